"""K1 from logits that exist, by the library: chunks of rows that fit a cache."""

from torch import Tensor

from align_kernels._labels import chunks, locate, only, take
from align_kernels.native import NativeRows, RowGrads, RowStats, Wanted, joined

CACHE_BYTES = 4 * 2**20


def _chunk_rows(logits: Tensor) -> int:
    return max(1, CACHE_BYTES // (max(logits.shape[1], 1) * 4))


def _counted(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.nonzero()[:, 0]


def forward(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, mask: Tensor | None, wanted: Wanted, check: bool
) -> tuple[Tensor, RowStats]:
    """Log-probs of the labels ``[N]``, 0 where outside or masked, and the statistics of the rows, 0 where masked."""
    rows = _counted(mask)
    index, inside = locate(labels if rows is None else labels[rows], logits.shape[1], check=check)
    passes, found = NativeRows(wanted), []
    for part in chunks(len(index), _chunk_rows(logits)):
        ref_x = None if ref_logits is None else take(ref_logits, rows, part)
        found.append(passes.forward(take(logits, rows, part), index[part], ref_x, overwrite=rows is not None))
    stats = joined(found, wanted, logits)
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
    passes = NativeRows(wanted)
    for part in chunks(len(labels) if rows is None else len(rows), _chunk_rows(logits)):
        chosen = part if rows is None else rows[part]
        x = logits[chosen]
        ref_x = None if ref_logits is None or grads.kl is None else ref_logits[chosen]
        out[chosen] = passes.backward(x, index[chosen], stats.at(chosen), grads.at(chosen), ref_x).to(out.dtype)
    if mask is not None:
        out.masked_fill_(~mask[:, None], 0)
