"""K6 in Triton, in two launches: KL reward, score, GAE and moments of each sequence; then whitening of all of them.

The first is K5's scan with the reward computed on the way. Each sequence leaves count, mean and summed squared differences
from its mean; every program of the second launch merges these in the same order, so that there are no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from align_kernels.gae_kernel import BLOCK, NUM_WARPS, bounds, discounted_sum, flags, next_step, row_stride

WHITEN_BLOCK = 4096
WHITEN_WARPS = 8
MERGE_BLOCK = 1024
WHITEN_EPSILON = tl.constexpr(1e-8)


@triton.jit
def token_kl(d, ESTIMATOR: tl.constexpr):
    """k1 d, k2 d²/2 or k3 e^−d − 1 + d."""
    if ESTIMATOR == "k1":
        return d
    if ESTIMATOR == "k2":
        return 0.5 * d * d
    # There is no expm1: below ½ the series, whose next term is under 2⁻²⁴ of the sum.
    tail = 1.0 - d / 8 * (1.0 - d / 9 * (1.0 - d / 10))
    tail = 1.0 - d / 5 * (1.0 - d / 6 * (1.0 - d / 7 * tail))
    series = 0.5 * d * d * (1.0 - d / 3 * (1.0 - d / 4 * tail))
    return tl.where(tl.abs(d) < 0.5, series, tl.exp(-d) - 1.0 + d)


# ------------------------------------------------------------------ first launch
@triton.jit(
    do_not_specialize=(
        "length logp_stride ref_stride values_stride mask_stride kl_coef score_clip gamma lam".split()
    )
)
def shaped_kernel(
    logp_ptr,
    ref_ptr,
    values_ptr,
    mask_ptr,
    scores_ptr,
    bootstrap_ptr,
    cu_ptr,
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    kl_sum_ptr,
    partials_ptr,
    length: tl.int64,
    logp_stride: tl.int64,
    ref_stride: tl.int64,
    values_stride: tl.int64,
    mask_stride: tl.int64,
    kl_coef,
    score_clip,
    gamma,
    lam,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gamma = tl.full((), gamma, tl.float32)
    rate = gamma * tl.full((), lam, tl.float32)
    kl_coef = tl.full((), kl_coef, tl.float32)
    score_clip = tl.full((), score_clip, tl.float32)
    sequence, row, lo, hi = bounds(cu_ptr, length)
    logp_ptr += row * logp_stride
    ref_ptr += row * ref_stride
    values_ptr += row * values_stride
    mask_ptr += row * mask_stride
    advantages_ptr += row * length
    returns_ptr += row * length
    rewards_ptr += row * length
    score = tl.load(scores_ptr + sequence).to(tl.float32)
    score = tl.where(score > score_clip, score_clip, tl.where(score < -score_clip, -score_clip, score))  # NaN stays
    value_beyond = tl.full((), 0.0, tl.float32)
    if bootstrap_ptr is not None:
        value_beyond = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    advantage_beyond = tl.full((), 0.0, tl.float32)
    seen = tl.full((), 0, tl.int32)
    kl_sum = tl.full((), 0.0, tl.float32)
    count = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)
    num_blocks = tl.cdiv(hi - lo, BLOCK)
    for i in range(num_blocks):
        t = lo + (num_blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = t < hi
        valid = tl.load(mask_ptr + t, mask=inside, other=0) != 0
        logp = tl.load(logp_ptr + t, mask=valid, other=0.0).to(tl.float32)
        ref_logp = tl.load(ref_ptr + t, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=valid, other=0.0).to(tl.float32)
        following, found, value_beyond, seen = next_step(values_ptr, mask_ptr, t, hi, seen, value_beyond, BLOCK)
        kl = token_kl(logp - ref_logp, ESTIMATOR)
        reward = tl.where(valid, -kl_coef * kl, 0.0) + tl.where(valid & (found == 0), score, 0.0)
        delta = tl.where(valid, reward + gamma * following - value, 0.0)
        advantage, advantage_beyond = discounted_sum(delta, tl.where(valid, rate, 1.0), advantage_beyond, BLOCK)
        advantage = tl.where(valid, advantage, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=inside)
        tl.store(returns_ptr + t, tl.where(valid, advantage + value, 0.0), mask=inside)
        tl.store(rewards_ptr + t, reward, mask=inside)
        kl_sum += tl.sum(kl, 0)
        # Moments of the block joined to those of the blocks before (Chan, Golub & LeVeque 1979).
        block_count = tl.sum(valid.to(tl.float32), 0)
        block_mean = tl.sum(advantage, 0) / tl.maximum(block_count, 1.0)
        from_mean = tl.where(valid, advantage - block_mean, 0.0)
        total = tl.maximum(count + block_count, 1.0)
        gap = block_mean - mean
        squares += tl.sum(from_mean * from_mean, 0) + gap * gap * (count * block_count / total)
        mean += gap * (block_count / total)
        count += block_count
    tl.store(kl_sum_ptr + sequence, kl_sum)
    tl.store(partials_ptr + 3 * sequence, count)
    tl.store(partials_ptr + 3 * sequence + 1, mean)
    tl.store(partials_ptr + 3 * sequence + 2, squares)


# ------------------------------------------------------------------ second launch
@triton.jit
def _merge(partials_ptr, num_parts, MERGE: tl.constexpr):
    """Count, mean and variance of all parts; two loops, so that differences are taken from the overall mean."""
    index = tl.arange(0, MERGE)
    counts = tl.zeros((MERGE,), tl.float32)
    sums = tl.zeros((MERGE,), tl.float32)
    for start in range(0, num_parts, MERGE):
        part = (start + index).to(tl.int64)
        n = tl.load(partials_ptr + 3 * part, mask=part < num_parts, other=0.0)
        sums += n * tl.load(partials_ptr + 3 * part + 1, mask=part < num_parts, other=0.0)
        counts += n
    count = tl.sum(counts, 0)
    mean = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((MERGE,), tl.float32)
    for start in range(0, num_parts, MERGE):
        part = (start + index).to(tl.int64)
        n = tl.load(partials_ptr + 3 * part, mask=part < num_parts, other=0.0)
        gap = tl.load(partials_ptr + 3 * part + 1, mask=part < num_parts, other=0.0) - mean
        squares += tl.load(partials_ptr + 3 * part + 2, mask=part < num_parts, other=0.0) + n * gap * gap
    return count, mean, tl.sum(squares, 0) / tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=["size", "num_parts"])
def whiten_kernel(
    values_ptr,
    mask_ptr,
    partials_ptr,
    stats_ptr,
    size: tl.int64,
    num_parts: tl.int64,
    WHITEN: tl.constexpr,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGE: tl.constexpr,
):
    count, mean, var = _merge(partials_ptr, num_parts, MERGE)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(stats_ptr, mean)
        tl.store(stats_ptr + 1, var)
    if WHITEN:
        t = program * BLOCK + tl.arange(0, BLOCK)
        inside = t < size
        valid = tl.load(mask_ptr + t, mask=inside, other=0) != 0
        x = tl.load(values_ptr + t, mask=inside, other=0.0)
        white = (x - mean) * tl.rsqrt(var + WHITEN_EPSILON)
        if not SHIFT_MEAN:
            white += mean
        tl.store(values_ptr + t, tl.where(valid, tl.where(count < 2.0, x, white), 0.0), mask=inside)


# ------------------------------------------------------------------ launches
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
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``, float32: shaped_advantages before its whitening."""
    options = {"dtype": torch.float32, "device": logp.device}
    advantages, returns, rewards = (torch.empty(logp.shape, **options) for _ in range(3))
    kl_sum, partials = torch.zeros(len(scores), **options), torch.zeros((len(scores), 3), **options)
    if not logp.numel() or not len(scores):
        return advantages, returns, rewards, kl_sum, partials
    with torch.cuda.device_of(logp):
        shaped_kernel[(len(scores),)](
            logp,
            ref_logp,
            values,
            flags(mask),
            scores.contiguous(),
            None if bootstrap is None else bootstrap.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            advantages,
            returns,
            rewards,
            kl_sum,
            partials,
            logp.shape[-1],
            *(row_stride(x) for x in (logp, ref_logp, values, mask)),
            kl_coef,
            score_clip,
            gamma,
            lam,
            ESTIMATOR=kl_estimator,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return advantages, returns, rewards, kl_sum, partials


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """Whitens contiguous ``values`` in place by the moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    stats = torch.zeros(2, dtype=torch.float32, device=values.device)
    programs = triton.cdiv(values.numel(), WHITEN_BLOCK) if whiten else 1
    if programs:
        with torch.cuda.device_of(values):
            whiten_kernel[(programs,)](
                values,
                flags(mask.contiguous()),
                partials,
                stats,
                values.numel(),
                len(partials),
                WHITEN=whiten,
                SHIFT_MEAN=shift_mean,
                BLOCK=WHITEN_BLOCK,
                MERGE=MERGE_BLOCK,
                num_warps=WHITEN_WARPS,
                enable_fp_fusion=True,
            )
    return stats
