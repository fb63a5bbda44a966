"""Pairwise reward-model loss and its metrics."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.data.records import STRENGTHS
from lightning_align.losses.reward_metrics import (
    accuracy,
    accuracy_by_strength,
    accuracy_length_matched,
    brier_score,
    calibration_metrics,
    expected_calibration_error,
    fit_temperature,
    kendall_tau,
    pair_metrics,
    regression_metrics,
    reliability_bins,
    score_metrics,
    spearman,
)
from lightning_align.losses.reward_model import preference_loss, regression_loss

SMALL, LARGE = [1.0, 2 / 3, 1 / 3, 0.0], [3.0, 2.0, 1.0, 0.0]


def interleaved(chosen: Tensor, rejected: Tensor, **options: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    scores = torch.stack([chosen, rejected], 1).flatten()
    index = torch.arange(len(chosen)) * 2
    return preference_loss(scores, index, index + 1, **options)


def random_scores(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scores[0], scores[1]


def ratio(metric: tuple[Tensor, Tensor]) -> float:
    return float(metric[0] / metric[1])


@given(shift=st.floats(-50, 50), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_rm_2_a_common_shift_changes_neither_loss_nor_accuracy(shift: float, seed: int) -> None:
    chosen, rejected = random_scores(seed=seed)
    loss, metrics = interleaved(chosen, rejected)
    moved, moved_metrics = interleaved(chosen + shift, rejected + shift)
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    assert moved_metrics["accuracy"] == metrics["accuracy"]
    centred, _ = interleaved(chosen, rejected, center_coef=0.01)
    centred_moved, _ = interleaved(chosen + 100, rejected + 100, center_coef=0.01)
    assert centred_moved > centred + 1  # what centring is for


def test_rm_3_swapping_the_sides() -> None:
    chosen, rejected = random_scores()
    label = torch.tensor([1.0, 0.9, 0.5, 0.2], dtype=torch.float64)
    there, metrics = interleaved(chosen, rejected, label=label)
    back, back_metrics = interleaved(rejected, chosen, label=1 - label)
    torch.testing.assert_close(back, there)
    assert back_metrics["margin"][0] == -metrics["margin"][0]
    assert back_metrics["accuracy"] == metrics["accuracy"]
    level, _ = interleaved(torch.zeros(1), torch.zeros(1))
    assert math.isclose(float(level), math.log(2), rel_tol=1e-6)


def test_smoothing_leaves_a_tie_a_tie() -> None:
    sides, tie = random_scores(), torch.full((4,), 0.5, dtype=torch.float64)
    plain, smoothed = (interleaved(*sides, label=tie, label_smoothing=rate)[0] for rate in (0.0, 0.2))
    torch.testing.assert_close(smoothed, plain)
    torch.testing.assert_close(interleaved(*sides[::-1], label=tie, label_smoothing=0.2)[0], plain)


@pytest.mark.parametrize("table", [[0.0] * 4, SMALL, LARGE], ids=["none", "small", "large"])
def test_rm_4_gradients_by_margin_table(table: list[float]) -> None:
    chosen, rejected = (x.requires_grad_() for x in random_scores())
    margin = torch.tensor(table, dtype=torch.float64)
    loss, _ = interleaved(chosen, rejected, margin=margin)
    to_chosen, to_rejected = torch.autograd.grad(loss, (chosen, rejected))
    push = torch.sigmoid(margin - (chosen - rejected)).detach()
    torch.testing.assert_close(to_chosen, -push)
    torch.testing.assert_close(to_rejected, push)


def all_pairs(scores: Tensor, offset: int) -> tuple[list[int], list[int], list[float]]:
    """Pairs of a ranking given best first, each weighing 1 / number of pairs."""
    pairs = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    return [offset + i for i, _ in pairs], [offset + j for _, j in pairs], [1 / len(pairs)] * len(pairs)


def test_rm_5_two_responses_are_a_pair_and_every_prompt_weighs_the_same() -> None:
    chosen, rejected = random_scores(1)
    first, second, weight = all_pairs(torch.stack([chosen[0], rejected[0]]), 0)
    kwise, _ = preference_loss(
        torch.stack([chosen[0], rejected[0]]), torch.tensor(first), torch.tensor(second), weight=torch.tensor(weight)
    )
    torch.testing.assert_close(kwise, interleaved(chosen, rejected)[0])

    nine, two = torch.zeros(9, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    parts = [all_pairs(nine, 0), all_pairs(two, 9)]
    loss, metrics = preference_loss(
        torch.cat([nine, two]).requires_grad_(),
        torch.tensor(parts[0][0] + parts[1][0]),
        torch.tensor(parts[0][1] + parts[1][1]),
        weight=torch.tensor(parts[0][2] + parts[1][2], dtype=torch.float64),
    )
    assert math.isclose(float(metrics["loss"][1]), 2, rel_tol=1e-12)  # two prompts
    assert math.isclose(float(loss), 2 * math.log(2), rel_tol=1e-12)  # each gives ln 2, whatever its size


def test_micro_batches_add_up_to_the_batch() -> None:
    chosen, rejected = random_scores(8)
    weight = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, metrics = interleaved(chosen, rejected, weight=weight)
    parts = [interleaved(chosen[r], rejected[r], weight=weight[r]) for r in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name in ("loss", "accuracy", "margin", "mean_reward"):
        total = [sum(part[name][side] for _, part in parts) for side in (0, 1)]
        torch.testing.assert_close(total[0] / total[1], metrics[name][0] / metrics[name][1])


def test_metrics_count_ties_half_and_leave_out_padding_rows_and_undecided_pairs() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, 5.0, torch.nan, torch.nan])
    first, second = torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5, 7])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last pair is padding
    label = torch.tensor([1.0, 1.0, 0.5, 1.0])  # the third is a labelled tie
    scores.requires_grad_()
    loss, metrics = preference_loss(scores, first, second, weight=weight, label=label)
    loss.backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert ratio(metrics["accuracy"]) == 0.75
    assert ratio(metrics["margin"]) == pytest.approx((1 + 0 - 6) / 3)
    assert ratio(metrics["mean_reward"]) == pytest.approx(7 / 6)
    assert ratio(metrics["min_reward"]) == -1
    assert ratio(metrics["max_reward"]) == 5
    assert not any(value.requires_grad for pair in metrics.values() for value in pair)


def test_conv_9_a_batch_of_padding_rows_only() -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, metrics = preference_loss(scores, torch.tensor([0]), torch.tensor([1]), weight=torch.zeros(1))
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert not scores.grad.any()
    assert all(torch.isfinite(a) and b == 0 for a, b in metrics.values())
    none = torch.empty(0, dtype=torch.long)
    assert preference_loss(scores, none, none)[0] == 0


def test_regression_by_squares_and_by_huber() -> None:
    scores = torch.tensor([0.0, 1.5, -3.0, torch.nan], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.5, 1.0, 1.0, 0.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0])
    error = [0.5, 0.5, 4.0]
    squares, metrics = regression_loss(scores, targets, weight=weight)
    assert float(squares.detach()) == pytest.approx(sum(w * e**2 / 2 for w, e in zip((1, 2, 0.5), error, strict=True)))
    assert float(metrics["loss"][1]) == 3.5
    assert ratio(metrics["mean_reward"]) == pytest.approx(-0.5)
    for delta in (1.0, 0.25):
        huber, _ = regression_loss(scores, targets, weight=weight, delta=delta)
        costs = [e**2 / 2 if e <= delta else delta * (e - delta / 2) for e in error]
        expected = sum(w * cost for w, cost in zip((1, 2, 0.5), costs, strict=True))
        assert float(huber.detach()) == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(huber, scores)
        assert gradient[3] == 0
        assert gradient[2].abs() == pytest.approx(0.5 * delta)  # an outlier pulls no harder
    assert regression_loss(scores[3:], targets[3:], weight=weight[3:])[0] == 0


def test_metrics_of_a_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(50, dtype=torch.float64, generator=generator)
    predicted = 0.8 * score + 0.3 + 0.1 * torch.randn(50, dtype=torch.float64, generator=generator)
    used = torch.ones(50)
    used[:5] = 0
    parts = [
        score_metrics(
            predicted[rows],
            {"score": score[rows], "response_weight": used[rows], "completion_mask": torch.ones(25, 4)},
        )
        for rows in (slice(0, 25), slice(25, 50))
    ]
    metrics = regression_metrics(parts)
    error = (predicted - score)[5:]
    assert metrics["mae"] == pytest.approx(float(error.abs().mean()))
    assert metrics["rmse"] == pytest.approx(float((error**2).mean()) ** 0.5)
    assert metrics["r2"] == pytest.approx(1 - float((error**2).mean() / score[5:].var(unbiased=False)))
    from scipy.stats import spearmanr

    assert metrics["spearman"] == pytest.approx(spearmanr(predicted[5:], score[5:]).statistic)
    assert "length_correlation" not in metrics  # all lengths are equal


def test_gradcheck() -> None:
    chosen, rejected = (x.requires_grad_() for x in random_scores())
    options = {"label_smoothing": 0.1, "center_coef": 0.01, "margin": torch.tensor(SMALL, dtype=torch.float64)}
    assert torch.autograd.gradcheck(lambda c, r: interleaved(c, r, **options)[0], (chosen, rejected))


def test_saturated_differences_stay_finite_in_float32() -> None:
    loss, _ = interleaved(torch.tensor([-200.0, 200.0]), torch.tensor([200.0, -200.0]), label_smoothing=0.1)
    assert torch.isfinite(loss)


# ------------------------------------------------------------------ metrics of an evaluation
def true_log_odds(count: int = 20_000) -> Tensor:
    """Differences Δ whose sign is right with probability σ(|Δ|): what a perfectly calibrated model gives."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * torch.randn(count, dtype=torch.float64, generator=generator).abs()
    right = torch.rand(count, dtype=torch.float64, generator=generator) < torch.sigmoid(size)
    return torch.where(right, size, -size)


