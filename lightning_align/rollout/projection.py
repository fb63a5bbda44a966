"""Linear layers of a decoder plan: over the module's weights, or over copies packed for the CPU's matrix product."""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

PACK_FROM = 2**17  # elements; in smaller matrices the packed product's fixed cost (10 µs) outweighs what it saves
PACKABLE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # and how far the packed product of the trial may be off


class Projection(Protocol):
    """x @ weight + bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product for x [tokens, in], as a new tensor [tokens, out]."""
        ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x @ weight + bias, written into ``residual`` [tokens, out]."""
        ...


@dataclass(frozen=True)
class PlainProjection:
    """``weight`` is [in, out]: a view of a torch Linear's, or a GPT-2 Conv1D's own."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        residual.addmm_(x, self.weight)
        return residual if self.bias is None else residual.add_(self.bias)


@dataclass(frozen=True)
class PackedProjection:
    """``weight`` is a copy in the blocks in which oneDNN multiplies.

    The plain product packs its weight at every call, which is most of the work when there are few rows: over a model of
    7 M parameters the packed one takes half the time at 4 and 8 rows, and 0.8 of it at 32 and 128.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return _packed_product(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(_packed_product(x, self.weight, self.bias))


def make_projection(weight: Tensor, bias: Tensor | None = None) -> Projection:
    """The faster projection of ``weight`` [in, out] and ``bias`` [out] on their device."""
    if weight.device.type == "cpu" and weight.numel() >= PACK_FROM and _packing_works(weight.dtype):
        return PackedProjection(_pack(weight), None if bias is None else bias.detach())
    return PlainProjection(weight, bias)


# The operations behind torch.compile's frozen linear layers. They are not public, hence the trial before the first use.
def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous(), None)


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether this processor and build of torch multiply packed weights of ``dtype``, and correctly."""
    if dtype not in PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 32), (32, 48), (48,)))
    try:
        ours = _packed_product(x, _pack(weight), bias)
    except (AttributeError, RuntimeError):  # another build, or a processor without instructions for this type
        return False
    return bool((ours - torch.addmm(bias, x, weight)).abs().max() <= PACKABLE[dtype])
