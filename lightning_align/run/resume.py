"""Exact resume: a hook between two batches, and the random states that are saved and restored there.

Lightning's own hooks leave no place where a step is wholly over: ``on_train_batch_end`` comes before the validation of
that step, and a checkpoint written there would skip it on resuming. :class:`BoundaryLoop` adds the place. What is saved
there is restored at the same point, after the resumed process has built its models and loaders and before it fetches a
batch, so nothing that start-up draws from the global generators matters.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class BoundaryCallback(Callback):
    """A callback that is told when a step is wholly over: logged, validated, and the next batch not fetched yet."""

    def on_boundary(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """``step`` optimiser steps or iterations are done; not called inside an accumulation window."""

    def on_loop_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The loop is about to fetch its first batch, in a fresh run or a resumed one."""


class BoundaryLoop(_TrainingEpochLoop):
    """Lightning's training loop with :class:`BoundaryCallback`'s hooks; it also validates after the very last step."""

    _started = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Start as Lightning does; a checkpoint of a boundary has nothing half-done to catch up with."""
        super().on_run_start(data_fetcher)
        self.restarting = False
        if not self._started:
            self._started = True
            for callback in self._callbacks():
                callback.on_loop_start(self.trainer, self.trainer.lightning_module)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is due, then announce the boundary."""
        accumulating = self._should_accumulate()
        super().on_advance_end(data_fetcher)
        if not accumulating:
            for callback in self._callbacks():
                callback.on_boundary(self.trainer, self.trainer.lightning_module, self._batches_that_stepped)

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        last = self.max_steps != -1 and self.global_step >= self.max_steps
        return super()._should_check_val_fx(data_fetcher) or (last and self._should_check_val_epoch())

    def _callbacks(self) -> list[BoundaryCallback]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, BoundaryCallback)]  # type: ignore[attr-defined]


def use_boundary_loop(trainer: Trainer) -> None:
    """Replace the trainer's epoch loop by one that announces boundaries."""
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = BoundaryLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)


class RandomState(BoundaryCallback):
    """Saves the global random states of every process with a checkpoint and restores them before the next batch."""

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._world_size = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember how many processes there are."""
        self._world_size = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """One state per process; plain tensors and numbers, so that the file loads with ``weights_only=True``."""
        own = random_state()
        if self._world_size == 1:
            return {"ranks": [own]}
        states: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the loop starts."""
        self._pending = state_dict

    def on_loop_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore; with another number of processes there is no exact state to go back to."""
        if self._pending is not None and len(self._pending["ranks"]) == trainer.world_size:
            set_random_state(self._pending["ranks"][trainer.global_rank])
        self._pending = None


def random_state() -> dict[str, Any]:
    """State of the global generators of torch (every device), Python and NumPy."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`random_state`; devices that this machine lacks are left out."""
    torch.set_rng_state(state["torch"].cpu())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
