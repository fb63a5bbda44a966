"""The clock of benchmarks against TRL as a callback that a configuration can name."""

from typing import Any

from lightning.pytorch import Callback

from benchmarks.training_clock import Clock


class StepClock(Callback):
    """Notes every step of ``fit``.

    Args:
        path: Where to.
    """

    def __init__(self, path: str) -> None:
        self.clock = Clock(path)

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins; there is no accumulation here."""
        self.clock.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """It is done."""
        self.clock.end()
