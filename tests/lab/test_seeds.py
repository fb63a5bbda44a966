"""Several runs of one method: a known law is found over them, and its interval speaks of the runs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.findings import about_foresight
from lightning_align.lab.regret import read_peaks
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.seeds import analyse_seeds, draw_seeds, headline, labels, sentences, unlike
from lightning_align.lab.summary import summarise_seeds

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
    told = " ".join(sentences(rising))
    assert "In 3 of 3 runs the last checkpoints are the highest: no fall is measured over runs." in told
    assert "–" not in told


def test_the_end_is_below_the_best_or_the_peak(law: Law) -> None:
    falling = analyse_seeds([curve(law, i, beta=beta) for i, beta in enumerate((0.34, 0.35, 0.36))])
    assert falling.at_top == 0
    expected = f"At the end the true score is {-falling.falls.value:.2f} below its peak (end minus that: −"
    assert any(told.startswith(expected) for told in sentences(falling))


def test_the_fall_is_measured_from_the_common_peak(law: Law) -> None:
    """Not from the peak of each run's own, from where every fall is deeper."""
    alphas = (0.45, 0.55, 0.65)
    seeds = analyse_seeds([curve(law, i, alpha=alpha) for i, alpha in enumerate(alphas)])
    peak = math.exp(0.55 / 0.35 - 1)
    assert seeds.peak is not None
    assert seeds.peak.d.estimate == pytest.approx(peak)
    near = np.sort(np.argsort(abs(D - peak))[:3])
    falls = [float(law(D[-3:], alpha, 0.35).mean() - law(D[near], alpha, 0.35).mean()) for alpha in alphas]
    rises = [float(law(D[near], alpha, 0.35).mean()) for alpha in alphas]
    assert seeds.falls.value == pytest.approx(np.mean(falls))
    assert seeds.rises.value == pytest.approx(np.mean(rises))
    own = np.mean([analysis.fall.estimate for analysis in seeds.analyses if analysis.fall is not None])
    assert own < seeds.falls.value - 0.005


def test_a_fall_that_differs_between_runs_by_more_than_its_size_is_no_fall_over_runs(law: Law) -> None:
    alike, apart = (
        analyse_seeds([curve(law, i, beta=beta, noise=0.005) for i, beta in enumerate(betas)])
        for betas in ((0.34, 0.35, 0.36), (0.28, 0.35, 0.5))
    )
    assert headline(alike).endswith("and then falls")
    assert apart.peak is not None
    assert apart.falls.value < 0 < apart.falls.high
    assert headline(apart).endswith("how far it falls differs between runs")


def test_a_law_that_the_measured_scores_do_not_follow_names_no_peak(law: Law) -> None:
    """The last checkpoints of every run are its best: the law bends down, the scores do not."""
    runs = [curve(law, i, noise=0.005) for i in range(3)]
    for run in runs:
        run.points[-3:] = [replace(point, gold=run.points[0].gold + 0.8) for point in run.points[-3:]]
    seeds = analyse_seeds(runs)
    assert seeds.falls.value > 0
    assert seeds.peak is None
    assert seeds.collapse is None
    assert "no peak of the true score can be claimed" in headline(seeds)


def test_the_law_is_back_at_the_start_only_where_checkpoints_lie(law: Law) -> None:
    seeds = analyse_seeds([curve(law, i, alpha=0.5, noise=0.01) for i in range(3)])
    place = (math.e * math.exp(0.5 / 0.35 - 1)) ** 2
    assert seeds.collapse is not None
    assert seeds.collapse.low < seeds.collapse.estimate < seeds.collapse.high
    assert seeds.collapse.estimate == pytest.approx(place, rel=0.05)
    assert any("3 of 3 runs were measured back there" in told for told in sentences(seeds))
    near = [curve(law, i, alpha=0.5, noise=0.01) for i in range(3)]
    for run in near:
        run.points = run.points[:15]  # to d = 3.7, short of 4.2
    short = analyse_seeds(near)
    assert short.peak is not None
    assert short.collapse is None
    content = summarise_seeds(short, [Path("a"), Path("b"), Path("c")])
    assert content["kl_collapse"] is None
    assert [run["measured_collapse_kl"] for run in content["per_run"]] == [None] * 3


