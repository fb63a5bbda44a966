"""Labels, rows and chunks: what every vocabulary operation asks before it computes."""

from collections.abc import Iterator

from torch import Tensor

IGNORED = -100


def locate(labels: Tensor, width: int, start: int = 0, *, check: bool = False) -> tuple[Tensor, Tensor | None]:
    """Columns of the labels ``[n]`` in a vocabulary shard, and which of them lie in it, None for all; some column else.

    Args:
        labels: int32 or int64 ``[n]``.
        width: Columns of the shard.
        start: Its first column.
        check: Raise for labels outside the shard other than −100; waits for the device.
    """
    columns = labels.long() - start if start else labels.long()
    if labels.is_cpu and len(labels):
        first, last = columns.aminmax()
        if int(first) >= 0 and int(last) < width:
            return columns, None
    index = columns.clamp(0, max(width - 1, 0))
    inside = (columns == index) & (width > 0)
    if check:
        bad = ~inside & (labels != IGNORED)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"labels: {int(labels[row])} at row {row} is outside the vocabulary of {width} tokens; "
                f"{IGNORED} marks a token without a label"
            )
    return index, inside


def only(values: Tensor, chosen: Tensor | None) -> Tensor:
    """A copy of the values ``[n]``, 0 where not chosen, even for NaN."""
    return values.clone() if chosen is None else values.masked_fill(~chosen, 0.0)


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows, the last one shorter."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def take(values: Tensor, rows: Tensor | None, part: slice | Tensor) -> Tensor:
    """A part of the chosen rows; all are chosen where ``rows`` is None."""
    return values[part] if rows is None else values.index_select(0, rows[part])
