"""Shaped rewards and GAE, against loops in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_kernels import gae
from lightning_align.losses.advantages import scored_mask, shaped_rewards
from lightning_align.losses.masked import masked_sum, masked_whiten


def loop_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor, dones: Tensor
) -> Tensor:
    """The recursion as it is written, on the masked tokens of each row."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        following, running = bootstrap[row], torch.zeros((), dtype=rewards.dtype)
        for t in reversed(range(rewards.shape[1])):
            if not mask[row, t]:
                continue
            if dones[row, t]:
                following, running = torch.zeros_like(following), torch.zeros_like(running)
            running = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * running
            following = values[row, t]
            advantages[row, t] = running
    return advantages


def random_rollout(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return rewards.where(mask, torch.nan), values.where(mask, torch.inf), mask


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    gamma=st.sampled_from([1.0, 0.97, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
)
@settings(deadline=None, max_examples=150)
def test_gae_equals_the_loop(seed: int, rows: int, length: int, gamma: float, lam: float) -> None:
    rewards, values, mask = random_rollout(seed, rows, length)
    generator = torch.Generator().manual_seed(seed + 1)
    bootstrap = torch.randn(rows, dtype=torch.float64, generator=generator)
    dones = torch.rand(rows, length, generator=generator) < 0.15
    advantages, returns = gae(rewards, values, mask=mask, gamma=gamma, lam=lam, bootstrap=bootstrap, dones=dones)
    expected = loop_gae(rewards, values, mask, gamma, lam, bootstrap, dones)
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(returns, (expected + values).where(mask, 0.0), rtol=1e-10, atol=1e-10)
    single, _ = gae(
        rewards.float(), values.float(), mask=mask, gamma=gamma, lam=lam, bootstrap=bootstrap.float(), dones=dones
    )
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_ppo_1_rewards_add_up_to_score_minus_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[:, 4] = True
    scores = torch.randn(6, dtype=torch.float64, generator=generator)
    rewards = shaped_rewards(kl.where(mask, torch.nan), mask, scores, kl_coef=0.3)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * masked_sum(kl, mask, dim=1))
    assert not rewards[~mask].any()


def test_score_lands_on_the_last_completion_token() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    rewards = shaped_rewards(torch.zeros(3, 4), mask, torch.tensor([2.0, 3.0, 4.0]), kl_coef=1.0)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4.0]]))


def test_ppo_2_limits_of_lambda_are_exact() -> None:
    """Dyadic numbers, so that sums are exact and 'equal' means bit for bit."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randint(-64, 64, (2, 5, 23), generator=generator) / 8).double()
    mask = torch.rand(5, 23, generator=generator) < 0.8
    advantages, returns = gae(rewards, values, mask=mask, gamma=1.0, lam=1.0)
    to_go = rewards.where(mask, 0.0).flip(1).cumsum(1).flip(1).where(mask, 0.0)
    assert torch.equal(advantages + values.where(mask, 0.0), to_go)
    assert torch.equal(returns, to_go)
    advantages, _ = gae(rewards, values, mask=mask, gamma=1.0, lam=0.0)
    zero = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(advantages, loop_gae(rewards, values, mask, 1.0, 0.0, zero, torch.zeros_like(mask)))


@pytest.mark.parametrize("left", [0, 1, 5])
@pytest.mark.parametrize("right", [0, 3, 8])
def test_ppo_4_padding_changes_no_advantage_or_return(left: int, right: int) -> None:
    rewards, values, mask = random_rollout(5, 4, 11)
    before = gae(rewards, values, mask=mask)
    padded = [torch.nn.functional.pad(x, (left, right), value=torch.nan) for x in (rewards, values)]
    after = gae(*padded, mask=torch.nn.functional.pad(mask, (left, right), value=False))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(y[:, left : left + 11], x)
        assert not y[:, :left].any()
        assert not y[:, left + 11 :].any()


@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_ppo_5_packed_equals_padded(seed: int, lengths: list[int]) -> None:
    lengths = [*lengths, 3]
    rewards, values, mask = random_rollout(seed, 1, sum(lengths))
    bootstrap = torch.randn(len(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = gae(rewards[0], values[0], cu_seqlens=cu, gamma=0.9, lam=0.8, mask=mask[0], bootstrap=bootstrap)
    for index, (lo, hi) in enumerate(pairwise(cu.tolist())):
        row = slice(lo, hi)
        alone = gae(
            rewards[:, row],
            values[:, row],
            mask=mask[:, row],
            gamma=0.9,
            lam=0.8,
            bootstrap=bootstrap[index : index + 1],
        )
        for x, y in zip(packed, alone, strict=True):
            assert torch.equal(x[row], y[0])


def test_ppo_5_counter_example_a_boundary_that_is_ignored() -> None:
    rewards, values, _ = random_rollout(1, 1, 8)
    rewards, values = rewards.nan_to_num(0.5), values.nan_to_num(0.5, 0.5, 0.5)
    split, _ = gae(rewards[0], values[0], cu_seqlens=torch.tensor([0, 4, 8]))
    joined, _ = gae(rewards[0], values[0], cu_seqlens=torch.tensor([0, 8]))
    assert (split[:4] - joined[:4]).abs().max() > 1e-3


def test_ppo_6_a_masked_span_inside_may_as_well_not_be_there() -> None:
    rewards, values, _ = random_rollout(2, 3, 10)
    rewards, values = rewards.nan_to_num(0.5), values.nan_to_num(0.5, 0.5, 0.5)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 3:7] = False
    keep = [0, 1, 2, 7, 8, 9]
    with_span, _ = gae(rewards, values, mask=mask, gamma=0.9)
    without, _ = gae(rewards[:, keep], values[:, keep], mask=mask[:, keep], gamma=0.9)
    torch.testing.assert_close(with_span[:, keep], without, rtol=1e-12, atol=1e-12)


def test_no_gradient_leaves_the_estimates() -> None:
    rewards, values = torch.randn(2, 2, 3).requires_grad_()
    for result in gae(rewards, values):
        assert not result.requires_grad
    assert not shaped_rewards(rewards, torch.ones(2, 3), values[:, 0], kl_coef=0.1).requires_grad


def test_sequences_without_a_score_get_advantage_0_and_touch_no_statistic() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    scores = torch.tensor([1.0, torch.nan, -1.0])
    learnt = scored_mask(mask, scores)
    rewards = shaped_rewards(torch.full((3, 4), 0.1), learnt, scores, kl_coef=1.0)
    advantages, _ = gae(rewards, torch.zeros(3, 4), mask=learnt)
    white = masked_whiten(advantages, learnt)
    assert not white[1].any()
    torch.testing.assert_close(white[[0, 2]], masked_whiten(advantages[[0, 2]], mask[[0, 2]]))
