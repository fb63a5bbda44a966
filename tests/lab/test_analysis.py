"""From a curve to what may be said of it: no peak without a rise, a fall and a fit that holds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_align.lab.analysis import Noise, analyse
from lightning_align.lab.findings import conclude, kind_of, kl_text, number
from lightning_align.lab.overopt import FormName, Interval
from lightning_align.lab.places import Places
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.summary import summarise

Law = Callable[..., Any]
MakeCurve = Callable[..., Curve]


def smooth_cliff(d: Any) -> Any:
    """A slow rise and a steep fall, which neither form can follow."""
    return 0.4 * np.minimum(d, 2.0) - 2.0 * np.maximum(d - 2.2, 0.0) ** 2


# ------------------------------------------------------------------ rise, peak, fall
def test_rise_and_fall_is_a_peak_with_its_place_and_its_height(make_curve: MakeCurve, law: Law) -> None:
    analysis = analyse(make_curve(lambda d: law(d, 0.55, 0.35), noise=0.02, seed=1))
    peak = analysis.fitted_peak
    assert peak is not None
    assert peak.kl.low <= math.exp(0.55 / 0.35 - 1) ** 2 <= peak.kl.high
    assert peak.reward.estimate == pytest.approx(0.35 * math.exp(0.55 / 0.35 - 1), rel=0.1)
    assert analysis.start_gold == analysis.curve.points[0].gold
    assert (analysis.rises, analysis.falls, analysis.misfit) == (True, True, False)
    assert analysis.proxy_slope == pytest.approx(0.8)
    finding = conclude(analysis)
    assert finding.kind == "peaks"
    assert finding.headline.startswith(f"The true score peaks at KL {kl_text(peak.kl.estimate)} and then falls")
    assert "while the optimised reward keeps rising" in finding.headline


@pytest.mark.parametrize("form", ["rl", "bon"])
@pytest.mark.parametrize("noise", [0.0, 0.005, 0.05])
@pytest.mark.parametrize("shape", [lambda d: 0.3 * d, lambda d: 0.3 * d + 0.02 * d**2, lambda d: 0.4 * np.sqrt(d)])
def test_opt_3_monotone_data_no_peak_is_reported(
    make_curve: MakeCurve, shape: Callable[[Any], Any], noise: float, form: FormName
) -> None:
    for seed in range(4):
        analysis = analyse(make_curve(shape, noise=noise, seed=seed), form=form)
        assert not analysis.falls
        assert kind_of(analysis) in ("rising", "risen", "levels off")
        if noise == 0.0:
            assert analysis.fitted_peak is None
            assert "no peak" in conclude(analysis).text


def test_opt_3_hardly_anything_is_claimed_on_noise(make_curve: MakeCurve) -> None:
    """95 % intervals: though the best of all places is picked, about one in twenty may show a fall that is none."""
    analyses = [analyse(make_curve(lambda d: 0 * d, noise=0.1, seed=seed)) for seed in range(100)]
    kinds = [kind_of(analysis) for analysis in analyses]
    assert kinds.count("flat") >= 85
    assert kinds.count("peaks") <= 4
    assert sum(analysis.falls for analysis in analyses) <= 10


def test_a_peak_that_is_not_followed_by_a_fall_levels_off(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.5, 0.31), d_max=2.2, noise=0.02, count=25)  # d* = 1.8
    analysis = analyse(curve)
    assert kind_of(analysis) in ("levels off", "risen", "rising")
    assert "falls" not in conclude(analysis).headline


def test_a_fit_that_does_not_hold_names_no_peak(make_curve: MakeCurve) -> None:
    """The form puts its peak where gold is far below its best: the headline must not repeat it."""
    analysis = analyse(make_curve(smooth_cliff, noise=0.02))
    assert analysis.result is not None
    assert analysis.result.status == "in range"
    assert analysis.misfit
    assert analysis.fitted_peak is None
    finding = conclude(analysis)
    assert finding.kind == "falls"
    assert finding.headline.startswith("The true score rises and then falls")
    assert "does not fit this run" in finding.text
    assert analysis.peak is not None
    assert 3.0 < analysis.peak.kl < 6.0


def test_a_fall_from_the_start(make_curve: MakeCurve) -> None:
    analysis = analyse(make_curve(lambda d: -0.2 * d, noise=0.02))
    assert kind_of(analysis) == "falls from the start"
    assert analysis.choice.point.step == 0
    assert "the model before training" in conclude(analysis).text


def test_a_rise_within_noise_is_neither_claimed_nor_denied() -> None:
    """A weak reward model's run: gold rises at first, though not beyond noise, and then falls to its floor."""
    kl = [0.0, 0.68, 2.38, 4.29, 7.25, 11.96, 15.56, 18.46, 21.68, 27.91, 35.47, 39.19, 45.64, 52.51, 59.34, 60.98]
    gold = [0.684, 0.798, 0.838, 0.777, 0.467, 0.238, 0.095, 0.024, -0.049, -0.071, -0.085, -0.084, -0.094, -0.081]
    gold += [-0.084, -0.084]
    rows = enumerate(zip(kl, gold, strict=True))
    points = [Point(step, kl=x, proxy=x**0.5, gold=y, gold_se=0.06, proxy_se=0.06) for step, (x, y) in rows]
    finding = conclude(analyse(Curve("measured", points)))
    assert finding.kind == "falls later"
    assert finding.headline == "The true score falls beyond KL 2.4, while the optimised reward keeps rising"
    assert "above the start, but not beyond noise (+0.1" in finding.text


