"""Scaling laws: known laws are found again, noise stays undecided, censored peaks are no numbers, files decide all."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.analysis import start_points
from lightning_align.lab.claims import judge
from lightning_align.lab.evaluation.intervals import student
from lightning_align.lab.overopt import FormFit
from lightning_align.lab.runs import load_curve
from lightning_align.lab.scaling import (
    Law,
    Measured,
    fit_law,
    fit_laws,
    lines,
    ln_reward,
    measure_of_gain,
    missing_cells,
    policy_sweep,
    reward_sweep,
)
from lightning_align.lab.scaling_claims import Finding, assess, page
from lightning_align.lab.scaling_laws import coefficient_laws, foretell_largest, joint_law, loss_law
from lightning_align.lab.scaling_runs import parameters, read_sweep
from lightning_align.playground import annotator_agreement
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


def judged(runs: Sequence[Measured]) -> dict[str, Finding]:
    return {finding.claim: finding for finding in assess(fit_laws(runs))}


def known(n: float, d: float) -> tuple[float, float]:
    """Peaks move out with size, and the more the more data there are."""
    return 0.5 + 0.02 * n * d / 4, 0.4


def flat(n: float, d: float) -> tuple[float, float]:
    return 0.6, 0.4


def test_known_slopes_lie_in_their_intervals() -> None:
    """SCL-1: d* = exp(α/β − 1) with α linear in ln N."""
    generator = np.random.default_rng(0)
    covered = {"S1": 0, "a0": 0, "a1": 0, "b1": 0, "joint a1": 0, "joint b1": 0}
    right = 0
    by_size = [math.exp((0.5 + 0.02 * math.log(size / SIZES[0])) / 0.4 - 1) for size in SIZES]
    x = np.log(SIZES) - np.log(SIZES).mean()
    truth = {"S1": float(x @ by_size / (x @ x)), "a0": 0.5 - 0.02 * math.log(SIZES[0]), "a1": 0.02, "b1": 0.0}
    for _ in range(60):
        laws = fit_laws(grid(generator, lambda n, d: (0.5 + 0.02 * n, 0.4), 0.01))
        assert all(one.censored is None for one in laws)
        first, joint = assess(laws)[0], joint_law(laws)
        assert first.claim == "S1"
        assert joint is not None
        found = {"S1": first.estimate.as_dict(), **coefficient_laws(laws)}
        found |= {f"joint {name}": joint[name] for name in ("a1", "b1")}
        for name in covered:
            low, high = found[name]["ci"]
            covered[name] += low <= truth[name.removeprefix("joint ")] <= high
        right += first.verdict == "supported"
    assert all(count >= 54 for count in covered.values()), covered
    assert right >= 54


def test_right_verdicts_on_a_grid_with_known_laws() -> None:
    """SCL-1: size helps the more the more data there are; below the threshold it does not."""
    generator = np.random.default_rng(1)
    right = {"S1": 0, "S2": 0, "S5": 0}
    for _ in range(20):
        found = judged(grid(generator, known, 0.005))
        for claim in right:
            right[claim] += found[claim].verdict == "supported"
    assert all(count >= 18 for count in right.values()), right


def test_pure_noise_is_undecided() -> None:
    """SCL-2."""
    generator = np.random.default_rng(2)
    verdicts: dict[str, list[str]] = {}
    for _ in range(60):
        runs = grid(generator, flat, 0.05)
        runs = [replace(one, reward_loss=float(generator.normal())) for one in runs]
        found = judged(runs)
        nothing = [
            run(generator, seed, policy=policy, alpha=0.0, beta=0.0, noise=0.1)
            for seed in range(SEEDS)
            for policy in SIZES
        ]
        found |= {claim: judged(nothing)[claim] for claim in ("S3", "S4")}
        for claim, finding in found.items():
            verdicts.setdefault(claim, []).append(finding.verdict)
    for claim, given in verdicts.items():
        assert given.count("undecided") >= 54, (claim, given)


def test_policies_of_several_sizes() -> None:
    generator = np.random.default_rng(3)
    runs = []
    for seed in range(SEEDS):
        for index, policy in enumerate(SIZES):
            alpha = 0.9 - 0.15 * index  # larger ones gain less, from a higher start, and peak at the same KL
            beta = alpha / (1 + math.log(1.7))
            start = 0.2 * index + generator.normal(0, 0.01)
            made = run(generator, seed, policy=policy, alpha=alpha, beta=beta, start=0.2 * index, noise=0.005)
            runs.append(replace(made, start=start))
    found = judged(runs)
    assert found["S3"].verdict == "supported"
    start = found["S3"].details["slope_of_start"]
    assert start["value"] == pytest.approx(0.2 / math.log(10), abs=0.01)
    assert start["se"] > 0.0005  # of what each run measured, not of the mean that all of them share
    assert found["S4"].verdict == "supported"
    level = [replace(one, gold=one.gold - one.start + 1.0, start=1.0 + 1e-3 * int(one.seed)) for one in runs]
    assert judged(level)["S3"].verdict == "undecided"  # gains less, but starts no higher
    for odd in SIZES:  # one size that differs, the middle one too, is enough
        apart = [
            replace(one, gold=one.start + FormFit("rl", 0.5 + 0.25 * (one.policy_parameters == odd), 0.4)(D))
            for one in runs
        ]
        assert judged(apart)["S4"].verdict == "contradicted"
    seeds = [replace(one, seed=str(int(one.seed) + 3 * copy)) for copy in range(2) for one in runs]
    assert judged(seeds)["S4"].verdict == "supported"
    seeds[0] = replace(seeds[0], gold=seeds[0].start + 0.1 * D**2)
    assert judged(seeds)["S4"].verdict == "undecided"  # five pairs are alike, and the sixth has no peak in sight


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
    laws = fit_laws(rising)
    findings = assess(laws)
    assert any(law.censored for law in laws)
    assert "slope of R at KL 16.0 on ln N" in findings[0].reason
    assert "peaks censored" in findings[0].reason
    gain, told = measure_of_gain(laws)
    assert told == "R at KL 16.0"
    assert [gain(law) for law in laws] == pytest.approx([float(law.fit(4.0)) for law in laws])
    short = replace(rising[0], d=D[:8], gold=rising[0].gold[:8])
    assert measure_of_gain(fit_laws([short, *rising[1:]]))[1] == f"R at KL {D[7] ** 2:.1f}"  # reached by all
    assert findings[0].verdict == "supported"


def test_points_count_by_their_errors() -> None:
    """Of points three of four of which are wild, β is found again as weighted least squares finds it."""
    generator = np.random.default_rng(15)
    errors = np.where(np.arange(len(D)) % 4 == 0, 0.02, 0.5)
    one = run(generator, 0, noise=0.0)
    off, plain = [], []
    for _ in range(50):
        wild = replace(one, gold=one.gold + errors * generator.normal(size=len(D)), gold_se=errors)
        for told, found in ((wild, off), (replace(wild, gold_se=np.full(len(D), math.nan)), plain)):
            law = fit_law(told)
            assert law is not None
            found.append(law.fit.beta - 0.5)
    basis = np.stack([D, -D * np.log(D)], axis=1) / errors[:, None]
    assert np.std(off) == pytest.approx(math.sqrt(np.linalg.inv(basis.T @ basis)[1, 1]), rel=0.3)
    assert np.std(plain) > 5 * np.std(off)


def test_a_noisy_rise_has_no_peak() -> None:
    """A straight line bends down by chance; what is not told from straight is no peak, whoever bent it."""
    generator = np.random.default_rng(16)
    straight = [run(generator, 0, alpha=0.05, beta=0.0, noise=0.1) for _ in range(200)]
    laws = [law for law in map(fit_law, straight) if law is not None]
    bends = [law for law in laws if law.fit.peak_d is not None and D[0] < law.fit.peak_d < D[-1]]
    assert len(bends) >= 15
    assert sum(law.censored is None for law in laws) <= 6
    assert any(law.censored == "no peak: the interval of β reaches 0" for law in bends)
    level = run(generator, 0, alpha=0.1, beta=0.05, noise=0.0)
    sure, unsure = fit_law(level), fit_law(replace(level, start_se=0.1))
    assert sure is not None
    assert unsure is not None
    assert (sure.censored, unsure.censored) == (None, "no peak: the interval of β reaches 0")


def test_slopes_within_groups_are_those_of_least_squares() -> None:
    generator = np.random.default_rng(5)
    laws = fit_laws(grid(generator, known, 0.01))
    values = {id(law): generator.normal() for law in laws}
    found = lines(laws, ln_reward, lambda law: values[id(law)], lambda law: law.measured.comparisons)
    for seed, (intercept, slope) in enumerate(found):
        own = [law for law in laws if law.measured.seed == str(seed)]
        dummies = np.array([[law.measured.comparisons == data for data in DATA] for law in own], dtype=float)
        basis = np.column_stack([[ln_reward(law) for law in own], dummies])
        wanted = np.linalg.lstsq(basis, np.array([values[id(law)] for law in own]), rcond=None)[0]
        assert slope == pytest.approx(wanted[0])
        assert intercept == pytest.approx(wanted[1:].mean())


def test_starts_are_averaged_over_the_runs_of_a_policy_size() -> None:
    """What a run's own start was off by does not enter its law, nor does another policy's start."""
    exact = [run(np.random.default_rng(10), seed, noise=0.0) for seed in range(3)]
    off = [replace(one, start=one.start + error) for one, error in zip(exact, (-0.1, 0.0, 0.1), strict=True)]
    other = replace(exact[0], policy_parameters=1_000, gold=exact[0].gold + 1.0, start=1.5)
    laws = fit_laws([*off, other])
    assert [law.start for law in laws] == pytest.approx([0.5, 0.5, 0.5, 1.5])
    assert [law.fit.alpha for law in laws] == pytest.approx([0.8] * 4)
    shared = [replace(one, start=1.0) for one in off]  # measured once for all of them: one measurement beside another
    assert fit_laws([*shared, replace(exact[0], start=0.0, seed="3")])[0].start == pytest.approx(0.5)


def test_size_that_helps_below_the_threshold_speaks_against_it() -> None:
    generator = np.random.default_rng(14)
    finding = judged(grid(generator, lambda n, d: (0.4 + 0.03 * n + 0.005 * n * d, 0.4), 0.001))["S2"]
    assert finding.details["threshold"] == 1_000
    assert finding.estimate.low > 0
    assert finding.verdict == "contradicted"
    assert "size helps at 100 comparisons, below the threshold of 1000" in finding.reason


def test_a_trend_over_sizes() -> None:
    """Page's test: three seeds in the expected order have one chance in 6³."""
    laws = fit_laws([run(np.random.default_rng(5), seed, size=size) for seed in range(3) for size in SIZES])
    assert page(laws, ln_reward) == pytest.approx(1 / 216)
    assert page(laws, lambda law: -ln_reward(law)) == pytest.approx(1.0)
    assert page(laws[1:], ln_reward) == pytest.approx(1 / 36)  # a seed that lacks a size is no block
    assert math.isnan(page([law for law in laws if law.measured.reward_parameters > 1e4], ln_reward))


