"""K6 in Triton, in two launches: KL reward, score, GAE and moments of each sequence; then whitening of all of them.

The first is K5's scan with the reward computed on the way. Each sequence leaves count, mean and summed squared
differences from its mean; every program of the second launch merges these in the same order, so there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from align_kernels.gae_kernel import BLOCK, NUM_WARPS, aot_spec, bounds, discounted_sum, flags, next_step, row_stride

WHITEN_BLOCK = 4096
WHITEN_WARPS = 8
MERGE_BLOCK = 1024
WHITEN_EPSILON = tl.constexpr(1e-8)

POINTERS = {
    "logp_ptr": "*fp32",
    "ref_ptr": "*fp32",
    "values_ptr": "*fp32",
    "mask_ptr": "*u8",
    "scores_ptr": "*fp32",
    "bootstrap_ptr": "*fp32",
    "cu_ptr": "*i64",
    "advantages_ptr": "*fp32",
    "returns_ptr": "*fp32",
    "rewards_ptr": "*fp32",
    "kl_sum_ptr": "*fp32",
    "partials_ptr": "*fp32",
}
SIZES = ["length", "logp_stride", "ref_stride", "values_stride", "mask_stride"]
RATES = ["kl_coef", "score_clip", "gamma", "lam"]
WHITEN_POINTERS = {"values_ptr": "*fp32", "mask_ptr": "*u8", "partials_ptr": "*fp32", "stats_ptr": "*fp32"}
WHITEN_SIZES = ["size", "num_parts"]


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
@triton.jit(do_not_specialize=SIZES + RATES)
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
    t = tl.arange(0, BLOCK)  # within a block; where the block starts is a 64-bit scalar
    num_blocks = tl.cdiv(hi - lo, BLOCK)
    for i in range(num_blocks):
        start = lo + (num_blocks - 1 - i) * BLOCK
        room = tl.minimum(hi - start, BLOCK + 1).to(tl.int32)
        inside = t < room
        block_values_ptr = values_ptr + (row * values_stride + start)
        block_mask_ptr = mask_ptr + (row * mask_stride + start)
        out = row * length + start
        following, found, value_beyond, seen = next_step(
            block_values_ptr, block_mask_ptr, room, seen, value_beyond, BLOCK
        )
        valid = tl.load(block_mask_ptr + t, mask=inside, other=0) != 0
        logp = tl.load(logp_ptr + (row * logp_stride + start) + t, mask=valid, other=0.0).to(tl.float32)
        ref_logp = tl.load(ref_ptr + (row * ref_stride + start) + t, mask=valid, other=0.0).to(tl.float32)
        kl = token_kl(logp - ref_logp, ESTIMATOR)
        reward = tl.where(valid, -kl_coef * kl, 0.0) + tl.where(valid & (found == 0), score, 0.0)
        tl.store(rewards_ptr + out + t, reward, mask=inside)
        value = tl.load(block_values_ptr + t, mask=valid, other=0.0).to(tl.float32)
        delta = tl.where(valid, reward + gamma * following - value, 0.0)
        advantage, advantage_beyond = discounted_sum(delta, tl.where(valid, rate, 1.0), advantage_beyond, BLOCK)
        advantage = tl.where(valid, advantage, 0.0)
        tl.store(advantages_ptr + out + t, advantage, mask=inside)
        tl.store(returns_ptr + out + t, tl.where(valid, advantage + value, 0.0), mask=inside)
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


@triton.jit(do_not_specialize=WHITEN_SIZES)
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
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    advantages, returns, rewards = (torch.empty(logp.shape, dtype=torch.float32, device=logp.device) for _ in range(3))
    kl_sum = advantages.new_zeros(len(scores))
    partials = advantages.new_zeros((len(scores), 3))
    if not logp.numel() or not len(scores):
        return advantages, returns, rewards, kl_sum, partials
    with torch.cuda.device_of(logp):
        shaped_kernel[(len(scores),)](
            logp,
            ref_logp,
            values,
            flags(mask),
            scores,
            bootstrap,
            cu_seqlens,
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
    """Whitens contiguous ``values`` in place by moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
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


# ------------------------------------------------------------------ what tools/aot_check.py compiles
AOT_SPECS = [
    *(
        aot_spec(variant, shaped_kernel, POINTERS | types, SIZES, RATES, absent, ESTIMATOR=estimator)
        for variant, types, absent, estimator in (
            ("k1", {}, "bootstrap_ptr cu_ptr", "k1"),
            ("k2,bf16 values", {"values_ptr": "*bf16"}, "bootstrap_ptr cu_ptr", "k2"),
            ("k3,packed,bootstrap", {"cu_ptr": "*i32"}, "", "k3"),
        )
    ),
    *(
        aot_spec(variant, whiten_kernel, WHITEN_POINTERS, WHITEN_SIZES, [], "", MERGE=MERGE_BLOCK, **constexprs)
        | {"num_warps": WHITEN_WARPS, "limits": {"regs": 96, "spill": 0, "shared": 49152}}
        for variant, constexprs in (
            ("shifted", {"BLOCK": WHITEN_BLOCK, "WHITEN": True, "SHIFT_MEAN": True}),
            ("scaled", {"BLOCK": WHITEN_BLOCK, "WHITEN": True, "SHIFT_MEAN": False}),
            ("moments only", {"BLOCK": WHITEN_BLOCK, "WHITEN": False, "SHIFT_MEAN": True}),
        )
    ),
]
