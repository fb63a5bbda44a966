"""K1 from logits that exist, by the library."""

from torch import Tensor

from align_kernels._labels import locate, only
from align_kernels.native import NativeRows, RowGrads, RowStats, Wanted


def _counted(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.nonzero()[:, 0]


def _chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def forward(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, mask: Tensor | None, wanted: Wanted, check: bool
) -> tuple[Tensor, RowStats]:
    """Log-probs of the labels ``[N]``, 0 where outside or masked, and the statistics of the rows, 0 where masked."""
    rows = _counted(mask)
    index, inside = locate(labels if rows is None else labels[rows], logits.shape[1], check=check)
    x, ref_x = (None if values is None else _chosen(values, rows) for values in (logits, ref_logits))
    assert x is not None
    stats = NativeRows(wanted).forward(x, index, ref_x, overwrite=rows is not None)
    logp = only(stats.logp, inside)
    if rows is None:
        return logp, stats

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(labels)).index_copy_(0, rows, values)

    return spread(logp), RowStats(*(None if values is None else spread(values) for values in stats))  # type: ignore[arg-type]


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    stats: RowStats,
    grads: RowGrads,
    wanted: Wanted,
) -> None:
    """Writes the gradient with respect to ``logits`` into ``out``, which may be ``logits``; zeros in masked rows."""
    rows = _counted(mask)
    index, inside = locate(labels, logits.shape[1])
    grads = grads._replace(logp=only(grads.logp, inside))
    if rows is None:
        NativeRows(wanted).backward(out, logits, index, stats, grads, ref_logits)
        return
    x, ref_x = _chosen(logits, rows), None if ref_logits is None or grads.kl is None else _chosen(ref_logits, rows)
    NativeRows(wanted).backward(x, x, index[rows], stats.at(rows), grads.at(rows), ref_x)
    out.zero_().index_copy_(0, rows, x)
