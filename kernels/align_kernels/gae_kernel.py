"""K5 in Triton: generalised advantage estimation by an associative scan, one program per sequence.

A_t = δ_t + a_t A_{t+1} is the composition, from the right, of the maps x → δ_t + a_t x; a token that is passed over is the
identity. What comes next to a token is a second scan, of the nearest step to its right. Blocks go from the right end to
the left; what a block hands on stays in registers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
RUNTIME = (
    "length rewards_stride values_stride mask_stride dones_stride log_rho_stride gamma lam log_rho_bar log_c_bar"
).split()


# ------------------------------------------------------------------ scans
@triton.jit
def _compose(a_right, b_right, a, b):
    return a * a_right, b + a * b_right


@triton.jit
def _nearest(found_right, value_right, found, value):
    return found | found_right, tl.where(found != 0, value, value_right)


@triton.jit
def at_first(x, BLOCK: tl.constexpr):
    """The leftmost element of a block."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == 0, x, tl.zeros_like(x)), 0)


@triton.jit
def discounted_sum(delta, decay, beyond, BLOCK: tl.constexpr):
    """x_t = delta_t + decay_t x_{t+1} over a block that ``beyond`` stands right of, and what stands left of it then."""
    product, total = tl.associative_scan((decay, delta), 0, _compose, reverse=True)
    x = total + product * beyond
    return x, at_first(x, BLOCK)


@triton.jit
def next_step(values_ptr, mask_ptr, t, hi, seen, value_beyond, BLOCK: tl.constexpr):
    """Looks right of each token t of a block for the nearest step.

    ``seen`` and ``value_beyond`` say whether there is one behind the block's right neighbour, and its value (or the
    bootstrap). Returns value and whether there is one for each token, then both for the block to the left.
    """
    inside = t + 1 < hi
    found = tl.load(mask_ptr + t + 1, mask=inside, other=0).to(tl.int32)
    value = tl.load(values_ptr + t + 1, mask=inside & (found != 0), other=0.0).to(tl.float32)
    found, value = tl.associative_scan((found, value), 0, _nearest, reverse=True)
    value = tl.where(found != 0, value, value_beyond)
    found = found | seen
    return value, found, at_first(value, BLOCK), at_first(found, BLOCK)


@triton.jit
def bounds(cu_ptr, length):
    """First row element, first and one-past-last token of this program's sequence, clamped so that nothing is left out.

    Padded: row ``program_id``. Packed: tokens before the first boundary or behind the last belong to the sequence there.
    """
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence
    lo = tl.zeros((), tl.int64)
    hi = length
    if cu_ptr is not None:
        row = tl.zeros((), tl.int64)
        lo = tl.load(cu_ptr + sequence).to(tl.int64)
        hi = tl.load(cu_ptr + sequence + 1).to(tl.int64)
        lo = tl.where(sequence == 0, 0, tl.maximum(lo, 0))
        hi = tl.where(sequence == tl.num_programs(0) - 1, length, tl.minimum(hi, length))
    return sequence, row, lo, hi


# ------------------------------------------------------------------ kernel
@triton.jit(do_not_specialize=RUNTIME)
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    dones_ptr,
    log_rho_ptr,
    bootstrap_ptr,
    cu_ptr,
    advantages_ptr,
    returns_ptr,
    length: tl.int64,
    rewards_stride: tl.int64,
    values_stride: tl.int64,
    mask_stride: tl.int64,
    dones_stride: tl.int64,
    log_rho_stride: tl.int64,
    gamma,
    lam,
    log_rho_bar,
    log_c_bar,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gamma = tl.full((), gamma, tl.float32)
    rate = gamma * tl.full((), lam, tl.float32)
    sequence, row, lo, hi = bounds(cu_ptr, length)
    rewards_ptr += row * rewards_stride
    values_ptr += row * values_stride
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    if dones_ptr is not None:
        dones_ptr += row * dones_stride
    if log_rho_ptr is not None:
        log_rho_ptr += row * log_rho_stride
    advantages_ptr += row * length
    returns_ptr += row * length
    value_beyond = tl.full((), 0.0, tl.float32)
    if bootstrap_ptr is not None:
        value_beyond = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    bootstrap = value_beyond
    advantage_beyond = tl.full((), 0.0, tl.float32)
    seen = tl.full((), 0, tl.int32)
    num_blocks = tl.cdiv(hi - lo, BLOCK)
    for i in range(num_blocks):
        t = lo + (num_blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = t < hi
        counted = inside
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + t, mask=inside, other=0) != 0
        step = counted
        if MODE == "dense":
            step = inside
        reward = tl.load(rewards_ptr + t, mask=step, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=step, other=0.0).to(tl.float32)
        if mask_ptr is not None and MODE != "dense":
            following, found, value_beyond, seen = next_step(values_ptr, mask_ptr, t, hi, seen, value_beyond, BLOCK)
            if MODE == "stop":
                adjacent = tl.load(mask_ptr + t + 1, mask=t + 1 < hi, other=0) != 0
                following = tl.where(adjacent, following, tl.where(found != 0, 0.0, bootstrap))
        else:
            following = tl.load(values_ptr + t + 1, mask=t + 1 < hi, other=0.0).to(tl.float32)
            following = tl.where(t + 1 < hi, following, bootstrap)
        end = tl.zeros_like(step)
        if dones_ptr is not None:
            end = tl.load(dones_ptr + t, mask=step, other=0) != 0
        delta = reward + gamma * tl.where(end, 0.0, following) - value
        decay = tl.where(end, 0.0, rate)
        if log_rho_ptr is not None:
            log_rho = tl.load(log_rho_ptr + t, mask=step, other=0.0).to(tl.float32)
            delta *= tl.exp(tl.where(log_rho > log_rho_bar, log_rho_bar, log_rho))
            decay *= tl.exp(tl.where(log_rho > log_c_bar, log_c_bar, log_rho))
        passed = 1.0 if MODE == "skip" else 0.0
        decay = tl.where(step, decay, tl.where(inside, passed, 1.0))
        advantage, advantage_beyond = discounted_sum(tl.where(step, delta, 0.0), decay, advantage_beyond, BLOCK)
        tl.store(advantages_ptr + t, tl.where(counted, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + t, tl.where(counted, advantage + value, 0.0), mask=inside)


# ------------------------------------------------------------------ launch
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
    """Advantages and returns, float32; arguments as in :func:`align_kernels.gae`."""
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
    num_sequences = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    if not rewards.numel() or not num_sequences:
        return advantages, returns
    mask, dones = flags(mask), flags(dones)
    with torch.cuda.device_of(rewards):
        gae_kernel[(num_sequences,)](
            rewards,
            values,
            mask,
            dones,
            log_rho,
            None if bootstrap is None else bootstrap.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            advantages,
            returns,
            rewards.shape[-1],
            *(row_stride(x) for x in (rewards, values, mask, dones, log_rho)),
            gamma,
            lam,
            math.log(rho_bar),
            math.log(c_bar),
            MODE=mask_mode,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return advantages, returns


def flags(x: Tensor | None) -> Tensor | None:
    """A boolean or uint8 tensor as uint8, the one type the kernels are compiled for."""
    return None if x is None else x.view(torch.uint8)


def row_stride(x: Tensor | None) -> int:
    """Elements from one row to the next; packed tensors have one row."""
    return 0 if x is None or x.dim() < 2 else x.stride(0)
