"""Scaling laws: known laws are found again, noise stays undecided, censored peaks are no numbers, files decide all."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.claims import judge
from lightning_align.lab.evaluation.intervals import student
from lightning_align.lab.overopt import FormFit
from lightning_align.lab.scaling import (
    Law,
    Measured,
    assess,
    fit_law,
    foretell_largest,
    ln_reward,
    loss_law,
    measure_of_gain,
    slopes,
)
from lightning_align.lab.scaling_runs import parameters, read_sweep
from lightning_align.run.logging import FileLogger

SIZES, DATA, SEEDS = (10_000, 100_000, 1_000_000), (100, 1_000, 10_000), 3
D = np.linspace(0.2, 4.0, 14)


def run(
    generator: np.random.Generator,
    seed: int,
    *,
    size: int = 1_000_000,
    comparisons: int = 10_000,
    policy: int = 500_000,
    alpha: float = 0.8,
    beta: float = 0.5,
    noise: float = 0.02,
    start: float = 0.5,
) -> Measured:
    gold = start + FormFit("rl", alpha, beta)(D) + generator.normal(0, noise, len(D))
    loss = 0.5 + (50 / comparisons) ** 0.4 - 0.02 * math.log(size) + generator.normal(0, 0.002)
    return Measured(size, comparisons, policy, str(seed), D, gold, start, loss)


def grid(
    generator: np.random.Generator, law: Callable[[float, float], tuple[float, float]], noise: float
) -> list[Measured]:
    """Sizes × data × seeds; each seed's law is off by as much as a point's noise."""
    runs = []
    for seed in range(SEEDS):
        off = generator.normal(0, noise)
        for size in SIZES:
            for data in DATA:
                alpha, beta = law(math.log(size / SIZES[0]), math.log(data / DATA[0]))
                options = {"size": size, "comparisons": data, "noise": noise}
                runs.append(run(generator, seed, alpha=alpha + off, beta=beta, **options))  # type: ignore[arg-type]
    return runs


def known(n: float, d: float) -> tuple[float, float]:
    """Peaks move out with size, and the more the more data there are."""
    return 0.5 + 0.02 * n * d / 4, 0.4


def flat(n: float, d: float) -> tuple[float, float]:
    return 0.6, 0.4


def test_known_slopes_lie_in_their_intervals() -> None:
    """SCL-1: d* = exp(α/β − 1) with α linear in ln N."""
    generator = np.random.default_rng(0)
    covered = right = 0
    for _ in range(60):
        law = lambda n, d: (0.5 + 0.02 * n, 0.4)  # noqa: E731
        laws, findings = assess(grid(generator, law, 0.01))
        assert all(one.censored is None for one in laws)
        by_size = [math.exp(law(math.log(size / SIZES[0]), 0)[0] / 0.4 - 1) for size in SIZES]
        x = np.log(SIZES) - np.log(SIZES).mean()
        truth = float(x @ by_size / (x @ x))
        first = findings[0]
        assert first.claim == "S1"
        covered += first.estimate.low <= truth <= first.estimate.high
        right += first.verdict == "supported"
    assert covered >= 54
    assert right >= 54


def test_right_verdicts_on_a_grid_with_known_laws() -> None:
    """SCL-1: size helps the more the more data there are; below the threshold it does not."""
    generator = np.random.default_rng(1)
    right = {"S1": 0, "S2": 0, "S5": 0}
    for _ in range(20):
        _, findings = assess(grid(generator, known, 0.005))
        for finding in findings:
            if finding.claim in right:
                right[finding.claim] += finding.verdict == "supported"
    assert all(count >= 18 for count in right.values()), right


def test_pure_noise_is_undecided() -> None:
    """SCL-2."""
    generator = np.random.default_rng(2)
    verdicts: dict[str, list[str]] = {}
    for _ in range(60):
        runs = grid(generator, flat, 0.05)
        runs = [Measured(**{**one.__dict__, "reward_loss": float(generator.normal())}) for one in runs]
        for finding in assess(runs)[1]:
            verdicts.setdefault(finding.claim, []).append(finding.verdict)
    for claim, found in verdicts.items():
        assert found.count("undecided") >= 54, (claim, found)


def test_policies_of_several_sizes() -> None:
    generator = np.random.default_rng(3)
    runs = []
    for seed in range(SEEDS):
        for index, policy in enumerate(SIZES):
            alpha = 0.9 - 0.15 * index  # larger ones gain less, from a higher start, and peak at the same KL
            beta = alpha / (1 + math.log(1.7))
            runs.append(run(generator, seed, policy=policy, alpha=alpha, beta=beta, start=0.2 * index, noise=0.005))
    found = {finding.claim: finding for finding in assess(runs)[1]}
    assert found["S3"].verdict == "supported"
    assert found["S3"].details["slope_of_start"]["value"] == pytest.approx(0.2 / math.log(10))
    assert found["S4"].verdict == "supported"
    apart = [
        Measured(
            **{**one.__dict__, "gold": one.start + FormFit("rl", 0.5 + 0.2 * (one.policy_parameters > 1e5), 0.4)(D)}
        )
        for one in runs
    ]
    assert {finding.claim: finding for finding in assess(apart)[1]}["S4"].verdict == "contradicted"


def test_censored_peaks_never_enter_as_numbers() -> None:
    """SCL-3: beyond the farthest point, before the first, and no peak at all."""
    generator = np.random.default_rng(4)
    cases = {
        "beyond the farthest checkpoint": (1.5, 0.4),
        "before the first checkpoint": (-0.5, 0.2),
        "no peak: β ≤ 0": (0.3, -0.2),
    }
    for reason, (alpha, beta) in cases.items():
        law = fit_law(run(generator, 0, alpha=alpha, beta=beta, noise=0.0))
        assert law is not None
        assert law.censored == reason
        assert math.isnan(law.peak_d)
        assert math.isnan(law.peak_gain)
    rising = grid(generator, lambda n, d: (0.9 + 0.1 * n, 0.3), 0.01)
    laws, findings = assess(rising)
    assert any(law.censored for law in laws)
    assert "slope of R at KL 16.0 on ln N" in findings[0].reason
    assert "peaks censored" in findings[0].reason
    gain, told = measure_of_gain(laws)
    assert told == "R at KL 16.0"
    assert all(math.isfinite(gain(law)) for law in laws)
    assert findings[0].verdict == "supported"


def test_slopes_within_groups_are_those_of_least_squares() -> None:
    generator = np.random.default_rng(5)
    laws = [law for law in map(fit_law, grid(generator, known, 0.01)) if law is not None]
    values = {id(law): generator.normal() for law in laws}
    found = slopes(laws, ln_reward, lambda law: values[id(law)], lambda law: law.measured.comparisons)
    for seed, slope in enumerate(found):
        own = [law for law in laws if law.measured.seed == str(seed)]
        dummies = np.array([[law.measured.comparisons == data for data in DATA] for law in own], dtype=float)
        basis = np.column_stack([[ln_reward(law) for law in own], dummies])
        wanted = np.linalg.lstsq(basis, np.array([values[id(law)] for law in own]), rcond=None)[0][0]
        assert slope == pytest.approx(wanted)


def test_few_runs_say_nothing() -> None:
    generator = np.random.default_rng(6)
    one_seed = [one for one in grid(generator, known, 0.01) if one.seed == "0"]
    assert {finding.verdict for finding in assess(one_seed)[1]} == {"undecided"}
    assert {finding.verdict for finding in assess([run(generator, 0)])[1]} == {"undecided"}
    short = Measured(1, 1, 1, "0", D[:3], D[:3], 0.0)
    assert fit_law(short) is None
    laws, findings = assess([short])
    assert laws == []
    assert {finding.verdict for finding in findings} == {"undecided"}
    assert judge(student(np.array([])), "more", 0.0)[0] == "undecided"


def test_the_largest_is_foretold_where_the_law_holds() -> None:
    generator = np.random.default_rng(7)
    laws: list[Law] = [law for law in map(fit_law, grid(generator, lambda n, d: (0.4 + 0.05 * n, 0.4), 0.001)) if law]
    found = foretell_largest(laws)
    assert found is not None
    assert found["law"] < 0.1 * found["as_the_next_smaller"] < found["no_gain"]
    assert foretell_largest([law for law in laws if law.measured.reward_parameters < 1e6]) is None


def test_the_law_of_the_loss() -> None:
    generator = np.random.default_rng(8)
    runs = [run(generator, seed, comparisons=data, noise=0.0) for seed in range(3) for data in (100, 300, 1000, 10_000)]
    found = loss_law([law for law in map(fit_law, runs) if law is not None])
    assert found is not None
    assert found["power"] == pytest.approx(0.4, abs=0.1)
    assert found["rmse"] < 0.01


# ---------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Reward models of two sizes and PPO against each, two seeds, as the trainer writes them."""
    folder, states = tmp_path / "runs" / "sweep", {}

    def model(run: Path, width: int) -> None:
        (run / "model").mkdir(parents=True)
        tensors = {"embed_tokens.weight": torch.zeros(50, width), "layers.0.w": torch.zeros(width, width)}
        save_file(tensors, run / "model" / "model.safetensors")

    def finish(run: Path, name: str, **facts: object) -> None:
        (run / "run.json").write_text(json.dumps({"status": "finished", **facts}))
        stage, _, axes = name.partition("/")
        labels = dict(word.split("=") for word in axes.split(",")) if axes else {}
        states[name] = {"stage": stage, "axes": labels, "finished": True, "seconds": 1.0}

    model(folder / "sft", 8)
    finish(folder / "sft", "sft")
    for seed in range(2):
        for width in (4, 16):
            name = f"reward/seed={seed},size={width}"
            model(folder / name, width)
            FileLogger(folder / name).log_metrics({"eval/loss": 1.0 / width, "eval/accuracy": 0.7}, step=5)
            finish(folder / name, name, data={"kind": "preference", "kept": 100})
            ppo = f"ppo/seed={seed},size={width}"
            logger = FileLogger(folder / ppo)
            for step, d in enumerate([0.0, *D.tolist()]):
                gold = 0.5 + float(FormFit("rl", 0.5, 0.4)(np.array(d))) if d else 0.5
                logger.log_metrics({"eval/lab/kl": d * d, "eval/lab/proxy": d, "eval/lab/gold": gold}, step=step)
            parents = [
                {"option": "model.init_args.reward", "run": f"runs/sweep/{name}"},
                {"option": "model.init_args.model", "run": "runs/sweep/sft"},
            ]
            finish(folder / ppo, ppo, parents=parents)
    (folder / "pipeline.json").write_text(json.dumps(states))
    return folder


