"""CONV-5 and FIELD 6: windows, their weights, and a position that is resumed exactly."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.collate import Window
from lightning_align.data.loader import EvalLoader, StreamLoader, TrainLoader, deal, epoch_order, grouped
from lightning_align.errors import UserError


class Numbers:
    """Elements whose batch says which they are."""

    longest = 9
    sequences_per_element = 1.0

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(4)
        self.lengths = rng.integers(1, 10, size)
        self.weights = rng.random(size)

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> dict[str, Any]:
        return {"elements": list(elements), "window_weight": window_weight, "window": window}


def endless(loader: TrainLoader) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def windows(size: int, batch_size: int, accumulate: int, world_size: int, **options: Any) -> list[tuple[Any, float]]:
    """Elements and weight of each optimiser step of an epoch, as the processes see it together."""
    data = Numbers(size)
    loaders = [
        TrainLoader(
            data, batch_size=batch_size, accumulate=accumulate, world_size=world_size, rank=rank, seed=7, **options
        )
        for rank in range(world_size)
    ]
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loaders[0])}  # as many on every process
    result = []
    for start in range(0, len(loaders[0]), accumulate):
        parts = [batch for batches in ranks for batch in batches[start : start + accumulate]]
        assert len({part["window_weight"] for part in parts}) == 1
        assert max(len(part["elements"]) for part in parts) <= batch_size
        elements = sorted(element for part in parts for element in part["elements"])
        result.append((elements, parts[0]["window_weight"]))
    return result


@pytest.mark.parametrize("size", [64, 61, 8, 5, 1])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_conv_5_an_optimiser_step_depends_on_the_product_only(size: int, group_by_length: bool) -> None:
    expected = windows(size, 8, 1, 1, group_by_length=group_by_length)
    weights = Numbers(size).weights
    for elements, weight in expected:
        assert weight == pytest.approx(weights[elements].sum(), rel=1e-12)
    assert sorted(element for elements, _ in expected for element in elements) == list(range(size))
    for batch_size, accumulate, world_size in ((4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 8, 1), (2, 1, 4)):
        found = windows(size, batch_size, accumulate, world_size, group_by_length=group_by_length)
        assert [elements for elements, _ in found] == [elements for elements, _ in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_conv_5_averages_of_micro_batches_would_differ() -> None:
    """The counter-example: the mean of the micro-batches' means is not the weighted mean."""
    data = Numbers(8)
    loss = np.arange(8.0)
    batches = list(TrainLoader(data, batch_size=4, accumulate=2))
    sums = [float((loss * data.weights)[batch["elements"]].sum()) for batch in batches]
    own = [float(data.weights[batch["elements"]].sum()) for batch in batches]
    right = float((loss * data.weights).sum() / data.weights.sum())
    assert sum(sums) / batches[0]["window_weight"] == pytest.approx(right)
    assert abs(np.mean([s / w for s, w in zip(sums, own, strict=True)]) - right) > 1e-3


def test_limit_shortens_the_last_window() -> None:
    whole = windows(64, 2, 4, 2)
    data = Numbers(64)
    loaders = [TrainLoader(data, batch_size=2, accumulate=4, world_size=2, rank=r, seed=7, limit=6) for r in range(2)]
    batches = [list(islice(iter(loader), 6)) for loader in loaders]
    assert batches[0][0]["window_weight"] == pytest.approx(whole[0][1])
    used = [element for rank in batches for batch in rank[4:] for element in batch["elements"]]
    assert batches[0][4]["window_weight"] == batches[1][5]["window_weight"] == pytest.approx(data.weights[used].sum())
    following = [next(iter(loader)) for loader in loaders]  # another epoch, though the first was not used up
    assert [loader.state_dict()["epoch"] for loader in loaders] == [1, 1]
    assert following[0]["elements"] != batches[0][0]["elements"]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_order(50, 3, 2).tolist() == epoch_order(50, 3, 2).tolist()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    assert epoch_order(5, 3, 2, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    loader = TrainLoader(Numbers(20), batch_size=4, seed=1)
    first, second = list(loader), list(loader)
    assert [batch["elements"] for batch in first] != [batch["elements"] for batch in second]


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 3))
def test_grouping_by_length_is_an_order_too(size: int, window: int, epoch: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 100, size)
    order = grouped(epoch_order(size, 0, epoch), lengths, window, 0, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_grouping_by_length_saves_padding() -> None:
    def padded(group: bool) -> int:
        batches = list(TrainLoader(data, batch_size=8, seed=0, group_by_length=group))
        return sum(len(b["elements"]) * int(data.lengths[b["elements"]].max()) for b in batches)

    data = Numbers(0)
    data.lengths = np.random.default_rng(0).geometric(0.02, 4000)
    data.weights = np.ones(4000)
    assert data.lengths.sum() <= padded(True) < 1.2 * data.lengths.sum() < padded(False)


# ---------------------------------------------------------------------- resuming
@pytest.mark.parametrize("kind", [TrainLoader, StreamLoader])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_field_6_resumes_with_the_very_next_batch(kind: type[TrainLoader], accumulate: int) -> None:
    def build() -> TrainLoader:
        return kind(Numbers(37), batch_size=2, accumulate=accumulate, world_size=2, rank=1, seed=5)

    whole = list(islice(endless(build()), 45))
    for stop in range(46):
        first, second = build(), build()
        seen = list(islice(endless(first), stop))
        early = endless(second)  # an iterator made before the state is restored, as Lightning does
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + list(islice(early, 45 - stop)) == whole


def test_state_of_other_data_or_batches_is_refused() -> None:
    state = TrainLoader(Numbers(37), batch_size=4, world_size=2, seed=5).state_dict()
    TrainLoader(Numbers(37), batch_size=2, world_size=4, seed=5).load_state_dict(state)  # the same steps
    for changed in (
        {"batch_size": 4, "world_size": 1, "seed": 5},
        {"batch_size": 2, "accumulate": 2, "world_size": 2, "seed": 5},
        {"batch_size": 4, "world_size": 2, "seed": 6},
        {"batch_size": 4, "world_size": 2, "seed": 5, "shuffle": False},
    ):
        with pytest.raises(UserError, match=r"the checkpoint was made with .* resume with the same data"):
            TrainLoader(Numbers(37), **changed).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="number of training rows 37, this run has 36"):
        TrainLoader(Numbers(36), batch_size=4, world_size=2, seed=5).load_state_dict(state)


