"""Claims: pairs of runs, effects with intervals, verdicts that can be wrong both ways, and what is refused."""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.claims import Result, assess, assess_all, from_scaling, judge, read_scaling
from lightning_align.lab.claims_file import Arm, Claim, read_claims
from lightning_align.lab.claims_measures import Measure, measure
from lightning_align.lab.claims_page import WIDTH, bar
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.grid import load_grid

KL = (0.0, 1.0, 4.0, 9.0)
SAMPLES = (0, 100, 200, 300)
Make = Callable[[str, Mapping[str, str], Sequence[float]], None]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A finished run of a pipeline at ``tmp_path``, with gold at KL 0, 1, 4 and 9."""

    def cell(stage: str, axes: Mapping[str, str], gold: Sequence[float]) -> None:
        name = f"{stage}/{','.join(f'{axis}={label}' for axis, label in axes.items())}" if axes else stage
        run = tmp_path / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"status": "finished"}))
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "episode", "eval/lab/kl", "eval/lab/gold", "eval/accuracy"])
            for step, (kl, score, drawn) in enumerate(zip(KL, gold, SAMPLES, strict=True)):
                writer.writerow([step, drawn, kl, score, score / 10])
        path = tmp_path / "pipeline.json"
        states = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(states | {name: {"stage": stage, "axes": dict(axes), "finished": True, "seconds": 1}})
        )

    return cell


def claim(kind: Measure, b: str | None = "b", **options: Any) -> Claim:
    return Claim("c", "a beats b", "nobody", kind, Arm("a"), Arm(b) if b else None, **options)


BEST = Measure("best_gold")


def test_runs_are_paired_by_what_the_claim_leaves_open(make: Make, tmp_path: Path) -> None:
    """The seeds' own levels leave the difference: 0.1, 0.2 and 0.3, whatever the level."""
    for seed, level in enumerate((0.0, 5.0, -3.0)):
        make("a", {"seed": str(seed)}, [level, level + 0.1 * (seed + 1), level, level])
        make("b", {"seed": str(seed)}, [level, level, level, level - 1])
    make("a", {"seed": "9"}, [100, 100, 100, 100])  # has no partner
    result = assess(claim(BEST), load_grid(tmp_path))
    wanted = student(np.array([0.1, 0.2, 0.3]))
    assert result.effect.value == pytest.approx(0.2)
    assert (result.effect.low, result.effect.high) == pytest.approx((wanted.low, wanted.high))
    assert result.effect.n == 3
    assert set(result.a) == {"seed=0", "seed=1", "seed=2"}
    assert len(result.runs) == 6
    assert result.verdict == "undecided"  # 0.2 ± 0.248


def test_labels_choose_the_runs_of_an_arm(make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        for size, gain in (("small", 0.0), ("large", 1.0)):
            make("a", {"size": size, "seed": str(seed)}, [0, gain + 0.01 * seed, 0, 0])
    large, small = Arm("a", {"size": "large"}), Arm("a", {"size": "small"})
    result = assess(Claim("c", "h", "s", BEST, large, small), load_grid(tmp_path))
    assert result.effect.value == pytest.approx(1.0)
    assert result.verdict == "supported"
    assert [str(run.name) for run in result.runs[:2]] == ["size=large,seed=0", "size=large,seed=1"]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Measure("best_gold"), 0.9),
        (Measure("last_gold"), 0.3),
        (Measure("gold_gain"), 0.2),
        (Measure("gold_change", place=4.0, until=9.0), -0.6),
        (Measure("gold_change", place=0.0, until=2.25), 0.6),
        (Measure("gold_at_kl", place=2.25), 0.7),  # half way between √1 and √4
        (Measure("gold_at_samples", place=150.0), 0.7),
        (Measure("kl_to_gold", place=0.7), 2.5),
        (Measure("samples_to_gold", place=0.3), 50.0),
        (Measure("samples_to_gold", place=0.1), 0.0),
        (Measure("metric", name="eval/accuracy"), 0.03),
        (Measure("metric", name="eval/accuracy", take="max"), 0.09),
        (Measure("metric", name="eval/accuracy", take="first"), 0.01),
        (Measure("metric", name="eval/accuracy", take="mean"), 0.045),
    ],
)
def test_measures(make: Make, tmp_path: Path, kind: Measure, wanted: float) -> None:
    make("a", {}, [0.1, 0.5, 0.9, 0.3])
    assert measure(tmp_path / "a", kind) == pytest.approx(wanted)


