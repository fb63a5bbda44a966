"""PRE-2: a packing loses nothing and repeats nothing; best fit is the textbook's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_align.data.packing import Packing, Strategy, efficiency, pack

Lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
Strategies = st.sampled_from(["bfd", "wrap", "none"])


def spans(packing: Packing) -> list[list[tuple[int, int, int]]]:
    """Rows as lists of (document, start, stop)."""
    segments = list(zip(packing.document.tolist(), packing.start.tolist(), packing.stop.tolist(), strict=True))
    return [segments[a:b] for a, b in zip(packing.rows[:-1], packing.rows[1:], strict=True)]


@given(Lengths, st.integers(1, 24), Strategies, st.none() | st.integers(0, 9))
def test_pre_2_every_token_is_there_exactly_once(
    lengths: list[int], capacity: int, strategy: Strategy, seed: int | None
) -> None:
    rows = spans(pack(np.array(lengths), capacity, strategy, seed=seed))
    tokens = [(document, token) for row in rows for document, start, stop in row for token in range(start, stop)]
    assert sorted(tokens) == [(document, token) for document, n in enumerate(lengths) for token in range(n)]
    assert all(1 <= sum(stop - start for _, start, stop in row) <= capacity for row in rows)


@given(Lengths, st.integers(1, 24), st.none() | st.integers(0, 9))
def test_wrap_fills_all_rows_but_the_last(lengths: list[int], capacity: int, seed: int | None) -> None:
    packing = pack(np.array(lengths), capacity, "wrap", seed=seed)
    assert (packing.row_lengths[:-1] == capacity).all()
    assert len(packing) == -(-sum(lengths) // capacity)
    if seed is None:  # the corpus as it stands
        order = [segment for row in spans(packing) for segment in row]
        assert order == sorted(order)


@given(Lengths, st.integers(1, 24), st.sampled_from(["bfd", "none"]))
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], capacity: int, strategy: Strategy) -> None:
    packing = pack(np.array(lengths), capacity, strategy)
    pieces = np.bincount(packing.document, minlength=len(lengths))
    assert pieces.tolist() == [-(-length // capacity) for length in lengths]
    if strategy == "none":
        assert len(packing) == pieces.sum()


def best_fit_by_hand(sizes: list[int], capacity: int) -> list[list[int]]:
    """Longest first; each to the row with the least room that is enough, the latest of several."""
    rows: list[list[int]] = []
    touched: list[int] = []
    for clock, piece in enumerate(sorted(range(len(sizes)), key=lambda piece: -sizes[piece])):
        room = [capacity - sum(sizes[p] for p in row) for row in rows]
        fitting = [(space, -touched[row], row) for row, space in enumerate(room) if space >= sizes[piece]]
        if fitting:
            rows[min(fitting)[2]].append(piece)
            touched[min(fitting)[2]] = clock
        else:
            rows.append([piece])
            touched.append(clock)
    return [sorted(row) for row in rows]


@given(st.lists(st.integers(1, 24), min_size=1, max_size=60))
@settings(max_examples=200)
def test_bfd_is_best_fit_decreasing(lengths: list[int]) -> None:
    packing = pack(np.array(lengths), 24, "bfd")
    assert [[document for document, _, _ in row] for row in spans(packing)] == best_fit_by_hand(lengths, 24)


@pytest.mark.parametrize("strategy", ["bfd", "wrap"])
def test_a_realistic_corpus_packs_almost_perfectly(strategy: Strategy) -> None:
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 300, size=20_000), 5000)
    assert efficiency(pack(lengths, 1024, strategy, seed=0), 1024) > 0.999


def test_order_depends_on_the_seed_only() -> None:
    lengths: NDArray[np.int64] = np.arange(1, 30)
    one, same, other = (pack(lengths, 32, "wrap", seed=seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert one.document.tolist() != other.document.tolist()


def test_nothing_to_pack_and_nonsense() -> None:
    for strategy in ("bfd", "wrap", "none"):
        assert len(pack(np.array([], dtype=np.int64), 8, strategy)) == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        pack(np.array([3, 0]), 8, "bfd")
    with pytest.raises(ValueError, match="rows of 0 tokens"):
        pack(np.array([3]), 0, "bfd")
