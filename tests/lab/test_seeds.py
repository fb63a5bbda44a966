"""Several runs of one method: a known law is found over them, and its interval speaks of the runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.regret import read_peaks
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.seeds import analyse_seeds, headline, sentences

D = np.linspace(0.0, 5.0, 20)
Law = Callable[..., np.ndarray]


def curve(
    law: Law, number: int, *, alpha: float = 0.55, beta: float = 0.35, noise: float = 0.0, start: float = 0.5
) -> Curve:
    gold = start + law(D, alpha, beta) + np.random.default_rng(number).normal(0, noise, len(D))
    points = [
        Point(i, kl=float(d * d), proxy=float(d), gold=float(y)) for i, (d, y) in enumerate(zip(D, gold, strict=True))
    ]
    return Curve(f"run {number}", points, seed=number)


def test_runs_with_starts_of_their_own_share_a_law(law: Law) -> None:
    seeds = analyse_seeds([curve(law, i, start=float(i)) for i in range(3)])
    assert (seeds.joint.fit.alpha, seeds.joint.fit.beta) == pytest.approx((0.55, 0.35))
    peak = math.exp(0.55 / 0.35 - 1)
    assert seeds.peak is not None
    assert seeds.peak.d.estimate == pytest.approx(peak)
    assert seeds.collapse is not None
    assert seeds.collapse.estimate == pytest.approx((math.e * peak) ** 2)
    assert seeds.peaks.n == 3
    assert seeds.peaks.value == pytest.approx(math.log(peak))
    assert [round(found.share, 2) for found in seeds.foresight] == [0.5, 0.33]
    assert all(found.predicted["rl"] == pytest.approx(0, abs=1e-9) for found in seeds.foresight)
    assert "peaks at KL 3.1" in headline(seeds)


def test_the_interval_over_runs_holds_the_truth_and_grows_with_their_spread(law: Law) -> None:
    """Three runs whose α differ: the interval over them covers the mean α; that of two is said to understate."""
    generator = np.random.default_rng(0)
    covered, widths = 0, {0.01: [], 0.06: []}  # type: ignore[var-annotated]
    for trial in range(60):
        spread = 0.06 if trial % 2 else 0.01
        alphas = 0.55 + generator.normal(0, spread, 3)
        runs = [curve(law, 3 * trial + i, alpha=float(a), noise=0.02) for i, a in enumerate(alphas)]
        alpha = analyse_seeds(runs).joint.alpha
        covered += alpha.low <= 0.55 <= alpha.high
        widths[spread].append(alpha.high - alpha.low)
    assert covered >= 52
    assert np.mean(widths[0.06]) > 2 * np.mean(widths[0.01])
    two = analyse_seeds([curve(law, i, noise=0.02) for i in range(2)])
    assert not two.joint.over_runs
    assert any("understate the spread between seeds" in told for told in sentences(two))


def test_runs_that_only_rise_have_no_peak(law: Law) -> None:
    rising = analyse_seeds([curve(law, i, alpha=1.0, beta=0.1, noise=0.01) for i in range(3)])
    assert rising.peak is None
    assert rising.collapse is None
    assert "no peak of the true score can be claimed" in headline(rising)


def test_runs_without_a_law_are_left_out_and_named(law: Law) -> None:
    short = Curve("short", [Point(0, kl=0.0, gold=1.0), Point(1, kl=1.0, gold=2.0)])
    seeds = analyse_seeds([curve(law, 0), short, curve(law, 1)])
    assert seeds.left_out == ["short"]
    assert "Left out for too few true scores: short." in sentences(seeds)
    with pytest.raises(UserError, match="1 of 2 runs have enough true scores for a law"):
        analyse_seeds([curve(law, 0), short])


def test_the_command_for_several_runs(
    make_run: Callable[..., Path], peaked: dict[str, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(f"ppo{i}", **{**peaked, "gold": [g + i for g in peaked["gold"]]})) for i in range(3)]
    out = tmp_path / "out"
    assert command(["lab", "overopt", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("Over 3 runs the true score peaks at KL")
    content = json.loads((out / "overopt.json").read_text())
    assert content["runs"] == runs
    assert content["over_runs"] is True
    assert content["kl_peak"] == pytest.approx(content["d_peak"] ** 2)
    assert len(content["per_run"]) == 3
    peaks, without = read_peaks([out / "overopt.json"])  # what lab select --fit reads
    assert (peaks[0].d.estimate, without) == (content["d_peak"], [])
    assert (out / "overopt.png").read_bytes().startswith(b"\x89PNG")
    assert command(["lab", "overopt", runs[0], runs[0]]) == 2
    assert "a run is given twice" in capsys.readouterr().err
    assert command(["lab", "overopt", *runs, "--aspects"]) == 2
    assert "are for one run" in capsys.readouterr().err
