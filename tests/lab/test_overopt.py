"""The law of over-optimisation: the fit, its peak, and whether its intervals hold what they promise."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_align.lab.overopt import (
    FormFit,
    FormName,
    analyse_form,
    bootstrap,
    design,
    fit_form,
    peaks,
)

CASES = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["cases"]
TRUE: dict[FormName, tuple[float, float]] = {"rl": (0.7, 0.31), "bon": (0.8, 0.09)}
FORMS: tuple[FormName, ...] = ("rl", "bon")
D = np.linspace(0.3, 6.0, 20)


def assert_fit(fit: FormFit, expected: dict[str, float | None]) -> None:
    for name in ("alpha", "beta", "peak_d", "peak_reward"):
        wanted = expected[name]
        assert getattr(fit, name) == (None if wanted is None else pytest.approx(wanted, rel=1e-10)), name


# ------------------------------------------------------------------ golden vectors
@pytest.mark.parametrize("form", FORMS)
def test_gold_3_gao(form: FormName) -> None:
    inputs, outputs = CASES["gao"]["inputs"], CASES["gao"]["outputs"]
    d = np.array(inputs["d"])
    true = FormFit(form, **outputs[form]["true"])
    assert_fit(fit_form(d, true(d), form), outputs[form]["clean_fit"])
    np.testing.assert_allclose(true(d) + np.array(inputs["noise"]), outputs[form]["reward_noisy"], rtol=1e-12)
    assert_fit(fit_form(d, np.array(outputs[form]["reward_noisy"]), form), outputs[form]["noisy_fit"])


def test_gold_3_gao_without_a_peak() -> None:
    inputs, outputs = CASES["gao"]["inputs"], CASES["gao"]["outputs"]
    assert_fit(fit_form(np.array(inputs["d"]), np.array(inputs["monotone"]), "bon"), outputs["no_peak"])


# ------------------------------------------------------------------ OPT-1
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("free", [False, True])
def test_opt_1_noise_free_data_recover_the_law(form: FormName, free: bool) -> None:
    alpha, beta = TRUE[form]
    reward = FormFit(form, alpha, beta)(D) + (0.4 if free else 0.0)
    weights = np.linspace(1.0, 9.0, len(D))
    fit = fit_form(D, reward, form, weights=weights, free_intercept=free)
    assert fit.alpha == pytest.approx(alpha, abs=1e-9)
    assert fit.beta == pytest.approx(beta, abs=1e-9)
    assert fit.intercept == pytest.approx(0.4 if free else 0.0, abs=1e-9)


@pytest.mark.parametrize(("form", "count", "free"), [("rl", 20, False), ("bon", 20, False), ("rl", 20, True)])
def test_opt_1_intervals_cover_the_truth(form: FormName, count: int, free: bool) -> None:
    """σ = 0.05 R*, 200 simulations: 90 to 98 % of the intervals hold α, β, d* and R*."""
    alpha, beta = TRUE[form]
    true = FormFit(form, alpha, beta)
    assert true.peak_d is not None
    assert true.peak_reward is not None
    d = np.linspace(6.0 / count, 6.0, count)
    generator = np.random.default_rng(0)
    covered = np.zeros(4)
    for seed in range(200):
        reward = true(d) + generator.normal(0, 0.05 * true.peak_reward, count)
        result = analyse_form(d, reward, form, free_intercept=free, seed=seed)
        assert result.peak is not None
        intervals = (result.alpha, result.beta, result.peak.d, result.peak.reward)
        truth = (alpha, beta, true.peak_d, true.peak_reward)
        covered += [i.low <= value <= i.high for i, value in zip(intervals, truth, strict=True)]
    assert ((covered / 200 >= 0.90) & (covered / 200 <= 0.98)).all(), covered / 200


# ------------------------------------------------------------------ OPT-2
@pytest.mark.parametrize("form", FORMS)
def test_opt_2_the_slope_at_the_peak_is_zero(form: FormName) -> None:
    alpha, beta = TRUE[form]
    fit = FormFit(form, alpha, beta)
    d = torch.tensor(fit.peak_d, dtype=torch.float64, requires_grad=True)
    reward = d * (alpha - beta * (d if form == "bon" else d.log()))
    (slope,) = torch.autograd.grad(reward, d)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)
    assert fit.peak_reward == pytest.approx(reward.item(), rel=1e-12)
    assert fit.peak_reward == pytest.approx(float(fit(reward.new_tensor(fit.peak_d).numpy())), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_opt_2_the_peak_is_above_its_surroundings(form: FormName) -> None:
    fit = FormFit(form, *TRUE[form])
    assert fit.peak_d is not None
    assert fit.peak_reward is not None
    around = fit.peak_d * np.array([0.5, 0.9, 0.999, 1.001, 1.1, 2.0])
    assert (fit(around) < fit.peak_reward).all()


# ------------------------------------------------------------------ OPT-3
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [lambda d: 0.3 * d, lambda d: 0.3 * d + 0.02 * d**2])
def test_opt_3_monotone_data_have_no_peak_in_range(form: FormName, shape: Any) -> None:
    d = np.linspace(0.2, 2.5, 20)
    for seed in range(10):
        reward = shape(d) + np.random.default_rng(seed).normal(0, 0.005, 20)
        assert analyse_form(d, reward, form).status != "in range"


def test_a_peak_before_the_first_or_beyond_the_last_distance_is_not_in_range() -> None:
    law = FormFit("rl", 0.7, 0.31)  # d* = 3.5
    near, far = np.linspace(0.2, 2.0, 12), np.linspace(4.5, 9.0, 12)
    assert analyse_form(near, law(near), "rl").status == "beyond"
    assert analyse_form(far, law(far), "rl").status == "before"
    assert analyse_form(D, law(D), "rl").status == "in range"


def test_a_peak_whose_beta_reaches_zero_is_uncertain() -> None:
    reward = FormFit("rl", 0.3, 0.15)(D) + np.random.default_rng(0).normal(0, 1.0, len(D))
    result = analyse_form(D, reward, "rl")
    assert result.beta.low <= 0 < result.beta.estimate
    assert result.status == "uncertain"
    assert result.peak is not None
    assert math.isinf(result.peak.d.high)


# ------------------------------------------------------------------ the pieces
def test_r_of_zero_is_zero_by_continuity() -> None:
    fit = FormFit("rl", 0.7, 0.31, intercept=2.0)
    assert float(fit(0.0)) == 0.0
    assert float(fit(1e-9)) == pytest.approx(0.0, abs=1e-7)
    assert design(np.array([0.0]), "rl").tolist() == [[0.0, -0.0]]


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_repetitions(form: FormName) -> None:
    reward = FormFit(form, *TRUE[form])(D) + np.random.default_rng(0).normal(0, 0.1, len(D))
    times = np.arange(len(D)) % 3 + 1
    weighted = fit_form(D, reward, form, weights=times.astype(float))
    repeated = fit_form(np.repeat(D, times), np.repeat(reward, times), form)
    assert (weighted.alpha, weighted.beta) == pytest.approx((repeated.alpha, repeated.beta), rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_scaling_the_score_scales_the_law_and_leaves_the_place_of_the_peak(form: FormName) -> None:
    reward = FormFit(form, *TRUE[form])(D) + np.random.default_rng(0).normal(0, 0.05, len(D))
    one, ten = analyse_form(D, reward, form), analyse_form(D, 10 * reward, form)
    assert one.peak is not None
    assert ten.peak is not None
    assert ten.alpha.low == pytest.approx(10 * one.alpha.low)
    assert (ten.peak.d.low, ten.peak.d.high) == pytest.approx((one.peak.d.low, one.peak.d.high))
    assert ten.peak.reward.high == pytest.approx(10 * one.peak.reward.high)
    assert ten.rmse == pytest.approx(10 * one.rmse)
    np.testing.assert_allclose(ten.band_high, 10 * one.band_high)


def test_an_offset_goes_into_the_free_intercept_alone() -> None:
    reward = FormFit("rl", *TRUE["rl"])(D) + np.random.default_rng(0).normal(0, 0.05, len(D))
    one, shifted = (analyse_form(D, reward + offset, "rl", free_intercept=True) for offset in (0.0, 7.0))
    assert shifted.fit.intercept == pytest.approx(one.fit.intercept + 7.0)
    assert shifted.alpha.low == pytest.approx(one.alpha.low)
    assert shifted.rmse == pytest.approx(one.rmse)
    np.testing.assert_allclose(shifted.band_low, one.band_low, atol=1e-9)


def test_bootstrap_is_reproducible_and_widens_with_the_error_of_the_start() -> None:
    reward = FormFit("rl", *TRUE["rl"])(D) + np.random.default_rng(0).normal(0, 0.05, len(D))
    first, again = bootstrap(D, reward, "rl", seed=5), bootstrap(D, reward, "rl", seed=5)
    assert (first == again).all()
    assert not (first == bootstrap(D, reward, "rl", seed=6)).all()
    assert bootstrap(D, reward, "rl", start_se=0.2)[:, 0].std() > 2 * first[:, 0].std()


def test_exact_data_have_intervals_of_no_width() -> None:
    result = analyse_form(D, FormFit("rl", *TRUE["rl"])(D), "rl")
    assert result.alpha.high - result.alpha.low == pytest.approx(0.0, abs=1e-9)
    assert result.rmse == pytest.approx(0.0, abs=1e-12)


def test_peaks_of_many_fits() -> None:
    alpha, beta = np.array([0.7, 0.7, -0.2, 1.0]), np.array([0.31, -0.1, 0.1, 1e-9])
    for form in FORMS:
        places, heights = peaks(form, alpha, beta)
        assert np.isinf(places[1])
        assert np.isinf(heights[1])
        assert np.isfinite(places[3])  # far beyond any run, but a number
        assert places[2] >= 0
    assert peaks("bon", alpha, beta)[0][2] == 0.0


@pytest.mark.parametrize(
    ("d", "free", "message"),
    [([1.0], False, "1 distances for 2"), ([1.0, 2.0], True, "give at least 3"), ([0.0, 1.0], False, "above 0")],
)
def test_bad_points_are_refused(d: list[float], free: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_form(np.array(d), np.ones(len(d)), "rl", free_intercept=free)
