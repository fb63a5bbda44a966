"""What benchmarks against TRL share: both sides in turns, each run in a process of its own, and their times."""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import Timing, machine, speedup

OURS, THEIRS = "lightning_align", "TRL"
ROOT = Path(__file__).parents[1]
LEARNING_RATE = 1e-4
Row = dict[str, float]


# ---------------------------------------------------------------------- one run
@dataclass(frozen=True)
class Run:
    """One process: when its steps ended, what it logged, and how much memory it took.

    Args:
        started: Unix time before the process was.
        steps: Rows of the clock.
        logged: Metrics of each step.
        peak_mib: Peak resident memory.
    """

    started: float
    steps: list[Row]
    logged: list[Row]
    peak_mib: float

    def timed(self, skipped: int) -> tuple[float, float]:
        """Wall and CPU seconds of the steps after the first ``skipped``."""
        first, last = self.steps[skipped - 1], self.steps[-1]
        return last["ended"] - first["ended"], last["cpu"] - first["cpu"]


def run_fit(
    model: Mapping[str, Any], data: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path, threads: int
) -> Run:
    """``fit`` with a configuration file: constant rate, no decay, records in order, everything logged at every step.

    Args:
        model: ``class_path`` and ``init_args`` of the module.
        data: The same of the datamodule.
        trainer: Options of the trainer.
        folder: Of the run and its caches.
        threads: Of the process.
    """
    constant = {
        **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        "weight_decay": 0.0,
    }
    in_order = {"val_fraction": 0.0, "shuffle": False, "cache_dir": str(folder / "cache")}
    clock = {"path": str(folder / "clock.jsonl")}
    config = {
        "seed_everything": 0,
        "model": {**model, "init_args": {**constant, **model["init_args"]}},
        "data": {**data, "init_args": {**in_order, **data["init_args"]}},
        "trainer": {
            **{"accelerator": "cpu", "log_every_n_steps": 1, **trainer},
            "callbacks": [{"class_path": "benchmarks.training_callback.StepClock", "init_args": clock}],
        },
        "run": {"root": str(folder), "name": "run", "wandb": "disabled"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    started = execute([sys.executable, "-m", "lightning_align", "fit", "--config", str(path)], folder, threads)
    with (folder / "run" / "metrics.csv").open(encoding="utf-8") as file:
        logged = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return _read(started, folder, logged)


def run_trl(
    settings: Mapping[str, Any], options: Mapping[str, Any], folder: Path, arguments: argparse.Namespace
) -> Run:
    """A script with TRL's trainer, under the same terms.

    Args:
        settings: Of ``benchmarks.training_trl``.
        options: Of TRL's configuration.
        folder: Of the run and its caches.
        arguments: Of the command line: ``steps``, ``threads``, ``trl_python``.
    """
    plain = {
        **{"max_steps": arguments.steps, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"},
        **{"logging_steps": 1, "disable_tqdm": True, "report_to": [], "seed": 0},
    }
    files = {"output": "run", "clock": "clock.jsonl", "logs": "logs.jsonl"}
    content = {
        **settings,
        **{name: str(folder / file) for name, file in files.items()},
        "options": {**plain, **options},
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    command = [os.path.abspath(arguments.trl_python), "-m", "benchmarks.training_trl", str(path)]
    started = execute(command, folder, arguments.threads)
    return _read(started, folder, _json_rows(folder / "logs.jsonl"))


def execute(command: Sequence[str], folder: Path, threads: int) -> float:
    """Run a process to its end with empty caches; Unix time of its start."""
    environment = os.environ | {
        **{"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"},
        **{"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    }
    started = time.time()
    with (folder / "log").open("w") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=ROOT, check=False).returncode
    if status != 0:
        raise SystemExit(f"{(folder / 'log').read_text()}\n{' '.join(command)} failed: nothing is reported")
    return started


def _json_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _read(started: float, folder: Path, logged: list[Row]) -> Run:
    *steps, peak = _json_rows(folder / "clock.jsonl")
    return Run(started, steps, logged, peak["peak_mib"])


# ---------------------------------------------------------------------- both, in turns
@dataclass
class Side:
    """Repeated runs of one side on one case; work is counted in samples."""

    timing: Timing = field(default_factory=Timing)
    first_step: list[float] = field(default_factory=list)
    first_step_cpu: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, run: Run, *, skipped: int, batch: int) -> None:
        """Note one run of ``batch`` samples a step, the first ``skipped`` steps of which are not timed."""
        self.timing.add(*run.timed(skipped), (len(run.steps) - skipped) * batch)
        self.first_step.append(run.steps[0]["ended"] - run.started)
        self.first_step_cpu.append(run.steps[0]["cpu"])
        self.peak_mib.append(run.peak_mib)
        self.losses = [row["loss"] for row in run.logged]

    def summary(self) -> dict[str, Any]:
        """Medians and ranges by name."""
        columns = {
            "samples_per_second": self.timing.rates(),
            "samples_per_cpu_second": self.timing.rates("cpu"),
            "first_step_seconds": self.first_step,
            "first_step_cpu_seconds": self.first_step_cpu,
            "peak_mib": self.peak_mib,
        }
        return {"runs": len(self.first_step), **medians(columns)}


def medians(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median, least and greatest of each column, as ``NAME``, ``NAME_min`` and ``NAME_max``."""
    found: dict[str, float] = {}
    for name, values in columns.items():
        found |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return found


def in_turns(programs: Mapping[str, Callable[[Path], Run]], number: int) -> dict[str, Run]:
    """One run of each side, in a folder of its own; who goes first changes from round to round."""
    runs = {}
    for name in [*programs][:: -1 if number % 2 else 1]:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = programs[name](Path(folder))
    return runs


def compare(
    programs: Mapping[str, Callable[[Path], Run]],
    check: Callable[[Run, Run], None],
    *,
    rounds: int,
    skipped: int,
    batch: int,
) -> dict[str, Side]:
    """Both sides in turn; ``check`` looks at every round, and stops the benchmark where they do not do the same."""
    sides = {name: Side() for name in programs}
    for number in range(rounds):
        runs = in_turns(programs, number)
        check(runs[OURS], runs[THEIRS])
        for name, run in runs.items():
            sides[name].add(run, skipped=skipped, batch=batch)
    return sides


def ratios(sides: Mapping[str, Side]) -> dict[str, float]:
    """Ours by theirs: samples a second, and of the others the medians."""
    ours, theirs = (sides[name].summary() for name in (OURS, THEIRS))
    return {
        "speed": speedup(sides[OURS].timing, sides[THEIRS].timing),
        "speed_cpu": speedup(sides[OURS].timing, sides[THEIRS].timing, "cpu"),
        "first_step": ours["first_step_seconds"] / theirs["first_step_seconds"],
        "first_step_cpu": ours["first_step_cpu_seconds"] / theirs["first_step_cpu_seconds"],
        "peak": ours["peak_mib"] / theirs["peak_mib"],
    }


# ---------------------------------------------------------------------- the command
def read_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, steps: int, skipped: int
) -> argparse.Namespace:
    """The options that every such benchmark has, beside those of the parser; an error if TRL is not there."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help=f"optimiser steps a run, more than {skipped}")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    options = parser.parse_args(arguments)
    if options.steps <= skipped:
        parser.error(f"--steps is {options.steps}: the first {skipped} are not timed, give more")
    trl_versions(options.trl_python)
    return options


def provenance(options: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Settings of the benchmark, hardware, versions of both sides, and commit."""
    given = {name: value for name, value in vars(options).items() if name != "trl_python"}
    return {"settings": given | settings, "machine": machine() | {"trl": trl_versions(options.trl_python)}}


def trl_versions(python: str) -> dict[str, str]:
    """Versions of TRL and what it stands on, in its environment; an error if it is not there."""
    names = ("trl", "torch", "transformers", "accelerate", "datasets")
    program = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    if shutil.which(python) is None:
        raise SystemExit(f"--trl-python {python}: there is no such interpreter")
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1]
        raise SystemExit(f"{python} has no TRL ({reason}): give --trl-python; `make test-parity` makes .venv-parity")
    return dict(zip(names, done.stdout.split(), strict=True))
