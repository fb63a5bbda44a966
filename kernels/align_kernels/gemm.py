"""Matrix products of the output layer, by the library, in the dtype that is fastest where the tensors are.

On a CPU without instructions for them bf16 products can be four times slower than fp32: there the weight is widened a
slice at a time. Which dtype to use is found out once per process.
"""

import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_BYTES = 32 * 2**20  # of a weight widened at a time
PROBE_REPEATS = 5
NARROW_GAIN = 0.8  # a narrow product must run at this share of fp32's rate to be used


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to multiply operands of ``dtype``."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    # half-precision exponentials lose the small probabilities, and no CPU gains from them
    return dtype if dtype == torch.bfloat16 and _bfloat16_pays() else torch.float32


# As in _dispatch: called while tracing, never traced.
compute_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _bfloat16_pays() -> bool:
    """Whether bf16 products on this CPU reach 0.8 of fp32's rate: the best of a few interleaved runs, 20 ms."""
    operands = {
        dtype: (torch.ones(128, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, float("inf"))
    for _ in range(PROBE_REPEATS):
        for dtype, (a, b) in operands.items():
            start = time.perf_counter()
            torch.mm(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] >= NARROW_GAIN * best[torch.bfloat16]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden·weightᵀ + bias in the dtype of ``out``, ``[n, V]``."""
    if weight.dtype == out.dtype:
        _mm(hidden, weight, bias, out)
        return
    for part, slice_ in _widened(weight, out.dtype):
        _mm(hidden, slice_, None if bias is None else bias[part].to(out.dtype), out[:, part])


def _mm(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """grad·weight in the dtype of ``grad``: ``[n, V]`` by ``[V, H]``."""
    if weight.dtype == grad.dtype:
        return grad @ weight
    total = grad.new_zeros(len(grad), weight.shape[1])
    for part, slice_ in _widened(weight, grad.dtype):
        total.addmm_(grad[:, part], slice_)
    return total


def add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += gradᵀ·hidden: ``[V, H]``, the product in the dtype of the operands, the sum in that of ``total``."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    elif grad.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)  # not rounded between chunks
    else:
        total += grad.T @ hidden


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, SLICE_BYTES // (max(weight.shape[1], 1) * dtype.itemsize))
    for start in range(0, len(weight), rows):
        part = slice(start, min(start + rows, len(weight)))
        yield part, weight[part].to(dtype)
