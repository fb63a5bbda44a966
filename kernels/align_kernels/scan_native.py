"""Native scan operations: compiled code on a CPU with a C compiler, tensor operations everywhere else.

``gae`` and ``shaped`` take the arguments of their namesakes in ``scan_compiled``.
"""

from typing import Any

import torch
from torch import Tensor

from align_kernels import scan_compiled, scan_tensors

WHITEN_EPSILON = 1e-8


def gae(rewards: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns; arguments as in :func:`align_kernels.gae`."""
    return _module(rewards).gae(rewards, *tensors, **options)


def shaped(logp: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    return _module(logp).shaped(logp, *tensors, **options)


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """Whitens contiguous ``values`` in place by moments ``[S, 3]``, if asked to; returns (mean, biased variance)."""
    count, mean, squares = merge(partials)
    var = squares / count.clamp(min=1)
    if whiten:
        few = count < 2  # such values stay as they are
        shift, scale = torch.where(few, 0.0, mean), torch.where(few, 1.0, torch.rsqrt(var + WHITEN_EPSILON))
        back = torch.zeros_like(shift) if shift_mean else shift
        if _module(values) is scan_compiled:
            scan_compiled.whiten_(values, mask, shift=float(shift), scale=float(scale), back=float(back))
        else:
            values.sub_(shift).mul_(scale).add_(back).masked_fill_(mask.logical_not(), 0)
    return torch.stack([mean, var])


def merge(moments: Tensor) -> Tensor:
    """Count, mean and summed squared differences from it over everything, ``[3]``, from those of parts ``[S, 3]``.

    Chan, Golub & LeVeque 1979: nothing subtracts two large sums.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    overall = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, overall, (squares + count * (mean - overall) ** 2).sum()])


def _module(tokens: Tensor) -> Any:
    return scan_compiled if tokens.device.type == "cpu" and scan_compiled.problem() is None else scan_tensors
