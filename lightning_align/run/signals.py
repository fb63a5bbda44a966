"""Ctrl-C and SIGTERM: the first lets the step in progress finish and saves, the second stops at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STAGE_VARIABLE = "LIGHTNING_ALIGN_STAGE"  # the process of a pipeline, set for those of its stages


class Interrupted(BaseException):
    """The run was asked to stop. Not an ``Exception``, so that nothing takes it for a failure it can handle."""


class StopRequest:
    """Context manager that turns signals into a flag which the training loop reads between two batches.

    Until :meth:`defer` is called there is no step to finish, and the first signal raises :class:`Interrupted`. A stage
    whose pipeline has gone (it was killed) counts as asked to stop, so that nobody trains unseen in the directory that
    the next pipeline will continue. A run started by hand may outlive its terminal.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._deferring = False
        # taken out: processes that this one starts have another parent
        pipeline = os.environ.pop(STAGE_VARIABLE, None)
        self._parent = None if pipeline is None else int(pipeline)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers (again: the Trainer registers its own when it starts)."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def defer(self, active: bool) -> None:
        """Whether a signal waits for the end of the step (True) or interrupts at once."""
        self._deferring = active

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop."""
        orphaned = self._parent is not None and os.getppid() != self._parent
        return self._signal is not None or orphaned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferring or self._signal is not None:
            raise Interrupted(f"interrupted by {name}")
        self._signal = number
        print(f"{name}: stopping after this step, once more to stop at once", file=sys.stderr, flush=True)
