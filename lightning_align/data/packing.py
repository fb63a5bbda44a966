"""Packing: which documents, or parts of them, share a row.

Nothing is lost and nothing occurs twice: the segments of a packing are a partition of all documents' tokens.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["bfd", "wrap", "none"]
Ints = NDArray[np.int64]


class Packing(NamedTuple):
    """Rows of segments; segment s is tokens ``start[s]`` to ``stop[s]`` of a document, row r holds segments ``rows[r]``
    to ``rows[r + 1]``.

    Attributes:
        document: Which document a segment is of ``[S]``.
        start: First token, within the document ``[S]``.
        stop: One past the last token ``[S]``.
        rows: First segment of each row, and the number of segments at the end ``[R + 1]``.
    """

    document: Ints
    start: Ints
    stop: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def row_lengths(self) -> Ints:
        """Tokens of each row ``[R]``."""
        ends = np.concatenate([[0], (self.stop - self.start).cumsum()])
        return np.diff(ends[self.rows])


def pack(lengths: Ints, capacity: int, strategy: Strategy, *, seed: int | None = None) -> Packing:
    """Distribute documents over rows of at most ``capacity`` tokens; a longer document is cut into several segments.

    Args:
        lengths: Tokens of each document, each at least 1.
        capacity: Tokens of a row.
        strategy: ``bfd``: best-fit decreasing (Ding et al. 2024, 2404.10830); only documents longer than a row are cut.
            ``wrap``: documents end to end, cut at every ``capacity`` tokens. ``none``: a row each.
        seed: Order in which documents come to be packed; None takes them as they stand.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or (len(lengths) and lengths.min() < 1):
        raise ValueError(f"rows of {capacity} tokens, documents of {lengths.min(initial=1)}: both must be at least 1")
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    if strategy == "wrap":
        return _wrap(lengths, capacity, order)
    document, start, stop = _pieces(lengths, capacity, order)
    if strategy == "none":
        return Packing(document, start, stop, np.arange(len(document) + 1))
    return _best_fit(document, start, stop, capacity)


def efficiency(packing: Packing, capacity: int) -> float:
    """Share of the rows' ``capacity`` that holds tokens."""
    return float(packing.row_lengths.sum() / max(1, len(packing) * capacity))


def _pieces(lengths: Ints, capacity: int, order: Ints) -> tuple[Ints, Ints, Ints]:
    """Every document in pieces of ``capacity`` tokens and a rest."""
    counts = -(-lengths[order] // capacity)
    document = np.repeat(order, counts)
    first = np.repeat(counts.cumsum() - counts, counts)
    start = (np.arange(len(document)) - first) * capacity
    return document, start, np.minimum(start + capacity, lengths[document])


def _wrap(lengths: Ints, capacity: int, order: Ints) -> Packing:
    ends = lengths[order].cumsum()
    total = int(ends[-1]) if len(ends) else 0
    row_starts = np.arange(0, total, capacity)
    cuts = np.union1d(row_starts, np.concatenate([[0], ends])[: len(ends)])  # where a row or a document begins
    owner = np.searchsorted(ends, cuts, side="right")
    begins = ends[owner] - lengths[order][owner]
    stops = np.append(cuts[1:], total)
    rows = np.append(np.searchsorted(cuts, row_starts), len(cuts))
    return Packing(order[owner], cuts - begins, stops - begins, rows)


def _best_fit(document: Ints, start: Ints, stop: Ints, capacity: int) -> Packing:
    """Longest piece first, each into the fullest row that still has room.

    Rows with r tokens of room wait on the stack ``waiting[r]``; bit r of ``room`` says whether there are any, so the
    fullest row for a piece is one shift and one lowest set bit away: about a microsecond, however many rows there are.
    """
    size = stop - start
    by_size = np.argsort(-size, kind="stable")
    row_of = np.empty(len(size), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    room = 0
    num_rows = 0
    for piece, length in zip(by_size.tolist(), size[by_size].tolist(), strict=True):
        fitting = room >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = waiting[space].pop()
            if not waiting[space]:
                room ^= 1 << space
        else:
            space, row = capacity, num_rows
            num_rows += 1
        row_of[piece] = row
        left = space - length
        if left:
            waiting[left].append(row)
            room |= 1 << left
    by_row = np.argsort(row_of, kind="stable")
    rows = np.searchsorted(row_of[by_row], np.arange(num_rows + 1))
    return Packing(document[by_row], start[by_row], stop[by_row], rows)
