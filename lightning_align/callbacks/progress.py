"""Progress that shows what matters: step or iteration, loss, KL, proxy and gold."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

# label, and the metrics it may come from, best first; KL, proxy and gold are of the same samples, those of this step
SHOWN = (
    ("loss", ("loss", "loss/policy_avg")),
    ("acc", ("accuracy", "rewards/accuracies")),
    ("margin", ("rewards/margins",)),
    ("KL", ("lab/kl", "objective/kl", "eval/lab/kl")),
    ("proxy", ("lab/proxy", "objective/scores", "eval/lab/proxy")),
    ("gold", ("lab/gold", "eval/lab/gold")),
    ("eval loss", ("eval/loss",)),
    ("eval acc", ("eval/accuracy", "eval/rewards/accuracies")),
)
PLAIN_SECONDS = 15.0  # without a terminal: one line this often


class RunProgress(ProgressBar):
    """A live bar on a terminal; elsewhere a line now and then, so that logs stay readable.

    Args:
        unit: What is counted: ``step`` or ``iteration``.
        total: How many of them the run has; the Trainer's optimiser steps by default.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        super().__init__()
        self.unit = unit
        self.total = total
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._task: Any = None
        self._enabled = True
        self._last_line = 0.0
        self._said = ""  # the last line

    def disable(self) -> None:
        """Show nothing (other processes than the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        super().on_train_start(trainer, pl_module)
        if self.total is None:
            self.total = int(trainer.estimated_stepping_batches)
        self._last_line = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._progress = Progress(
                TextColumn(f"{self.unit}s"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.unit, total=self.total, metrics="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or write a line if it is time for one."""
        if not self._enabled:
            return
        done = self.done(trainer)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, metrics=describe(trainer.callback_metrics))
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._line(trainer, done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last state stays visible, with what an evaluation after the last step measured."""
        if self._enabled and self._progress is None:
            self._line(trainer, self.done(trainer))
        elif self._progress is not None:
            self._progress.update(self._task, completed=self.done(trainer), metrics=describe(trainer.callback_metrics))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def done(self, trainer: Trainer) -> int:
        """Steps or iterations done."""
        return trainer.global_step if self.unit == "step" else trainer.fit_loop.total_batch_idx + 1

    def _line(self, trainer: Trainer, done: int) -> None:
        self._last_line = time.monotonic()
        total = f"/{self.total}" if self.total else ""
        line = f"{self.unit} {done}{total}  {describe(trainer.callback_metrics)}"
        if line != self._said:
            print(line, file=sys.stderr, flush=True)
            self._said = line

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(metrics: dict[str, Tensor]) -> str:
    """``loss 1.23  KL 0.4 …`` from whatever of :data:`SHOWN` has been logged."""
    parts = []
    for label, names in SHOWN:
        name = next((name for name in names if name in metrics), None)
        if name is not None:
            parts.append(f"{label} {float(metrics[name]):.3g}")
    return "  ".join(parts)
