"""Checkpoints: ``last.ckpt`` to go on from, and named ones for the lab; a file is whole or not there."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_align.errors import UserError
from lightning_align.run.directory import CHECKPOINTS, LAST, RunDirectory
from lightning_align.run.files import replacing
from lightning_align.run.logging import FileLogger
from lightning_align.run.resume import BoundaryCallback
from lightning_align.run.signals import Interrupted, StopRequest


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and waits for the disk; Lightning writes to ``$TMPDIR`` and copies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """A killed process leaves the old file or the new one."""
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class RunCheckpoints(BoundaryCallback, Checkpoint):
    """Opens the run, writes its checkpoints at boundaries, and stops there when asked to.

    Args:
        run: The run directory.
        files: The run's metrics and samples, which are cut back to the checkpoint on resuming.
        config: Text of ``config.yaml``.
        facts: Seed, parents and models for ``run.json``.
        every: Steps between two writes of ``last.ckpt``: optimiser steps offline, iterations online.
        keep_every: Steps between two checkpoints to keep for the lab; 0 keeps none but those that ``label`` asks for.
        label: Asked at every boundary for the name of a checkpoint to keep, or None.
        stop: Signals received so far.
    """

    def __init__(
        self,
        run: RunDirectory,
        files: FileLogger,
        *,
        config: str,
        facts: Mapping[str, Any],
        every: int,
        keep_every: int,
        label: Callable[[], str | None],
        stop: StopRequest,
    ) -> None:
        if every < 1:
            raise UserError(f"run.checkpoint_every is {every}: give at least 1")
        if keep_every < 0:
            raise UserError(f"run.keep_every is {keep_every}: give a number of steps, or 0 to keep none")
        self.run = run
        self.files = files
        self.config = config
        self.facts = facts
        self.every = every
        self.keep_every = keep_every
        self.label = label
        self.stop = stop
        self.step = 0
        self.resumed_from: int | None = None
        self._saved: int | None = None
        self._rewind: Mapping[str, int] = {"metrics": 0, "samples": 0}

    def state_dict(self) -> dict[str, Any]:
        """What the files hold at this moment."""
        return {"files": self.files.state_dict(), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep until the run is opened."""
        self._rewind = state_dict["files"]
        self.step = self.resumed_from = self._saved = state_dict["step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the trainer write files our way."""
        trainer.strategy.checkpoint_io = WholeFiles()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Data and models are good: now the run may write."""
        if trainer.is_global_zero:
            if self.stop.requested:  # the pipeline has gone: the next one must not find a run that it did not start
                raise Interrupted("stopped before it began")
            self.run.open(self.config, **self.facts)
            self.run.update(step=self.step)
            if self.run.resume:
                self.files.rewind(self._rewind)
        trainer.strategy.barrier("run directory")
        self.stop.install()  # the Trainer has just registered its own handlers

    def on_loop_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the start if it is to be kept; from here on a signal waits for the end of the step."""
        self._save_labelled(trainer)
        self.stop.install()
        self.stop.defer(True)

    def on_boundary(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save what is due; then stop if a signal came."""
        self.step = step
        self._save_labelled(trainer)
        stopping = self.stop.requested
        if trainer.world_size > 1:  # all processes must stop at the same step, whichever got the signal
            stopping = trainer.strategy.reduce_boolean_decision(stopping, all=False)
        if stopping or step % self.every == 0:
            self._save_last(trainer)
        if stopping:
            raise Interrupted(f"stopped after step {step}; --resume continues from {self.run.last_checkpoint}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end is always saved, so that a finished run can be prolonged."""
        self.stop.defer(False)
        if self._saved != self.step:
            self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in ``run.json`` how it ended. Nothing is saved: the step was only half done.

        A mistake of the user's that came to light before there was anything to keep leaves no directory behind.
        """
        self.stop.defer(False)
        if isinstance(exception, UserError) and self.run.discard():
            return
        if self.run.opened:
            stopped = isinstance(exception, Interrupted)
            error = None if stopped else f"{type(exception).__name__}: {exception}"
            self.run.end(status="interrupted" if stopped else "failed", step=self.step, error=error)

    def _save_labelled(self, trainer: Trainer) -> None:
        label = self.label()
        if label is None and self.keep_every and self.step and self.step % self.keep_every == 0:
            label = f"step={self.step:05d}"  # its KL is not known until somebody measures it
        if label is not None:
            self._save(trainer, f"{label}.ckpt", weights_only=True)  # for the lab: nothing to go on training from

    def _save_last(self, trainer: Trainer) -> None:
        self._save(trainer, self.run.last_checkpoint.name)
        self._saved = self.step
        if trainer.is_global_zero:
            self.run.update(step=self.step)

    def _save(self, trainer: Trainer, name: str, *, weights_only: bool = False) -> None:
        self.files.sync()  # a checkpoint knows how many rows there are
        trainer.save_checkpoint(self.run.path / CHECKPOINTS / name, weights_only=weights_only)


def check_checkpoint(path: Path, *, to_train: bool = True, remedy: str = "give another one") -> None:
    """Raise :class:`UserError` unless ``path`` is a whole checkpoint of this program, one to train on by default.

    ``remedy`` says what to do about one that is not whole.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):  # the index stands at the end
        raise UserError(f"{path} is not a whole checkpoint: it is cut off, or something else; {remedy}")
    try:
        # mmap reads the index only
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint ({reason}): {remedy}") from error
    missing = {"state_dict", "method"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise UserError(f"{path} is not a checkpoint of this program: it has no {', '.join(sorted(missing))}")
    if to_train and not {"loops", "callbacks", "optimizer_states"} <= set(content):
        raise UserError(f"{path} holds weights only, to evaluate or export: training goes on from {LAST}")
