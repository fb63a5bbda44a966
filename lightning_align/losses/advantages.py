"""Per-token rewards and generalised advantage estimation, on padded or packed rollouts."""

import torch
from torch import Tensor

from lightning_align.losses.masked import at_least_float32


def scored_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """``mask`` ``[B, T]`` without the sequences that have no score (NaN): advantage 0, and part of no statistic."""
    return mask.bool() & ~scores.isnan()[:, None]


def shaped_rewards(kl: Tensor, mask: Tensor, scores: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = −β kl_t on the mask, plus the sequence's score on its last masked token; ``[B, T]``, no gradient.

    Args:
        kl: Per-token KL estimate or exact KL ``[B, T]``.
        mask: True on completion tokens ``[B, T]``; a sequence with an empty mask gets no reward at all.
        scores: One per sequence ``[B]``; the last token is EOS where there is one.
        kl_coef: β.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * at_least_float32(kl.detach()), 0.0)
    later = mask.flip(1).cumsum(1).flip(1)  # masked tokens from t on: 1 at the last one
    return rewards + torch.where(mask & (later == 1), scores.detach().to(rewards.dtype)[:, None], 0.0)


def _discounted_sum(delta: Tensor, decay: Tensor) -> Tensor:
    """x_t = delta_t + decay_t · x_{t+1} along dim 1, by doubling: log₂ T vector operations instead of T.

    After k rounds x_t covers tokens t … t + 2^k − 1 and ``decay_t`` the product over them. Nothing is divided, so zeros
    (the end of an episode) and ones (a masked token, passed over) are as exact as anything else.
    """
    length, step = delta.shape[1], 1
    delta, decay = delta.clone(), decay.clone()
    while step < length:
        delta[:, :-step] = delta[:, :-step] + decay[:, :-step] * delta[:, step:]
        decay[:, :-step] = decay[:, :-step] * decay[:, step:]
        decay[:, -step:] = 0.0  # nothing is left to add beyond the end
        step *= 2
    return delta


def _next_valid(values: Tensor, mask: Tensor, bootstrap: Tensor) -> Tensor:
    """Value at the next masked position after each token; ``bootstrap`` ``[B]`` after the last one."""
    batch, length = mask.shape
    position = torch.arange(length, device=mask.device).expand(batch, length)
    own = torch.where(mask, position, length)
    upcoming = own.flip(1).cummin(1).values.flip(1)  # at t itself or later
    after = torch.cat([upcoming[:, 1:], upcoming.new_full((batch, 1), length)], 1)
    return torch.cat([values, bootstrap[:, None]], 1).gather(1, after)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    dones: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, G_t = A_t + V_t (Schulman et al. 2015, 1506.02438).

    The recursion runs on the masked tokens only: others (padding, tool output) are passed over without discount.

    Args:
        rewards: ``[B, T]``.
        values: Value of the state before each token ``[B, T]``.
        mask: True on completion tokens ``[B, T]``; what stands elsewhere does not matter.
        gamma: Discount per masked token.
        lam: GAE's λ.
        bootstrap: Value after the last masked token ``[B]``; 0 by default.
        dones: True on tokens that end an episode ``[B, T]``: nothing after them counts.

    Returns:
        Advantages and returns ``[B, T]``, 0 outside the mask.
    """
    mask = mask.bool()
    rewards = torch.where(mask, at_least_float32(rewards), 0.0)
    values = torch.where(mask, at_least_float32(values), 0.0)
    after_last = values.new_zeros(len(values)) if bootstrap is None else bootstrap.to(values.dtype)
    following = _next_valid(values, mask, after_last)
    decay = torch.full_like(values, gamma * lam).where(mask, 1.0)  # `where` of two numbers would be float32
    if dones is not None:
        ends = mask & dones.bool()
        following = torch.where(ends, 0.0, following)
        decay = torch.where(ends, 0.0, decay)
    delta = torch.where(mask, rewards + gamma * following - values, 0.0)
    advantages = torch.where(mask, _discounted_sum(delta, decay), 0.0)
    return advantages, advantages + values


@torch.no_grad()
def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gae` on sequences that lie end to end in one row; never crosses a boundary.

    Args:
        rewards: ``[N]``.
        values: ``[N]``.
        cu_seqlens: Boundaries ``[S + 1]``, from 0 to N, as for variable-length attention.
        gamma: Discount per masked token.
        lam: GAE's λ.
        mask: True on completion tokens ``[N]``; all by default.
        bootstrap: Value after each sequence ``[S]``; 0 by default.

    Returns:
        Advantages and returns ``[N]``.
    """
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(rewards) or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.tolist()}: it must rise from 0 to {len(rewards)}, the number of tokens"
        )
    # [S, longest]; its true entries, row by row, are the packed row
    inside = torch.arange(int(lengths.max()), device=rewards.device) < lengths[:, None]

    def padded(flat: Tensor) -> Tensor:
        return flat.new_zeros(inside.shape).masked_scatter(inside, flat)

    valid = inside if mask is None else padded(mask.bool())
    advantages, returns = gae(padded(rewards), padded(values), valid, gamma=gamma, lam=lam, bootstrap=bootstrap)
    return advantages[inside], returns[inside]
