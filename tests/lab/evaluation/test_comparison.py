"""Win rates: golden vectors, both orders, ties; and with the advantage of length taken away."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from lightning_align.lab.evaluation.comparison import both_orders, consistency, per_prompt, score_judge, verdicts
from lightning_align.lab.evaluation.length_control import length_controlled

CASES = json.loads((Path(__file__).parents[2] / "golden" / "golden.json").read_text())["cases"]


def test_golden_win_rate() -> None:
    case = CASES["winrate"]
    a_first, b_first = (np.array(case["inputs"][name], dtype=float) for name in ("a_first", "b_first"))
    results = both_orders(a_first, b_first)
    assert results.tolist() == case["outputs"]["per_prompt"]
    assert results.mean() == pytest.approx(case["outputs"]["win_rate"], rel=1e-12)
    assert consistency(a_first, b_first).mean() == case["outputs"]["consistency"]


@pytest.mark.parametrize("tie_eps", [0.0, 0.3])
def test_eval_2_win_rates_of_both_sides_add_up_to_one(tie_eps: float) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(50, 4)), draw.normal(0.3, 1, size=(50, 3)).round(1)
    ours = per_prompt(both_orders(*score_judge(a, b, tie_eps=tie_eps)))
    theirs = per_prompt(both_orders(*score_judge(b, a, tie_eps=tie_eps)))
    np.testing.assert_allclose(ours + theirs, 1.0, rtol=1e-12)
    assert per_prompt(both_orders(*score_judge(a, a[:, ::-1], tie_eps=tie_eps))).mean() == pytest.approx(0.5)


def test_eval_3_a_judge_with_pure_position_bias() -> None:
    always_first = np.ones(40)
    assert both_orders(always_first, always_first).mean() == 0.5
    assert consistency(always_first, always_first).mean() == 0.0


def test_a_judge_that_scores_is_consistent() -> None:
    a, b = np.array([[1.0, 2.0]]), np.array([[1.0]])
    a_first, b_first = score_judge(a, b)
    assert a_first.tolist() == [[[0.5], [1.0]]]
    assert b_first.tolist() == [[[0.5], [0.0]]]
    assert consistency(a_first, b_first).tolist() == [[[1.0], [1.0]]]


def test_the_tie_band_includes_its_edge_and_what_has_no_score_stays_out() -> None:
    first, second = np.array([1.0, 1.5, 1.6, np.nan]), np.array([1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(verdicts(first, second, tie_eps=0.5), [0.5, 0.5, 1.0, np.nan])
    results = both_orders(*score_judge(first[:, None], second[:, None]))
    np.testing.assert_array_equal(per_prompt(results), [0.5, 1.0, 1.0, np.nan])


# ------------------------------------------------------------------ length
def judged_by_length(means: list[float], prompts: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of a judge who likes the longer answer, more surely the longer it is, of models of these lengths."""
    draw = np.random.default_rng(1)
    difference = np.array([draw.normal(mean, 1.0, prompts) for mean in means])
    chance = 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))
    return (draw.random(difference.shape) < chance).astype(float), difference


def test_eval_7_a_length_only_judge_sees_no_difference_at_equal_length() -> None:
    results, difference = judged_by_length([-1.5, 0.5, 2.0])
    assert results.mean(1) == pytest.approx([0.2, 0.6, 0.8], abs=0.1)
    for rate in length_controlled(results, difference, replicates=50):
        assert rate.value == pytest.approx(0.5, abs=0.03)
        assert rate.low < 0.5 < rate.high


def test_swapping_gives_the_rest_and_a_model_against_itself_a_half() -> None:
    draw = np.random.default_rng(2)
    difference = draw.normal(0.5, 1, (1, 200))
    results = (draw.random((1, 200)) < 0.7).astype(float)
    (ours,) = length_controlled(results, difference, replicates=20)
    (theirs,) = length_controlled(1 - results, -difference, replicates=20)
    assert ours.value + theirs.value == pytest.approx(1, abs=1e-9)
    (same,) = length_controlled(np.full((1, 200), 0.5), difference, replicates=20)
    assert same.value == pytest.approx(0.5, abs=1e-12)


def test_without_a_difference_in_length_it_is_the_win_rate() -> None:
    results = np.array([[1.0] * 14 + [0.0] * 6])
    (rate,) = length_controlled(results, np.zeros((1, 20)), replicates=20)
    assert rate.value == pytest.approx(0.7, abs=1e-6)
    (certain,) = length_controlled(np.ones((1, 20)), np.zeros((1, 20)), replicates=20)
    assert certain.value > 0.99


def test_the_part_of_length_is_held_back() -> None:
    """One model that wins where it is longer, always: without the ridge on φ there is no finite fit."""
    difference = np.concatenate([np.linspace(-2.0, -0.2, 7), np.linspace(0.1, 3.0, 13)])
    wins = (difference > 0).astype(float)
    (rate,) = length_controlled(wins[None], difference[None], replicates=20)
    basis = np.tanh(difference / difference.std())

    def penalised(coefficients: np.ndarray) -> float:
        theta, phi = coefficients
        logits = theta + phi * basis
        return float(np.sum(np.logaddexp(0, logits) - wins * logits) + phi**2 / 2 + 1e-6 * theta**2 / 2)

    theta, phi = optimize.minimize(penalised, np.zeros(2), tol=1e-12).x
    assert 0.5 < phi < 5
    assert rate.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-5)


def test_a_length_controlled_rate_claims_no_more_than_its_prompts_say() -> None:
    nan = np.nan
    (single,) = length_controlled(np.array([[1.0]]), np.zeros((1, 1)), replicates=20)
    assert single.value > 0.5
    assert single.n == 1
    results = np.array([[nan, nan, nan, nan], [1.0, 0.0, nan, nan], [1.0, 1.0, 0.0, 1.0]])
    nothing, two, four = length_controlled(results, np.zeros((3, 4)), replicates=2000)
    assert (nothing.n, two.n, four.n) == (0, 2, 4)
    assert np.isnan([nothing.value, nothing.low, nothing.high, nothing.se, single.low, single.high]).all()
    assert four.value == pytest.approx(0.75, abs=1e-6)
    # of two prompts a resample holds both, one of them or none: the last kind is left out, not counted as one half
    assert two.se**2 == pytest.approx(_variance_of_two_of_four(), rel=0.1)


def _variance_of_two_of_four() -> float:
    """Of the share of wins, over all resamples of four prompts of which one was won, one lost and two say nothing."""
    shares = [
        drawn.count(0) / (drawn.count(0) + drawn.count(1))
        for drawn in product(range(4), repeat=4)
        if drawn.count(0) + drawn.count(1)
    ]
    return float(np.var(shares))
