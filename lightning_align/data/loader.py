"""Loaders: an order that is a function of seed and epoch, a position that is saved, and the weight of optimiser steps.

The order of an epoch is cut into windows, one an optimiser step: ``batch_size × accumulate × world_size`` elements. A
window is dealt out to its (accumulation step, process) slots, so every process knows the weight of the whole window,
and the elements of a step depend on the product only.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.collate import Batch, Batchable, Window
from lightning_align.errors import UserError

Ints = NDArray[np.int64]
EVAL_SEED = 20_000  # of the order of evaluations, which no other seed changes
MEGABATCH = 32  # windows within which elements are sorted by length


class TrainLoader:
    """The batches of one process; Lightning saves and restores the position with the checkpoint.

    An epoch has as many micro-batches on every process. Its last window may be short: it then has fewer accumulation
    steps and smaller batches, down to empty ones on some processes, and the weight of what it holds.

    Args:
        data: What to batch.
        batch_size: Elements per process and micro-batch.
        accumulate: Micro-batches per optimiser step.
        world_size: Number of processes.
        rank: This process.
        seed: Of the order.
        shuffle: False keeps the order of the data.
        group_by_length: Batch elements of similar length: they are sorted within some windows, whose order is shuffled.
        limit: Number of micro-batches of an epoch that will be used; None for all.
    """

    def __init__(
        self,
        data: Batchable,
        *,
        batch_size: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
        limit: int | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.limit = limit
        self.epoch = 0
        self.position = 0  # micro-batches of this epoch that were handed out
        self._restored = False

    @property
    def window(self) -> int:
        """Elements of an optimiser step."""
        return self.batch_size * self.accumulate * self.world_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.data), self.window)
        return whole * self.accumulate + _steps(rest, self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        # a generator: nothing happens before the first batch is asked for, and by then the position may be restored
        self._begin()
        windows = self._windows(self.epoch)
        for window in range(self.position // self.accumulate, len(windows)):
            slots = deal(windows[window], self.batch_size, self.world_size)
            used = slots[: self._steps_of(window)]
            every, own = _elements(used, slice(None)), _elements(used, slice(self.rank, self.rank + 1))
            weight = float(self.data.weights[every].sum())
            for step in range(self.position - window * self.accumulate, len(slots)):
                self.position += 1
                yield self.data.collate(slots[step][self.rank].tolist(), weight, Window(every, own, first=step == 0))

    def _begin(self) -> None:
        """Start an epoch, unless a restored position lies within one."""
        end = len(self) if self.limit is None else self.limit
        if self.position >= (end if self._restored else 1):
            self.epoch, self.position = self.epoch + 1, 0
        self._restored = False

    def _windows(self, epoch: int) -> list[Ints]:
        order = epoch_order(len(self.data), self.seed, epoch, shuffle=self.shuffle)
        if self.group_by_length:
            order = grouped(order, self.data.lengths, self.window, self.seed, epoch)
        windows = [order[start : start + self.window] for start in range(0, len(order), self.window)]
        # within a step the order is free: neighbours of similar length need less padding
        return [window[np.argsort(-self.data.lengths[window], kind="stable")] for window in windows]

    def _steps_of(self, window: int) -> int:
        """Micro-batches of a window that are not beyond the limit."""
        return self.accumulate if self.limit is None else max(0, self.limit - window * self.accumulate)

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, int]:
        """Position, and what it means something for; plain numbers."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out; refused when the order or the batches would be others."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint was made with {name.replace('_', ' ')} {state.get(name)}, this run has {value}, "
                    "and other batches: resume with the same data and settings, or start another run"
                )
        self.epoch, self.position, self._restored = state["epoch"], state["position"], True

    def _identity(self) -> dict[str, int]:
        return {
            "batch_size_over_all_processes": self.batch_size * self.world_size,
            "accumulate_grad_batches": self.accumulate,
            "number_of_training_rows": len(self.data),
            "number_of_training_tokens": int(self.data.lengths.sum()),
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "group_by_length": int(self.group_by_length),
        }


class StreamLoader(TrainLoader):
    """Epoch after epoch without a seam, for methods that count iterations: a batch is always full.

    Batch number k holds elements k·W … (k + 1)·W − 1 of the endless stream of epochs, W elements on all processes
    together. What Lightning takes for an epoch is as many whole batches as there are in the data, at least one.
    """

    def __len__(self) -> int:
        return max(1, len(self.data) // self.window)

    def __iter__(self) -> Iterator[Batch]:
        self._begin()
        while self.position < len(self):
            start = (self.epoch * len(self) + self.position) * self.window + self.rank * self.batch_size
            self.position += 1
            yield self.data.collate(self._stream(start, start + self.batch_size), float(self.window))

    def _stream(self, start: int, stop: int) -> list[int]:
        size, elements = len(self.data), []
        for epoch in range(start // size, (stop - 1) // size + 1):
            order = epoch_order(size, self.seed, epoch, shuffle=self.shuffle)
            elements += order[max(0, start - epoch * size) : stop - epoch * size].tolist()
        return elements


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Batches of a loader, epoch after epoch."""
    while True:
        yield from loader


class EvalLoader:
    """Every element once, in the same order every time; process r of n takes every n-th batch.

    Whoever takes only the first batches (``limit_val_batches``) gets elements of every length: batches made by length
    come in a random order.

    Args:
        data: What to batch.
        batch_size: Elements a batch.
        world_size: Number of processes.
        rank: This process.
        fill: Whether a process without a batch gets an empty one, so that all take as many steps.
        by_length: Batch elements of similar length, so that batches need less padding; the batches are shuffled.
        shuffle: Draw the elements in a random order instead of theirs.
    """

    def __init__(
        self,
        data: Batchable,
        *,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        fill: bool = True,
        by_length: bool = False,
        shuffle: bool = False,
    ) -> None:
        self.data = data
        order = epoch_order(len(data), EVAL_SEED, 0, shuffle=shuffle)
        if by_length:
            order = np.argsort(-data.lengths, kind="stable")
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        if by_length:
            batches = [batches[number] for number in epoch_order(len(batches), EVAL_SEED, 0)]
        if fill and batches:
            batches += [order[:0]] * (-len(batches) % world_size)
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for elements in self.batches:
            yield self.data.collate(elements.tolist(), float(self.data.weights[elements].sum()))


def epoch_order(size: int, seed: int, epoch: int, *, shuffle: bool = True) -> Ints:
    """The order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(size) if shuffle else np.arange(size)


def grouped(order: Ints, lengths: Ints, window: int, seed: int, epoch: int) -> Ints:
    """The order with elements of similar length in one window: sorted within megabatches, windows shuffled.

    A last short window stays the last.
    """
    size = window * MEGABATCH
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    by_length = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    whole = len(order) // window
    windows = np.random.default_rng((seed, epoch, 1)).permutation(whole)
    return np.concatenate(
        [by_length[: whole * window].reshape(whole, window)[windows].ravel(), by_length[whole * window :]]
    )


def deal(window: Ints, batch_size: int, world_size: int) -> list[list[Ints]]:
    """Elements of a window by accumulation step and process; a short window is dealt out evenly."""
    parts = np.array_split(window, _steps(len(window), batch_size * world_size) * world_size)
    return [parts[start : start + world_size] for start in range(0, len(parts), world_size)]


def _elements(slots: list[list[Ints]], ranks: slice) -> list[int]:
    """What the slots of some processes hold."""
    return [element for step in slots for part in step[ranks] for element in part.tolist()]


def _steps(elements: int, batch: int) -> int:
    return -(-elements // batch)
