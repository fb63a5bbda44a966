"""What the scan operations accept. Errors name the argument, what it is and what it must be, before any launch."""

from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_layout(name: str, tokens: Tensor, cu_seqlens: Tensor | None, gamma: float, lam: float) -> None:
    """The tokens themselves, the boundaries of packed ones, and the two discounts."""
    if tokens.dtype not in FLOATS:
        raise TypeError(f"{name} is {tokens.dtype}: it must be {_listed(FLOATS)}")
    if cu_seqlens is None and tokens.dim() != 2:
        raise ValueError(f"{name} has shape {list(tokens.shape)}: give [B, T], or [N] with cu_seqlens")
    if cu_seqlens is not None:
        if tokens.dim() != 1:
            raise ValueError(f"{name} has shape {list(tokens.shape)}: with cu_seqlens it must be [N]")
        if cu_seqlens.dim() != 1 or not len(cu_seqlens):
            raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}: it must be [S + 1]")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}: it must be int32 or int64")
        _check_device("cu_seqlens", cu_seqlens, name, tokens)
    for rate, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{rate} is {number}: it must be in [0, 1]")


def check_tokens(name: str, tokens: Tensor, numbers: dict[str, Tensor], flags: dict[str, Tensor | None]) -> None:
    """Per-token tensors: the shape and device of ``tokens``."""
    for other, x in [*numbers.items(), *flags.items()]:
        if x is None:
            continue
        allowed = FLOATS if other in numbers else (torch.bool, torch.uint8)
        if x.dtype not in allowed:
            raise TypeError(f"{other} is {x.dtype}: it must be {_listed(allowed)}")
        if x.shape != tokens.shape:
            raise ValueError(f"{other} has shape {list(x.shape)}, but {name} has {list(tokens.shape)}")
        _check_device(other, x, name, tokens)


def check_sequences(name: str, tokens: Tensor, cu_seqlens: Tensor | None, numbers: dict[str, Tensor | None]) -> None:
    """Per-sequence tensors: one number for each row, or for each packed sequence."""
    num_sequences = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
    for other, x in numbers.items():
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise TypeError(f"{other} is {x.dtype}: it must be {_listed(FLOATS)}")
        if x.shape != (num_sequences,):
            of = f"{name} has {list(tokens.shape)}"
            if cu_seqlens is not None:
                of = f"cu_seqlens has {list(cu_seqlens.shape)}, bounds of {num_sequences} sequences"
            raise ValueError(f"{other} has shape {list(x.shape)}, but {of}")
        _check_device(other, x, name, tokens)


def _check_device(other: str, x: Tensor, name: str, tokens: Tensor) -> None:
    if x.device != tokens.device:
        raise RuntimeError(f"{other} is on {x.device}, but {name} on {tokens.device}")


def check_boundaries(cu_seqlens: Tensor | None, total: int) -> None:
    """On a CPU, that the boundaries rise from 0 to the number of tokens. To ask a GPU would be to wait for it."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(lo > hi for lo, hi in pairwise(bounds)):
        shown = ", ".join(map(str, bounds[:16])) + (", …" if len(bounds) > 16 else "")
        raise ValueError(f"cu_seqlens is [{shown}]: it must rise from 0 to {total}, the number of tokens")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
