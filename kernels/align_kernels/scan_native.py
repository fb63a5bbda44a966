"""Scan operations from tensor operations alone: no compiler, any device, float64 as well."""

import math

import torch
from torch import Tensor

from align_kernels.scan_rows import BUNDLE, Part, Steps, parts, scan

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
    dtype = accumulator(rewards, values)
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))
    for part in parts(rewards, cu_seqlens):
        counted = None if mask is None else part.cut(mask).bool()
        steps = Steps(part, None if mask_mode == "dense" else counted, mask_mode)
        done = None if dones is None else part.cut(dones).bool()
        value = steps.zeroed(part.cut(values).to(dtype))
        delta = (part.cut(rewards) - value).add_(steps.following(value, bootstrap, done), alpha=gamma)
        decay = steps.decay(gamma * lam, delta, done)
        if log_rho is not None:
            log_ratio = part.cut(log_rho).to(dtype)
            delta *= log_ratio.clamp(max=math.log(rho_bar)).exp()
            trace = log_ratio.clamp(max=math.log(c_bar)).exp()
            decay = decay * (trace if steps.off is None else trace.masked_fill_(steps.off, 1))
        advantage, result = part.cut(advantages), part.cut(returns)
        advantage.copy_(scan(steps.zeroed(delta), decay))
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
    dtype = accumulator(logp, ref_logp, values)
    advantages, returns, rewards = (logp.new_empty(logp.shape, dtype=dtype) for _ in range(3))
    kl_sum = scores.new_zeros(len(scores), dtype=dtype)
    partials = scores.new_zeros((len(scores), 3), dtype=dtype)
    scores = scores.to(dtype).clamp(-score_clip, score_clip)
    for part in parts(logp, cu_seqlens):
        valid = part.cut(mask).bool()
        steps = Steps(part, valid, "skip")
        kl = token_kl(steps.zeroed(part.cut(logp).to(dtype) - part.cut(ref_logp)), kl_estimator)
        reward = torch.mul(kl, -kl_coef, out=part.cut(rewards))
        part.add_to_last(reward, valid, scores[part.sequences])
        value = steps.zeroed(part.cut(values).to(dtype))
        delta = (reward - value).add_(steps.following(value, bootstrap, None), alpha=gamma)
        advantage = part.cut(advantages)
        advantage.copy_(scan(steps.zeroed(delta), steps.decay(gamma * lam, delta, None)))
        advantage.masked_fill_(~valid, 0)
        torch.add(advantage, value, out=part.cut(returns))
        kl_sum[part.sequences] = part.sums(kl)
        partials[part.sequences] = _moments(part, advantage, valid)
    return advantages, returns, rewards, kl_sum, partials


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """Whitens contiguous ``values`` in place by the moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    count, mean, squares = merge(partials)
    var = squares / count.clamp(min=1)
    if whiten:
        few = count < 2  # such values stay as they are
        shift, scale = torch.where(few, 0.0, mean), torch.where(few, 1.0, torch.rsqrt(var + WHITEN_EPSILON))
        off = mask.logical_not().view(-1)
        for piece, skipped in zip(values.view(-1).split(BUNDLE), off.split(BUNDLE), strict=True):
            piece.sub_(shift).mul_(scale)
            if not shift_mean:
                piece.add_(shift)
            piece.masked_fill_(skipped, 0)
    return torch.stack([mean, var])


def token_kl(d: Tensor, estimator: str) -> Tensor:
    """k1 d, k2 d²/2 or k3 e^−d − 1 + d of log-ratios d, per token."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    series = d * d * (0.5 - d / 6 + d * d / 24)
    return torch.where(d.abs() < SERIES_BELOW, series, torch.expm1(-d) + d)


def merge(moments: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it over everything, ``[3]``, from those of parts ``[S, 3]``.

    Chan, Golub & LeVeque 1979: nothing subtracts two large sums.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    overall = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, overall, (squares + count * (mean - overall) ** 2).sum()])


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _moments(part: Part, values: Tensor, valid: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it, per sequence, of values that are 0 where not valid."""
    count = part.sums(valid.to(values.dtype))
    mean = part.sums(values) / count.clamp(min=1)
    centred = (values - part.spread(mean)).masked_fill_(~valid, 0)
    return torch.stack([count, mean, part.sums(centred.square_())], 1)
