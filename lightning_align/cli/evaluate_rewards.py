"""The part of ``evaluate`` that judges reward models: comparisons in, accuracy and calibration out."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from lightning_align.cli.evaluate_data import read_records
from lightning_align.cli.evaluate_tables import text
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.rewards import (
    Comparisons,
    calibrated_error,
    decided,
    pair_metrics,
    score_differences,
    subsets,
)
from lightning_align.lab.evaluation.subjects import Subject, short_names
from lightning_align.rewards.learned import LearnedReward

METRICS = ("accuracy", "loss", "ece", "brier")
FORMAT = 1


def evaluate_rewards(found: Sequence[Subject], options: Namespace) -> tuple[dict[str, Any], list[Table]]:
    """Content of the JSON and tables for the terminal."""
    comparisons, fields = read_comparisons(options)
    by = subsets(fields, options.by)
    rows = [measure(subject, comparisons, by, options.seed) for subject in found]
    notes = [f"{number:,} records left out: {reason}" for reason, number in comparisons.skipped.items()]
    notes += [f"{row['model']}: {note}" for row in rows for note in row["notes"]]
    content = {
        "format": FORMAT,
        "kind": "reward models",
        "data": {
            "source": options.data,
            "split": options.split,
            "pairs": len(comparisons),
            "prompts": int(comparisons.group.max()) + 1,
            "skipped": comparisons.skipped,
        },
        "settings": {"seed": options.seed, "by": options.by},
        "models": rows,
        "notes": notes,
    }
    return content, [table(rows)]


def read_comparisons(options: Namespace) -> tuple[Comparisons, list[dict[str, Any]]]:
    """The decided pairs, and every field of their records."""
    loaded, fields = read_records(options, "preference")
    kept, skipped = decided(loaded.records)
    if not kept:
        raise UserError(f"{options.data}: no record says which answer is better ({len(loaded.records):,} do not)")
    records = [loaded.records[index] for index in kept]
    _, group = np.unique([str(record["prompt"]) for record in records], return_inverse=True)
    places = [loaded.places[index] for index in kept]
    return Comparisons(records, places, group, loaded.report.dropped | skipped), [fields[index] for index in kept]


def measure(
    subject: Subject, comparisons: Comparisons, by: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """A reward model's row: all pairs, and each subset of them."""
    reward = LearnedReward(subject.source, normalisation="none")
    reward.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    delta = score_differences(reward, comparisons)
    cut = reward.num_truncated
    return {
        "model": subject.argument,
        "metrics": _metrics(delta, comparisons.group, seed),
        "by": {
            name: {value: _metrics(delta[rows], comparisons.group[rows], seed) for value, rows in values.items()}
            for name, values in by.items()
        },
        "truncated": cut,
        "notes": [f"{cut:,} answers with their prompts are longer than its context: the start is cut off"] * (cut > 0),
    }


def _metrics(delta: Any, group: Any, seed: int) -> dict[str, Any]:
    _, renumbered = np.unique(group, return_inverse=True)
    metrics = pair_metrics(delta, renumbered, seed=seed)
    content = {name: {**metrics[name].as_dict(), "pairs": len(delta)} for name in METRICS}
    by_chance, p = calibrated_error(delta, seed=seed)
    content["ece"] |= {"if_calibrated": by_chance, "p_calibrated": p}
    return content


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All pairs in the first row of a model, its subsets below."""
    shown = Table()
    for header in ("reward model", "pairs", *METRICS, "calibrated: p"):
        shown.add_column(header, overflow="fold", justify="right" if header == "pairs" else "left")
    for name, row in zip(short_names([row["model"] for row in rows]), rows, strict=True):
        parts = {name: row["metrics"]}
        parts |= {f"  {field} {value}": part for field, by in row["by"].items() for value, part in by.items()}
        for label, metrics in parts.items():
            cells = [f"{metrics['accuracy']['pairs']:,}", *(text(metrics[metric]) for metric in METRICS)]
            shown.add_row(label, *cells, f"{metrics['ece']['p_calibrated']:.4f}")
    return shown