def test_rm_11_scores_that_are_the_true_log_odds_are_calibrated() -> None:
    delta = true_log_odds()
    assert expected_calibration_error(delta) < 0.02
    assert expected_calibration_error(3 * delta) > 0.05  # over-confident
    assert abs(fit_temperature(delta) - 1) < 0.05
    assert abs(fit_temperature(3 * delta) - 3) < 0.15
    curve = reliability_bins(delta)
    assert sum(point.count for point in curve) == len(delta)
    for point in curve:
        assert abs(point.accuracy - point.predicted) < 4 * (0.25 / point.count) ** 0.5


def test_rm_10_coin_flips_score_one_half() -> None:
    delta = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert abs(accuracy(delta) - 0.5) < 3 * 0.5 / 20_000**0.5


def test_temperature_stays_in_range_where_there_is_no_optimum() -> None:
    assert 1e-3 <= fit_temperature(torch.tensor([1.0, 2.0])) < 2e-3
    assert fit_temperature(torch.tensor([-1.0, -2.0])) == pytest.approx(1e3, rel=1e-6)


def test_brier() -> None:
    assert brier_score(torch.zeros(5)) == 0.25
    assert brier_score(torch.tensor([50.0])) < 1e-12


def test_accuracy_by_strength_and_length() -> None:
    delta = torch.tensor([1.0, -1.0, 1.0, 0.0])
    by = accuracy_by_strength(delta, torch.tensor([0, 0, 3, -1]), STRENGTHS)
    assert by == {"significantly": 0.5, "negligibly": 1.0}
    lengths = torch.tensor([10, 10, 100, 7]), torch.tensor([20, 11, 90, 7])
    assert accuracy_length_matched(delta, *lengths) == 0.5


