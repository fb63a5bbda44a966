"""Plackett–Luce against the probabilities of all orders."""

from itertools import permutations
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.losses.ranking import ORDERS, orders_of, plackett_luce_loss
from lightning_align.losses.reward_model import preference_loss


def probability(best_first: list[float]) -> float:
    """That the best is chosen first, then the best of the rest, and so on."""
    chance = 1.0
    for place in range(len(best_first)):
        chance *= exp(best_first[place]) / sum(exp(score) for score in best_first[place:])
    return chance


def by_enumeration(scores: list[float], ranks: list[int]) -> float:
    """Mean of −ln P over all orders in which better ranks stand first, by K − 1."""
    count = len(scores)
    orders = [order for order in permutations(range(count)) if sorted(ranks) == [ranks[i] for i in order]]
    losses = [-log(probability([scores[i] for i in order])) for order in orders]
    return sum(losses) / len(losses) / (count - 1)


def loss_of(scores: list[float], ranks: list[int]) -> float:
    loss, _ = plackett_luce_loss(
        torch.tensor(scores, dtype=torch.float64), torch.arange(len(scores))[None], torch.tensor([ranks])
    )
    return float(loss)


rankings = (
    st.integers(2, 5)
    .flatmap(
        lambda k: st.tuples(
            st.lists(st.floats(-4, 4), min_size=k, max_size=k), st.lists(st.integers(1, k), min_size=k, max_size=k)
        )
    )
    .filter(lambda ranking: max(map(ranking[1].count, ranking[1])) <= 4)
)


@given(ranking=rankings)
@settings(deadline=None, max_examples=150)
def test_rm_6_loss_is_that_of_all_orders_enumerated(ranking: tuple[list[float], list[int]]) -> None:
    assert loss_of(*ranking) == pytest.approx(by_enumeration(*ranking), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_rm_6_probabilities_of_all_orders_sum_to_one(count: int) -> None:
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count)).tolist()
    total = sum(exp(-(count - 1) * loss_of(scores, [p + 1 for p in places])) for places in permutations(range(count)))
    assert total == pytest.approx(1, rel=1e-6)


@given(ranking=rankings, shift=st.floats(-100, 100))
@settings(deadline=None, max_examples=60)
def test_rm_6_a_common_shift_changes_nothing(ranking: tuple[list[float], list[int]], shift: float) -> None:
    scores, ranks = ranking
    assert loss_of([score + shift for score in scores], ranks) == pytest.approx(loss_of(scores, ranks), abs=1e-9)


@pytest.mark.parametrize(("ranks", "label"), [([1, 2], 1.0), ([2, 1], 0.0), ([1, 1], 0.5)])
def test_two_are_bradley_terry_and_a_tie_is_a_soft_label(ranks: list[int], label: float) -> None:
    scores = torch.tensor([0.7, -0.4], dtype=torch.float64)
    pair = preference_loss(scores, torch.tensor([0]), torch.tensor([1]), label=torch.tensor([label]))[0]
    assert loss_of(scores.tolist(), ranks) == pytest.approx(float(pair), rel=1e-12)


def test_many_tied_stand_in_24_orders_of_which_none_puts_one_before_another_more_often() -> None:
    real = torch.ones(1, 7, dtype=torch.bool)
    orders = orders_of(torch.tensor([[1, 2, 2, 2, 2, 2, 3]]), real)
    assert orders.shape == (ORDERS, 1, 7)
    assert (orders[:, 0, 0] == 0).all()
    assert (orders[:, 0, 6] == 6).all()
    places = orders[:, 0].argsort(-1)
    assert all(int((places[:, a] < places[:, b]).sum()) == ORDERS // 2 for a in range(1, 6) for b in range(1, a))
    # all equal: the loss is that of any order, whatever is drawn
    assert loss_of([0.3] * 7, [1] * 7) == pytest.approx(sum(log(k) for k in range(2, 8)) / 6)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three prompts of 3, 2 and 4 responses; some rows of scores belong to none."""
    scores = torch.randn(12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scores[[3, 8, 11]] = torch.nan
    rows = torch.tensor([[0, 1, 2, -1], [5, 4, -1, -1], [6, 7, 9, 10]])
    ranks = torch.tensor([[2, 1, 2, 0], [1, 2, 0, 0], [3, 1, 2, 4]])
    return scores, rows, ranks, torch.tensor([1.0, 0.5, 2.0])


def test_prompts_of_unequal_size_add_up_by_their_weight() -> None:
    scores, rows, ranks, weight = batch()
    loss, metrics = plackett_luce_loss(scores, rows, ranks, weight=weight)
    alone = [
        by_enumeration([float(scores[row]) for row in own if row >= 0], [rank for rank in order if rank])
        for own, order in zip(rows.tolist(), ranks.tolist(), strict=True)
    ]
    assert float(loss) == pytest.approx(sum(w * one for w, one in zip(weight.tolist(), alone, strict=True)))
    assert float(metrics["loss"][1]) == 3.5
    parts = [plackett_luce_loss(scores, rows[[i]], ranks[[i]], weight=weight[[i]])[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss)


def test_gradients_are_those_of_finite_differences_and_none_reaches_padding() -> None:
    scores, rows, ranks, weight = batch()
    real = scores.isfinite()

    def loss_of_real(values: Tensor) -> Tensor:
        return plackett_luce_loss(scores.masked_scatter(real, values), rows, ranks, weight=weight)[0]

    assert torch.autograd.gradcheck(loss_of_real, scores[real].clone().requires_grad_())
    scores.requires_grad_()
    plackett_luce_loss(scores, rows, ranks, weight=weight)[0].backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad[~real].eq(0).all()
    # a common shift changes nothing: the gradients of a prompt sum to 0
    for own in rows.tolist():
        assert abs(float(scores.grad[[row for row in own if row >= 0]].sum())) < 1e-12


def test_conv_9_a_prompt_of_weight_zero_touches_nothing() -> None:
    scores = torch.tensor([torch.nan, 1.0], requires_grad=True)
    loss, metrics = plackett_luce_loss(scores, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), weight=torch.zeros(1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert scores.grad is not None
    assert not scores.grad.any()
    assert metrics["loss"][1] == 0


def test_scores_far_apart_stay_finite_in_float32() -> None:
    loss, _ = plackett_luce_loss(
        torch.tensor([-300.0, 300.0, 0.0]), torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]])
    )
    assert float(loss) == pytest.approx(300)
