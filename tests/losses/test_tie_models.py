"""Comparisons that may tie: probabilities, limits, and the loss."""

from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.losses.reward_model import preference_loss
from lightning_align.losses.tie_models import TIE_MODELS, davidson, rao_kupper, tied_preference_loss


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(delta=st.floats(-30, 30), free=st.floats(-20, 20), name=st.sampled_from(sorted(TIE_MODELS)))
@settings(deadline=None, max_examples=200)
def test_rm_7_three_probabilities_sum_to_one(delta: float, free: float, name: str) -> None:
    model = TIE_MODELS[name]
    there = model.log_probabilities(double(delta), model.from_free(double(free))).exp()
    back = model.log_probabilities(double(-delta), model.from_free(double(free))).exp()
    assert float(there.sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(there, back.flip(0))  # win and loss change places


@given(delta=st.floats(-30, 30))
@settings(deadline=None, max_examples=50)
def test_rm_7_without_a_tie_band_it_is_bradley_terry(delta: float) -> None:
    right = torch.sigmoid(double(delta))
    for limit in (rao_kupper(double(delta), double(0.0)), davidson(double(delta), double(-700.0))):
        win, tie, loss = limit.exp()
        torch.testing.assert_close(win, right)
        torch.testing.assert_close(loss, 1 - right, rtol=1e-6, atol=1e-15)
        assert float(tie) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rao_kupper_as_published(dtype: torch.dtype) -> None:
    """π_i / (π_i + θ π_j), (θ² − 1) π_i π_j / …, π_j / (π_j + θ π_i)."""
    first, second, theta = 2.5, 0.8, 1.7
    win, tie, loss = rao_kupper(torch.tensor([log(first / second)], dtype=dtype), torch.tensor(log(theta), dtype=dtype))
    bottoms = first + theta * second, second + theta * first
    assert float(win.exp()) == pytest.approx(first / bottoms[0], rel=1e-6)
    assert float(loss.exp()) == pytest.approx(second / bottoms[1], rel=1e-6)
    assert float(tie.exp()) == pytest.approx((theta**2 - 1) * first * second / (bottoms[0] * bottoms[1]), rel=1e-6)


@pytest.mark.parametrize("name", sorted(TIE_MODELS))
def test_a_new_model_calls_few_equal_answers_a_tie(name: str) -> None:
    model = TIE_MODELS[name]
    tie = model.log_probabilities(torch.zeros(1), model.from_free(torch.tensor(model.to_free(model.start))))[1].exp()
    assert 0.04 < float(tie) < 0.06


def loss_of(name: str, scores: Tensor, free: Tensor, **options: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    model = TIE_MODELS[name]
    index = torch.arange(len(scores) // 2) * 2
    return tied_preference_loss(
        scores, index, index + 1, model.from_free(free), log_probabilities=model.log_probabilities, **options
    )


SCORES = [0.3, -0.5, 1.0, 1.2, 0.0, 2.0, -1.0, 0.4]
LABEL = [1.0, 0.5, 0.0, 0.8]


@pytest.mark.parametrize("name", sorted(TIE_MODELS))
def test_loss_of_wins_ties_and_losses(name: str) -> None:
    scores, free, label, weight = double(*SCORES), double(-0.4)[0], double(*LABEL), double(1, 2, 0.5, 1)
    model = TIE_MODELS[name]
    win, tie, lose = model.log_probabilities(scores[::2] - scores[1::2], model.from_free(free))
    loss, metrics = loss_of(name, scores, free, label=label, weight=weight)
    expected = -(win[0] + 2 * tie[1] + 0.5 * lose[2] + 0.8 * win[3] + 0.2 * lose[3])
    torch.testing.assert_close(loss, expected)
    assert float(metrics["ties/observed"][0] / metrics["ties/observed"][1]) == pytest.approx(2 / 4.5)
    share = float((weight * tie.exp()).sum() / weight.sum())
    assert float(metrics["ties/predicted"][0] / metrics["ties/predicted"][1]) == pytest.approx(share)


@pytest.mark.parametrize("name", sorted(TIE_MODELS))
def test_margins_smoothing_and_gradients(name: str) -> None:
    label = double(*LABEL)
    margin = double(1.0, 5.0, 0.3, 0.0)

    def loss(scores: Tensor, free: Tensor) -> Tensor:
        return loss_of(name, scores, free, label=label, margin=margin, label_smoothing=0.1, center_coef=0.01)[0]

    arguments = double(*SCORES).requires_grad_(), double(-0.4)[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, arguments)
    moved = margin.clone()
    moved[1] = 0  # a tie has no margin
    again, metrics = loss_of(name, *arguments, label=label, margin=moved, label_smoothing=0.1, center_coef=0.01)
    torch.testing.assert_close(again, loss(*arguments))
    without = loss_of(name, *arguments, label=label)[1]
    assert metrics["ties/predicted"] == without["ties/predicted"]  # margins are for learning only
    ties = {"label": torch.full_like(label, 0.5)}
    torch.testing.assert_close(
        loss_of(name, *arguments, label_smoothing=0.1, **ties)[0], loss_of(name, *arguments, **ties)[0]
    )


def test_rm_7_the_loss_tends_to_bradley_terrys_where_nothing_ties() -> None:
    scores, label = double(*SCORES), double(1.0, 0.9, 0.0, 1.0)
    index = torch.arange(4) * 2
    plain, metrics = preference_loss(scores, index, index + 1, label=label, label_smoothing=0.1, center_coef=0.02)
    for name in TIE_MODELS:
        loss, own = loss_of(name, scores, double(-40.0)[0], label=label, label_smoothing=0.1, center_coef=0.02)
        torch.testing.assert_close(loss, plain)
        assert own["accuracy"] == metrics["accuracy"]


@pytest.mark.parametrize("name", sorted(TIE_MODELS))
def test_padding_and_empty_batches_leave_finite_gradients(name: str) -> None:
    scores = torch.tensor([torch.nan, torch.nan, 1.0, 0.0], requires_grad=True)
    free = torch.tensor(TIE_MODELS[name].to_free(TIE_MODELS[name].start), requires_grad=True)
    label = torch.tensor([0.5, 0.5])
    for weight in (torch.tensor([0.0, 1.0]), torch.zeros(2)):
        loss, metrics = loss_of(name, scores, free, label=label, weight=weight)
        gradients = torch.autograd.grad(loss, (scores, free))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert all(torch.isfinite(value) for metric in metrics.values() for value in metric)
    assert loss == 0


def test_the_parameter_finds_the_share_of_ties() -> None:
    """Answers of equal worth of which three in ten tie."""
    label = torch.tensor([0.5] * 300 + [1.0] * 350 + [0.0] * 350)
    for name, model in TIE_MODELS.items():
        free = torch.tensor(model.to_free(model.start), requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss_of(name, torch.zeros(2000), free, label=label)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        tie = model.log_probabilities(torch.zeros(1), model.from_free(free.detach()))[1].exp()
        assert float(tie) == pytest.approx(0.3, abs=5e-3)