def test_sweeps_are_kept_apart() -> None:
    """Runs of other policies, which learn otherwise, do not enter the laws of the reward model's size."""
    generator = np.random.default_rng(11)
    runs = grid(generator, known, 0.005)
    others = [run(generator, seed, policy=policy, alpha=0.1) for seed in range(SEEDS) for policy in (1_000, 50_000)]
    laws = fit_laws(runs + others)
    assert [law.measured for law in reward_sweep(laws)] == runs
    assert {law.measured.policy_parameters for law in policy_sweep(laws)} == {1_000, 50_000, 500_000}
    assert len(policy_sweep(laws)) == 9
    alone, together = judged(runs), judged(runs + others)
    assert [alone[claim].estimate for claim in ("S1", "S2", "S5")] == [
        together[claim].estimate for claim in ("S1", "S2", "S5")
    ]


def test_missing_cells_bias_nothing() -> None:
    """Of a seed that lacks a size with much data, the gain over few data is that of the sizes which are left."""
    exact = grid(np.random.default_rng(12), lambda n, d: (0.5 + 0.05 * n + 0.02 * d, 0.4), 0.0)
    gone = [
        one for one in exact if not (one.seed == "1" and one.reward_parameters == 10_000 and one.comparisons == 10_000)
    ]
    assert missing_cells(fit_laws(exact)) == []
    assert missing_cells(fit_laws(gone)) == ["reward model of 10,000, 10,000 comparisons, seed 1"]
    whole, found = (judged(runs)["S2"].details["gain_over_fewest"]["10000"] for runs in (exact, gone))
    assert found["n"] == 3
    gain, _ = measure_of_gain(fit_laws(exact))
    at = {(law.measured.reward_parameters, law.measured.comparisons): gain(law) for law in fit_laws(exact)}
    left = np.mean([at[size, 10_000] - at[size, 100] for size in SIZES[1:]])
    assert found["value"] == pytest.approx((2 * whole["value"] + left) / 3)
    assert {finding.verdict for finding in judged([one for one in gone if one.seed != "2"]).values()} == {"undecided"}


