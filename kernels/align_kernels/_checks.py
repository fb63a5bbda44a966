"""Checks of arguments, made before anything is launched; every message names the argument and what it met."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.uint8)


def shape(name: str, values: Tensor, expected: torch.Size, of: str) -> None:
    """``values`` has the shape of the argument ``of``."""
    if values.shape != expected:
        raise ValueError(f"{name} is {list(values.shape)}, but {of} is {list(expected)}")


def dtype(name: str, values: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """``values`` has one of the dtypes."""
    if values.dtype not in allowed:
        raise TypeError(f"{name} is {values.dtype}: it must be one of {', '.join(map(str, allowed))}")


def device(**tensors: Tensor | None) -> None:
    """All tensors are on one device."""
    first = None
    for name, values in tensors.items():
        if values is None:
            continue
        if first is None:
            first, there = name, values.device
        elif values.device != there:
            raise RuntimeError(f"{name} is on {values.device}, but {first} is on {there}")


def positive(**values: float | None) -> None:
    """Each number is positive, or None; none is a tensor that asks for a gradient."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}: it must be positive and finite")
        if isinstance(value, Tensor):
            constant(**{name: value})


def floating(name: str, value: torch.dtype | None) -> None:
    """``value`` is a floating-point dtype, or None."""
    if value is not None and not value.is_floating_point:
        raise TypeError(f"{name} is {value}: it must be a floating-point dtype")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """``value`` is one of the words."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")


def constant(**tensors: Tensor | None) -> None:
    """None of the tensors requires a gradient."""
    if torch.is_grad_enabled():
        for name, values in tensors.items():
            if values is not None and values.requires_grad:
                raise ValueError(f"{name} requires a gradient, but none is computed for it: pass {name}.detach()")


def tokens(mask: Tensor | None, labels: Tensor, **others: Tensor | None) -> None:
    """Labels are integers, the mask is one, and both and the others have one shape."""
    dtype("labels", labels, INTEGERS)
    if mask is not None:
        dtype("mask", mask, MASKS)
        shape("mask", mask, labels.shape, "labels")
    for name, values in others.items():
        if values is not None:
            shape(name, values, labels.shape, "labels")


def logits(x: Tensor, labels: Tensor, name: str = "logits") -> None:
    """``x`` ``[…, V]`` belongs to labels ``[…]``."""
    dtype(name, x, FLOATS)
    if x.dim() != labels.dim() + 1 or x.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} is {list(x.shape)}, but labels is {list(labels.shape)}: it must be [*labels.shape, V]"
        )


def layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """Hidden states ``[…, H]``, weight ``[V, H]`` and bias ``[V]`` fit each other and the labels ``[…]``."""
    dtype("hidden", hidden, FLOATS)
    if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "full_tensor"):
        raise ValueError("weight is a DTensor: call this inside the head's forward, or pass weight.full_tensor()")
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        if weight.dim() == 2 and hidden.shape[-1] == weight.shape[0]:
            raise ValueError(
                f"hidden is {list(hidden.shape)} and weight is {list(weight.shape)}: these look like logits; "
                "give hidden states, or use token_stats"
            )
        if not weight.numel():
            raise ValueError(
                f"weight is {list(weight.shape)}, a parameter without elements: call this inside the head's forward, "
                "where it has been gathered, or pass weight.full_tensor()"
            )
        raise ValueError(
            f"weight is {list(weight.shape)}: it must be [V, {hidden.shape[-1]}] for hidden {list(hidden.shape)}"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, but labels is {list(labels.shape)}: it must be [*labels.shape, H]"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, or call this under autocast"
        )
    if bias is not None:
        dtype("bias", bias, (weight.dtype,))
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {list(bias.shape)}, but weight is {list(weight.shape)}")


def rows(values: Tensor, mask: Tensor | None, labels: Tensor) -> None:
    """``values`` are indices of tokens, as many as the mask counts, where that is known without waiting."""
    dtype("rows", values, (torch.int64,))
    if values.dim() != 1 or values.device != labels.device:
        raise ValueError(f"rows is {list(values.shape)} on {values.device}: it must be one-dimensional, beside labels")
    if torch.compiler.is_compiling():
        return
    if values.is_cpu and len(values):
        first, last = map(int, values.aminmax())
        if first < 0 or last >= labels.numel():
            raise ValueError(f"rows are {first} … {last}: they must be indices of {labels.numel()} tokens")
    if mask is not None and mask.is_cpu:
        count = int(mask.count_nonzero())
        if count != len(values):
            raise ValueError(f"rows has {len(values)} tokens, but mask counts {count}")


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of an autograd function, for a first derivative alone.

    A second one would silently lack what the saved tensors contribute: ``once_differentiable`` looks at the upstream
    gradients only.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "align_kernels computes first derivatives only: leave create_graph out, or call with impl='reference'"
            )
        return backward(ctx, *grads)

    return checked


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy of it whose last dimension is contiguous."""
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    _warn_about_copy()
    return x.contiguous()


@functools.cache
def _warn_about_copy() -> None:
    warnings.warn(
        "align_kernels copied a tensor whose last dimension is not contiguous; store it so to save the copies",
        stacklevel=4,
    )
