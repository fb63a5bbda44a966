"""Scan operations from tensor operations alone: no compiler, any device.

x_t = b_t + a_t x_{t+1} is solved in blocks of 32 tokens: within all blocks at once by a loop over 32 tokens, across
blocks by the same scheme, a 32nd of the size. The data is touched a fixed number of times, where doubling touches it
log₂ T times and a loop over time pays for T dispatches. Padded rollouts are worked off in bundles of rows that stay in
cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from align_kernels.scan_checks import result_dtype

BLOCK = 32
BUNDLE = 2**17  # tokens worked on at once: a handful of float32 tensors of this size stays in the last level of cache
WHITEN_EPSILON = 1e-8
SERIES_BELOW = 1e-3  # |d| under which e^−d − 1 + d is summed as a series


# ------------------------------------------------------------------ operations
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
    for part in _parts(rewards, cu_seqlens):
        counted = torch.ones_like(part.cut(rewards), dtype=torch.bool) if mask is None else part.cut(mask).bool()
        step = torch.ones_like(counted) if mask_mode == "dense" else counted
        end = torch.zeros_like(step) if dones is None else part.cut(dones).bool() & step
        value = part.cut(values).to(dtype).masked_fill(~step, 0)
        following = part.following(value, None if mask is None else step, bootstrap, mask_mode).masked_fill_(end, 0)
        delta = (part.cut(rewards) - value).add_(following, alpha=gamma)
        decay = torch.full_like(delta, gamma * lam)
        if log_rho is not None:
            log_ratio = part.cut(log_rho).to(dtype)
            delta *= log_ratio.clamp(max=math.log(rho_bar)).exp()
            decay *= log_ratio.clamp(max=math.log(c_bar)).exp()
        decay.masked_fill_(~step, 1.0 if mask_mode == "skip" else 0.0).masked_fill_(end, 0)
        decay[part.ends] = 0
        advantage, result = part.cut(advantages), part.cut(returns)
        advantage.copy_(scan(delta.masked_fill_(~step, 0), decay))
        torch.add(advantage, value, out=result)
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
    for part in _parts(logp, cu_seqlens):
        valid = part.cut(mask).bool()
        d = part.cut(logp).to(dtype) - part.cut(ref_logp).to(dtype)
        kl = _token_kl(d.masked_fill_(~valid, 0), kl_estimator)
        reward = torch.mul(kl, -kl_coef, out=part.cut(rewards))
        part.add_to_last(reward, valid, scores[part.sequences].to(dtype).clamp(-score_clip, score_clip))
        kl_sum[part.sequences] = part.sums(kl)
    tensors = (rewards, values, mask, None, bootstrap, cu_seqlens, None)
    advantages, returns = gae(*tensors, gamma=gamma, lam=lam, mask_mode="skip", rho_bar=1.0, c_bar=1.0)
    partials = scores.new_zeros((len(scores), 3), dtype=dtype)
    for part in _parts(logp, cu_seqlens):
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


# ------------------------------------------------------------------ pieces
def scan(b: Tensor, a: Tensor) -> Tensor:
    """x_t = b_t + a_t x_{t+1} along dim 1 of ``[R, T]``, with 0 beyond the end."""
    rows, length = b.shape
    width = min(BLOCK, length)
    x, product = _time_major(b, width), _time_major(a, width)
    lines, factors = x.unbind(0), product.unbind(0)
    for t in range(width - 2, -1, -1):
        lines[t].addcmul_(factors[t], lines[t + 1])
        factors[t].mul_(factors[t + 1])  # of all factors from t to the end of the block
    if length > width:
        blocks = scan(x[0].view(rows, -1), product[0].view(rows, -1))
        x.addcmul_(product, pad(blocks[:, 1:], (0, 1)).flatten())
    return x.t().reshape(rows, -1)[:, :length]


def _time_major(x: Tensor, width: int) -> Tensor:
    """``[R, T]`` → a new ``[width, R · blocks]``, zeros behind the last token."""
    short = -x.shape[1] % width
    x = pad(x, (0, short)) if short else x
    return x.reshape(-1, width).t().clone(memory_format=torch.contiguous_format)


def _token_kl(d: Tensor, estimator: str) -> Tensor:
    """k1 d, k2 d²/2 or k3 e^−d − 1 + d of log-ratios d, per token."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    wide = d.double()
    series = wide * wide * (0.5 - wide / 6 + wide * wide / 24)
    return torch.where(wide.abs() < SERIES_BELOW, series, torch.expm1(-wide) + wide).to(d.dtype)