def test_what_a_run_did_not_reach_is_no_number_and_no_pair(make: Make, tmp_path: Path) -> None:
    make("a", {}, [0.1, 0.5, 0.9, 0.3])
    for kind in (Measure("gold_at_kl", place=10), Measure("kl_to_gold", place=2.0)):
        assert math.isnan(measure(tmp_path / "a", kind))
    for seed in range(3):
        make("b", {"seed": str(seed)}, [0, 1, 2 + (seed == 0), 0])
    result = assess(Claim("c", "h", "s", Measure("samples_to_gold", place=2.5), Arm("b")), load_grid(tmp_path))
    assert (result.effect.n, result.verdict) == (1, "undecided")
    assert result.reason.startswith("2 of 3 pairs lack samples after which")
    with pytest.raises(UserError, match="no column 'eval/speed'"):
        measure(tmp_path / "a", Measure("metric", name="eval/speed"))


def test_a_gain_holds_the_error_of_a_start_that_its_runs_share(make: Make, tmp_path: Path) -> None:
    """All three runs have one measurement of the start, that is wrong for all; against another arm it is none."""
    for stage, more in (("a", 0.0), ("b", 0.2)):
        for seed in range(3):
            make(stage, {"seed": str(seed)}, [0.5, 1, 1, 0.7 + more + 0.01 * seed])
            file = tmp_path / stage / f"seed={seed}" / "metrics.csv"
            head, *rows = file.read_text().splitlines()
            file.write_text("\n".join([f"{head},eval/lab/gold_se", *(f"{row},0.08" for row in rows)]) + "\n")
    gains = student(np.array([0.2, 0.21, 0.22]))
    alone = assess(claim(Measure("gold_gain"), b=None), load_grid(tmp_path))
    reach = math.hypot(gains.high - gains.value, 1.959964 * 0.08)
    assert (alone.effect.low, alone.effect.high) == pytest.approx((0.21 - reach, 0.21 + reach))
    between = assess(claim(Measure("gold_gain")), load_grid(tmp_path))
    assert between.effect.high - between.effect.low < 1e-9


def test_no_verdict_from_fewer_than_three_seeds(make: Make, tmp_path: Path) -> None:
    for seed in range(2):
        make("a", {"seed": str(seed)}, [0, 9 + 1e-3 * seed, 0, 0])
        make("b", {"seed": str(seed)}, [0, 1, 0, 0])
    result = assess(claim(BEST), load_grid(tmp_path))
    assert result.effect.low > 0
    assert (result.verdict, result.effect.n) == ("undecided", 2)
    missing = assess(claim(BEST, b="nothing"), load_grid(tmp_path))
    assert (missing.verdict, missing.reason) == ("undecided", "no finished run of nothing")


@pytest.mark.parametrize(
    ("ends", "expect", "margin", "verdict"),
    [
        ((0.1, 0.3), "more", 0.0, "supported"),
        ((0.1, 0.3), "less", 0.0, "contradicted"),
        ((-0.3, -0.1), "more", 0.0, "contradicted"),
        ((-0.3, -0.1), "less", 0.0, "supported"),
        ((-0.1, 0.3), "more", 0.0, "undecided"),
        ((-0.1, 0.3), "less", 0.0, "undecided"),
        ((-0.1, 0.15), "equal", 0.2, "supported"),
        ((0.01, 0.15), "equal", 0.2, "supported"),  # a difference, but a small one
        ((-0.1, 0.3), "equal", 0.2, "undecided"),
        ((0.25, 0.3), "equal", 0.2, "contradicted"),
        ((-0.3, -0.25), "equal", 0.2, "contradicted"),
        ((0.2, 0.8), "equal", 0.5, "undecided"),  # above 0, and perhaps within
        ((-0.8, -0.2), "equal", 0.5, "undecided"),
    ],
)
def test_verdicts(ends: tuple[float, float], expect: str, margin: float, verdict: str) -> None:
    low, high = ends
    assert judge(Estimate((low + high) / 2, low, high, 3), expect, margin)[0] == verdict


