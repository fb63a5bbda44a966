"""An output layer over chosen hidden states, in chunks, and the sums of its gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align_kernels import gemm
from align_kernels._labels import chunks, take
from align_kernels.native import statistics_dtype


@dataclass(frozen=True)
class Layer:
    """Hidden states and the output layer they meet.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        rows: int64 ``[M]``, the hidden states that count, each once; None for all.
        chunk: Rows of logits at a time.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    chunk: int

    def __len__(self) -> int:
        return len(self.hidden if self.rows is None else self.rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return gemm.compute_dtype(self.hidden.dtype, self.hidden.device)

    def parts(self) -> list[slice]:
        """The chunks."""
        return list(chunks(len(self), self.chunk))

    def states(self, part: slice | Tensor) -> Tensor:
        """Hidden states of a part of the rows."""
        return take(self.hidden, self.rows, part).to(self.dtype)

    def empty_logits(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows."""
        return torch.empty(rows, len(self.weight), dtype=self.dtype, device=self.hidden.device)

    def logits_into(self, out: Tensor, part: slice) -> Tensor:
        """Logits of a part of the rows, in the first rows of ``out``."""
        out = out[: part.stop - part.start]
        gemm.project(self.states(part), self.weight, self.bias, out)
        return out


@dataclass
class LayerGrads:
    """Gradients of a layer, None where not needed. Chunks are summed in float32 and rounded once.

    ``single`` says that there is one chunk: its product is the weight's gradient, without a sum.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    single: bool

    @classmethod
    def zeros(
        cls,
        layer: Layer,
        needs: tuple[bool, bool, bool],
        accum_dtype: torch.dtype | None,
        sums: int,
        rows_may_lack: bool = False,
    ) -> "LayerGrads":
        """Zeros, to which so many chunks will be added, for what is needed of hidden states, weight and bias.

        With ``rows_may_lack`` some rows may never be added.
        """
        needs_hidden, needs_weight, needs_bias = needs
        wide = statistics_dtype(layer.weight.dtype)
        hidden = weight = bias = None
        if needs_hidden:
            every = layer.rows is None and not rows_may_lack
            hidden = (torch.empty_like if every else torch.zeros_like)(layer.hidden)
        if needs_weight:
            weight = layer.weight if sums == 1 else torch.zeros_like(layer.weight, dtype=accum_dtype or wide)
        if needs_bias and layer.bias is not None:
            bias = torch.zeros_like(layer.bias, dtype=wide)
        return cls(hidden, weight, bias, sums == 1)

    def add(self, layer: Layer, part: slice | Tensor, grad: Tensor, scale: Tensor | None = None) -> None:
        """Adds a part of the rows: ``grad`` ``[n, V]`` in the dtype of the logits, each row times ``scale`` ``[n]``."""
        rows = None if layer.rows is None else layer.rows[part]
        if self.hidden is not None:
            product = gemm.times_weight(grad, layer.weight)
            product = product if scale is None else product * scale[:, None]
            if rows is None:
                self.hidden[part] = product
            else:
                self.hidden.index_copy_(0, rows, product.to(self.hidden.dtype))
        if self.weight is not None:
            states = layer.states(part)
            states = states if scale is None else (states * scale[:, None]).to(states.dtype)
            if self.single:
                self.weight = grad.T @ states
            else:
                gemm.add_outer(self.weight, grad, states)
        if self.bias is not None:
            factors = torch.ones(len(grad), dtype=grad.dtype, device=grad.device) if scale is None else scale
            self.bias += grad.T @ factors.to(grad.dtype)

    def rounded(self, layer: Layer) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of the layer."""
        weight = None if self.weight is None else self.weight.to(layer.weight.dtype)
        bias = None if self.bias is None or layer.bias is None else self.bias.to(layer.bias.dtype)
        return self.hidden, weight, bias
