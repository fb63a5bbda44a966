"""Scan operations from tensor operations alone: no compiler, any device."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align_kernels.scan_checks import result_dtype
from align_kernels.scan_rows import Part, Steps, parts, scan

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

WHITEN_EPSILON = 1e-8
SERIES_BELOW = 1e-3  # |d| under which e^−d − 1 + d is summed as a series


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    log_rho: Tensor | None,
    *,
    gamma: float,
    lam: float,
    mask_mode: str,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; arguments as in :func:`align_kernels.gae`."""
    dtype = result_dtype(rewards, values)
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))
    for part in parts(rewards, cu_seqlens):
        counted = None if mask is None else part.cut(mask).bool()
        steps = Steps(part, None if mask_mode == "dense" else counted, mask_mode)
        done = None if dones is None else part.cut(dones).bool()
        value = steps.zeroed(part.cut(values).to(dtype))
        delta = (part.cut(rewards) - value).add_(steps.following(value, bootstrap, done), alpha=gamma)
        trace = None
        if log_rho is not None:
            log_ratio = part.cut(log_rho).to(dtype)
            delta *= log_ratio.clamp(max=math.log(rho_bar)).exp()
            trace = log_ratio.clamp(max=math.log(c_bar)).exp()
        advantage, result = part.cut(advantages), part.cut(returns)
        advantage.copy_(scan(steps.zeroed(delta), steps.decay(gamma * lam, delta, done, trace)))
        torch.add(advantage, value, out=result)
        if counted is not None:
            advantage.masked_fill_(~counted, 0)
            result.masked_fill_(~counted, 0)
    return advantages, returns


def shaped(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    dtype = result_dtype(logp, ref_logp, values)
    rewards = logp.new_empty(logp.shape, dtype=dtype)
    kl_sum = scores.new_zeros(len(scores), dtype=dtype)
    for part in parts(logp, cu_seqlens):
        valid = part.cut(mask).bool()
        d = part.cut(logp).to(dtype) - part.cut(ref_logp).to(dtype)
        kl = _token_kl(d.masked_fill_(~valid, 0), kl_estimator)
        reward = torch.mul(kl, -kl_coef, out=part.cut(rewards))
        part.add_to_last(reward, valid, scores[part.sequences].to(dtype).clamp(-score_clip, score_clip))
        kl_sum[part.sequences] = part.sums(kl)
    tensors = (rewards, values, mask, None, bootstrap, cu_seqlens, None)
    advantages, returns = gae(*tensors, gamma=gamma, lam=lam, mask_mode="skip", rho_bar=1.0, c_bar=1.0)
    partials = scores.new_zeros((len(scores), 3), dtype=dtype)
    for part in parts(logp, cu_seqlens):
        partials[part.sequences] = _moments(part, part.cut(advantages), part.cut(mask).bool())
    return advantages, returns, rewards, kl_sum, partials


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """Whitens contiguous ``values`` in place by moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    count, mean, squares = merge(partials)
    var = squares / count.clamp(min=1)
    if whiten:
        few = count < 2  # such values stay as they are
        shift, scale = torch.where(few, 0.0, mean), torch.where(few, 1.0, torch.rsqrt(var + WHITEN_EPSILON))
        values.sub_(shift).mul_(scale)
        if not shift_mean:
            values.add_(shift)
        values.masked_fill_(mask.logical_not(), 0)
    return torch.stack([mean, var])


def merge(moments: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it over everything, ``[3]``, from those of parts ``[S, 3]``.

    Chan, Golub & LeVeque 1979: nothing subtracts two large sums.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    overall = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, overall, (squares + count * (mean - overall) ** 2).sum()])


def merge_over_ranks(moments: Tensor, group: "ProcessGroup") -> Tensor:
    """:func:`merge` over the sequences of all ranks, ``[1, 3]``: one collective, which every rank must enter."""
    count, mean, squares = merge(moments.double())
    total = torch.stack([count, count * mean, squares + count * mean * mean])
    torch.distributed.all_reduce(total, group=group)
    count, first, second = total
    mean = first / count.clamp(min=1)
    return torch.stack([count, mean, (second - count * mean * mean).clamp(min=0)])[None].to(moments.dtype)


def _token_kl(d: Tensor, estimator: str) -> Tensor:
    """k1 d, k2 d²/2 or k3 e^−d − 1 + d of log-ratios d, per token."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    wide = d.double()
    series = wide * wide * (0.5 - wide / 6 + wide * wide / 24)
    return torch.where(wide.abs() < SERIES_BELOW, series, torch.expm1(-wide) + wide).to(d.dtype)


def _moments(part: Part, values: Tensor, valid: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it, per sequence, of values that are 0 where not valid."""
    count = part.sums(valid.to(values.dtype))
    mean = part.sums(values) / count.clamp(min=1)
    centred = (values - part.spread(mean)).masked_fill_(~valid, 0)
    return torch.stack([count, mean, part.sums(centred.square_())], 1)