def test_few_runs_say_nothing() -> None:
    generator = np.random.default_rng(6)
    one_seed = [one for one in grid(generator, known, 0.01) if one.seed == "0"]
    assert {finding.verdict for finding in judged(one_seed).values()} == {"undecided"}
    assert {finding.verdict for finding in judged([run(generator, 0)]).values()} == {"undecided"}
    short = Measured(1, 1, 1, "0", D[:3], D[:3], 0.0)
    assert fit_law(short) is None
    assert fit_laws([short]) == missing_cells([]) == []
    assert {finding.verdict for finding in judged([short]).values()} == {"undecided"}
    assert judge(student(np.array([])), "more", 0.0)[0] == "undecided"


def test_the_largest_is_foretold_where_the_law_holds() -> None:
    generator = np.random.default_rng(7)
    laws: list[Law] = fit_laws(grid(generator, lambda n, d: (0.4 + 0.05 * n, 0.4), 0.001))
    found = foretell_largest(laws)
    assert found is not None
    assert found["law"] < 0.1 * found["as_the_next_smaller"] < found["no_gain"]
    assert found["d_peak"]["foretold"] == pytest.approx(math.exp((0.4 + 0.05 * math.log(100)) / 0.4 - 1), rel=0.02)
    assert found["R_peak"]["found"] == pytest.approx(found["R_peak"]["foretold"], rel=0.02)
    assert foretell_largest([law for law in laws if law.measured.reward_parameters < 1e6]) is None


