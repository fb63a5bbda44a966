"""One law for several runs: exact where it holds, with an interval that holds the mean law of runs that differ."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from lightning_align.lab.joint import Series, analyse_jointly, bootstrap_runs, fit_jointly
from lightning_align.lab.overopt import FormFit, FormName, fit_form, peaks, percentile_interval
from lightning_align.lab.places import collapse
from lightning_align.lab.runs import Point

FORMS: tuple[FormName, ...] = ("rl", "bon")
D = np.linspace(0.3, 6.0, 20)
TRIALS = 200


class Family(NamedTuple):
    """Mean α and β of a method's runs, and how far those of one run lie from them."""

    form: FormName
    alpha: float
    beta: float
    spread_alpha: float
    spread_beta: float

    @property
    def law(self) -> FormFit:
        return FormFit(self.form, self.alpha, self.beta)

    def draw(self, count: int, generator: np.random.Generator) -> list[Series]:
        """Runs of 20 points with noise of 0.05·R*."""
        noise = 0.05 * (self.law.peak_reward or 0.0)
        runs = []
        for _ in range(count):
            alpha = self.alpha + generator.normal(0, self.spread_alpha)
            beta = self.beta + generator.normal(0, self.spread_beta)
            reward = FormFit(self.form, alpha, beta)(D) + generator.normal(0, noise, len(D))
            runs.append(Series(D, reward, np.ones(len(D))))
        return runs


FAMILIES = [
    Family("rl", 0.7, 0.31, 0.1, 0.05),
    Family("rl", 0.7, 0.31, 0.0, 0.0),  # runs that differ by their noise alone
    Family("bon", 0.8, 0.09, 0.1, 0.012),
]


def unwidened(runs: list[Series], form: FormName, drawn: np.ndarray) -> np.ndarray:
    """What the percentile bootstrap over runs alone would have drawn."""
    fit = fit_jointly(runs, form)
    count = len(runs)
    estimate = np.array([fit.alpha, fit.beta])
    wider = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975) * math.sqrt(count / (count - 1))
    return estimate + (drawn - estimate) / wider


def covered(family: Family, drawn: np.ndarray) -> np.ndarray:
    """Whether the intervals of α, β, d* and R* hold those of the mean law."""
    d, reward = peaks(family.form, np.array([family.alpha]), np.array([family.beta]))
    truth = (family.alpha, family.beta, float(d[0]), float(reward[0]))
    values = (drawn[:, 0], drawn[:, 1], *peaks(family.form, drawn[:, 0], drawn[:, 1]))
    intervals = [percentile_interval(math.nan, value) for value in values]
    return np.array([i.low <= value <= i.high for i, value in zip(intervals, truth, strict=True)])


