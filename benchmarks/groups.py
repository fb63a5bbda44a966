"""GRPO and RLOO against TRL: ``python -m benchmarks.groups --trl-python .venv-parity/bin/python``.

One iteration draws eight completions of each of four prompts, scores them with the same function and takes one step on
them, with the KL to the initial policy. Both sides have one small random Llama, in float32 on a fixed number of CPU
threads, prompts of 32 or 256 tokens, and completions of 64 tokens that never end early.

Ours is ``lightning_align fit`` with a configuration, theirs a script as TRL's documentation has it (``generate`` of
transformers, one forward pass for all completions, no gradient checkpointing). Each run is a process of its own, and
the two take turns. Reported are wall and CPU seconds an iteration (the first left out) and the process's peak of
resident memory. Nothing is reported where the two do not do the same: lengths and numbers of tokens in every iteration,
entropy and reward of the first.

Results go to the terminal; JSON and a table, ``groups.…``, to ``benchmarks/results/<device>/``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import logging

from benchmarks.common import markdown, result_folder
from benchmarks.groups_run import (
    GROUP,
    METHODS,
    NEW_TOKENS,
    PROMPTS,
    ROWS,
    SIDES,
    Case,
    GroupWorld,
    build_world,
    check_same,
)
from benchmarks.sides import OURS, Run, Side, compare, in_turns, medians, provenance, ratios, read_arguments

STEPS, SKIPPED = 6, 1  # iterations a run; of these, not timed
SIZE, VOCABULARY, HIDDEN, LAYERS = 4000, 8192, 256, 4  # those of ``benchmarks.training``
GOALS = {32: 2.0, 256: 3.0}  # times TRL's speed, by the length of the prompt; memory is to be no higher
Result = dict[Case, dict[str, Side]]
HEAD = (
    *("method", "prompt", "", "s / iteration", "CPU s / iteration", "peak memory, MiB"),
    *("speed", "speed by CPU s", "memory", "goal"),
)


def programs(world: GroupWorld, case: Case, options: argparse.Namespace) -> dict[str, Callable[[Path], Run]]:
    """Both sides of a case."""
    return {name: partial(side, world, case, options) for name, side in SIDES.items()}


# ---------------------------------------------------------------------- reports
def summary(side: Side) -> dict[str, Any]:
    """Medians and ranges of a side, seconds an iteration among them."""
    clocks = {"seconds_per_iteration": side.timing.rates(), "cpu_seconds_per_iteration": side.timing.rates("cpu")}
    seconds = {name: [ROWS / rate for rate in rates] for name, rates in clocks.items()}
    return side.summary() | medians(seconds)


def verdict(tokens: int, by: Mapping[str, float]) -> str:
    """The goal of a case, and whether it was met in CPU seconds and memory."""
    goal = GOALS.get(tokens)
    if goal is None:
        return ""
    parts = [f"≥ {goal:g} ×: {'met' if by['speed_cpu'] >= goal else 'missed'}"]
    parts.append(f"memory: {'met' if by['peak'] <= 1 else 'missed'}")
    return ", ".join(parts)


def result_table(result: Result) -> str:
    """Medians with ranges, and how the sides compare, in Markdown."""
    rows = [HEAD]
    for (method, tokens), sides in result.items():
        by = ratios(sides)
        for name, side in sides.items():
            found = summary(side)
            cells = [
                f"{found[key]:{form}} ({found[f'{key}_min']:{form}}–{found[f'{key}_max']:{form}})"
                for key, form in (
                    *(("seconds_per_iteration", ".2f"), ("cpu_seconds_per_iteration", ".2f")),
                    ("peak_mib", ",.0f"),
                )
            ]
            last = (f"{by['speed']:.1f} ×", f"{by['speed_cpu']:.1f} ×", f"{by['peak']:.2f}", verdict(tokens, by))
            rows.append((method, str(tokens), name, *cells, *(last if name == OURS else [""] * 4)))
    return markdown(rows)


def write_results(result: Result, world: GroupWorld, options: argparse.Namespace) -> None:
    """JSON and the table."""
    folder = result_folder()
    about = {
        **provenance(
            options,
            iterations_not_timed=SKIPPED,
            prompts=PROMPTS,
            completions_of_a_prompt=GROUP,
            new_tokens=NEW_TOKENS,
            parameters=world.parameters,
        ),
        "goals": {"speed_cpu": GOALS, "peak": 1.0},
        "ratios": [{"method": case[0], "prompt": case[1], **ratios(sides)} for case, sides in result.items()],
        "runs": [
            {"method": method, "prompt": tokens, "variant": name, "summary": summary(side), **asdict(side)}
            for (method, tokens), sides in result.items()
            for name, side in sides.items()
        ],
    }
    (folder / "groups.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    facts = "\n".join(f"- {name}: {value}" for name, value in {**about["settings"], **about["machine"]}.items())
    (folder / "groups.md").write_text(f"{facts}\n\n{result_table(result)}\n", encoding="utf-8")
    print(f"wrote groups.json and groups.md to {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.groups", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[*GOALS])
    options = read_arguments(parser, arguments, steps=STEPS, skipped=SKIPPED)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"size": SIZE, "vocabulary": VOCABULARY, "hidden": HIDDEN, "layers": LAYERS}
        world = build_world(Path(folder), lengths=options.prompt_tokens, **sizes)
        print(f"{world.parameters:,} parameters", flush=True)
        cases = [(method, tokens) for tokens in options.prompt_tokens for method in options.methods]
        in_turns(programs(world, cases[0], options), 0)  # brings both programs into the machine's file cache
        result: Result = {}
        for case in cases:
            both = programs(world, case, options)
            check = partial(check_same, case)
            result[case] = compare(both, check, rounds=options.rounds, skipped=SKIPPED, batch=ROWS)
            print(result_table({case: result[case]}), flush=True)
        print(result_table(result))
        write_results(result, world, options)


if __name__ == "__main__":
    main()
