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
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import logging

from benchmarks.common import result_folder, write_csv
from benchmarks.sides import OURS, Run, Side, compare, in_turns, provenance, ratios, read_arguments
from benchmarks.training_cases import EQUAL, METHODS, UNEQUAL, World, build_world
from benchmarks.training_figure import draw
from benchmarks.training_run import BATCH, SIDES, Case, check_same

STEPS, SKIPPED = 12, 2  # steps a run; of these, not timed
SIZE, VOCABULARY, HIDDEN, LAYERS = 4000, 8192, 256, 4
Result = dict[Case, dict[str, Side]]


def programs(world: World, case: Case, options: argparse.Namespace) -> dict[str, Callable[[Path], Run]]:
    """Both sides of a case."""
    return {name: partial(side, world, case, options) for name, side in SIDES.items()}


# ---------------------------------------------------------------------- reports
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
    about = {
        **provenance(options, batch=BATCH, steps_not_timed=SKIPPED, records=world.source, parameters=world.parameters),
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--lengths", nargs="+", choices=(UNEQUAL, EQUAL), default=[UNEQUAL, EQUAL])
    options = read_arguments(parser, arguments, steps=STEPS, skipped=SKIPPED)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder), size=SIZE, vocabulary=VOCABULARY, hidden=HIDDEN, layers=LAYERS)
        print(f"{world.parameters:,} parameters, {world.source}", flush=True)
        cases = [(method, lengths) for method in options.methods for lengths in options.lengths]
        in_turns(programs(world, cases[0], options), 0)  # brings both programs into the machine's file cache
        result: Result = {}
        console = Console(width=170)
        for case in cases:
            result[case] = compare(
                programs(world, case, options),
                partial(check_same, case, METHODS[case[0]]),
                rounds=options.rounds,
                skipped=SKIPPED,
                batch=BATCH,
            )
            console.print(result_table({case: result[case]}))
        console.print(result_table(result))
        write_results(result, world, options)


if __name__ == "__main__":
    main()