def test_the_law_of_the_loss() -> None:
    generator = np.random.default_rng(8)
    runs = [run(generator, seed, comparisons=data, noise=0.0) for seed in range(3) for data in (100, 300, 1000, 10_000)]
    found = loss_law(fit_laws(runs))
    assert found is not None
    assert found["power"] == pytest.approx(0.4, abs=0.1)
    assert found["rmse"] < 0.01
    bounded = loss_law(fit_laws([replace(one, label_entropy=0.3) for one in runs]))
    assert bounded is not None
    assert bounded["floor"] >= 0.3 > found["floor"]
    assert loss_law(fit_laws([one for one in runs if one.comparisons < 1000])) is None


def test_weights_of_the_joint_law() -> None:
    """A point that is told to be wild counts little."""
    runs = grid(np.random.default_rng(13), known, 0.0)
    exact = joint_law(fit_laws(runs))
    errors = np.full(len(D), 0.01)
    errors[-1] = 100.0
    wild = [
        replace(one, gold=one.gold + np.where(errors > 1, 3e-6 * one.reward_parameters, 0.0), gold_se=errors)
        for one in runs
    ]
    weighted = joint_law(fit_laws(wild))
    assert exact is not None
    assert weighted is not None
    assert exact["a1"]["value"] == pytest.approx(0.02 * math.log(100) / 4)
    assert weighted["a1"]["value"] == pytest.approx(exact["a1"]["value"], abs=1e-4)
    assert weighted["rmse"] > 0.4


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
            logger = FileLogger(folder / name)
            logger.log_metrics({"eval/loss": 2.0, "eval/accuracy": 0.5}, step=1)
            logger.log_metrics({"eval/loss": 1.0 / width, "eval/accuracy": 0.7}, step=5)
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
    assert {one.reward_accuracy for one in runs} == {0.7}
    assert {one.seconds for one in runs} == {1.0}
    shutil.rmtree(sweep / "reward" / "seed=0,size=4" / "model")
    runs, left_out = read_sweep(sweep)
    assert len(runs) == 3
    assert "has no weights in safetensors files" in left_out[0]


