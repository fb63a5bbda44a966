"""All methods at the same start, prompts, KL budget and sample budget: a row each, over their seeds."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.grid import cell_of, expand
from lightning_align.lab.measured import check_alike, read_measured
from lightning_align.lab.runs import read_episodes
from lightning_align.run.directory import read_status

# metric of a measured checkpoint, its heading, and whether more is better (None: neither)
COLUMNS: Mapping[str, tuple[str, bool | None]] = {
    "gold": ("true score", True),
    "gold_helpfulness": ("helpfulness", True),
    "gold_safety": ("safety", True),
    "win_rate": ("win rate", True),
    "length_controlled_win_rate": ("win rate, length-controlled", True),
    "heldout": ("held-out reward", True),
    "proxy": ("reward", None),
    "kl": ("KL", None),
    "length": ("tokens", None),
    "distinct_2": ("distinct-2", True),
    "self_bleu": ("self-BLEU", False),
    "samples": ("samples", False),
    "seconds": ("seconds", False),
    "memory": ("peak MiB", False),
}
START = "start"


@dataclass(frozen=True)
class Entry:
    """One run at the checkpoint that is compared.

    Attributes:
        method: What repetitions share; :data:`START` is what all of them began from.
        run: Its folder.
        step: Of the checkpoint.
        values: Estimates by :data:`COLUMNS`, as far as they are known.
        answers: The first prompts with an answer and its scores.
    """

    method: str
    run: Path
    step: int
    values: Mapping[str, Estimate]
    answers: Sequence[Mapping[str, Any]]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Runs themselves, and of a pipeline's folder those of its finished runs whose checkpoints were measured.

    Raises:
        UserError: There is none.
    """
    runs = expand(places, lambda run: bool(read_measured(run)))
    if not runs:
        raise UserError(
            f"no run in {', '.join(map(str, places))} has measured checkpoints: run lab frontier --recompute first"
        )
    return runs


def load_entries(runs: Sequence[Path], *, kl: float, samples: float) -> list[Entry]:
    """Of every run the checkpoint with the largest KL within both budgets, and the start.

    Raises:
        UserError: A run was not measured, or on other prompts or settings than the others, or has no checkpoint within
            the budgets.
    """
    rows = {run: read_measured(run) for run in runs}
    for run, own in rows.items():
        if not own:
            raise UserError(f"{run} has no measured checkpoints: run lab frontier --recompute on it first")
    check_alike({str(run): own[-1]["settings"] for run, own in rows.items()})
    entries: list[Entry] = []
    for run, own in rows.items():
        drawn = read_episodes(run)
        within = [row for row in own if row["metrics"]["kl"]["value"] <= kl and drawn.get(row["step"], 0.0) <= samples]
        if not within:
            least = min(row["metrics"]["kl"]["value"] for row in own)
            raise UserError(f"{run} has no checkpoint within KL {kl:g} and {samples:g} samples (least KL: {least:.2f})")
        chosen = max(within, key=lambda row: (row["metrics"]["kl"]["value"], -row["step"]))
        first = min(own, key=lambda row: int(row["step"]))
        if first["step"] == 0 and not any(entry.method == START for entry in entries):
            entries.append(Entry(START, run, 0, _values(first, {}), first.get("answers", [])))
        cell = cell_of(run)
        method = cell.method if cell is not None else run.resolve().name
        cost = _cost(run) | ({"samples": drawn[chosen["step"]]} if chosen["step"] in drawn else {})
        entries.append(Entry(method, run, chosen["step"], _values(chosen, cost), chosen.get("answers", [])))
    return entries


def _values(row: Mapping[str, Any], cost: Mapping[str, float]) -> dict[str, Estimate]:
    found = {
        name: Estimate(m["value"], _number(m["ci"][0]), _number(m["ci"][1]), m["n"], _number(m["se"]))
        for name, m in row["metrics"].items()
        if name in COLUMNS and m["value"] is not None
    }
    return found | {name: Estimate(value, math.nan, math.nan, 1) for name, value in cost.items()}


