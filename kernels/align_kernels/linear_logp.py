"""Statistics of hidden states under an output layer, a chunk of rows at a time: K2, for any pair of row passes.

The chunk loop, the matrix products, what is kept for the backward pass and the merging of vocabulary shards are the
same for every implementation; :class:`Rows` are the two passes over a chunk of logits, by Triton or by the library.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align_kernels._labels import locate, only
from align_kernels.layer import Layer, LayerGrads
from align_kernels.native import RowGrads, RowStats, Wanted, joined
from align_kernels.shards import Shard, merge, sum_over_shards


class Rows(Protocol):
    """Forward and backward of a chunk of logits; see :class:`align_kernels.native.NativeRows`.

    ``by_probabilities``: the gradient is made by :func:`from_probabilities` and not by ``backward``. ``in_place``: kept
    logits are overwritten with their gradient, so that backward runs once only.
    """

    wanted: Wanted
    by_probabilities: bool
    in_place: bool

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        ref_x: Tensor | None = None,
        *,
        overwrite: bool = False,
        probabilities: bool = False,
    ) -> RowStats: ...

    def mark(self, x: Tensor, labels: Tensor, logp: Tensor) -> None: ...

    def backward(
        self,
        out: Tensor,
        x: Tensor,
        labels: Tensor,
        stats: RowStats,
        grads: RowGrads,
        ref_x: Tensor | None = None,
        *,
        owned: Tensor | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Columns:
    """What forward found out about rows ``[M]``.

    Args:
        stats: Over the whole vocabulary; ``stats.logp`` is of the column in ``index``.
        logp: Of the labels; 0 where a label is outside the vocabulary.
        index: Columns of the labels in this shard; some column where ``inside`` is false.
        inside: Which labels are columns of this shard; None for all.
        known: Which labels are columns of some shard; None for all.
    """

    stats: RowStats
    logp: Tensor
    index: Tensor
    inside: Tensor | None
    known: Tensor | None


def forward(
    rows: Rows,
    layer: Layer,
    reference: Layer | None,
    labels: Tensor,
    *,
    keep: bool,
    check: bool = False,
    shard: Shard | None = None,
) -> tuple[Columns, Tensor | None]:
    """Statistics of the rows, and with ``keep`` what spares backward a product: logits, or p − 1[j = label]."""
    index, inside = locate(labels, layer.weight.shape[0], 0 if shard is None else shard.start, check=check)
    size = min(layer.chunk, len(layer))
    kept = layer.empty_logits(len(layer) if keep else 0)
    buffer = layer.empty_logits(0 if keep else size)
    ref_buffer = None if reference is None else reference.empty_logits(size)
    probabilities = keep and rows.by_probabilities
    found = []
    # memory that is taken anyway is filled by one product
    at_once = keep and reference is None and len(layer) > 0
    for part in [slice(0, len(layer))] if at_once else layer.parts():
        x = layer.logits_into(kept[part] if keep else buffer, part)
        ref_x = None if reference is None or ref_buffer is None else reference.logits_into(ref_buffer, part)
        found.append(rows.forward(x, index[part], ref_x, overwrite=not keep, probabilities=probabilities))
    stats = joined(found, rows.wanted, layer.hidden)
    if shard is None:
        columns = Columns(stats, only(stats.logp, inside), index, inside, inside)
    else:
        stats, logp, known = merge(stats, inside, shard.group)
        columns = Columns(stats, logp, index, inside, known)
    return columns, kept if keep else None


def backward(
    rows: Rows,
    layer: Layer,
    reference: Layer | None,
    columns: Columns,
    kept: Tensor | None,
    grads: RowGrads,
    needs: tuple[bool, bool, bool],
    *,
    shard: Shard | None = None,
    accum_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from the upstream gradients of the rows ``[M]``."""
    grads = grads._replace(logp=only(grads.logp, columns.known))
    # where no chunk needs memory, all rows are one product each for hidden states and weight, without a sum of chunks
    free = grads.lse is None if rows.by_probabilities else rows.in_place and grads.kl is None
    at_once = kept is not None and free and len(layer) > 0
    size = min(layer.chunk, len(layer))
    spare = kept is None or not (rows.by_probabilities or rows.in_place)
    buffer = layer.empty_logits(size if spare else 0)
    ref_buffer = reference.empty_logits(size) if reference is not None and grads.kl is not None else None
    parts = [slice(0, len(layer))] if at_once else layer.parts()
    total = LayerGrads.zeros(layer, needs, accum_dtype, sums=len(parts))
    for part in parts:
        x = layer.logits_into(buffer, part) if kept is None else kept[part]
        index, stats, upstream = columns.index[part], columns.stats.at(part), grads.at(part)
        if rows.by_probabilities:
            if kept is None:
                rows.mark(x, index, stats.logp)
            total.add(layer, part, *from_probabilities(x, index, upstream, rows.wanted.temperature))
        else:
            ref_x = None if reference is None or ref_buffer is None else reference.logits_into(ref_buffer, part)
            owned = None if shard is None or columns.inside is None else columns.inside[part]
            out = buffer[: len(x)] if spare else x
            rows.backward(out, x, index, stats, upstream, ref_x, owned=owned)
            total.add(layer, part, out)
    if shard is not None and total.hidden is not None:
        total.hidden = sum_over_shards(total.hidden, shard.group)
    return total.rounded(layer)


def from_probabilities(
    marked: Tensor, index: Tensor, grads: RowGrads, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the logits, as rows and what multiplies each, from p − 1[j = label]."""
    scale = grads.others if temperature == 1.0 else grads.others / temperature
    if grads.lse is None:
        return marked, scale
    # the label's column has p·(g_lse − g_lp) + g_lp: g_lse more than the marked one
    grad = (marked * scale[:, None]).scatter_add_(1, index[:, None], grads.lse[:, None] / temperature)
    return grad.to(marked.dtype), None