# ------------------------------------------------------------------ OPT-1, over runs
@pytest.mark.parametrize("form", FORMS)
def test_opt_1_noise_free_runs_recover_their_law_whatever_their_starts_and_weights(form: FormName) -> None:
    law = FormFit(form, 0.7, 0.31)
    runs = [
        Series(D[::step], law(D[::step]) + start, np.linspace(1, 9, len(D[::step])), free=start != 0)
        for step, start in ((1, 0.0), (2, 5.0), (3, -2.0))
    ]
    fit = fit_jointly(runs, form)
    assert (fit.alpha, fit.beta) == pytest.approx((0.7, 0.31), abs=1e-9)
    assert [run.start(fit) for run in runs] == pytest.approx([0.0, 5.0, -2.0], abs=1e-9)
    result = analyse_jointly(runs, form)
    assert result.rmse == pytest.approx(0, abs=1e-9)
    assert result.peak is not None
    assert (result.peak.d.low, result.peak.d.high) == pytest.approx((law.peak_d, law.peak_d), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("free", [False, True])
def test_the_fit_to_one_run_is_that_of_the_run(form: FormName, free: bool) -> None:
    generator = np.random.default_rng(0)
    reward, weights = generator.normal(size=len(D)), generator.uniform(0.5, 2, len(D))
    joint = fit_jointly([Series(D, reward, weights, free)], form)
    alone = fit_form(D, reward, form, weights=weights, free_intercept=free)
    assert (joint.alpha, joint.beta) == pytest.approx((alone.alpha, alone.beta), rel=1e-8)
    if not free:
        both = fit_jointly([Series(D[:7], reward[:7], weights[:7]), Series(D[7:], reward[7:], weights[7:])], form)
        assert (both.alpha, both.beta) == pytest.approx((alone.alpha, alone.beta), rel=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [3, 5])
def test_opt_1_the_interval_over_runs_covers_and_the_plain_bootstrap_does_not(family: Family, count: int) -> None:
    """200 simulations: 90 to 99 % of the widened intervals hold α, β, d* and R*, and of the plain ones far fewer."""
    generator = np.random.default_rng(count)
    wide, plain = np.zeros(4), np.zeros(4)
    for trial in range(TRIALS):
        runs = family.draw(count, generator)
        drawn = bootstrap_runs(runs, family.form, replicates=1000, seed=trial)
        wide += covered(family, drawn) / TRIALS
        plain += covered(family, unwidened(runs, family.form, drawn)) / TRIALS
    assert ((wide >= 0.90) & (wide <= 0.99)).all(), wide
    assert (plain < (0.85 if count == 3 else 0.91)).all(), plain


def test_the_interval_of_two_runs_understates_and_does_not_speak_of_runs() -> None:
    family = FAMILIES[0]
    generator = np.random.default_rng(0)
    hits = np.zeros(4)
    for trial in range(100):
        runs = family.draw(2, generator)
        hits += covered(family, bootstrap_runs(runs, "rl", replicates=400, seed=trial)) / 100
    assert (hits < 0.7).all(), hits
    assert not analyse_jointly(runs, "rl").over_runs
    assert analyse_jointly(family.draw(3, generator), "rl").over_runs


def test_two_runs_that_share_a_law_have_intervals_that_cover_it() -> None:
    family = FAMILIES[1]
    generator = np.random.default_rng(0)
    hits = np.zeros(4)
    for trial in range(TRIALS):
        drawn = bootstrap_runs(family.draw(2, generator), "rl", replicates=400, seed=trial)
        hits += covered(family, drawn) / TRIALS
    assert (hits >= 0.90).all(), hits


# ------------------------------------------------------------------ OPT-3
@pytest.mark.parametrize("form", FORMS)
def test_opt_3_runs_that_only_rise_have_no_peak_in_range(form: FormName) -> None:
    d = np.linspace(0.2, 2.5, 20)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        runs = [
            Series(d, (0.3 + generator.normal(0, 0.03)) * d + generator.normal(0, 0.005, 20), np.ones(20))
            for _ in range(3)
        ]
        assert analyse_jointly(runs, form).status != "in range"


# ------------------------------------------------------------------ back at the start
@pytest.mark.parametrize("form", FORMS)
def test_the_law_is_at_its_start_where_it_collapses(form: FormName) -> None:
    law = FormFit(form, 0.7, 0.31)
    assert law.collapse_d is not None
    assert float(law(law.collapse_d)) == pytest.approx(0, abs=1e-12)
    assert float(law(0.99 * law.collapse_d)) > 0
    result = analyse_jointly(FAMILIES[0].draw(3, np.random.default_rng(0)), "rl")
    assert result.collapse_d is not None
    assert result.peak is not None
    assert result.collapse_d.low == pytest.approx(math.e * result.peak.d.low)
    assert FormFit(form, 0.7, -0.1).collapse_d is None
    assert FormFit("bon", -0.2, 0.1).collapse_d is None


def measured(law: FormFit, farthest: float, start: float = 2.0) -> float | None:
    d = np.linspace(0.0, farthest, 60)
    points = [Point(i, kl=float(x * x), gold=start + float(law(x))) for i, x in enumerate(d)]
    return collapse(points, start)


def test_measured_scores_are_back_at_the_start_where_they_cross_it_and_never_beyond_the_data() -> None:
    law = FormFit("bon", 0.8, 0.2)  # back at d = 4
    assert measured(law, 6.0) == pytest.approx(16, rel=0.02)
    assert measured(law, 3.8) is None
    assert measured(FormFit("bon", -0.1, 0.2), 6.0) is None  # never above the start
    assert collapse([], 0.0) is None


def test_measured_scores_cross_the_start_where_the_line_between_two_places_does() -> None:
    line = {0.0: 0.0, 1.0: 0.6, 2.0: 0.3, 4.0: -0.1, 5.0: -0.5}  # from 0.3 to −0.1 between 2 and 4: 0 at 3.5
    points = [Point(i, kl=d * d, gold=2.0 + gain) for i, (d, gain) in enumerate(line.items())]
    assert collapse(points, 2.0) == pytest.approx(3.5**2)


def test_too_few_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="too few distances"):
        fit_jointly([Series(np.ones(4), np.arange(4.0), np.ones(4))], "rl")