def test_a_sweep_is_read_from_its_runs(sweep: Path, tmp_path: Path) -> None:
    runs, left_out = read_sweep(sweep)  # from another folder than it was trained in
    assert left_out == []
    assert {(one.reward_parameters, one.seed) for one in runs} == {(16, "0"), (256, "0"), (16, "1"), (256, "1")}
    assert all((one.comparisons, one.policy_parameters, one.start, len(one.d)) == (100, 64, 0.5, 14) for one in runs)
    assert {one.reward_loss for one in runs} == {0.25, 0.0625}
    shutil.rmtree(sweep / "reward" / "seed=0,size=4" / "model")
    runs, left_out = read_sweep(sweep)
    assert len(runs) == 3
    assert "has no weights in safetensors files" in left_out[0]


def test_the_command_is_a_function_of_the_files(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SCL-4."""
    assert command(["lab", "scaling", str(sweep)]) == 0
    assert capsys.readouterr().out.startswith("4 runs, 0 with a censored peak\n")
    names = ["scaling.json", "scaling.csv", "scaling_rewards.png", "scaling_gain.png"]
    before = [(sweep / name).read_bytes() for name in names]
    assert command(["lab", "scaling", str(sweep)]) == 0
    assert before == [(sweep / name).read_bytes() for name in names]
    content = json.loads(before[0])
    assert [row["claim"] for row in content["claims"]] == ["S1", "S2", "S3", "S4", "S5"]
    assert all({"estimate", "ci", "n", "verdict", "reason", "runs"} <= set(row) for row in content["claims"])
    assert {row["verdict"] for row in content["claims"]} == {"undecided"}  # two seeds


def test_another_trainers_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(9)
    path = tmp_path / "sweep.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reward_parameters", "comparisons", "policy_parameters", "seed", "step", "kl", "gold"])
        for one in grid(generator, known, 0.005):
            rows = [(0.0, one.start), *zip(one.d.tolist(), one.gold.tolist(), strict=True), (9.0, math.nan)]
            for step, (d, gold) in enumerate(rows):
                sizes = (one.reward_parameters, one.comparisons, one.policy_parameters, one.seed)
                writer.writerow([*sizes, step, d * d, gold])
    assert command(["lab", "scaling", str(path)]) == 0
    told = capsys.readouterr().out
    assert "27 runs" in told
    assert "S1 larger reward models allow larger updates before gold falls: supported" in told


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("seed,step,kl,gold\n")
    with pytest.raises(UserError, match="has no column 'reward_parameters'"):
        read_sweep(path)
    head = "reward_parameters,comparisons,policy_parameters,seed,step,kl,gold\n"
    path.write_text(head + "1.5,1,1,0,0,0,0\n")
    with pytest.raises(UserError, match=r"s.csv line 2: sizes and comparisons are whole numbers above 0"):
        read_sweep(path)
    path.write_text(head + "1,1,1,0,0,1,0\n")
    with pytest.raises(UserError, match=r"has no run that takes part: .* has no true score at the start"):
        read_sweep(path)
    with pytest.raises(UserError, match="its size is not known"):
        parameters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{bad}")
    with pytest.raises(UserError, match="cannot be read"):
        parameters(tmp_path)
