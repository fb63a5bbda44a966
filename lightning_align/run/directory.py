"""The run directory: created last of all, never overwritten by accident, always saying what state the run is in."""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lightning_align.errors import UserError
from lightning_align.run.environment import git_commit, hardware, peak_memory, versions
from lightning_align.run.files import write_atomically, writing
from lightning_align.run.lock import LOCK_FILE, take_lock

STATUS_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
MODEL = "model"
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)  # what renaming a folder onto another that is not empty gives


class RunDirectory:
    """``root/name``. The constructor and :meth:`check` touch nothing; :meth:`open` writes, once all else is good.

    From :meth:`hold` or :meth:`open` to :meth:`close` no other process can resume or overwrite it.

    Args:
        root: Folder that holds all runs.
        name: Name of this run.
        resume: Continue what is there.
        overwrite: Delete what is there.
    """

    def __init__(self, root: Path, name: str, *, resume: bool = False, overwrite: bool = False) -> None:
        if name in ("", ".") or ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"run.name is '{name}': give a folder name, relative to run.root")
        self.path = root / name
        self.resume = resume
        self.overwrite = overwrite
        self._facts: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []  # the folders above it that :meth:`open` made, innermost first
        self._started = time.monotonic()
        self._earlier_seconds = 0.0
        self._earlier_peaks: Mapping[str, int] = {}

    @property
    def last_checkpoint(self) -> Path:
        """``checkpoints/last.ckpt``, which may not exist yet."""
        return self.path / CHECKPOINTS / LAST

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / MODEL

    def check(self) -> None:
        """Raise :class:`UserError` if the run could not be written, or would overwrite another."""
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: give one of them")
        existing = next(
            folder for folder in (self.path, *self.path.parents) if folder.exists() or folder == folder.parent
        )
        if not existing.is_dir():
            raise UserError(
                f"cannot create the run directory {self.path}: {existing} is not a folder (change --run.root)"
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"cannot write the run directory {self.path}: no permission in {existing} (change --run.root)"
            )
        occupied = existing == self.path and any(self.path.iterdir())
        if self.resume and not occupied:
            raise UserError(f"nothing to resume: {self.path} does not exist (check --run.name and --run.root)")
        if self.resume and not (self.path / STATUS_FILE).is_file():
            raise UserError(f"nothing to resume: {self.path} is not a run directory (it has no {STATUS_FILE})")
        if occupied and not (self.resume or self.overwrite):
            raise UserError(f"the run {self.path} exists: give --resume, --overwrite or another --run.name")
        if self.overwrite and occupied and not (self.path / STATUS_FILE).is_file():
            raise UserError(f"will not overwrite {self.path}: it is not a run directory (it has no {STATUS_FILE})")

    def open(
        self, config: str, *, seed: int, parents: list[dict[str, Any]], models: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Create the directory (or reopen it), write ``config.yaml`` and mark the run as running.

        Args:
            config: Text of ``config.yaml``.
            seed: Of the run.
            parents: The runs it reads from, as :func:`find_parents` gives them.
            models: The model folders it reads, with what they hold.
        """
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        before = read_status(self.path) if self.resume else {}
        self._earlier_seconds = float(before.get("durations", {}).get("total_seconds", 0.0))
        self._earlier_peaks = before.get("peak_memory", {})
        self._facts = {
            "status": "running",
            "created": before.get("created", _now()),
            "updated": _now(),
            "seed": seed,
            "parents": parents,
            "models": list(models),
            "resumed": int(before.get("resumed", -1)) + 1 if self.resume else 0,
            "git_commit": git_commit(),
            "versions": versions(),
            "hardware": hardware(),
        }
        try:
            if self.resume:
                self.hold()
                self._write(self.path, config)
            else:
                self._create(config)
        except (OSError, UserError) as error:
            self._facts = {}
            self.close()
            refusal = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(refusal, OSError) or refusal.errno in OCCUPIED:
                raise
            raise UserError(
                f"cannot write the run directory {self.path}: {refusal.strerror} (change --run.root)"
            ) from error

    def hold(self) -> None:
        """Keep other processes out of a run that is there; :class:`UserError` if one is in it."""
        if self._lock is None and self.path.exists():
            self._lock = self._take(self.path)

    def close(self) -> None:
        """Let other processes in; a process that dies does so by itself."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self, folder: Path) -> IO[bytes]:
        with writing(folder / LOCK_FILE):
            lock = take_lock(folder)
        if lock is None:
            raise UserError(
                f"the run {self.path} is going on in another process: wait for it or stop it, or give another "
                "--run.name"
            )
        return lock

    def _create(self, config: str) -> None:
        """A new directory appears whole and an old one goes whole: a process killed here leaves no half of a run.

        Of several processes that come at once, one holds the lock of the new directory, which moves with it.
        """
        new, old = (self.path.with_name(f".{self.path.name}.{what}") for what in ("new", "old"))
        if self.overwrite:
            self.hold()
        new.mkdir(parents=True, exist_ok=True)
        lock = self._take(new)
        try:
            for leftover in (*new.iterdir(), old):
                if leftover.name != LOCK_FILE:
                    _remove(leftover)
            self._write(new, config)
            if self.overwrite and self.path.exists():
                os.replace(self.path, old)
            self._move(new)
        except BaseException:
            _remove(new)
            lock.close()
            raise
        _remove(old)
        self.close()
        self._lock = lock

    def _move(self, new: Path) -> None:
        try:
            os.replace(new, self.path)
        except OSError as error:
            if error.errno in OCCUPIED:
                raise UserError(
                    f"another process has just begun the run {self.path}: give another --run.name"
                ) from error
            raise

    def _write(self, folder: Path, config: str) -> None:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, config)
        self._update(folder)

    def discard(self) -> bool:
        """Remove a new directory that holds nothing but what :meth:`open` wrote; returns whether it did."""
        if not self.opened or self.resume or any((self.path / CHECKPOINTS).iterdir()):
            return False
        if {child.name for child in self.path.iterdir()} != {CONFIG_FILE, STATUS_FILE, CHECKPOINTS, LOCK_FILE}:
            return False
        shutil.rmtree(self.path)
        self.close()
        for parent in self._made:
            if not any(parent.iterdir()):
                parent.rmdir()
        self._facts = {}
        return True

    def update(self, **facts: Any) -> None:
        """Add ``facts`` to ``run.json``, with the time spent so far."""
        self._facts |= facts
        self._update(self.path)

    def end(self, **facts: Any) -> None:
        """:meth:`update` where the run failed. A full disk has room for it in the old file at least."""
        try:
            self.update(**facts)
        except UserError:
            with contextlib.suppress(OSError), (self.path / STATUS_FILE).open("r+b") as file:
                file.write(self._text().encode())
                file.truncate()

    def _update(self, folder: Path) -> None:
        session = time.monotonic() - self._started
        self._facts["updated"] = _now()
        self._facts["durations"] = {
            "session_seconds": round(session, 3),
            "total_seconds": round(self._earlier_seconds + session, 3),
        }
        self._facts["peak_memory"] = {
            name: max(value, self._earlier_peaks.get(name, 0)) for name, value in peak_memory().items()
        }
        write_atomically(folder / STATUS_FILE, self._text())

    def _text(self) -> str:
        return json.dumps(self._facts, indent=2) + "\n"

    @property
    def opened(self) -> bool:
        """Whether this process has written anything."""
        return bool(self._facts)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_status(path: Path) -> dict[str, Any]:
    """The content of ``run.json``; :class:`UserError` if it is not readable."""
    try:
        return json.loads((path / STATUS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a run directory: it has no {STATUS_FILE}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / STATUS_FILE} is damaged ({error}): remove the run or restore the file") from error


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    return (path / STATUS_FILE).is_file()


def find_parents(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that a configuration reads from: every value that is a run directory or lies in one."""
    parents: dict[str, dict[str, Any]] = {}
    for key, value in string_options(config):
        candidate = Path(value)
        if not value or len(value) > 4096 or "\n" in value or not candidate.exists():
            continue
        run = next((folder for folder in (candidate, *list(candidate.parents)[:2]) if is_run(folder)), None)
        if run is not None:
            status = read_status(run)
            parents[key] = {
                "option": key,
                "run": str(run),
                "status": status.get("status"),
                "created": status.get("created"),
            }
    return list(parents.values())


def check_parents(run: Path, parents: list[dict[str, Any]]) -> None:
    """Raise :class:`UserError` if a run that ``run`` began from has been replaced since.

    Args:
        run: A run directory, about to be resumed.
        parents: What :func:`find_parents` finds now.
    """
    before = {(parent["option"], parent["run"]): parent["created"] for parent in read_status(run).get("parents", [])}
    for parent in parents:
        created = before.get((parent["option"], parent["run"]))
        if created is not None and created != parent["created"]:
            raise UserError(
                f"{parent['run']} was replaced since {run} began: it was created {created}, what lies there now "
                f"{parent['created']}; resuming would mix the two: give --overwrite or another --run.name"
            )


def string_options(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of every string in nested mappings and lists."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from string_options(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from string_options(value, f"{prefix}[{index}]")
    elif isinstance(node, str):
        yield prefix, node


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
