"""All methods at the same start, prompts, KL budget and sample budget: a row each, over their seeds."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.analysis import START_KL
from lightning_align.lab.evaluation.intervals import SEEDS, Estimate, over_runs
from lightning_align.lab.evaluation.subjects import place_of
from lightning_align.lab.grid import cell_of, expand
from lightning_align.lab.measured import check_alike, read_measured
from lightning_align.lab.runs import MEASURED_FILE, read_episodes
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
BEST_OF_N_NOTE = "Best-of-n is no policy but a choice among answers of the start: it stands in the frontier alone."


@dataclass(frozen=True)
class Entry:
    """One run at the checkpoint that is compared.

    Attributes:
        method: What repetitions share; :data:`START` is what all of them began from.
        run: Its folder.
        step: Of the checkpoint.
        values: Estimates by :data:`COLUMNS`, as far as they are known.
        answers: The first prompts with an answer and its scores.
        prompts: What each prompt has, by the same names, as far as that is known.
    """

    method: str
    run: Path
    step: int
    values: Mapping[str, Estimate]
    answers: Sequence[Mapping[str, Any]]
    prompts: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


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
    """Of every run the checkpoint with the largest KL within both budgets, and each start.

    Raises:
        UserError: A run was not measured, or on other prompts or settings than the others, or from other starts, or
            has no checkpoint within the budgets, or does not say where it stands in them.
    """
    rows = {run: _rows(run) for run in runs}
    check_alike({str(run): own[-1]["settings"] for run, own in rows.items()})
    methods: dict[str, list[str]] = {}
    for run, own in rows.items():
        methods.setdefault(_method(run), []).append(_start(own))
    _check_starts(methods)
    entries: list[Entry] = []
    started: set[str] = set()
    for run, own in rows.items():
        drawn = _drawn(run, own)
        near = [row for row in own if _kl(row) <= kl]
        if math.isfinite(samples) and (unknown := [row["step"] for row in near if row["step"] not in drawn]):
            raise UserError(
                f"{run} does not say how many answers it had drawn by step {unknown[0]}: leave out --samples or the run"
            )
        within = [row for row in near if drawn.get(row["step"], 0.0) <= samples]
        if not within:
            least = min(map(_kl, own))
            raise UserError(f"{run} has no checkpoint within KL {kl:g} and {samples:g} samples (least KL: {least:.2f})")
        chosen = max(within, key=lambda row: (_kl(row), -row["step"]))
        first = min(own, key=lambda row: int(row["step"]))
        if first["step"] == 0 and _kl(first) < START_KL and _start(own) not in started:
            entries.append(_entry(START, run, first, {}))
            started.add(_start(own))
        cost = _cost(run) | ({"samples": drawn[chosen["step"]]} if chosen["step"] in drawn else {})
        entries.append(_entry(_method(run), run, chosen, cost))
    return entries


def _method(run: Path) -> str:
    cell = cell_of(run)
    return cell.method if cell is not None else run.resolve().name


def _rows(run: Path) -> list[dict[str, Any]]:
    if not run.is_dir():
        raise UserError(f"{run} is no run directory: lab leaderboard compares measured runs, lab frontier CSVs too")
    own = read_measured(run)
    if not own:
        raise UserError(f"{run} has no measured checkpoints: run lab frontier --recompute on it first")
    for row in own:
        if row["metrics"].get("kl", {}).get("value") is None:
            raise UserError(
                f"{run / MEASURED_FILE} has no KL of step {row['step']}: measure the run again (lab frontier "
                "--recompute --overwrite), or leave it out"
            )
    return own


def _kl(row: Mapping[str, Any]) -> float:
    return float(row["metrics"]["kl"]["value"])


def _start(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the model lies that the run began from; empty if it is not known."""
    told = rows[-1]["settings"].get("start")
    return place_of(str(told)) if told else ""


def _check_starts(methods: Mapping[str, Sequence[str]]) -> None:
    """The same starts for all methods: from others the KL is another, and so is what was gained."""
    first = next(iter(methods))
    for method, starts in methods.items():
        if set(starts) != set(methods[first]):
            one, two = (", ".join(sorted(set(each))) or "none" for each in (methods[first], starts))
            raise UserError(
                f"{first} and {method} did not begin from the same starts: {one} and {two}; compare runs of the same"
            )


def _drawn(run: Path, rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Answers drawn by each step, as far as it is known; a run on data of given answers draws none."""
    kind = (read_status(run).get("data") or {}).get("kind")
    given = {} if kind in (None, "prompt") else {int(row["step"]): 0.0 for row in rows}
    return {0: 0.0} | given | read_episodes(run)


def _entry(method: str, run: Path, row: Mapping[str, Any], cost: Mapping[str, float]) -> Entry:
    return Entry(method, run, row["step"], _values(row, cost), row.get("answers", []), row.get("per_prompt", {}))


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

    Intervals are those of :func:`~.intervals.over_runs`; that of a single run is the one it was measured with.
    """
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry.method, []).append(entry)
    rows = {}
    for method, own in methods.items():
        names = [name for name in COLUMNS if all(name in entry.values for entry in own)]
        rows[method] = {name: own[0].values[name] if len(own) == 1 else _over(own, name) for name in names}

    def key(item: tuple[str, Mapping[str, Estimate]]) -> tuple[bool, float]:
        gold = item[1].get("gold") or item[1].get("win_rate") or item[1].get("proxy")
        return item[0] == START, -(gold.value if gold is not None else math.inf)

    return dict(sorted(rows.items(), key=key))


def _over(own: Sequence[Entry], name: str) -> Estimate:
    estimates = [entry.values[name] for entry in own]
    rows = [np.array(entry.prompts.get(name, []), dtype=np.float64) for entry in own]
    alike = len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    return over_runs([e.value for e in estimates], [e.se for e in estimates], np.stack(rows) if alike else None)


def moved(row: Mapping[str, Estimate]) -> bool:
    """Whether a method is compared at a checkpoint beyond its start."""
    return row["kl"].value >= START_KL


def headline(rows: Mapping[str, Mapping[str, Estimate]], kl: float) -> str:
    """Which method leads of those that moved, and whether its interval is clear of the next one's."""
    methods = {name: row for name, row in rows.items() if name != START}
    where = "" if math.isinf(kl) else f" within KL {kl:g}"
    if not any("gold" in row for row in methods.values()):
        return f"{len(methods)} method{'s' * (len(methods) != 1)}{where}, without a true score"
    judged = [(name, row["gold"]) for name, row in methods.items() if "gold" in row and moved(row)]
    if not judged:
        return f"No method leads: none has a checkpoint beyond its start{where or ' within the budget'}"
    still = [name for name, row in methods.items() if not moved(row)]
    apart = f"; at the start still: {', '.join(still)}" if still else ""
    first, gold = judged[0]
    if len(judged) == 1:
        return f"{first} reaches a true score of {gold.value:.2f}{where}{apart}"
    second, other = judged[1]
    clear = gold.low > other.high
    how = "clear of" if clear else "not clear of"
    return f"{first} leads{where} with {gold.value:.2f}, {how} {second} ({other.value:.2f}){apart}"


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
        f"and memory are of the whole run. Intervals are over seeds where a method has {SEEDS} or more (the prompts "
        "and the start's answers are the same for all, and their error is not in it), else over prompts."
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
