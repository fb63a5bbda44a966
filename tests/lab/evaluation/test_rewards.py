"""Metrics of reward models: the same numbers as while they train, intervals over prompts."""

import numpy as np
import pytest
import torch

from lightning_align.lab.evaluation.rewards import calibrated_error, decided, pair_metrics, subsets
from lightning_align.losses.reward_metrics import accuracy, brier_score, expected_calibration_error


def test_metrics_are_those_of_training() -> None:
    delta = np.random.default_rng(0).normal(0.4, 1.5, 300)
    delta[:5] = 0.0
    metrics = pair_metrics(delta, np.arange(300))
    tensor = torch.from_numpy(delta)
    assert metrics["accuracy"].value == pytest.approx(accuracy(tensor))
    assert metrics["brier"].value == pytest.approx(brier_score(tensor))
    assert metrics["ece"].value == pytest.approx(expected_calibration_error(tensor))
    assert metrics["loss"].value == pytest.approx(float(-torch.nn.functional.logsigmoid(tensor).mean()))
    for metric in metrics.values():
        assert metric.low < metric.value < metric.high
        assert metric.n == 300


def test_rm_2_only_differences_count_and_swapping_turns_accuracy_round() -> None:
    delta = np.random.default_rng(1).normal(0.4, 1.0, 100)
    there, back = (pair_metrics(sign * delta, np.arange(100))["accuracy"].value for sign in (1, -1))
    assert there + back == pytest.approx(1)


def test_pairs_of_a_prompt_are_resampled_together() -> None:
    """Copies of a pair say nothing new: the interval stays as wide."""
    delta = np.random.default_rng(2).normal(0.3, 1.0, 80)
    once = pair_metrics(delta, np.arange(80))["accuracy"]
    copied = pair_metrics(np.repeat(delta, 5), np.repeat(np.arange(80), 5))["accuracy"]
    assert (copied.value, copied.low, copied.high, copied.n) == (once.value, once.low, once.high, 80)


def test_rm_11_scores_that_are_the_true_log_odds_are_calibrated() -> None:
    draw = np.random.default_rng(3)
    odds = draw.normal(0, 1.5, 20_000)
    delta = np.where(draw.random(20_000) < 1 / (1 + np.exp(-odds)), odds, -odds)
    assert pair_metrics(delta, np.arange(20_000))["ece"].value < 0.02


def test_noise_alone_explains_the_error_of_a_calibrated_model_only() -> None:
    draw = np.random.default_rng(4)
    odds = draw.normal(0, 1.5, 500)
    delta = np.where(draw.random(500) < 1 / (1 + np.exp(-odds)), odds, -odds)
    by_chance, p = calibrated_error(delta)
    assert expected_calibration_error(torch.from_numpy(delta)) < by_chance
    assert p > 0.05
    assert calibrated_error(3 * delta)[1] < 0.001


def test_what_does_not_say_which_is_better_is_left_out_and_counted() -> None:
    records = [{"tie": True}, {"weight": 0.0}, {}, {"tie": False, "weight": 2.0}, {"tie": True}]
    assert decided(records) == ([2, 3], {"a tie": 2, "its weight is 0": 1})


def test_subsets_by_any_field() -> None:
    records = [{"a": True, "b": 1}, {"a": False}, {"a": True, "b": None}]
    found = subsets(records, ["a", "b"])
    assert {value: rows.tolist() for value, rows in found["a"].items()} == {"False": [1], "True": [0, 2]}
    assert {value: rows.tolist() for value, rows in found["b"].items()} == {"1": [0]}
