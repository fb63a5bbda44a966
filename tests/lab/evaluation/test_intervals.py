"""Bootstrap intervals cover, permutation p-values are those of enumeration, both repeat."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from lightning_align.lab.evaluation.intervals import (
    bca,
    means,
    over_runs,
    permutation_p,
    ratios,
    resampled_sums,
    shared_error,
    student,
)


def test_eval_4_coverage_of_a_bernoulli_mean() -> None:
    draw = np.random.default_rng(0)
    trials, covered = 600, 0
    for trial in range(trials):
        estimate = means({"x": (draw.random(300) < 0.4).astype(float)}, seed=trial, replicates=800)["x"]
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.93 <= covered / trials <= 0.97


def test_eval_8_the_same_seed_gives_the_same_interval() -> None:
    values = {"x": np.random.default_rng(1).normal(size=200)}
    assert means(values, seed=3) == means(values, seed=3)
    assert means(values, seed=3) != means(values, seed=4)


def test_a_mean_has_the_usual_standard_error_and_interval() -> None:
    values = np.random.default_rng(2).normal(size=400)
    estimate = means({"x": values})["x"]
    se = values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.se == pytest.approx(se)
    assert (estimate.low, estimate.high) == pytest.approx(
        (values.mean() - 1.96 * se, values.mean() + 1.96 * se), abs=0.01
    )


def test_columns_share_their_resamples() -> None:
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=(2, 60))
    sums = resampled_sums(np.stack([x, y, x + y], axis=1), replicates=100)
    np.testing.assert_allclose(sums[:, 0] + sums[:, 1], sums[:, 2])


def test_a_ratio_weighs_rows_by_their_denominator() -> None:
    top, bottom = np.array([1.0, 6.0, 4.0]), np.array([1.0, 2.0, 1.0])
    estimate = ratios({"r": (top, bottom)})["r"]
    assert estimate.value == 11 / 4
    assert estimate.low == 1.0
    assert estimate.high == 4.0


def test_rows_without_a_number_leave_every_sum() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan])
    estimate = means({"x": values})["x"]
    assert (estimate.value, estimate.n) == (2.0, 2)
    assert estimate.se == pytest.approx(1.0)
    nothing = means({"x": np.full(3, np.nan)})["x"]
    assert nothing.n == 0
    assert math.isnan(nothing.value)


def test_one_row_has_no_interval() -> None:
    estimate = means({"x": np.array([2.0])})["x"]
    assert (estimate.value, estimate.n) == (2.0, 1)
    assert math.isnan(estimate.low)
    assert estimate.as_dict()["n"] == 1


def test_permutation_p_is_that_of_all_signs() -> None:
    differences = np.random.default_rng(4).normal(0.5, 1, 10)
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=10)]
    exact = np.mean([value >= abs(differences.sum()) - 1e-9 for value in sums])
    assert permutation_p(differences, replicates=40_000) == pytest.approx(exact, abs=0.01)
    assert permutation_p(-differences) == permutation_p(differences)


def test_permutation_p_without_a_difference_is_one_and_never_zero() -> None:
    assert permutation_p(np.zeros(5)) == 1.0
    assert 0 < permutation_p(np.ones(100)) < 2e-4
    assert math.isnan(permutation_p(np.full(3, np.nan)))


def test_bca_is_scipys() -> None:
    values = np.random.default_rng(5).exponential(size=60)
    ours = bca(np.column_stack([values, np.ones(60)]), lambda sums: (sums[:, 0] / sums[:, 1]) ** 2)
    theirs = stats.bootstrap(
        (values,), lambda x, axis: x.mean(axis) ** 2, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert ours.value == pytest.approx(values.mean() ** 2)


def test_bca_of_a_sum_of_absolute_values_is_scipys() -> None:
    """It grows with the noise of a resample: most of them lie above the estimate, and the interval comes back down."""
    columns = np.random.default_rng(6).normal(0.05, 1, size=(40, 4))
    ours = bca(columns, lambda sums: np.abs(sums).sum(axis=1))
    drawn = np.abs(resampled_sums(columns)).sum(axis=1)
    assert (drawn < ours.value).mean() < 0.4
    theirs = stats.bootstrap(
        tuple(columns.T), lambda *rows, axis: sum(np.abs(row.sum(axis)) for row in rows), paired=True, method="BCa",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.05)
    assert ours.high < 0.9 * np.quantile(drawn, 0.975)


def test_runs_on_the_same_prompts_are_averaged_prompt_by_prompt() -> None:
    """Two runs: as if their prompts were different ones the interval would be too short."""
    generator = np.random.default_rng(7)
    held = {"same": 0, "apart": 0}
    for _ in range(500):
        prompts = generator.normal(0, 1, 40) + generator.normal(0, 0.4, (2, 40))
        values, errors = prompts.mean(1).tolist(), (prompts.std(1, ddof=1) / math.sqrt(40)).tolist()
        for name, given in (("same", prompts), ("apart", None)):
            estimate = over_runs(values, errors, given)
            held[name] += estimate.low <= 0 <= estimate.high
    assert 0.93 <= held["same"] / 500 <= 0.98
    assert held["apart"] / 500 < 0.9
    gaps = over_runs([1.0, 3.0], [0.3, 0.4], np.array([[0.0, 2.0, math.nan], [2.0, 4.0, 9.0]]))
    assert (gaps.value, gaps.n, gaps.se) == (2.0, 2, pytest.approx(1.0))


def test_what_runs_share_is_the_covariance_of_their_prompts() -> None:
    generator = np.random.default_rng(8)
    common = generator.normal(0, 1, 400)
    found = shared_error(common + generator.normal(0, 2, (4, 400)))
    assert found == pytest.approx(common.std() / 20, rel=0.2)
    assert shared_error(common[None]) == shared_error(common[None, :1].repeat(3, 0)) == 0.0
    assert shared_error(np.array([[1.0, -1.0], [-1.0, 1.0]])) == 0.0


def test_students_interval_of_a_few() -> None:
    estimate = student(np.array([1.0, 2.0, 3.0]))
    assert estimate.value == 2.0
    assert estimate.high - 2.0 == pytest.approx(4.303 * estimate.se, rel=1e-3)
    assert math.isnan(student(np.array([1.0])).low)