def _number(value: float | None) -> float:
    """JSON has null for what is none."""
    return math.nan if value is None else value


def _cost(run: Path) -> dict[str, float]:
    """Of the whole run: seconds, and the most memory."""
    status = read_status(run)
    seconds = status.get("durations", {}).get("total_seconds")
    peaks = status.get("peak_memory", {})
    peak = peaks.get("gpu_bytes", peaks.get("process_bytes"))
    known = {"seconds": seconds, "memory": None if peak is None else peak / 2**20}
    return {name: float(value) for name, value in known.items() if value is not None}


def board(entries: Sequence[Entry]) -> dict[str, dict[str, Estimate]]:
    """Every method's mean over its runs, best true score first, the start last.

    Of several runs the interval is Student's over them; of one it is over its prompts and says nothing of other seeds.
    """
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry.method, []).append(entry)
    rows = {}
    for method, own in methods.items():
        names = [name for name in COLUMNS if all(name in entry.values for entry in own)]
        rows[method] = {
            name: own[0].values[name] if len(own) == 1 else student(np.array([e.values[name].value for e in own]))
            for name in names
        }

    def key(item: tuple[str, Mapping[str, Estimate]]) -> tuple[bool, float]:
        gold = item[1].get("gold") or item[1].get("win_rate") or item[1].get("proxy")
        return item[0] == START, -(gold.value if gold is not None else math.inf)

    return dict(sorted(rows.items(), key=key))


def headline(rows: Mapping[str, Mapping[str, Estimate]], kl: float) -> str:
    """Which method leads, and whether its interval is clear of the next one's."""
    judged = [(name, row["gold"]) for name, row in rows.items() if name != START and "gold" in row]
    where = "" if math.isinf(kl) else f" within KL {kl:g}"
    if not judged:
        return f"{len([name for name in rows if name != START])} methods{where}, without a true score"
    first, gold = judged[0]
    if len(judged) == 1:
        return f"{first} reaches a true score of {gold.value:.2f}{where}"
    second, other = judged[1]
    clear = gold.low > other.high
    how = "clear of" if clear else "not clear of"
    return f"{first} leads{where} with {gold.value:.2f}, {how} {second} ({other.value:.2f})"


def to_csv(entries: Sequence[Entry]) -> str:
    """A line for each run."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["method", "run", "step", *COLUMNS])
    for entry in entries:
        cells = [entry.values[name].value if name in entry.values else "" for name in COLUMNS]
        writer.writerow([entry.method, entry.run, entry.step, *cells])
    return out.getvalue()


def note(entries: Sequence[Entry], kl: float, samples: float) -> str:
    """What was compared, in words."""
    budgets = [f"KL {kl:g}"] if math.isfinite(kl) else []
    budgets += [f"{samples:,.0f} samples"] if math.isfinite(samples) else []
    within = f" with the largest KL within {' and '.join(budgets)}" if budgets else " with the largest KL"
    runs = len({entry.run for entry in entries})
    return (
        f"Each of {runs} runs counts with the kept checkpoint{within}, measured on the same held-out prompts. Seconds "
        "and memory are of the whole run. Intervals are over seeds where a method has several, else over prompts."
    )


def summarise(
    rows: Mapping[str, Mapping[str, Estimate]], entries: Sequence[Entry], kl: float, samples: float
) -> dict[str, Any]:
    """Content of ``leaderboard.json``."""
    return {
        "format": 1,
        "kl": kl,
        "samples": samples,
        "headline": headline(rows, kl),
        "methods": {
            method: {
                "runs": [{"run": str(e.run), "step": e.step} for e in entries if e.method == method],
                **{name: estimate.as_dict() for name, estimate in row.items()},
            }
            for method, row in rows.items()
        },
    }
