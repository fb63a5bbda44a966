"""Labels, rows and chunks: what every vocabulary operation asks before it computes."""

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -100


def locate(labels: Tensor, width: int, start: int = 0, *, check: bool = False) -> tuple[Tensor, Tensor]:
    """Columns of the labels ``[n]`` in a vocabulary shard, and which of them lie in it; column 0 for the others.

    Args:
        labels: int32 or int64 ``[n]``.
        width: Columns of the shard.
        start: Its first column.
        check: Raise for labels outside the shard other than −100; waits for the device.
    """
    columns = labels.long() - start if start else labels.long()
    inside = (columns >= 0) & (columns < width)
    if check:
        bad = ~inside & (labels != IGNORED)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"labels: {int(labels[row])} at row {row} is outside the vocabulary of {width} tokens; "
                f"{IGNORED} marks a token without a label"
            )
    return torch.where(inside, columns, 0), inside


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows, the last one shorter."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def take(values: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """A part of the chosen rows; all are chosen where ``rows`` is None."""
    return values[part] if rows is None else values.index_select(0, rows[part])
