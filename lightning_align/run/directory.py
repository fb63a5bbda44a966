"""The run directory: created last of all, never overwritten by accident, always saying what state the run is in."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import lightning_align
from lightning_align.errors import UserError

STATUS_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
MODEL = "model"

_VERSIONED = ("torch", "lightning", "transformers", "tokenizers", "datasets", "jsonargparse", "numpy", "wandb")


class RunDirectory:
    """``root/name``. The constructor and :meth:`check` touch nothing; :meth:`open` writes, once all else is good.

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
        self._made: list[Path] = []  # the folders above it that :meth:`open` made, innermost first
        self._started = time.monotonic()
        self._earlier_seconds = 0.0

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

    def open(self, config: str, *, seed: int, parents: list[dict[str, Any]]) -> None:
        """Create the directory (or reopen it), write ``config.yaml`` and mark the run as running."""
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        before = read_status(self.path) if self.resume else {}
        self._earlier_seconds = float(before.get("durations", {}).get("total_seconds", 0.0))
        self._facts = {
            "status": "running",
            "created": before.get("created", _now()),
            "updated": _now(),
            "seed": seed,
            "parents": parents,
            "resumed": int(before.get("resumed", -1)) + 1 if self.resume else 0,
            "git_commit": git_commit(),
            "versions": versions(),
            "hardware": hardware(),
        }
        try:
            if self.path.exists() and not self.overwrite:
                self._write(self.path, config)
            else:
                self._create(config)
        except OSError as error:
            self._facts = {}
            raise UserError(
                f"cannot write the run directory {self.path}: {error.strerror} (change --run.root)"
            ) from error

    def _create(self, config: str) -> None:
        """A new directory appears whole and an old one goes whole: a process killed here leaves no half of a run."""
        new, old = (self.path.with_name(f".{self.path.name}.{what}") for what in ("new", "old"))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        self._write(new, config)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(new, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path, config: str) -> None:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, config)
        self._update(folder)

    def discard(self) -> bool:
        """Remove a new directory that holds nothing but what :meth:`open` wrote; returns whether it did."""
        if not self.opened or self.resume or any((self.path / CHECKPOINTS).iterdir()):
            return False
        if {child.name for child in self.path.iterdir()} != {CONFIG_FILE, STATUS_FILE, CHECKPOINTS}:
            return False
        shutil.rmtree(self.path)
        for parent in self._made:
            if not any(parent.iterdir()):
                parent.rmdir()
        self._facts = {}
        return True

    def update(self, **facts: Any) -> None:
        """Add ``facts`` to ``run.json``, with the time spent so far."""
        self._facts |= facts
        self._update(self.path)

    def _update(self, folder: Path) -> None:
        session = time.monotonic() - self._started
        self._facts["updated"] = _now()
        self._facts["durations"] = {
            "session_seconds": round(session, 3),
            "total_seconds": round(self._earlier_seconds + session, 3),
        }
        write_atomically(folder / STATUS_FILE, json.dumps(self._facts, indent=2) + "\n")

    @property
    def opened(self) -> bool:
        """Whether this process has written anything."""
        return bool(self._facts)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
    for key, value in _leaves(config):
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


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of every string in nested mappings and lists."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}[{index}]")
    elif isinstance(node, str):
        yield prefix, node


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it stands on."""
    found = {"python": platform.python_version(), "lightning_align": lightning_align.__version__}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run had at its disposal."""
    import torch

    return {
        "machine": platform.machine(),
        "cpu_cores": len(psutil.Process().cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with ``+changes`` when it is dirty; None outside a checkout."""
    folder = Path(lightning_align.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # an installed package inside somebody else's repository is not described by that repository's commit
    if commit is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no", ".") else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