def test_what_cannot_take_part_is_told(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model that is gone, a run without a true score, one that is too short: each with its reason."""
    shutil.rmtree(sweep / "reward" / "seed=0,size=4")
    (sweep / "ppo" / "seed=0,size=16" / "metrics.csv").write_text("step,eval/lab/kl,eval/lab/proxy\n0,0,1\n1,1,2\n")
    table = (sweep / "ppo" / "seed=1,size=4" / "metrics.csv").read_text().splitlines()
    (sweep / "ppo" / "seed=1,size=4" / "metrics.csv").write_text("\n".join(table[:5]))
    assert command(["lab", "scaling", str(sweep)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("1 run, 0 with a censored peak\n")
    assert "its reward model's run is gone: " in told
    assert "seed=0,size=16 has no true score at the start" in told
    assert "seed=1,size=4 has a true score at 3 distances from the start, and a law needs 4" in told
    assert len(json.loads((sweep / "scaling.json").read_text())["left_out"]) == 3
    assert not list(sweep.glob("*.png"))  # one run is no sweep
    (sweep / "ppo" / "seed=1,size=16" / "metrics.csv").write_text("\n".join(table[:2]))  # evaluated at the start alone
    assert command(["lab", "scaling", str(sweep)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("0 runs, 0 with a censored peak\n")
    assert "seed=1,size=16 has a true score at 0 distances" in told
    assert told.count(": undecided (not measured)") == 5


def test_a_start_with_a_kl_below_zero_is_one(sweep: Path) -> None:
    """An estimate of the KL may be slightly negative; the start is that of ``lab overopt``, the mean of its points."""
    file = sweep / "ppo" / "seed=0,size=4" / "metrics.csv"
    head, first, *rest = file.read_text().splitlines()
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    told = [dict(cells, **{"step": str(step), "eval/lab/kl": kl, "eval/lab/gold": gold}) for step, kl, gold in
            ((-2, "-0.0001", "0.3"), (-1, "0.0001", "0.4"))]  # fmt: skip
    file.write_text("\n".join([head, *(",".join(row.values()) for row in told), *rest]) + "\n")
    runs, left_out = read_sweep(sweep)
    assert left_out == []
    assert {(one.seed, one.reward_parameters): one.start for one in runs}["0", 16] == pytest.approx(0.35)
    file.write_text("\n".join([head, *(",".join(row.values()) for row in told[:1]), *rest]) + "\n")
    assert read_sweep(sweep)[1] == []
    (point,) = start_points(load_curve(file.parent).points)
    assert point.gold == 0.3


def test_a_sweep_without_reward_models_says_what_it_lacks(sweep: Path) -> None:
    for place in sweep.glob("ppo/*/run.json"):
        content = json.loads(place.read_text())
        place.write_text(json.dumps(content | {"parents": content["parents"][1:]}))
    wanted = r"has no run that takes part: .*size=4 did not train against a reward model's run"
    with pytest.raises(UserError, match=wanted):
        read_sweep(sweep)
    for place in sweep.glob("ppo/*/metrics.csv"):
        place.unlink()
    with pytest.raises(UserError, match="none of its 9 finished runs trained against a reward model's run"):
        read_sweep(sweep)


def test_a_pipeline_without_axes_is_refused(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = json.loads((sweep / "pipeline.json").read_text())
    (sweep / "pipeline.json").write_text(json.dumps({name: state | {"axes": {}} for name, state in states.items()}))
    assert command(["lab", "scaling", str(sweep)]) == 2
    assert f"{sweep} is of a pipeline without axes: laws of scaling take sizes and" in capsys.readouterr().err
    assert not (sweep / "scaling.json").exists()


def test_comparisons_and_label_entropy_are_those_of_the_reward_models_data(sweep: Path) -> None:
    reward = sweep / "reward" / "seed=0,size=4"
    data = {"kind": "ranked", "kept": 100, "notes": {"pairs": 570}}  # of 95 rankings, five being held out
    (reward / "run.json").write_text(json.dumps({"status": "finished", "data": data}))
    options = {"size": 100, "temperature": 1.6}
    content = {"data": {"init_args": {"path": "playground", "val_path": None, "playground": options}}}
    (reward / "config.yaml").write_text(json.dumps(content))
    runs, _ = read_sweep(sweep)
    found = {(one.reward_parameters, one.seed): one for one in runs}
    assert found[16, "0"].comparisons == 570
    assert found[16, "0"].label_entropy == annotator_agreement(temperature=1.6).entropy
    assert {(one.comparisons, one.label_entropy) for key, one in found.items() if key != (16, "0")} == {(100, 0.0)}
    (reward / "run.json").write_text(json.dumps({"status": "finished", "data": {"kind": "prompt", "kept": 100}}))
    assert "does not say how many comparisons" in read_sweep(sweep)[1][0]


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
        columns = ["reward_parameters", "comparisons", "policy_parameters", "seed", "step", "kl", "gold"]
        writer.writerow([*columns, "reward_loss"])
        policies = [run(generator, seed, policy=size) for seed in range(SEEDS) for size in (1_000, 50_000)]
        for one in [*grid(generator, known, 0.005), *policies]:
            rows = [(0.0, one.start), *zip(one.d.tolist(), one.gold.tolist(), strict=True), (9.0, math.nan)]
            for step, (d, gold) in enumerate(rows):
                sizes = (one.reward_parameters, one.comparisons, one.policy_parameters, one.seed)
                writer.writerow([*sizes, step, d * d, gold, one.reward_loss])
    assert command(["lab", "scaling", str(path)]) == 0
    told = capsys.readouterr().out
    assert "33 runs" in told
    for claim in ("S1 larger reward", "S2 below", "S5 a reward"):
        assert any(line.strip().startswith(claim) and ": supported (" in line for line in told.splitlines())
    pictures = ["scaling_gain.png", "scaling_loss.png", "scaling_policies.png", "scaling_rewards.png"]
    assert sorted(each.name for each in tmp_path.glob("*.png")) == pictures


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("seed,step,kl,gold\n")
    with pytest.raises(UserError, match="has no column 'reward_parameters'"):
        read_sweep(path)
    head = "reward_parameters,comparisons,policy_parameters,seed,step,kl,gold\n"
    for sizes, told in (
        ("1.5,1,1", "'1.5' in column 'reward_parameters'"),
        ("1,1,", "'' in column 'policy_parameters'"),
    ):
        path.write_text(head + f"{sizes},0,0,0,0\n")
        with pytest.raises(UserError, match=rf"s.csv line 2: {told} is not a whole number above 0"):
            read_sweep(path)
    path.write_text(head + "1,1,1,0,0,1,0\n")
    with pytest.raises(UserError, match=r"has no run that takes part: .* has no true score at the start"):
        read_sweep(path)
    with pytest.raises(UserError, match="its size is not known"):
        parameters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{bad}")
    with pytest.raises(UserError, match="cannot be read"):
        parameters(tmp_path)
