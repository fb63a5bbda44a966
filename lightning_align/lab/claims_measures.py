"""What is measured of a finished run as one number: a metric, or a place on its curve of gold over KL or samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.errors import UserError
from lightning_align.feedback.fields import fault, mapping
from lightning_align.lab.frontier import load_tracks
from lightning_align.lab.frontier_tracks import Track, roots, samples, shared_gain_error
from lightning_align.lab.runs import Table
from lightning_align.run.directory import METRICS_FILE

# kinds with a number, what it is, and how the measure reads
PLACES = {
    "gold_at_kl": "true score at KL {place:g}",
    "gold_at_samples": "true score after {place:,.0f} samples",
    "kl_to_gold": "KL at which the true score first reaches {place:g}",
    "samples_to_gold": "samples after which the true score first reaches {place:g}",
}
GAIN = "gold_gain"
WHOLE = {
    "best_gold": "highest true score",
    "last_gold": "true score at the end",
    GAIN: "true score at the end minus at the start",
}
CHANGE = "gold_change"  # with two KLs: from the one to the other, fixed beforehand, so that chance can raise it too
TAKES = {"last": -1, "first": 0}
REDUCERS: dict[str, Callable[..., Any]] = {"max": np.max, "min": np.min, "mean": np.mean, "std": np.std}


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        kind: ``metric``, :data:`CHANGE`, or one of :data:`PLACES` and :data:`WHOLE`.
        name: Column of ``metrics.csv``, for ``metric``.
        take: Which of its values: ``last``, ``first``, ``max``, ``min``, ``mean`` or ``std``.
        place: KL, samples or score, for :data:`PLACES`; the first KL of a change.
        until: The second.
    """

    kind: str
    name: str = ""
    take: str = "last"
    place: float = math.nan
    until: float = math.nan

    @property
    def described(self) -> str:
        """In words."""
        if self.kind == "metric":
            return self.name if self.take == "last" else f"{self.take} {self.name}"
        if self.kind == CHANGE:
            return f"true score at KL {self.until:g} minus that at KL {self.place:g}"
        return WHOLE[self.kind] if self.kind in WHOLE else PLACES[self.kind].format(place=self.place)


def read_measure(source: str, place: str, value: Any) -> Measure:
    """``best_gold``, ``{gold_at_kl: 1.0}``, or ``{metric: eval/accuracy, take: last}`` of a YAML file."""
    if isinstance(value, str) and value in WHOLE:
        return Measure(value)
    forms = [*WHOLE, *(f"{{{name}: NUMBER}}" for name in PLACES), f"{{{CHANGE}: [KL, KL]}}", "{metric: NAME}"]
    known = ", ".join(forms)
    if not isinstance(value, dict):
        raise fault(source, place, f"is {value!r}: give one of {known}")
    if "metric" in value:
        given = mapping(source, place, value, ("metric", "take"))
        take = given.get("take", "last")
        if not isinstance(given["metric"], str) or take not in (*TAKES, *REDUCERS):
            raise fault(source, place, f"needs a column of {METRICS_FILE} and one of {', '.join([*TAKES, *REDUCERS])}")
        return Measure("metric", name=given["metric"], take=take)
    if CHANGE in value:
        ends = mapping(source, place, value, (CHANGE,))[CHANGE]
        if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)):
            raise fault(source, f"{place}.{CHANGE}", f"is {ends!r}: give two KLs")
        return Measure(CHANGE, place=float(ends[0]), until=float(ends[1]))
    given = mapping(source, place, value, tuple(PLACES))
    if len(given) != 1:
        raise fault(source, place, f"is {value!r}: give one of {known}")
    ((kind, where),) = given.items()
    if not _is_number(where):
        raise fault(source, f"{place}.{kind}", f"is {where!r}: give a number")
    return Measure(kind, place=float(where))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def measure(run: Path, wanted: Measure) -> float:
    """The number; NaN where the run did not come that far or did not measure it.

    Raises:
        UserError: It has no such column, or no curve at all.
    """
    if wanted.kind == "metric":
        return _metric(run, wanted)
    (track,) = load_tracks([run])
    if track.score != "gold":
        raise UserError(f"{run} has no true score for '{wanted.described}': give the runs model.gold, or measure it")
    gold = np.array([point.gold for point in track.points])
    if wanted.kind in WHOLE:
        return float(
            {
                "best_gold": gold.max(),
                "last_gold": gold[-1],
                GAIN: gold[-1] - gold[0],
            }[wanted.kind]
        )
    if wanted.kind in ("gold_at_kl", CHANGE):
        first, second = (track.at(roots, math.sqrt(max(kl, 0.0))) for kl in (wanted.place, wanted.until))
        return second - first if wanted.kind == CHANGE else first
    if wanted.kind == "gold_at_samples":
        return track.at(samples, wanted.place)
    return _first(track, gold, wanted)


def shared_error_of_gains(runs: Sequence[Path]) -> float:
    """Standard error that the runs' gains from start to end have in common, see :func:`~.shared_gain_error`."""
    tracks = [track for run in runs for track in load_tracks([run])]
    return shared_gain_error([(track, np.eye(len(track.points))[-1]) for track in tracks])


def _first(track: Track, gold: Any, wanted: Measure) -> float:
    """Where gold first reaches a level, along training, between neighbours."""
    places = np.array(
        [point.kl for point in track.points] if wanted.kind == "kl_to_gold" else track.samples, dtype=np.float64
    )
    above = np.flatnonzero(gold >= wanted.place)
    if not len(above):
        return math.nan
    index = int(above[0])
    if index == 0:
        return float(places[0])
    share = (wanted.place - gold[index - 1]) / (gold[index] - gold[index - 1])
    return float(places[index - 1] + share * (places[index] - places[index - 1]))


def _metric(run: Path, wanted: Measure) -> float:
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run} has no {METRICS_FILE}: has it been trained?")
    table = Table.read(path)
    if wanted.name not in table.header:
        raise UserError(f"{path} has no column '{wanted.name}' (it has {table})")
    cells = np.array([table.number(index, wanted.name) for index in range(len(table.rows))])
    values = cells[np.isfinite(cells)]
    if not len(values):
        return math.nan
    return float(values[TAKES[wanted.take]] if wanted.take in TAKES else REDUCERS[wanted.take](values))