def test_verdicts_on_noise_are_rarely_anything_but_undecided() -> None:
    generator = np.random.default_rng(0)
    verdicts = [judge(student(row), "more", 0.0)[0] for row in generator.normal(size=(2000, 3))]
    assert 0.92 < verdicts.count("undecided") / 2000 < 0.98
    assert 0.01 < verdicts.count("supported") / 2000 < 0.04
    apart = [judge(student(row), "equal", 1.0)[0] for row in generator.normal(3.0, 1.0, size=(2000, 3))]
    assert apart.count("supported") == 0  # no difference shown is not equality


FILE = """
claims:
  - name: best
    hypothesis: a is better than b at its best.
    source: nobody 2020
    measure: best_gold
    a: a
    b: {stage: b, size: 3}
  - name: equal
    hypothesis: a is like b.
    source: nobody 2020
    measure: {gold_at_kl: 1.0}
    a: a
    b: b
    expect: equal
    margin: 0.2
  - {name: law, hypothesis: Larger is safer., source: Gao 2022, scaling: S1}
"""


def test_a_file_of_claims(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FILE)
    best, equal, law = read_claims(tmp_path / "c.yaml")
    assert best.b == Arm("b", {"size": "3"})
    assert (best.expect, best.margin, best.measure) == ("more", 0.0, Measure("best_gold"))
    assert (equal.expect, equal.margin, equal.measure) == ("equal", 0.2, Measure("gold_at_kl", place=1.0))
    assert law.scaling == "S1"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("    a: a\n    b: {", "    b: {", "field claims[0].a is missing"),
        ("measure: best_gold", "measure: best_proxy", "field claims[0].measure is 'best_proxy': give one of best_gold"),
        ("measure: best_gold", "measure: {gold_at_kl: far}", "field claims[0].measure.gold_at_kl is 'far'"),
        ("measure: best_gold", "measure: {metric: loss, take: some}", "field claims[0].measure needs a column"),
        (
            "measure: best_gold",
            "measure: {gold_change: [1]}",
            "field claims[0].measure.gold_change is [1]: give two KLs",
        ),
        ("expect: equal", "expect: same", "field claims[1].expect is 'same': give one of more, less, equal"),
        ("    margin: 0.2\n", "", "field claims[1].margin belongs to expect: equal"),
        ("margin: 0.2", "margin: -1", "field claims[1].margin is -1"),
        ("name: equal", "name: best", "field claims[1].name is 'best' again"),
        ("scaling: S1", "scaling: S9", "field claims[2].scaling is one of S1"),
        ("source: Gao 2022", "sauce: Gao 2022", "unknown field claims[2].sauce; did you mean 'source'"),
    ],
)
def test_mistakes_in_a_file_of_claims(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in FILE
    (tmp_path / "c.yaml").write_text(FILE.replace(before, after, 1))
    with pytest.raises(UserError, match=re.escape(message)):
        read_claims(tmp_path / "c.yaml")


def test_the_command_writes_what_it_says(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        make("a", {"seed": str(seed)}, [0, 1 + 0.01 * seed, 0, 0])
        make("b", {"seed": str(seed), "size": "3"}, [0, 0.5 + 0.01 * seed**2, 0, 0])
    law = {"claim": "S1", "estimate": 0.5, "ci": [0.2, 0.8], "n": 9, "verdict": "supported", "reason": "it rises"}
    (tmp_path / "scaling.json").write_text(json.dumps({"claims": [law]}))
    (tmp_path / "c.yaml").write_text(FILE)
    words = ["lab", "claims", str(tmp_path), "--claims", str(tmp_path / "c.yaml")]
    assert command(words) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 claims: 2 supported, 0 contradicted, 0 undecided; 1 not measured\n")
    content = json.loads((tmp_path / "claims.json").read_text())
    assert content["counts"] == {"supported": 2, "contradicted": 0, "undecided": 0, "not measured": 1}
    rows = content["claims"]
    assert [row["verdict"] for row in rows] == ["supported", "not measured", "supported"]
    assert "equal: not measured; 0 pairs of runs" in told
    assert rows[2]["effect"]["ci"] == [0.2, 0.8]
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "claims.json").read_bytes(), (tmp_path / "claims.png").read_bytes()
    assert command(words) == 0
    assert before == ((tmp_path / "claims.json").read_bytes(), (tmp_path / "claims.png").read_bytes())


def test_a_stage_that_is_near_is_named(make: Make, tmp_path: Path) -> None:
    make("dpo", {"seed": "0"}, [0, 1, 0, 0])
    for stage, told in (("dpp", "no finished run of dpp; did you mean 'dpo'?"), ("hir", "no finished run of hir")):
        result = assess(Claim("c", "h", "s", BEST, Arm(stage)), load_grid(tmp_path))
        assert (result.outcome, result.reason) == ("not measured", told)
    other = assess(Claim("c", "h", "s", BEST, Arm("dpo", {"size": "3"})), load_grid(tmp_path))
    assert other.reason == "no finished run of dpo size=3"  # the stage is there


def test_an_empty_file_of_claims_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# none yet\n")
    with pytest.raises(UserError, match=r"c.yaml is empty: give a list under claims: \(docs/claims.md\)"):
        read_claims(tmp_path / "c.yaml")


def test_a_folder_that_measured_a_law_counts_before_one_that_did_not(tmp_path: Path) -> None:
    law = {"claim": "S1", "estimate": 0.5, "ci": [0.2, 0.8], "n": 9, "verdict": "supported", "reason": "it rises"}
    none = law | {"estimate": None, "ci": [None, None], "n": 0, "verdict": "undecided", "reason": "needs several sizes"}
    for name, row in (("sweep", law), ("old", none)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scaling.json").write_text(json.dumps({"claims": [row]}))
    asked = Claim("law", "h", "s", Measure("metric"), Arm("lab scaling S1"), scaling="S1")
    for order in (("sweep", "old"), ("old", "sweep")):
        (result,) = assess_all([asked], [], [tmp_path / name for name in order])
        assert result.outcome == "supported"
    with pytest.raises(UserError, match=r"old/scaling.json has a number for none of the claims: run lab scaling on"):
        read_scaling(tmp_path / "old")
    (result,) = assess_all([asked], [], [tmp_path / "old"])
    assert (result.outcome, result.reason) == ("not measured", "needs several sizes")


def test_a_claim_of_the_laws_without_them_is_undecided() -> None:
    law = Claim("law", "h", "s", Measure("metric"), Arm("lab scaling S1"), scaling="S1")
    result = from_scaling(law, {})
    assert result.verdict == "undecided"
    assert "run lab scaling" in result.reason


def test_a_damaged_file_of_laws_is_one_line(tmp_path: Path) -> None:
    assert read_scaling(tmp_path) == {}
    for content in ("{", "[]", '{"claims": [{}]}'):
        (tmp_path / "scaling.json").write_text(content)
        with pytest.raises(UserError, match=r"scaling.json is damaged .*: run lab scaling again"):
            read_scaling(tmp_path)


def test_a_bar_stands_where_the_effect_is() -> None:
    """Zero in the middle, the interval about the dot, more to the right."""

    def drawn(value: float, low: float, high: float) -> tuple[float, list[float]]:
        result = Result(claim(BEST), {}, {}, Estimate(value, low, high, 3), "undecided", "", [])
        text = bar(result)
        (dot,) = re.findall(r'cx="([\d.]+)"', text)
        *_, ends = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', text)
        return float(dot), [float(end) for end in ends]

    middle = WIDTH / 2
    dot, (low, high) = drawn(0.2, -0.1, 0.5)
    assert low < middle < dot < high < WIDTH
    assert (dot - middle) / (high - middle) == pytest.approx(0.4, abs=0.01)
    assert (middle - low) / (high - middle) == pytest.approx(0.2, abs=0.01)
    dot, (low, high) = drawn(-2.0, -3.0, -1.0)
    assert low < dot < high < middle
    assert "circle" not in bar(Result(claim(BEST), {}, {}, student(np.array([])), "undecided", "", []))
