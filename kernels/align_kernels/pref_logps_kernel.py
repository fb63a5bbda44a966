"""K4 in Triton: sums over the tokens of each sequence, one program a sequence, in a fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
STEPS = 40  # of bisection: enough for 2⁴⁰ tokens


@triton.jit
def first_at_least(ids_ptr, wanted, n, STEPS: tl.constexpr):
    """How many of the ascending ``ids`` are below ``wanted``, by bisection."""
    low = tl.full((), 0, tl.int64)
    high = low + n
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(ids_ptr + middle, mask=low < high, other=0) < wanted
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["n"])
def segment_sum_kernel(
    values_ptr, counted_ptr, ids_ptr, sums_ptr, counts_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    first = first_at_least(ids_ptr, sequence, n, STEPS)
    end = first_at_least(ids_ptr, sequence + 1, n, STEPS)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + at, mask=at < end, other=0.0)
        count += tl.load(counted_ptr + at, mask=at < end, other=0).to(tl.int64)
    tl.store(sums_ptr + sequence, tl.sum(total, 0))
    tl.store(counts_ptr + sequence, tl.sum(count, 0))


@torch.library.custom_op("align_kernels::segment_sums", mutates_args=())
def segment_sums(values: Tensor, counted: Tensor, ids: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
    """Sum and count of each sequence's tokens; see :func:`align_kernels.pref_logps.segment_sums`."""
    sums = torch.zeros(num_seqs, dtype=torch.float32, device=values.device)
    counts = torch.zeros(num_seqs, dtype=torch.int64, device=values.device)
    if num_seqs and len(values):
        with torch.cuda.device_of(values):
            segment_sum_kernel[(num_seqs,)](
                values.contiguous(),
                counted.contiguous().view(torch.uint8),
                ids.contiguous(),
                sums,
                counts,
                len(values),
                BLOCK=BLOCK,
                STEPS=STEPS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return sums, counts


@segment_sums.register_fake
def _(values: Tensor, counted: Tensor, ids: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(num_seqs, dtype=torch.float32), ids.new_empty(num_seqs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return grad_sums.index_select(0, ids), None, None, None


segment_sums.register_autograd(_grad, setup_context=_setup)

POINTERS = {
    "values_ptr": "*fp32",
    "counted_ptr": "*u8",
    "ids_ptr": "*i64",
    "sums_ptr": "*fp32",
    "counts_ptr": "*i64",
}
AOT_SPECS = [
    {
        "name": "segment_sum_kernel",
        "fn": segment_sum_kernel,
        "signature": POINTERS | {"n": "i64"},
        "constexprs": {"BLOCK": BLOCK, "STEPS": STEPS},
        "divisible": list(POINTERS),
        "num_warps": NUM_WARPS,
        "limits": {"regs": 96, "spill": 0, "shared": 49152},
    }
]