# ---------------------------------------------------------------------- streams and evaluation
@pytest.mark.parametrize(("size", "batch_size", "world_size"), [(37, 4, 2), (3, 4, 2), (8, 8, 1), (5, 1, 1)])
def test_stream_is_epochs_end_to_end(size: int, batch_size: int, world_size: int) -> None:
    loaders = [
        StreamLoader(Numbers(size), batch_size=batch_size, world_size=world_size, rank=rank, seed=2)
        for rank in range(world_size)
    ]
    steps = 3 * size
    stream: list[int] = []
    iterators = [endless(loader) for loader in loaders]
    for _ in range(steps):
        batches = [next(iterator)["elements"] for iterator in iterators]
        assert {len(batch) for batch in batches} == {batch_size}
        stream += [element for batch in batches for element in batch]
    for epoch in range(len(stream) // size):
        assert stream[epoch * size : (epoch + 1) * size] == epoch_order(size, 2, epoch).tolist()


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_evaluation_sees_everything_once(size: int, batch_size: int, world_size: int, by_length: bool) -> None:
    data = Numbers(size)
    options: dict[str, Any] = {"batch_size": batch_size, "world_size": world_size, "by_length": by_length}
    ranks = [list(EvalLoader(data, rank=rank, **options)) for rank in range(world_size)]
    assert sorted(e for batches in ranks for batch in batches for e in batch["elements"]) == list(range(size))
    assert len({len(batches) for batches in ranks}) == 1
    unfilled = [list(EvalLoader(data, rank=rank, fill=False, **options)) for rank in range(world_size)]
    assert all(batch["elements"] for batches in unfilled for batch in batches)
    if not by_length:
        first = [e for batch in EvalLoader(data, batch_size=batch_size) for e in batch["elements"]]
        assert first == list(range(size))


def test_the_first_batches_of_an_evaluation_are_of_all_lengths() -> None:
    data = Numbers(400)
    batches = [batch["elements"] for batch in EvalLoader(data, batch_size=8, by_length=True)]
    assert batches == [batch["elements"] for batch in EvalLoader(data, batch_size=8, by_length=True)]
    spread = [data.lengths[batch].max() - data.lengths[batch].min() for batch in batches]
    assert np.mean(spread) < 0.1 * (data.lengths.max() - data.lengths.min())
    means = [data.lengths[batch].mean() for batch in batches[:10]]
    assert min(means) < np.quantile(data.lengths, 0.3) < np.quantile(data.lengths, 0.7) < max(means)


def test_shuffled_evaluation_has_one_order() -> None:
    orders = [[e for b in EvalLoader(Numbers(50), batch_size=n, shuffle=True) for e in b["elements"]] for n in (4, 7)]
    assert orders[0] == orders[1] != list(range(50))
    assert sorted(orders[0]) == list(range(50))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_deal_is_even(size: int, batch_size: int, world_size: int) -> None:
    slots = deal(np.arange(size), batch_size, world_size)
    sizes = [len(part) for step in slots for part in step]
    assert all(len(step) == world_size for step in slots)
    assert sum(sizes) == size
    assert max(sizes) <= min(batch_size, min(sizes) + 1)


@pytest.mark.parametrize("limit", [None, 4])
def test_a_batch_knows_the_elements_of_its_step(limit: int | None) -> None:
    loaders = [
        TrainLoader(Numbers(23), batch_size=2, accumulate=3, world_size=2, rank=rank, seed=1, limit=limit)
        for rank in range(2)
    ]
    ranks = [list(islice(loader, limit)) for loader in loaders]
    for start in range(0, len(ranks[0]), 3):
        step = [batches[start : start + 3] for batches in ranks]
        every = sorted(element for batches in step for batch in batches for element in batch["elements"])
        for batches in step:
            own = [element for batch in batches for element in batch["elements"]]
            for number, batch in enumerate(batches):
                window = batch["window"]
                assert (sorted(window.elements), window.own, window.first) == (every, own, number == 0)
