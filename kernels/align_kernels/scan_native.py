"""Native scan operations: compiled code on a CPU with a C compiler, tensor operations everywhere else.

The functions take the arguments of their namesakes in ``scan_compiled``.
"""

from typing import Any

from torch import Tensor

from align_kernels import scan_compiled, scan_tensors


def gae(rewards: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns; arguments as in :func:`align_kernels.gae`."""
    return _module(rewards).gae(rewards, *tensors, **options)


def shaped(logp: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    return _module(logp).shaped(logp, *tensors, **options)


def whiten_(values: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """Whitens contiguous ``values`` in place by moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    return _module(values).whiten_(values, *tensors, **options)


def _module(tokens: Tensor) -> Any:
    return scan_compiled if tokens.device.type == "cpu" and scan_compiled.problem() is None else scan_tensors
