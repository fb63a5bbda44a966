"""PPO's clipped losses."""

import math

import pytest
import torch
from torch import Tensor

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.policy import ppo_policy_loss
from lightning_align.losses.value import value_loss


def batch(seed: int = 0, rows: int = 4, length: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and a mask with ends that differ."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, dtype=torch.float64, generator=generator) * 3
    logp = old + 0.4 * torch.randn(rows, length, dtype=torch.float64, generator=generator)
    advantages = torch.randn(rows, length, dtype=torch.float64, generator=generator)
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
    return logp, old, advantages, mask


def token_gradient(advantage: float, ratio: float, **options: float) -> float:
    """d loss / d logp of one token."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, _ = ppo_policy_loss(
        logp, torch.zeros(1, 1), torch.tensor([[advantage]], dtype=torch.float64), torch.ones(1, 1), **options
    )
    return float(torch.autograd.grad(loss, logp)[0])


def test_ppo_3_on_the_first_step_it_is_the_vanilla_policy_gradient() -> None:
    old, _, advantages, mask = batch()
    logp = old.clone().requires_grad_()
    loss, metrics = ppo_policy_loss(logp, old, advantages, mask)
    expected = -(advantages * logp).where(mask, 0.0).sum() / mask.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(expected, logp)[0])
    ratios = {name: float(a / b) for name, (a, b) in metrics.items()}
    assert ratios["val/ratio"] == 1
    assert ratios["policy/clipfrac_avg"] == 0
    assert ratios["policy/approxkl_avg"] == 0
    torch.testing.assert_close(loss.detach(), -(advantages.where(mask, 0.0).sum() / mask.sum()))


@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf, -1e9])
def test_ppo_4_padding_changes_no_loss_gradient_or_metric(garbage: float) -> None:
    tensors = batch(1)
    mask = tensors[-1]
    columns = torch.nn.functional.pad(mask, (2, 3), value=False)

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.where(mask, garbage), (2, 3), value=garbage)

    logp = tensors[0].clone().requires_grad_()
    wide = padded(tensors[0]).requires_grad_()
    loss, metrics = ppo_policy_loss(logp, *tensors[1:])
    same, same_metrics = ppo_policy_loss(wide, padded(tensors[1]), padded(tensors[2]), columns)
    torch.testing.assert_close(same, loss)
    gradient, wide_gradient = torch.autograd.grad(loss, logp)[0], torch.autograd.grad(same, wide)[0]
    torch.testing.assert_close(wide_gradient[:, 2:-3], gradient)
    assert not wide_gradient[~columns].any()
    for name in metrics:
        torch.testing.assert_close(same_metrics[name], metrics[name])
    values = tensors[0].clone().requires_grad_()
    wide = padded(tensors[0]).requires_grad_()
    loss, _ = value_loss(values, *tensors[1:])
    same, _ = value_loss(wide, padded(tensors[1]), padded(tensors[2]), columns)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(torch.autograd.grad(same, wide)[0][:, 2:-3], torch.autograd.grad(loss, values)[0])


def test_ppo_5_packed_equals_padded_losses() -> None:
    logp, old, advantages, mask = batch(2)
    flat = [x[mask][None] for x in (logp, old, advantages, mask)]
    for function in (ppo_policy_loss, value_loss):
        torch.testing.assert_close(function(*flat)[0], function(logp, old, advantages, mask)[0])


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [
        (1.0, 1.25, False),
        (-1.0, 0.75, False),
        (1.0, 0.75, True),
        (-1.0, 1.25, True),
        (1.0, 1.1, True),
        (-1.0, 0.9, True),
    ],
)
def test_ppo_7_where_the_clip_removes_the_gradient(advantage: float, ratio: float, moves: bool) -> None:
    gradient = token_gradient(advantage, ratio)
    if moves:
        assert math.isclose(gradient, -advantage * ratio, rel_tol=1e-12)
    else:
        assert gradient == 0


def test_ppo_7_dual_clip_bounds_what_a_bad_token_can_do() -> None:
    assert token_gradient(-1.0, 3.5, dual_clip=3.0) == 0
    assert token_gradient(-1.0, 3.5) != 0
    assert token_gradient(-1.0, 2.5, dual_clip=3.0) != 0
    assert token_gradient(1.0, 0.5, dual_clip=3.0) == token_gradient(1.0, 0.5)
    with pytest.raises(ValueError, match=r"dual_clip is 1\.1"):
        token_gradient(1.0, 1.0, dual_clip=1.1)


def test_clip_higher_moves_the_upper_bound_only() -> None:
    assert token_gradient(1.0, 1.25, cliprange_high=0.28) != 0
    assert token_gradient(-1.0, 0.75, cliprange_high=0.28) == 0


def test_far_log_ratios_stay_finite() -> None:
    logp = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    loss, metrics = ppo_policy_loss(logp, torch.zeros(1, 3), torch.tensor([[-1.0, -1.0, 1.0]]), torch.ones(1, 3))
    loss.backward()
    assert torch.isfinite(loss)
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(a) for a, _ in list(metrics.values())[:3])


def test_gradient_flows_through_the_current_policy_and_value_only() -> None:
    for function in (ppo_policy_loss, value_loss):
        tensors = [x.clone().requires_grad_() for x in batch(3)[:3]]
        function(*tensors, batch(3)[3])[0].backward()
        assert tensors[0].grad is not None
        assert tensors[0].grad.any()
        assert tensors[1].grad is None
        assert tensors[2].grad is None


def test_conv_5_normaliser_makes_micro_batches_add_up() -> None:
    logp, old, advantages, mask = batch(4)
    for function in (ppo_policy_loss, value_loss):
        whole, whole_metrics = function(logp, old, advantages, mask)
        parts = [
            function(logp[rows], old[rows], advantages[rows], mask[rows], normaliser=mask.sum())
            for rows in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        for name in whole_metrics.keys() - {"empty_batches"}:
            total = [sum(metrics[name][side] for _, metrics in parts) for side in (0, 1)]
            torch.testing.assert_close(total[0] / total[1], whole_metrics[name][0] / whole_metrics[name][1])


def test_conv_9_empty_mask() -> None:
    for function in (ppo_policy_loss, value_loss):
        x = torch.full((2, 3), torch.nan, requires_grad=True)
        loss, metrics = function(x, x.detach(), x.detach(), torch.zeros(2, 3))
        loss.backward()
        assert loss == 0
        assert x.grad is not None
        assert not x.grad.any()
    assert ppo_policy_loss(x, x, x, torch.zeros(2, 3))[1]["empty_batches"][0] == 1
    assert metrics["loss/value_avg"] == (0, 0)


def test_value_clip_follows_the_worse_of_the_two_errors() -> None:
    """v moves from 0 towards G = 1 by more than ε: the clipped error is larger and carries no gradient."""
    v = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, metrics = value_loss(v, zero, one, one)
    assert math.isclose(float(loss.detach()), 0.5 * 0.8**2, rel_tol=1e-6)
    assert torch.autograd.grad(loss, v)[0] == 0
    assert metrics["val/clipfrac_avg"][0] == 1
    free, metrics = value_loss(v, zero, one, one, cliprange_value=None)
    assert torch.autograd.grad(free, v)[0] == -0.5
    assert metrics["val/clipfrac_avg"][0] == 0


def test_ppo_16_without_policy_loss_a_step_is_an_sft_step_of_the_coefficient() -> None:
    """L = L_π + γ L_ptx with all advantages 0: the gradient is γ times that of the token-mean NLL."""
    logits = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logp = logits.log_softmax(-1)[..., 2]
    weights = torch.ones(3, 5, dtype=torch.float64)
    policy, _ = ppo_policy_loss(logp, logp.detach() - 0.1, torch.zeros(3, 5), torch.ones(3, 5))
    nll, metrics = token_cross_entropy(logp, weights)
    nll = nll / metrics["loss"][1]
    together = torch.autograd.grad(policy + 27.8 * nll, logits, retain_graph=True)[0]
    alone = torch.autograd.grad(nll, logits)[0]
    torch.testing.assert_close(together, 27.8 * alone)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradcheck(dual_clip: float | None) -> None:
    logp, old, advantages, mask = batch(5)
    logp.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_policy_loss(x, old, advantages, mask, dual_clip=dual_clip)[0], (logp,)
    )
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantages, mask)[0], (logp,))
