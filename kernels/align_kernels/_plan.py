"""How much at a time, what to keep, which rows: what is decided before an operation on hidden states."""

import functools
import os

import torch
from torch import Tensor

from align_kernels import _checks, gemm

MIB = 2**20
# Logits at a time: enough to fill a product of matrices; on a CPU at least so many rows.
CHUNK_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB}
LEAST_CHUNK_ROWS = 128
# ``save="auto"`` keeps logits up to this share of a device's memory.
KEPT_SHARE = 16
MOST_KEPT_ON_CPU = 1024 * MIB


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of the product in the dtype of autocast, where it is on for their device; float64 stays."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


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


def logits_memory(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of logits that :func:`align_kernels.linear_token_logprobs` holds at its peak, forward and backward.

    Args:
        rows: Tokens that count.
        vocabulary: Size of the vocabulary.
        dtype: Of the hidden states.
        device: Where they are.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    held = rows if keeps("auto", rows, vocabulary, like) else min(rows, chunk_rows(None, vocabulary, like))
    return held * vocabulary * gemm.compute_dtype(dtype, device).itemsize


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
    return _share_of_memory(device.type, device.index)


# Called while tracing, never traced; see _dispatch.choose.
_memory_to_keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _share_of_memory(device_type: str, index: int | None) -> int:
    """Bytes: a share of all, not of what is free, so that a run that is resumed decides (and rounds) as before."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(index or 0).total_memory // KEPT_SHARE
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return MOST_KEPT_ON_CPU
    return min(total // KEPT_SHARE, MOST_KEPT_ON_CPU)
