"""Where metrics and samples go: ``metrics.csv`` and ``samples.jsonl`` always, Weights & Biases as a mirror."""

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_align.run.directory import METRICS_FILE, SAMPLES_FILE
from lightning_align.run.files import replacing, sync, write_atomically, writing

WandbMode = Literal["offline", "online", "disabled"]
WANDB_TIMEOUT = 30.0  # seconds to wait for a server before going on without it


class RunLogger(Logger):
    """A Lightning logger that takes sample tables too."""

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Add one row per sample: ``prompt``, ``completion``, scores, KL …; ``step`` is added to each."""
        raise NotImplementedError(f"{type(self).__name__} must implement log_samples")


def log_samples(loggers: Iterable[Logger], rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
    """Write sample rows to every logger that keeps them."""
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_samples(rows, step=step)


class FileLogger(RunLogger):
    """``metrics.csv`` and ``samples.jsonl`` in the run directory; every row is on disk when the call returns.

    Columns are sorted (``step`` first) and may appear at any time; the file is then rewritten. Nothing is created
    before the first row, so that a run which fails early leaves nothing.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._metrics = folder / METRICS_FILE
        self._samples = folder / SAMPLES_FILE
        self._columns: list[str] = []
        self._rows = 0
        self._sample_rows = 0

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self._metrics.parent.name

    @property
    def version(self) -> str:
        """A run has one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self._metrics.parent)

    def state_dict(self) -> dict[str, int]:
        """How many rows belong to the run so far; goes into the checkpoint."""
        return {"metrics": self._rows, "samples": self._sample_rows}

    @rank_zero_only
    def sync(self) -> None:
        """Wait until every row is on disk, also after a power cut."""
        for path in (self._metrics, self._samples):
            if path.exists():
                sync(path)

    @rank_zero_only
    def rewind(self, state: Mapping[str, int]) -> None:
        """Cut both files back to what they held when ``state`` was taken."""
        header, rows = read_table(self._metrics)
        if len(rows) < state["metrics"]:
            warnings.warn(f"{self._metrics} has lost rows: {len(rows)} of {state['metrics']} are there", stacklevel=2)
        rows = rows[: state["metrics"]]
        self._rows = len(rows)
        self._columns = _ordered({name for row in rows for name in header if row[name] != ""})
        if rows:
            self._rewrite(rows)
        else:
            self._metrics.unlink(missing_ok=True)
        lines = (
            self._samples.read_bytes().splitlines(keepends=True)[: state["samples"]] if self._samples.exists() else []
        )
        self._sample_rows = len(lines)
        if lines:
            with replacing(self._samples) as file:
                file.write(b"".join(lines))
        else:
            self._samples.unlink(missing_ok=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row. Values are written with all their digits."""
        row = {name: _cell(value) for name, value in metrics.items()}
        row["step"] = str(self._rows if step is None else step)
        if not set(row) <= set(self._columns):
            rows = read_table(self._metrics)[1]
            self._columns = _ordered({*self._columns, *row})
            self._rewrite([*rows, row])
        else:
            with writing(self._metrics), self._metrics.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)
        self._rows += 1

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Append one JSON line per sample; not-a-number is written as null."""
        self._samples.parent.mkdir(parents=True, exist_ok=True)
        with writing(self._samples), self._samples.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **_jsonable(row)}, ensure_ascii=False, allow_nan=False) + "\n")
        self._sample_rows += len(rows)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds them."""

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._metrics, text.getvalue())


class WandbMirror(RunLogger):
    """Mirrors metrics and samples to Weights & Biases. It never asks, never blocks and never fails a run.

    Offline unless told otherwise, logged in or not. The first problem of any kind gives one warning and ends it.

    Args:
        folder: The run directory; offline files lie in its ``wandb`` folder.
        mode: ``offline``, ``online`` (falls back to offline without a login) or ``disabled``.
        config: The resolved configuration, shown beside the curves.
    """

    def __init__(self, folder: Path, mode: WandbMode, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._folder = folder
        self._mode: WandbMode = mode
        self._config = config
        self._run: Any = None
        self._table: Any = None

    @property
    def name(self) -> str:
        """Project name."""
        return "lightning-align"

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._folder.name

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run ``action`` on a started mirror; whatever goes wrong ends the mirroring, not the run."""
        if self._mode == "disabled":
            return
        try:
            if self._run is None:
                self._start()
            action()
        except Exception as error:  # a mirror may raise anything, from network to disk, and must never stop a run
            self._mode = "disabled"
            text = " ".join(str(error).split())
            warnings.warn(
                f"Weights & Biases is switched off for this run: {type(error).__name__}: {text}", stacklevel=3
            )

    def _start(self) -> None:
        import wandb

        if self._mode == "online" and not wandb.login(prompt=False, verify=False):
            warnings.warn("no Weights & Biases login: logging offline (see `wandb login`, `wandb sync`)", stacklevel=4)
            self._mode = "offline"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", self.name),
            name=self._folder.name,
            dir=str(self._folder),
            config=dict(self._config),
            mode=self._mode,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=WANDB_TIMEOUT, summary_timeout=int(WANDB_TIMEOUT)
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for name in ("lab/proxy", "lab/gold"):
            self._run.define_metric(name, step_metric="lab/kl")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Mirror one row; ``step`` is a column, so rows may come in any order."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._guarded(lambda: self._run.log({**values, "step": step}))

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Add the samples to one growing table that is keyed by step."""
        self._guarded(lambda: self._add_samples([{"step": step, **_jsonable(row)} for row in rows]))

    def _add_samples(self, rows: list[dict[str, Any]]) -> None:
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL", allow_mixed_types=True)
        for row in rows:
            cells = (row.get(name) for name in self._table.columns)
            self._table.add_data(*(json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in cells))
        self._run.log({"samples": self._table})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is given at the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the mirror, with the run's exit code."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if status == "success" else 1))
            self._mode = "disabled"


def wandb_mode(option: WandbMode | None) -> WandbMode:
    """The mode to use: the option, else ``WANDB_MODE``, else offline. Being logged in changes nothing."""
    if option is not None:
        return option
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "dryrun":  # its old name
        mode = "offline"
    if mode in ("offline", "online", "disabled"):
        return mode  # type: ignore[return-value]
    warnings.warn(f"WANDB_MODE is '{mode}', which is not offline, online or disabled: logging offline", stacklevel=2)
    return "offline"


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a ``metrics.csv``, cells as written; both empty if there is no file."""
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
        return list(reader.fieldnames or []), rows


def _ordered(names: Iterable[str]) -> list[str]:
    """``step`` first, the others sorted: the same header whatever order the columns appeared in."""
    return ["step", *sorted(set(names) - {"step"})]


def _cell(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.item()
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _jsonable(value: Any) -> Any:
    """Plain JSON: tensors become numbers or lists, numbers that JSON has no word for become null."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
