"""One run of a side of ``benchmarks.training``, in a process of its own, and the check that both train the same."""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.training_cases import METHODS, ROOM, Method, World

OURS, THEIRS = "lightning_align", "TRL"
ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-3  # relative
BATCH = 8  # sequences or pairs a step
LEARNING_RATE = 1e-4
Case = tuple[str, str]  # method, lengths
Row = dict[str, float]


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


def run_ours(world: World, case: Case, folder: Path, options: argparse.Namespace) -> Run:
    """``fit`` with a configuration file."""
    name, lengths = case
    method = METHODS[name]
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": method.module,
            "init_args": {
                "model": str(world.model(method.model)),
                **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
                **{"weight_decay": 0.0, **(method.settings or {})},
            },
        },
        "data": {
            "class_path": method.data,
            "init_args": {
                **{"path": str(world.data(name, lengths)), "batch_size": BATCH, "max_length": ROOM},
                **{"val_fraction": 0.0, "shuffle": False, "cache_dir": str(folder / "cache")},
            },
        },
        "trainer": {
            **{"accelerator": "cpu", "max_steps": options.steps, "log_every_n_steps": 1},
            "callbacks": [
                {
                    "class_path": "benchmarks.training_callback.StepClock",
                    "init_args": {"path": str(folder / "clock.jsonl")},
                }
            ],
        },
        "run": {"root": str(folder), "name": "run", "wandb": "disabled"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "lightning_align", "fit", "--config", str(path)]
    started = _execute(command, folder, options.threads)
    with (folder / "run" / "metrics.csv").open(encoding="utf-8") as file:
        logged = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return _read(started, folder, logged)


def run_theirs(world: World, case: Case, folder: Path, options: argparse.Namespace) -> Run:
    """A script with TRL's trainer."""
    name, lengths = case
    method = METHODS[name]
    settings = {
        **{"trainer": f"{method.trl}Trainer", "config": f"{method.trl}Config"},
        **{"model": str(world.model(method.model)), "data": str(world.data(name, lengths))},
        **{"output": str(folder / "run"), "clock": str(folder / "clock.jsonl"), "logs": str(folder / "logs.jsonl")},
        "options": {
            **{"max_steps": options.steps, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE},
            **{"lr_scheduler_type": "constant", "max_length": ROOM, "train_sampling_strategy": "sequential"},
            **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"},
            **{"logging_steps": 1, "disable_tqdm": True, "report_to": [], "seed": 0},
        },
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    command = [os.path.abspath(options.trl_python), "-m", "benchmarks.training_trl", str(path)]
    started = _execute(command, folder, options.threads)
    return _read(started, folder, _json_rows(folder / "logs.jsonl"))


SIDES = {OURS: run_ours, THEIRS: run_theirs}


def _execute(command: Sequence[str], folder: Path, threads: int) -> float:
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


def check_same(case: Case, method: Method, ours: Run, theirs: Run) -> None:
    """Stop the benchmark where the two sides train something else."""
    for metric in method.same:
        our, their = (run.logged[0][metric] for run in (ours, theirs))
        if not abs(our - their) <= TOLERANCE * abs(their):
            raise SystemExit(
                f"{' '.join(case)}: {metric} of the first step is {our:.6g} here and {their:.6g} in TRL, more than "
                f"{TOLERANCE:g} apart: the two train something else, and nothing is reported"
            )
    our_tokens, their_tokens = ([row["num_tokens"] for row in run.logged] for run in (ours, theirs))
    if our_tokens != their_tokens:
        raise SystemExit(
            f"{' '.join(case)}: after {len(our_tokens)} steps {our_tokens[-1]:,.0f} tokens were seen here and "
            f"{their_tokens[-1]:,.0f} in TRL: the batches are others, and nothing is reported"
        )