def test_spearmans_correlation_with_ties() -> None:
    scores, lengths = torch.tensor([0.1, 0.5, 0.5, 2.0, -3.0]), torch.tensor([3, 5, 6, 6, 1])
    from scipy.stats import spearmanr

    assert spearman(scores, lengths) == pytest.approx(spearmanr(scores, lengths).statistic)
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))


def test_kendall_tau_is_a_mean_over_prompts() -> None:
    delta, group = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([4, 4, 4, 9])
    assert kendall_tau(delta, group) == pytest.approx((1 / 3 + 1) / 2)


def responses(chosen: list[float], rejected: list[float], label: list[float], group: list[int]) -> tuple[Tensor, Any]:
    count = len(chosen)
    batch = {
        "pair_chosen": torch.arange(count) * 2,
        "pair_rejected": torch.arange(count) * 2 + 1,
        "pair_weight": torch.ones(count),
        "pair_label": torch.tensor(label),
        "pair_strength": torch.full((count,), -1),
        "completion_mask": torch.ones(2 * count, 3, dtype=torch.bool),
        "group": torch.tensor(group).repeat_interleave(2),
    }
    return torch.tensor([chosen, rejected]).T.flatten(), batch


def test_calibration_metrics_over_batches() -> None:
    one = pair_metrics(*responses([1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0, 1, 2]))
    two = pair_metrics(*responses([3.0, -1.0, 0.0], [0.0, 2.0, 1.0], [1.0] * 3, [0] * 3))
    assert one["chosen"].tolist() == [1.0, 1.0]  # label 0 turns its pair round, the tie is left out
    metrics = calibration_metrics([one, two], STRENGTHS)
    assert "accuracy" not in metrics  # which is weighted, and among the sums of an evaluation
    # groups of different batches are different prompts: if they were one, it would be 1/2
    assert metrics["rank/kendall_tau"] == pytest.approx((1 + 1 - 1 / 3) / 3)
    assert "length_correlation" not in metrics  # all lengths are equal
    assert "accuracy/better" not in metrics
    assert calibration_metrics([pair_metrics(*responses([1.0], [0.0], [0.5], [0]))], STRENGTHS) == {}
