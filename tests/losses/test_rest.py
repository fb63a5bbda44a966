"""Weights of ReST's losses against loops in float64."""

import math

import pytest
import torch

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.rest import improve_loss, reward_weights

REWARDS = [0.3, -1.2, 4.0, 0.9, 2.5, 0.9, -0.1]


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(7, 5, generator=generator, dtype=torch.float64) * 4
    mask = torch.rand(7, 5, generator=generator) < 0.7
    return logp, mask


def expected_weights(loss: str, threshold: float, temperature: float) -> list[float]:
    if loss == "weighted_bc":
        return [min(20.0, math.exp((reward - threshold) / temperature)) for reward in REWARDS]
    if loss == "v_mpo":
        middle = sorted(REWARDS)[(len(REWARDS) - 1) // 2]
        return [math.exp((r - max(REWARDS)) / temperature) if r >= middle else 0.0 for r in REWARDS]
    return [1.0] * len(REWARDS)


@pytest.mark.parametrize("loss", ["bc", "gold", "weighted_bc", "v_mpo"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_weights_and_loss_are_those_of_a_loop(loss: str, temperature: float) -> None:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    weights = reward_weights(rewards, loss, everyone=rewards, threshold=-1.5, temperature=temperature)
    wanted = expected_weights(loss, -1.5, temperature)
    torch.testing.assert_close(weights, torch.tensor(wanted).double())
    logp, mask = drawn()
    power = 0.7 if loss == "gold" else 0.0
    total, tokens = 0.0, 0.0
    for row in range(7):
        for t in range(5):
            if mask[row, t]:
                value = float(logp[row, t])
                trust = max(math.exp(power * value), 0.3) if power else 1.0
                total -= wanted[row] * trust * value
                tokens += wanted[row]
    logp.requires_grad_()
    got, sums = improve_loss(logp, mask, weights, gold_power=power, gold_floor=0.3)
    assert float(got) == pytest.approx(total, rel=1e-12)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(total / tokens, rel=1e-12)
    (gradient,) = torch.autograd.grad(got, logp)
    for row in range(7):
        for t in range(5):
            trust = max(math.exp(power * float(logp[row, t])), 0.3) if power else 1.0
            assert float(gradient[row, t]) == pytest.approx(-wanted[row] * trust * bool(mask[row, t]))


def test_better_half_is_of_all_that_was_kept_wherever_it_is() -> None:
    everyone = torch.tensor(REWARDS)
    parts = [everyone[:3], everyone[3:]]
    weights = [reward_weights(p, "v_mpo", everyone=everyone, threshold=0.0, temperature=1.0) for p in parts]
    whole = reward_weights(everyone, "v_mpo", everyone=everyone, threshold=0.0, temperature=1.0)
    torch.testing.assert_close(torch.cat(weights), whole)
    assert int((whole > 0).sum()) == 4  # 0.9, the middle one, twice, and the two above


def test_large_rewards_do_not_overflow() -> None:
    rewards = torch.tensor([1e4, 0.0, -1e4])
    for loss in ("v_mpo", "weighted_bc"):
        weights = reward_weights(rewards, loss, everyone=rewards, threshold=-2e4, temperature=1e-3)
        assert weights.isfinite().all()
        assert float(weights.max()) > 0


def test_rest_2_equal_weights_are_supervised_fine_tuning() -> None:
    logp, mask = drawn(1)
    loss, sums = improve_loss(logp, mask, torch.ones(7))
    expected, other = token_cross_entropy(logp, mask.double())
    torch.testing.assert_close(loss, expected)
    assert sums["loss"][1] == other["loss"][1]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_what_stands_in_padding_does_not_matter(garbage: float, power: float) -> None:
    logp, mask = drawn(2)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(1))
    clean, _ = improve_loss(logp, mask, weights, gold_power=power)
    dirty = logp.where(mask, garbage).requires_grad_()
    loss, _ = improve_loss(dirty, mask, weights, gold_power=power)
    torch.testing.assert_close(loss, clean)
    assert torch.autograd.grad(loss, dirty)[0].isfinite().all()