def test_both_forms_are_told_and_the_one_that_holds_predicts(law: Law) -> None:
    seeds = analyse_seeds([curve(law, i, noise=0.01) for i in range(3)])
    assert seeds.forms["rl"].rmse < seeds.forms["bon"].rmse
    text = " ".join(sentences(seeds))
    assert "The other form, R(d) = d(α − β d), peaks at KL" in text
    half = seeds.foresight[0]
    for value in (half.predicted["rl"], half.predicted["bon"], half.constant, half.linear, half.hindsight["rl"]):
        assert f"{value:.3f}" in text
    assert "nearer than both" in text
    assert "in its best-of-n form" in about_foresight(half, "rl")
    assert "in its RL form" in about_foresight(half, "bon")
    flat = analyse_seeds([curve(lambda d, alpha, beta: np.minimum(d, 1.0), i, noise=0.01) for i in range(3)])
    assert "no nearer than the better of them" in about_foresight(flat.foresight[0], "rl")


def test_every_run_is_in_the_picture(law: Law) -> None:
    runs = [curve(law, i, noise=0.01) for i in range(12)]  # more than there are colours
    (ax,) = draw_seeds(analyse_seeds(runs)).axes
    labels = [line.get_label() for line in ax.get_lines()]
    assert [f"seed {i}" for i in range(12)] == [label for label in labels if str(label).startswith("seed")]
    texts = [text.get_text() for text in ax.texts]
    assert any(text.startswith("peak: KL 3.") for text in texts)
    assert any(text.startswith("back at the start: KL 2") for text in texts)


def configured(law: Law, number: int, method: str, **options: object) -> Curve:
    config = {"model": {"class_path": f"somewhere.{method}", "init_args": options}}
    return replace(curve(law, number), config=config, path=Path(f"runs/{number}"))


def test_runs_of_several_methods_are_no_seeds(law: Law) -> None:
    runs = [configured(law, 0, "PPO"), curve(law, 1), configured(law, 2, "DPO")]
    with pytest.raises(UserError, match="not seeds of one: runs/0 is of PPO, runs/2 is of DPO; lab frontier compares"):
        unlike(runs)
    seeds = [
        configured(law, i, "PPO", seed=i, kl_coef=0.1, reward=f"runs/reward/{i}", parts={"a": i}) for i in range(3)
    ]
    assert unlike([*seeds, curve(law, 3)]) == []
    other = configured(law, 4, "PPO", kl_coef=0.2, reward=None, parts=None)
    assert unlike([*seeds, other]) == ["the runs differ in kl_coef (0.1, 0.2): are they seeds of one method?"]


def test_runs_of_one_seed_are_told_apart_by_name_or_place(law: Law) -> None:
    first, second = (replace(curve(law, 0), name=name, path=Path(name)) for name in ("a", "b"))
    assert labels([first, curve(law, 1)]) == ["seed 0", "seed 1"]
    assert labels([first, second]) == ["a", "b"]
    assert labels([replace(first, path=Path("x/a")), replace(first, path=Path("y/a"))]) == ["x/a", "y/a"]


def test_a_fitted_start_is_called_so(law: Law) -> None:
    runs = [curve(law, i) for i in range(3)]
    assert "each run minus its own fitted start: " in sentences(analyse_seeds(runs, free_start=True))[0]
    assert " above the start (interval" in sentences(analyse_seeds(runs))[0]


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
    told = capsys.readouterr().out
    assert told.startswith("Over 3 runs the true score peaks at KL")
    assert f"  {runs[2]}: points read: 17 (evaluations on held-out prompts, metrics.csv)\n" in told
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
