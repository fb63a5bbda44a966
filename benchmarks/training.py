"""Training against TRL: ``python -m benchmarks.training --trl-python .venv-parity/bin/python``.

SFT, a reward model, DPO and KTO of one small random Llama, in float32 on a fixed number of CPU threads. Both sides have
the same initial weights, records, batches in the same order, optimiser (AdamW at a constant rate, gradients clipped to
norm 1) and loss, and log every step, as each does. Two kinds of batches: conversations of hh-rlhf, whose lengths are as
unequal as lengths are (generated text where that file is not there), and random words of one length.

Ours is ``lightning_align fit`` with a configuration, theirs a script as TRL's documentation has it, without gradient
checkpointing. Each run is a process of its own with empty caches, and the two take turns. Reported are samples a second
(the first steps left out), seconds from the start of the process to the end of the first step, and the process's peak
of resident memory. Nothing is reported where the two do not train the same: the first step's loss (and the log-probs or
scores behind it) must agree within 1e-3, and the tokens of every step exactly.

Results go to the terminal; CSV, JSON and a picture, ``training.…``, to ``benchmarks/results/<device>/``.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import logging

from benchmarks.common import Timing, machine, result_folder, speedup, write_csv
from benchmarks.training_cases import EQUAL, METHODS, UNEQUAL, World, build_world
from benchmarks.training_figure import draw
from benchmarks.training_run import BATCH, OURS, SIDES, THEIRS, Case, Run, check_same

STEPS, SKIPPED = 12, 2  # steps a run; of these, not timed
SIZE, VOCABULARY, HIDDEN, LAYERS = 4000, 8192, 256, 4


@dataclass
class Side:
    """Repeated runs of one side on one case; work is counted in samples."""

    timing: Timing = field(default_factory=Timing)
    first_step: list[float] = field(default_factory=list)
    first_step_cpu: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, run: Run, batch: int) -> None:
        """Note one run."""
        self.timing.add(*run.timed(SKIPPED), (len(run.steps) - SKIPPED) * batch)
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
        found: dict[str, Any] = {"runs": len(self.first_step)}
        for name, values in columns.items():
            found |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        return found


Result = dict[Case, dict[str, Side]]


def run_both(world: World, case: Case, options: argparse.Namespace, number: int) -> dict[str, Run]:
    """One run of each side; who goes first changes from round to round."""
    runs = {}
    for name in [*SIDES][:: -1 if number % 2 else 1]:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = SIDES[name](world, case, Path(folder), options)
    return runs


def compare(world: World, case: Case, options: argparse.Namespace) -> dict[str, Side]:
    """Both sides in turn; every round is checked."""
    sides = {name: Side() for name in SIDES}
    for number in range(options.rounds):
        runs = run_both(world, case, options, number)
        check_same(case, METHODS[case[0]], runs[OURS], runs[THEIRS])
        for name, run in runs.items():
            sides[name].add(run, BATCH)
    return sides


# ---------------------------------------------------------------------- reports
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


def result_table(result: Result) -> Table:
    """Medians with ranges, and how the sides compare."""
    columns = ("samples / s", "to the first step's end, s", "peak memory, MiB", "samples / s", "first step", "peak")
    table = Table("method", "lengths", "", *columns, title="training; in the last columns ours by TRL's (CPU seconds)")
    for (method, lengths), sides in result.items():
        for name, side in sides.items():
            found = side.summary()
            cells = [
                f"{found[key]:{form}} ({found[f'{key}_min']:{form}}–{found[f'{key}_max']:{form}})"
                for key, form in (("samples_per_second", ".2f"), ("first_step_seconds", ".1f"), ("peak_mib", ",.0f"))
            ]
            by = ratios(sides)
            last = [
                *(f"{by[key]:.2f} ({by[f'{key}_cpu']:.2f})" for key in ("speed", "first_step")),
                f"{by['peak']:.2f}",
            ]
            table.add_row(method, lengths, name, *cells, *(last if name == OURS else ["", "", ""]))
    return table


def write_results(result: Result, world: World, options: argparse.Namespace) -> None:
    """CSV, JSON and the picture."""
    folder = result_folder()
    rows = [
        {"method": method, "lengths": lengths, "variant": name, **side.summary()}
        for (method, lengths), sides in result.items()
        for name, side in sides.items()
    ]
    write_csv(folder / "training.csv", rows)
    settings = {
        **{name: value for name, value in vars(options).items() if name != "trl_python"},
        **{"batch": BATCH, "steps_not_timed": SKIPPED, "records": world.source, "parameters": world.parameters},
    }
    about = {
        "settings": settings,
        "machine": machine() | {"trl": trl_versions(options.trl_python)},
        "tokens_of_sequences": {name: _quantiles(found) for name, found in world.tokens.items()},
        "ratios": [{"method": case[0], "lengths": case[1], **ratios(sides)} for case, sides in result.items()],
        "runs": [
            {"method": method, "lengths": lengths, "variant": name, **asdict(side)}
            for (method, lengths), sides in result.items()
            for name, side in sides.items()
        ],
    }
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    found = {case: {name: side.summary() for name, side in sides.items()} for case, sides in result.items()}
    draw(found, {case: ratios(sides)["speed"] for case, sides in result.items()}, folder / "training.png")
    print(f"wrote training.csv, training.json and training.png to {folder}")


def _quantiles(tokens: Sequence[int]) -> dict[str, float]:
    cuts = statistics.quantiles(tokens, n=100, method="inclusive")
    return {"p10": cuts[9], "p50": cuts[49], "p90": cuts[89], "max": max(tokens), "mean": statistics.mean(tokens)}


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps a run, more than {SKIPPED}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--lengths", nargs="+", choices=(UNEQUAL, EQUAL), default=[UNEQUAL, EQUAL])
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    options = parser.parse_args(arguments)
    if options.steps <= SKIPPED:
        parser.error(f"--steps is {options.steps}: the first {SKIPPED} are not timed, give more")
    trl_versions(options.trl_python)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder), size=SIZE, vocabulary=VOCABULARY, hidden=HIDDEN, layers=LAYERS)
        print(f"{world.parameters:,} parameters, {world.source}", flush=True)
        cases = [(method, lengths) for method in options.methods for lengths in options.lengths]
        run_both(world, cases[0], options, 0)  # brings both programs into the machine's file cache
        result: Result = {}
        console = Console(width=170)
        for case in cases:
            result[case] = compare(world, case, options)
            console.print(result_table({case: result[case]}))
        console.print(result_table(result))
        write_results(result, world, options)


if __name__ == "__main__":
    main()