def _moments(part: "_Part", values: Tensor, valid: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it, per sequence, of values that are 0 where not valid."""
    count = part.sums(valid.to(values.dtype))
    mean = part.sums(values) / count.clamp(min=1)
    centred = (values - part.spread(mean)).masked_fill_(~valid, 0)
    return torch.stack([count, mean, part.sums(centred.square_())], 1)


# ------------------------------------------------------------------ rows and sequences
class _Part:
    """A bundle of rows of a padded rollout, or a packed one as a single row.

    Args:
        rows: The rows; all of them for a packed rollout.
        cu_seqlens: Boundaries of the packed sequences, None for a padded rollout.

    Attributes:
        sequences: Which sequences are in it.
        ends: Index into ``[R, T]`` of the last token of each of them that is not empty.
    """

    def __init__(self, rows: slice, cu_seqlens: Tensor | None) -> None:
        self.packed = cu_seqlens is not None
        self.sequences = rows
        self.ends: tuple[slice | int | Tensor, ...] = (slice(None), -1)
        if cu_seqlens is not None:
            self.lengths = cu_seqlens.diff().long()
            self.filled = self.lengths > 0
            self.ends = (0, cu_seqlens[1:][self.filled].long() - 1)

    def cut(self, x: Tensor) -> Tensor:
        """This part of ``[B, T]`` or ``[N]`` as ``[R, T]``, a view."""
        return x[None] if self.packed else x[self.sequences]

    def sums(self, x: Tensor) -> Tensor:
        """Σ over each sequence of ``[R, T]``."""
        if self.packed:
            return torch.segment_reduce(x[0], "sum", lengths=self.lengths, initial=0)
        return x.sum(1)

    def spread(self, x: Tensor) -> Tensor:
        """One number per sequence, to broadcast over ``[R, T]``."""
        return x.repeat_interleave(self.lengths)[None] if self.packed else x[:, None]

    def add_to_last(self, x: Tensor, valid: Tensor, amount: Tensor) -> None:
        """Adds each sequence's amount to ``x`` ``[R, T]`` at its last valid token, if it has any."""
        position = torch.where(valid, torch.arange(x.shape[1], device=x.device), -1)
        if self.packed:
            last = torch.segment_reduce(position[0].double(), "max", lengths=self.lengths, initial=-1).long()
            x[0].scatter_add_(0, last.clamp(min=0), torch.where(last < 0, 0.0, amount))
        else:
            last = position.amax(1)
            x.scatter_add_(1, last.clamp(min=0)[:, None], torch.where(last < 0, 0.0, amount)[:, None])

    def following(self, value: Tensor, step: Tensor | None, bootstrap: Tensor | None, mode: str) -> Tensor:
        """Value of the state after each step; ``bootstrap`` ``[S]`` after a sequence's last one.

        Args:
            value: 0 where there is no step.
            step: What ``skip`` and ``stop`` distinguish, or None.
            bootstrap: One per sequence, or None for 0.
            mode: ``skip`` looks past other tokens, at ``stop`` they have the value 0.
        """
        behind: Tensor | float = 0.0
        if bootstrap is not None:
            behind = bootstrap.to(value.dtype)[self.filled if self.packed else self.sequences]
        if step is not None and mode != "dense":
            # The value of the nearest step at or behind each token, or the bootstrap; under `stop` of none but its own.
            carried, passing = (value.clone() if mode == "skip" else torch.zeros_like(value)), (~step).to(value.dtype)
            carried[self.ends] = torch.where(step[self.ends], carried[self.ends], behind)
            passing[self.ends] = 0
            value = scan(carried, passing) if mode == "skip" else scan(carried, passing) + value
        after = torch.empty_like(value)
        after[:, :-1] = value[:, 1:]
        after[self.ends] = behind
        return after


def _parts(tokens: Tensor, cu_seqlens: Tensor | None) -> Iterator[_Part]:
    """Bundles of rows of padded ``tokens`` ``[B, T]``, or all of packed ones ``[N]``; none without tokens."""
    if not tokens.numel():
        return
    if cu_seqlens is not None:
        yield _Part(slice(None), cu_seqlens)
        return
    batch, length = tokens.shape
    rows = max(1, BUNDLE // length)
    for start in range(0, batch, rows):
        yield _Part(slice(start, start + rows), None)