# ------------------------------------------------------------------ the start
def test_a_peak_near_the_start_is_not_taken_for_the_start() -> None:
    """A run that rises in its first evaluations: the fitted peak lies between the start and the best score."""
    kl = [0.0, 0.53, 1.62, 2.68, 3.61, 4.27, 5.4, 8.24, 9.45, 9.86, 14.39, 16.51, 19.19, 25.55, 29.19, 34.43, 37.37]
    gold = [0.551, 0.775, 0.889, 0.742, 0.76, 0.721, 0.66, 0.605, 0.649, 0.587, 0.341, 0.268, 0.152, 0.014, -0.045]
    gold += [-0.084, -0.084]
    rows = enumerate(zip(kl, gold, strict=True))
    points = [Point(step, kl=x, proxy=x**0.5, gold=y, gold_se=0.06, proxy_se=0.06) for step, (x, y) in rows]
    analysis = analyse(Curve("measured", points))
    assert analysis.rises
    assert kind_of(analysis) == "peaks"


def test_the_start_is_the_mean_of_all_points_near_kl_0(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points.append(Point(500, kl=0.0004, proxy=0.0, gold=curve.points[0].gold + 0.2))
    assert analyse(curve).start_gold == pytest.approx(curve.points[0].gold + 0.1)


def test_points_that_have_begun_to_move_do_not_blur_the_start(make_curve: MakeCurve, law: Law) -> None:
    """The RL form is steep at 0: with 80 dense points the intervals must still hold α and β."""
    held = np.zeros(2)
    for seed in range(60):
        analysis = analyse(make_curve(lambda d: law(d, 0.55, 0.35), count=80, noise=0.08, seed=seed))
        assert analysis.result is not None
        alpha, beta = analysis.result.alpha, analysis.result.beta
        held += [alpha.low <= 0.55 <= alpha.high, beta.low <= 0.35 <= beta.high]
    assert (held >= 52).all()


def test_without_a_start_it_is_fitted(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points = curve.points[2:]
    analysis = analyse(curve)
    assert analysis.start is None
    assert analysis.start_fitted
    assert analysis.start_gold == pytest.approx(1.0, abs=1e-9)
    assert analysis.fitted_peak is not None
    assert analysis.fitted_peak.reward.estimate == pytest.approx(0.35 * math.exp(0.55 / 0.35 - 1), rel=1e-9)
    assert "No checkpoint lies at KL 0, so the score at the start is fitted too." in conclude(analysis).sentences


def test_a_free_start_ignores_a_first_point_that_is_off(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points[0] = replace(curve.points[0], gold=0.6)
    fixed, free = analyse(curve), analyse(curve, free_start=True)
    assert (fixed.start_gold, fixed.start_fitted) == (0.6, False)
    assert free.start_gold == pytest.approx(1.0, abs=1e-9)
    assert "The score at the start is fitted too." in conclude(free).sentences
    assert conclude(free).sentences[0].endswith("above the fitted start, which is 0.40 above the measured one.")
    assert conclude(analyse(make_curve(lambda d: law(d, 0.55, 0.35)))).sentences[0].endswith("above the start.")
    headless = analyse(replace(curve, points=curve.points[2:]))
    assert conclude(headless).sentences[0].endswith(" above the fitted start.")


def test_negative_kl_estimates_are_kept_but_not_fitted(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points[3] = replace(curve.points[3], kl=-0.2, gold=50.0)
    analysis = analyse(curve)
    assert len(analysis.curve.points) == 17
    assert curve.points[3] not in analysis.fitted
    assert analysis.result is not None
    assert analysis.result.alpha.estimate == pytest.approx(0.55)
    first_negative = analyse(Curve("x", [replace(curve.points[0], kl=-0.3), *curve.points[4:]]))
    assert first_negative.start is not None  # the first estimate is not positive: that is the start
    assert first_negative.start_gold == 1.0


def test_distances_below_a_tenth_are_not_fitted(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points.insert(1, Point(1, kl=0.0099, proxy=0.0, gold=1.0))
    assert min(point.d for point in analyse(curve).fitted) > 0.1


# ------------------------------------------------------------------ little data
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_points_claim_nothing(make_curve: MakeCurve, law: Law, count: int) -> None:
    analysis = analyse(make_curve(lambda d: law(d, 0.55, 0.35), count=count))
    finding = conclude(analysis)
    assert finding.kind == "too few"
    assert "at least six checkpoints" in finding.text
    assert "at KL" not in finding.headline


def test_too_few_are_as_many_as_it_says(make_curve: MakeCurve, law: Law) -> None:
    whole = make_curve(lambda d: law(d, 0.55, 0.35), count=9)
    few = [p for p in whole.points if p.kl == 0] * 4 + whole.points[1:]
    few = [replace(point, step=step, gold_se=0.01) for step, point in enumerate(few)]
    for count, kind in ((3, True), (4, False)):
        finding = conclude(analyse(Curve("few", few[: 4 + count])))
        assert (finding.kind == "too few") == kind
    beyond = few[4:]
    for count, kind in ((4, True), (5, False)):
        finding = conclude(analyse(Curve("few", beyond[:count])))
        assert (finding.kind == "too few") == kind
        assert not kind or "4 of them at a KL of 0.01 or more (5 where none lies at KL 0)" in finding.text


def test_no_gold_offers_the_knee_as_a_weak_hint(make_curve: MakeCurve) -> None:
    curve = make_curve(lambda d: 0 * d)
    curve.points = [replace(point, gold=math.nan, proxy=math.tanh(point.proxy)) for point in curve.points]
    analysis = analyse(curve)
    finding = conclude(analysis)
    assert (finding.kind, analysis.forms, analysis.peak) == ("no gold", {}, None)
    assert analysis.choice is not None
    assert analysis.choice.policy == "knee"
    assert any(sentence.startswith("A weak hint: step ") for sentence in finding.sentences)


def test_without_gold_and_without_a_knee_no_checkpoint_is_named(make_curve: MakeCurve) -> None:
    curve = make_curve(lambda d: 0 * d)
    curve.points = [replace(point, gold=math.nan) for point in curve.points]  # the proxy is 0.8·√KL
    analysis = analyse(curve)
    finding = conclude(analysis)
    assert analysis.choice is None
    assert "nothing here says which checkpoint to keep" in finding.text
    assert summarise(analysis, finding, Path("run"))["chosen"] is None


def test_no_proxy_at_all(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35), noise=0.02)
    curve.points = [replace(point, proxy=math.nan) for point in curve.points]
    analysis = analyse(curve)
    assert kind_of(analysis) == "peaks"
    assert analysis.proxy_gain is None
    assert "optimised reward" not in conclude(analysis).headline


def test_measured_errors_are_weights_and_noise(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35))
    curve.points = [replace(p, gold_se=0.02 if i != 8 else 1e3) for i, p in enumerate(curve.points)]
    curve.points[8] = replace(curve.points[8], gold=40.0)  # worthless, and known to be
    analysis = analyse(curve)
    assert analysis.gold_noise.freedom == math.inf
    assert analysis.result is not None
    assert analysis.result.alpha.estimate == pytest.approx(0.55, abs=1e-3)


def test_opt_4_shifted_gold_and_mixed_rows_give_the_same_result(make_curve: MakeCurve, law: Law) -> None:
    curve = make_curve(lambda d: law(d, 0.55, 0.35), noise=0.03)
    moved = Curve("x", [replace(point, gold=point.gold - 4.0) for point in curve.points])
    mixed = Curve("x", curve.points[::-1])
    expected = conclude(analyse(curve))
    assert conclude(analyse(moved)) == expected
    again = conclude(analyse(mixed))
    assert (again.kind, again.headline) == (expected.kind, expected.headline)
    assert analyse(mixed).choice == analyse(curve).choice


def test_best_of_n_uses_the_other_form(make_curve: MakeCurve) -> None:
    analysis = analyse(make_curve(lambda d: d * (0.8 - 0.2 * d), noise=0.01), form="bon")
    assert analysis.fitted_peak is not None
    assert analysis.fitted_peak.d.estimate == pytest.approx(2.0, rel=0.05)
    assert "d(α − β d)" in conclude(analysis).text


# ------------------------------------------------------------------ differences and words
def test_difference_covers_95_percent() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0, 0.3, (4000, 4))
    held = 0
    for row in samples:
        interval = Noise(0.3, math.inf).difference(float(row[:3].mean()), 3, float(row[3]), 1)
        held += interval.low <= 0 <= interval.high
    assert held / len(samples) == pytest.approx(0.95, abs=0.012)


def test_difference_widens_with_fewer_degrees_of_freedom_and_more_looks() -> None:
    widths = [
        Noise(1.0, freedom).difference(0.0, 1, 0.0, 1, looks).high
        for freedom, looks in ((math.inf, 1), (7.5, 1), (7.5, 15))
    ]
    assert widths[0] == pytest.approx(1.96 * math.sqrt(2), rel=1e-3)
    assert widths == sorted(widths)
    assert Noise(0.0, 1.0).difference(2.0, 1, 1.0, 1) == Interval(1.0, 1.0, 1.0)


def test_the_best_of_many_looks_is_held_to_bonferronis_level() -> None:
    interval = Noise(1.0, math.inf).difference(0.0, 2, 0.0, 4, looks=10)
    reach = stats.norm.ppf(1 - 0.025 / 10) * math.sqrt(1 / 2 + 1 / 4)
    assert (interval.low, interval.high) == (pytest.approx(-reach), pytest.approx(reach))


def test_the_start_is_no_part_of_a_place_near_it() -> None:
    points = [Point(step, kl=d * d, gold=d) for step, d in enumerate((0.0, 1.0, 3.0, 4.0))]
    places = Places(points)
    assert places.nearest(0.4, ()).points == (points[0],)
    assert places.nearest(0.4, points[:1]).points == (points[1],)
    assert places.nearest(0.4, points).points == (points[0],)  # nothing else is left


def test_a_fitted_peak_next_to_the_start_is_measured_beside_it() -> None:
    """α 0.02 and β 0.2: the peak lies at d = 0.41, nearest to the start of these checkpoints."""
    d = np.array([0.0, 0.9, 1.1, 1.4, 1.8, 2.2, 2.7, 3.3])
    gold = d * (0.02 - 0.2 * np.log(np.where(d > 0, d, 1.0)))
    points = [
        Point(i, kl=float(x * x), gold=float(y), gold_se=1e-4) for i, (x, y) in enumerate(zip(d, gold, strict=True))
    ]
    analysis = analyse(Curve("run", points))
    assert analysis.peak is not None
    assert points[0] not in analysis.peak.points
    assert analysis.rise is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.1234, "−0.12"), (2.0, "2.00"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "−∞")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("kl", "text"), [(0.0123, "0.01"), (0.949, "0.95"), (3.14, "3.1"), (31.4, "31"), (9.96, "10")])
def test_kl_text_has_as_many_digits_as_can_be_used(kl: float, text: str) -> None:
    assert kl_text(kl) == text
