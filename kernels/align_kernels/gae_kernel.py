"""K5 in Triton: generalised advantage estimation by an associative scan, one program per sequence.

A_t = δ_t + a_t A_{t+1} composes, from the right, maps x → δ_t + a_t x; a token passed over is the identity.
What follows a token is a second scan, of the nearest step to its right. Blocks go from the right end to the left; what
a block hands on stays in registers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # of 1024, the scans take twice the registers, and half as many programs fit on a multiprocessor
NUM_WARPS = 4
POINTERS = {
    "rewards_ptr": "*fp32",
    "values_ptr": "*fp32",
    "mask_ptr": "*u8",
    "dones_ptr": "*u8",
    "log_rho_ptr": "*fp32",
    "bootstrap_ptr": "*fp32",
    "cu_ptr": "*i64",
    "advantages_ptr": "*fp32",
    "returns_ptr": "*fp32",
}
SIZES = ["length", "rewards_stride", "values_stride", "mask_stride", "dones_stride", "log_rho_stride"]
RATES = ["gamma", "lam", "log_rho_bar", "log_c_bar"]


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
def next_step(values_ptr, mask_ptr, room, seen, value_beyond, BLOCK: tl.constexpr):
    """Looks right of each token of a block for the nearest step.

    The pointers are at the block's first token, ``room`` tokens from the end of the sequence. ``seen`` says whether
    there is a step behind the block's right neighbour, and ``value_beyond`` its value, or else the bootstrap. Returns
    values and whether there is a step for each token, then both for the block to the left.
    """
    right = tl.arange(0, BLOCK) + 1
    found = tl.load(mask_ptr + right, mask=right < room, other=0).to(tl.int32)
    value = tl.load(values_ptr + right, mask=(right < room) & (found != 0), other=0.0).to(tl.float32)
    found, value = tl.associative_scan((found, value), 0, _nearest, reverse=True)
    value = tl.where(found != 0, value, value_beyond)
    found = found | seen
    return value, found, at_first(value, BLOCK), at_first(found, BLOCK)


@triton.jit
def bounds(cu_ptr, length):
    """This program's sequence, its row, and its first and one-past-last token in the row.

    Packed tokens before the first boundary or behind the last count to the sequence there: every output is written.
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
@triton.jit(do_not_specialize=SIZES + RATES)
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
    bootstrap = tl.full((), 0.0, tl.float32)
    if bootstrap_ptr is not None:
        bootstrap = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    value_beyond = bootstrap
    advantage_beyond = tl.full((), 0.0, tl.float32)
    seen = tl.full((), 0, tl.int32)
    t = tl.arange(0, BLOCK)  # within a block; where the block starts is a 64-bit scalar
    num_blocks = tl.cdiv(hi - lo, BLOCK)
    for i in range(num_blocks):
        start = lo + (num_blocks - 1 - i) * BLOCK
        room = tl.minimum(hi - start, BLOCK + 1).to(tl.int32)
        inside = t < room
        counted = inside
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + (row * mask_stride + start) + t, mask=inside, other=0) != 0
        step = counted
        if MODE == "dense":
            step = inside
        block_values_ptr = values_ptr + (row * values_stride + start)
        if mask_ptr is not None and MODE != "dense":
            block_mask_ptr = mask_ptr + (row * mask_stride + start)
            following, found, value_beyond, seen = next_step(
                block_values_ptr, block_mask_ptr, room, seen, value_beyond, BLOCK
            )
            if MODE == "stop":
                adjacent = tl.load(block_mask_ptr + t + 1, mask=t + 1 < room, other=0) != 0
                following = tl.where(adjacent, following, tl.where(found != 0, 0.0, bootstrap))
        else:
            following = tl.load(block_values_ptr + t + 1, mask=t + 1 < room, other=0.0).to(tl.float32)
            following = tl.where(t + 1 < room, following, bootstrap)
        decay = tl.where(step, rate, 1.0)
        if MODE == "stop":
            decay = tl.where(inside & (step == 0), 0.0, decay)
        if dones_ptr is not None:
            end = tl.load(dones_ptr + (row * dones_stride + start) + t, mask=step, other=0) != 0
            following = tl.where(end, 0.0, following)
            decay = tl.where(end, 0.0, decay)
        value = tl.load(block_values_ptr + t, mask=step, other=0.0).to(tl.float32)
        reward = tl.load(rewards_ptr + (row * rewards_stride + start) + t, mask=step, other=0.0).to(tl.float32)
        delta = tl.where(step, reward + gamma * following - value, 0.0)
        if log_rho_ptr is not None:
            log_rho = tl.load(log_rho_ptr + (row * log_rho_stride + start) + t, mask=step, other=0.0).to(tl.float32)
            delta *= tl.exp(tl.where(log_rho > log_rho_bar, log_rho_bar, log_rho))
            decay *= tl.where(step, tl.exp(tl.where(log_rho > log_c_bar, log_c_bar, log_rho)), 1.0)
        advantage, advantage_beyond = discounted_sum(delta, decay, advantage_beyond, BLOCK)
        out = row * length + start
        tl.store(advantages_ptr + out + t, tl.where(counted, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + out + t, tl.where(counted, advantage + value, 0.0), mask=inside)


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
            bootstrap,
            cu_seqlens,
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


# ------------------------------------------------------------------ what tools/aot_check.py compiles
def aot_spec(
    variant: str, fn: Any, pointers: dict[str, str], sizes: list[str], rates: list[str], absent: str, **constexprs: Any
) -> dict[str, Any]:
    """A specialisation for the ahead-of-time gate; ``absent`` names the pointers that are None."""
    constexprs = {"BLOCK": BLOCK, **constexprs} | dict.fromkeys(absent.split())
    present = [name for name in pointers if name not in constexprs]
    return {
        "name": f"{fn.__name__}[{variant}]",
        "fn": fn,
        "signature": pointers | dict.fromkeys(sizes, "i64") | dict.fromkeys(rates, "fp32"),
        "constexprs": constexprs,
        "divisible": present,
        "num_warps": NUM_WARPS,
        "limits": {"regs": 96, "spill": 0, "shared": 49152},
    }


AOT_SPECS = [
    aot_spec(variant, gae_kernel, POINTERS | types, SIZES, RATES, absent, MODE=mode)
    for variant, types, absent, mode in (
        ("dense", {}, "mask_ptr dones_ptr log_rho_ptr bootstrap_ptr cu_ptr", "dense"),
        ("skip", {}, "dones_ptr log_rho_ptr bootstrap_ptr cu_ptr", "skip"),
        ("skip,bf16,packed", {"rewards_ptr": "*bf16", "values_ptr": "*bf16"}, "dones_ptr log_rho_ptr", "skip"),
        ("stop", {}, "dones_ptr log_rho_ptr cu_ptr", "stop"),
        ("dense,masked,dones", {}, "log_rho_ptr bootstrap_ptr cu_ptr", "dense"),
        ("everything", {"cu_ptr": "*i32"}, "", "skip"),
    )
]
