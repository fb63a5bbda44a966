"""Labels and rewards from a judge's log-probs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.losses.judge import both_orders, expected_rating, label_metrics, soft_label
from lightning_align.losses.masked import Metrics
from lightning_align.losses.reward_model import preference_loss

ULP = 2**-52


def shares(metrics: Metrics) -> dict[str, float]:
    return {name: float(a / b) for name, (a, b) in metrics.items()}


def draw(number: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(number, dtype=torch.float64, generator=generator) for _ in range(2))
    return first, second


# ------------------------------------------------------------------ one comparison
def test_cai_2_options_swapped_give_the_complement() -> None:
    logp_a, logp_b = (values.log() for values in draw())
    label = soft_label(logp_a, logp_b)
    torch.testing.assert_close(label, logp_a.exp() / (logp_a.exp() + logp_b.exp()))
    torch.testing.assert_close(label + soft_label(logp_b, logp_a), torch.ones(50).double(), rtol=0, atol=ULP)
    bounded = soft_label(logp_a, logp_b, bounds=(0.4, 0.6))
    torch.testing.assert_close(bounded + soft_label(logp_b, logp_a, bounds=(0.4, 0.6)), torch.ones(50).double())


def test_cai_2_bounds_hold() -> None:
    logp_a, logp_b = (values.log() * 3 for values in draw())
    label, bounded = soft_label(logp_a, logp_b), soft_label(logp_a, logp_b, bounds=(0.4, 0.6))
    inside = (label > 0.4) & (label < 0.6)
    assert inside.any()
    assert (bounded[inside] == label[inside]).all()
    assert (bounded[label < 0.4] == 0.4).all()
    assert (bounded[label > 0.6] == 0.6).all()
    with pytest.raises(ValueError, match=r"bounds are \(0\.6, 0\.4\)"):
        soft_label(logp_a, logp_b, bounds=(0.6, 0.4))


def test_cai_2_a_label_of_one_half_moves_no_reward_model_at_equal_scores() -> None:
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    label = soft_label(torch.tensor([-3.0]), torch.tensor([-3.0]))
    loss, _ = preference_loss(scores, torch.tensor([0]), torch.tensor([1]), label=label)
    assert not torch.autograd.grad(loss, scores)[0].any()


def test_far_log_probs_and_half_precision() -> None:
    far = soft_label(torch.tensor([-1e4, -2.0, -1e4]), torch.tensor([-2.0, -1e4, -1e4]))
    assert far.tolist() == [0.0, 1.0, 0.5]
    assert soft_label(torch.tensor([-1.0]).bfloat16(), torch.tensor([-2.0]).bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------ both orders
@given(bias=st.floats(0, 1))
def test_aif_1_a_judge_of_places_only_is_undone(bias: float) -> None:
    same = torch.full((3,), bias, dtype=torch.float64)
    label, metrics = both_orders(same, same)
    assert (label == 0.5).all()
    found = shares(metrics)
    assert found["ai/position_bias"] == (bias != 0.5)
    assert found["ai/undecided"] == 1
    assert found["ai/mean_confidence"] == 0.5


def test_aif_1_position_bias_is_the_share_whose_winner_changes() -> None:
    first, swapped = torch.tensor([0.9, 0.9, 0.2, 0.5, 0.4]), torch.tensor([0.1, 0.8, 0.9, 0.9, 0.3])
    label, metrics = both_orders(first, swapped)
    torch.testing.assert_close(label, torch.tensor([0.9, 0.55, 0.15, 0.3, 0.55]))
    assert metrics["ai/position_bias"] == (2, 5)


def test_aif_2_swapped_completions_give_the_complement() -> None:
    """A judge that answers by what it is shown: swapping the completions exchanges the two answers."""
    first, swapped = draw(1000, seed=2)
    label, metrics = both_orders(first, swapped)
    other, other_metrics = both_orders(swapped, first)
    torch.testing.assert_close(label + other, torch.ones(1000).double(), rtol=0, atol=ULP)
    torch.testing.assert_close(label, 0.5 * (first + 1 - swapped))
    torch.testing.assert_close(other_metrics, metrics)
    certain, _ = both_orders(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert certain.tolist() == [1.0, 0.0]


def test_metrics_of_labels() -> None:
    label = torch.tensor([0.9, 0.5, 0.46, 0.1, 0.56])
    found = shares(label_metrics(label, torch.tensor([1.0, 0.0, 0.7, 0.2, 0.5])))
    assert found["ai/alignment"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["ai/undecided"] == pytest.approx(2 / 5)
    assert found["ai/mean_confidence"] == pytest.approx((0.9 + 0.5 + 0.54 + 0.9 + 0.56) / 5)
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in label.tolist()]
    assert found["cai/label_entropy"] == pytest.approx(sum(entropies) / 5)
    assert shares(label_metrics(torch.tensor([0.0, 1.0])))["cai/label_entropy"] == 0
    assert "ai/alignment" not in label_metrics(label)


def test_metrics_of_parts_add_up() -> None:
    first, swapped = draw(20, seed=3)
    gold = (first > 0.4).double()
    parts = [
        label_metrics(both_orders(a, b)[0], g)
        for a, b, g in zip(*(x.split(7) for x in (first, swapped, gold)), strict=True)
    ]
    whole = label_metrics(both_orders(first, swapped)[0], gold)
    for name, sides in whole.items():
        for side in (0, 1):
            torch.testing.assert_close(sum(part[name][side] for part in parts), sides[side])


def test_aif_4_training_on_soft_labels_recovers_the_log_odds() -> None:
    label = torch.tensor([0.3], dtype=torch.float64)
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], lr=1.0, max_iter=50, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = preference_loss(scores, torch.tensor([0]), torch.tensor([1]), label=label)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((scores[0] - scores[1]).detach()) == pytest.approx(math.log(0.3 / 0.7), abs=1e-6)


# ------------------------------------------------------------------ ratings
def test_aif_3_equal_ratings_have_reward_0() -> None:
    for level in (-50.0, -3.0, 0.0):
        rating = expected_rating(torch.full((2, 10), level, dtype=torch.float64))
        torch.testing.assert_close(rating.reward, torch.zeros(2).double(), rtol=0, atol=1e-15)
        torch.testing.assert_close(rating.score, torch.full((2,), 5.5).double())


def test_aif_3_certain_ratings_span_the_interval() -> None:
    certain = torch.full((10, 10), -torch.inf, dtype=torch.float64)
    certain.fill_diagonal_(-0.5)
    rating = expected_rating(certain)
    torch.testing.assert_close(rating.score, torch.arange(1, 11).double())
    torch.testing.assert_close(rating.reward, 2 * torch.arange(10).double() / 9 - 1)
    assert (rating.reward[0], rating.reward[-1]) == (-1, 1)
    torch.testing.assert_close(rating.mass, torch.full((10,), math.exp(-0.5)).double())


def test_ratings_equal_a_loop_and_do_not_depend_on_the_mass() -> None:
    logp = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(1) - 1
    rating = expected_rating(logp)
    for row, score, reward, mass in zip(logp.tolist(), *(x.tolist() for x in rating), strict=True):
        chances = [math.exp(value) for value in row]
        expected = sum(k * chance for k, chance in enumerate(chances, 1)) / sum(chances)
        assert score == pytest.approx(expected)
        assert reward == pytest.approx(2 * (expected - 1) / 9 - 1)
        assert mass == pytest.approx(sum(chances))
        assert mass == pytest.approx(math.exp(-1))
    shifted = expected_rating(logp - 30)
    torch.testing.assert_close(shifted.reward, rating.reward)
    five = expected_rating(logp[:, :5])
    torch.testing.assert_close(five.reward, 2 * (five.score - 1) / 4 - 1)


def test_a_judge_that_rates_nothing_leaves_the_completion_unscored() -> None:
    rating = expected_rating(torch.tensor([[-torch.inf] * 10, [-1.0] * 10]))
    assert rating.reward.isnan().tolist() == [True, False]
    assert rating.mass[0] == 0
