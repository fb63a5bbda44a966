"""Running the stages of a pipeline: each in a process of its own, several at a time where their inputs are there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_align.cli.main import EXIT_INTERRUPTED
from lightning_align.cli.stage_inputs import decide, fingerprint
from lightning_align.cli.stages import Pipeline, Stage
from lightning_align.run.lock import is_locked
from lightning_align.run.signals import SIGNALS, STAGE_VARIABLE

DESCRIPTIONS = {"skip": "done, unchanged", "run": "running", "resume": "continuing", "overwrite": "running again"}
FLAGS = {"resume": "--resume", "overwrite": "--overwrite"}
LOGS = "logs"  # folder of what stages print, where several run at a time
THREADS = "OMP_NUM_THREADS"
POLL_SECONDS = 0.2


class Children:
    """Processes that are started and waited for in threads; signals are forwarded to all of them.

    Each gets a session of its own: a Ctrl-C in the terminal would otherwise reach it twice, and the second means at
    once.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._signalled: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        self._before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signalled = number
        for child in list(self._running):
            child.send_signal(number)

    @property
    def stopping(self) -> bool:
        """Whether a signal has come: nothing new is to start."""
        return self._signalled is not None

    def run(self, command: list[str], *, log: Path | None = None, threads: int | None = None) -> int:
        """Run a command to its end; returns its exit code.

        Args:
            command: Its words.
            log: File that what it prints is added to, instead of this terminal.
            threads: Of its arithmetic, unless the environment says so already.
        """
        environment = {**os.environ, STAGE_VARIABLE: str(os.getpid())}
        if threads is not None:
            environment.setdefault(THREADS, str(threads))
        if log is None:
            return self._wait(subprocess.Popen(command, start_new_session=True, env=environment))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            out: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            return self._wait(subprocess.Popen(command, start_new_session=True, env=environment, **out))

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        self._running.add(child)
        if self._signalled is not None:  # it came while the process was being started
            child.send_signal(self._signalled)
        try:
            return child.wait()
        finally:
            self._running.discard(child)


@dataclass
class Run:
    """The stages of one call: which wait, run, failed, and are left out because others failed."""

    pipeline: Pipeline
    wanted: Sequence[Stage]
    jobs: int
    forced: bool
    waiting: list[Stage] = field(default_factory=list)
    running: dict[Future[int], tuple[Stage, str, float]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    ran: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(self.wanted)
        self.started = time.monotonic()

    def go(self) -> int:
        """Run what has to; returns the exit code of the first stage that failed.

        A stage that fails takes with it those that need it; where it was one run of many (it has axes) the others go
        on, else nothing new is started.
        """
        with Children() as children, ThreadPoolExecutor(self.jobs) as pool:
            while self.waiting or self.running:
                if children.stopping or self._broken:
                    self.waiting.clear()
                for stage in self._ready():
                    self._start(stage, children, pool)
                if self.running:
                    done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._finish(future)
        if children.stopping or EXIT_INTERRUPTED in self.failed.values():
            print("the same command continues the pipeline", file=sys.stderr)
            return EXIT_INTERRUPTED
        return next(iter(self.failed.values()), 0)

    @property
    def _broken(self) -> bool:
        """Whether a stage failed that is not one of many."""
        return any(stage.name in self.failed and not stage.axes for stage in self.wanted)

    def _ready(self) -> list[Stage]:
        """Stages that can start now; those whose parents failed are given up."""
        running = {stage.name for stage, _, _ in self.running.values()}
        pending = {stage.name for stage in self.waiting} | running
        ready: list[Stage] = []
        for stage in list(self.waiting):
            broken = [name for name in stage.parents if name in self.failed or name in self.left_out]
            if broken:
                why = "failed" if broken[0] in self.failed else "is left out"
                print(f"stage '{stage.name}' is left out: '{broken[0]}' {why}", file=sys.stderr)
                self.left_out.add(stage.name)
                self.waiting.remove(stage)
                continue
            # a lab stage reads whatever lies in a folder: it waits for all before it
            before = {other.name for other in self.wanted[: self.wanted.index(stage)]}
            needed = before if stage.lab is not None else set(stage.parents)
            if not needed & pending and len(ready) + len(self.running) < self.jobs:
                ready.append(stage)
        return ready

    def _start(self, stage: Stage, children: Children, pool: ThreadPoolExecutor) -> None:
        self.waiting.remove(stage)
        if not self._is_free(stage, children):
            return
        action = decide(self.pipeline, stage, forced=self.forced)
        number = list(self.pipeline.stages).index(stage) + 1
        print(
            f"[{number}/{len(self.pipeline.stages)}] {stage.name}: {DESCRIPTIONS[action]} ({stage.folder})",
            file=sys.stderr,
            flush=True,
        )
        if action == "skip":
            return
        self.ran += 1
        inputs = fingerprint(self.pipeline, stage)
        if action != "resume":
            self.pipeline.record(stage, inputs=inputs, finished=False)
        options: dict[str, Any] = {}
        if self.jobs > 1:
            log = self.pipeline.folder / LOGS / f"{stage.name.replace('/', '.')}.log"
            options = {"log": log, "threads": max(1, (os.cpu_count() or 1) // self.jobs)}
        future = pool.submit(children.run, stage.command(FLAGS.get(action)), **options)
        self.running[future] = (stage, inputs, time.monotonic())

    def _is_free(self, stage: Stage, children: Children) -> bool:
        """Wait until no other process trains in the stage's folder; False if a signal came before.

        Such a process is a stage whose pipeline was killed, which saves and stops after its step, or a run by hand.
        """
        told = False
        while stage.config is not None and is_locked(stage.folder):
            if children.stopping:
                return False
            if not told:
                told = True
                print(f"{stage.name} waits: {stage.folder} is going on in another process", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        return True

    def _finish(self, future: Future[int]) -> None:
        stage, inputs, started = self.running.pop(future)
        code, seconds = future.result(), time.monotonic() - started
        if code == 0:
            self.pipeline.record(stage, inputs=inputs, finished=True, seconds=round(seconds, 1))
            if self.jobs > 1:
                print(f"{stage.name}: done in {seconds:.0f} s{self._left()}", file=sys.stderr, flush=True)
        elif code == EXIT_INTERRUPTED or -code in SIGNALS:
            self.failed[stage.name] = EXIT_INTERRUPTED
        else:
            self.failed[stage.name] = code if code > 0 else 1
            where = f" (see {self.pipeline.folder / LOGS})" if self.jobs > 1 else ""
            print(f"error: stage '{stage.name}' failed with exit code {code}{where}", file=sys.stderr)

    def _left(self) -> str:
        """How long the rest will take, if it is like what has run so far."""
        if not self.waiting or not self.ran:
            return ""
        ended = self.ran - len(self.running)
        minutes = (time.monotonic() - self.started) / ended * (len(self.waiting) + len(self.running) / 2) / 60
        return f", {len(self.waiting)} stages wait, about {max(1, round(minutes))} min"
