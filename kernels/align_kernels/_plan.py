"""How much at a time, what to keep, which rows: what is decided before an operation on hidden states."""

import functools
import os

import torch
from torch import Tensor

from align_kernels import _checks, gemm

MIB = 2**20
# Logits at a time: enough to fill a product of matrices; on a CPU at least so many rows.
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}
LEAST_CHUNK_ROWS = 128
MOST_KEPT_ON_CPU = 1024 * MIB


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of autocast, where it is on for the first one's device."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def counted_rows(mask: Tensor | None, rows: Tensor | None, labels: Tensor) -> Tensor | None:
    """Indices of the tokens that count, or None for all."""
    if rows is not None:
        _checks.rows(rows, mask, labels)
        return rows
    if mask is None:
        return None
    chosen = mask.reshape(-1).nonzero()[:, 0].to(labels.device)
    return None if len(chosen) == labels.numel() else chosen


def keeps(save: str, rows: int, vocabulary: int, like: Tensor) -> bool:
    """Whether to keep what the backward pass needs of so many rows of logits."""
    if save != "auto":
        return save == "logits"
    dtype = gemm.compute_dtype(like.dtype, like.device)
    return rows * vocabulary * dtype.itemsize <= _memory_to_keep(like.device)


def chunk_rows(chunk_bytes: int | None, vocabulary: int, like: Tensor) -> int:
    """Rows of logits at a time."""
    itemsize = gemm.compute_dtype(like.dtype, like.device).itemsize
    vocabulary = max(vocabulary, 1)
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (vocabulary * itemsize))
    if like.device.type == "cuda":
        return max(1, CHUNK_BYTES["cuda"] // (vocabulary * itemsize))
    return max(LEAST_CHUNK_ROWS, CHUNK_BYTES["cpu"] // (vocabulary * itemsize))


def _memory_to_keep(device: torch.device) -> int:
    return _quarter_of_free_memory(device.type, device.index)


# Called while tracing, never traced; see _dispatch.choose.
_memory_to_keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _quarter_of_free_memory(device_type: str, index: int | None) -> int:
    """Bytes, as found at first use."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info(index)[0] // 4
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        free = MOST_KEPT_ON_CPU
    return min(free // 4, MOST_KEPT_ON_CPU)
