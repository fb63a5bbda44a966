"""Methods side by side: true score over KL and over the samples that it took, of several runs of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.figures import distance
from lightning_align.lab.grid import cell_of
from lightning_align.lab.measured import check_alike, read_measured
from lightning_align.lab.overopt import Array
from lightning_align.lab.pareto import pareto
from lightning_align.lab.runs import Point, load_curve, read_episodes

Z = 1.96  # of a 95 % interval
TOLERANCE = 1e-3  # in √KL: rounding leaves the start a little above 0
SEEDS = 3  # runs of a method from which on an interval is one over runs
MOST_METHODS = 10  # in one picture
BEST_OF_N = "best-of-n"
SCORES = {"gold": "true score (gold)", "heldout": "held-out judge", "win_rate": "win rate", "proxy": "reward (proxy)"}


@dataclass(frozen=True)
class Track:
    """One run.

    Attributes:
        method: Name of its folder; runs of one name are seeds of one method.
        run: Its path.
        points: Checkpoints with the score that methods are compared by, in the order of steps.
        samples: Answers that the policy had given at each of them; NaN where it is not known.
        score: Field of a point that methods are compared by.
        source: Where the points come from, as :func:`~lightning_align.lab.runs.load_curve` calls it.
        settings: How they were measured, if they were afterwards.
        answers: Rows with ``step``, ``prompt``, ``completion`` and scores.
        prompts: The score of every prompt by step, where checkpoints were measured one like the other.
    """

    method: str
    run: Path
    points: Sequence[Point]
    samples: Sequence[float]
    score: str = "gold"
    source: str = "plain"
    settings: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    prompts: Mapping[int, Sequence[float]] = field(default_factory=dict)

    @property
    def start(self) -> Point:
        """The first checkpoint."""
        return self.points[0]

    @property
    def top(self) -> Point:
        """The checkpoint with the highest score; of equals the nearest."""
        return max(self.points, key=lambda point: (self.value(point), -distance(point)))

    def value(self, point: Point) -> float:
        """The score that methods are compared by."""
        return float(getattr(point, self.score))

    def error(self, point: Point) -> float:
        """Its standard error over prompts."""
        return float(getattr(point, f"{self.score}_se"))

    def shares(self, place: Callable[["Track"], Sequence[float]], where: float, score: str | None = None) -> Array:
        """What each point counts ``[n]`` in the score where ``place`` is ``where``; NaN where the run did not go."""
        places = np.array(place(self), dtype=np.float64)
        values = np.array([getattr(point, score or self.score) for point in self.points], dtype=np.float64)
        order = np.argsort(places, kind="stable")
        kept = order[np.isfinite(places[order]) & np.isfinite(values[order])]
        x = places[kept]
        if not len(x) or not x[0] - TOLERANCE <= where <= x[-1] + TOLERANCE:
            return np.full(len(places), math.nan)
        shares = np.zeros(len(places))
        shares[kept] = [np.interp(where, x, column) for column in np.eye(len(x))]
        return shares

    def at(self, place: Callable[["Track"], Sequence[float]], where: float, score: str | None = None) -> float:
        """Score where ``place`` of the points is ``where``, between neighbours; NaN where the run did not go."""
        shares = self.shares(place, where, score)
        used = [(share, getattr(point, score or self.score)) for share, point in zip(shares, self.points, strict=True)]
        return float(sum(share * value for share, value in used if share != 0))

    def gain_error(self, shares: Array) -> float:
        """Standard error of the gain of a mixture of points over the start.

        0 at the start itself. Over paired prompts where their values are known, else as if both were measured on
        prompts of their own.
        """
        used = [(share, point) for share, point in zip(shares, self.points, strict=True) if share != 0]
        if all(point is self.start for _, point in used):
            return 0.0
        if not all(point.step in self.prompts for point in (self.start, *(point for _, point in used))):
            nearest = max(used, key=lambda pair: float(pair[0]))[1]
            return math.hypot(self.error(self.start), self.error(nearest))
        mixed = sum(share * np.array(self.prompts[point.step]) for share, point in used)
        gains = mixed - np.array(self.prompts[self.start.step])
        return student(gains[np.isfinite(gains)]).se


def roots(track: Track) -> list[float]:
    """√KL of the points."""
    return [distance(point) for point in track.points]


def samples(track: Track) -> Sequence[float]:
    """Answers given so far."""
    return track.samples


# ---------------------------------------------------------------------------------------------------------- reading
def load_tracks(
    runs: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    source: str = "auto",
    best_of: Sequence[Path] = (),
) -> list[Track]:
    """Read runs and CSVs, to be compared by gold, or where none has it by another of :data:`SCORES`.

    Args:
        runs: Run directories and CSVs.
        columns: Of the CSVs, see :func:`~lightning_align.lab.runs.load_curve`.
        source: Of the run directories, in the same words.
        best_of: CSVs of best-of-n, with n in the place of the step.

    Raises:
        UserError: A run has no score that the others have, is given twice or was measured in another way, or there are
            more methods than can be told apart.
    """
    curves, places = [], [run.resolve() for run in runs]
    for number, run in enumerate([*runs, *best_of]):
        if run.resolve() in places[:number]:
            raise UserError(f"{run} is given twice: a run is one seed, give it once")
        options: dict[str, Any] = {"source": source} if run.is_dir() else {"columns": columns if run in runs else None}
        curves.append((run, load_curve(run, **options)))
    score = _common_score([curve.points for _, curve in curves[: len(runs)]])
    tracks = []
    for run, curve in curves:
        points = [point for point in curve.points if math.isfinite(getattr(point, score))]
        if not points:
            raise UserError(_no_score(run, score))
        episodes = read_episodes(run)
        measured = read_measured(run) if curve.source == "measured" else []
        answers = [{"step": row["step"], **answer} for row in measured for answer in row["answers"]]
        track = Track(
            BEST_OF_N if run in best_of else _method(run),
            run,
            points,
            [episodes.get(point.step, math.nan) for point in points],
            score,
            curve.source,
            measured[-1]["settings"] if measured else {},
            answers or curve.samples,
            {row["step"]: _numbers(row["per_prompt"][score]) for row in measured if score in row["per_prompt"]},
        )
        tracks.append(track)
    names = {track.method for track in tracks}
    if len(names) > MOST_METHODS:
        raise UserError(f"{len(names)} methods in one picture: give at most {MOST_METHODS}")
    _check_measured([track for track in tracks if track.run.is_dir()])
    return tracks


def _numbers(row: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in row]


def _method(run: Path) -> str:
    """Stage and labels of a run of a sweep, without the seed's; else the name of the folder."""
    cell = cell_of(run) if run.is_dir() else None
    return run.resolve().name if cell is None else cell.method


def _common_score(curves: Sequence[Sequence[Point]]) -> str:
    """Gold if a run has it, else the next of :data:`SCORES` that one has."""
    for score in SCORES:
        if any(math.isfinite(getattr(point, score)) for points in curves for point in points):
            return score
    raise AssertionError("a curve has a score")


def _no_score(run: Path, score: str) -> str:
    if score != "gold":
        return f"{run} has no {SCORES[score]}, which the others are compared by: give it one, or leave it out"
    return (
        f"{run} has no gold score: give runs with model.gold, measure it (--recompute --gold), or of a CSV name the "
        "column (--columns gold=NAME)"
    )


def _check_measured(tracks: Sequence[Track]) -> None:
    measured = {str(track.run): track.settings for track in tracks if track.source == "measured"}
    rest = [str(track.run) for track in tracks if track.source != "measured"]
    if measured and rest:
        raise UserError(
            f"{next(iter(measured))} was measured afterwards and {rest[0]} was not: give --recompute to measure all, "
            "or --source eval to take the evaluations in training of all"
        )
    check_alike(measured)


# ---------------------------------------------------------------------------------------------------------- comparing
def by_method(tracks: Sequence[Track]) -> dict[str, list[Track]]:
    """Runs of one name together, in the order in which they were given."""
    groups: dict[str, list[Track]] = {}
    for track in tracks:
        groups.setdefault(track.method, []).append(track)
    return groups


def common_kl(tracks: Sequence[Track]) -> float:
    """The largest KL that every run reaches, those of a single point left out."""
    ends = [max(roots(track)) for track in tracks if len(track.points) > 1]
    return min(ends, default=0.0) ** 2


def gain(tracks: Sequence[Track], place: Callable[[Track], Sequence[float]], where: float) -> Estimate:
    """Mean gain of the score over the start, of runs that came that far; see :func:`over_runs` for its interval."""
    reached = [track for track in tracks if math.isfinite(track.at(place, where)) and len(track.points) > 1]
    return over_runs(
        [track.at(place, where) - track.value(track.start) for track in reached],
        [track.gain_error(track.shares(place, where)) for track in reached],
    )


def over_runs(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    """Mean of runs with Student's interval over them; of fewer than :data:`SEEDS` the interval is over prompts.

    The latter says nothing of other seeds.
    """
    if len(values) >= SEEDS or not values:
        return student(np.array(values))
    value = float(np.mean(values))
    se = math.hypot(*errors) / len(values)
    return Estimate(value, value - Z * se, value + Z * se, len(values), se)


def best(tracks: Sequence[Track]) -> dict[str, Any]:
    """The highest score of each run on average, where it was, and the gain; the highest of many is flattered."""
    tops = [(track, track.top) for track in tracks]
    errors = [track.gain_error(np.array([point is top for point in track.points], dtype=float)) for track, top in tops]
    drawn = [t.samples[list(t.points).index(top)] for t, top in tops]
    row: dict[str, Any] = {
        tracks[0].score: float(np.mean([track.value(top) for track, top in tops])),
        "kl": float(np.mean([top.kl for _, top in tops])),
        "steps": [top.step for _, top in tops],
        "samples": float(np.mean(drawn)),
        "gain": over_runs(
            [t.value(top) - t.value(t.start) for t, top in tops if len(t.points) > 1],
            [error for error, (t, _) in zip(errors, tops, strict=True) if len(t.points) > 1],
        ).as_dict(),
    }
    for name in ("win_rate", "heldout"):
        values = [getattr(top, name) for _, top in tops]
        if all(map(math.isfinite, values)):
            row[f"{name}_there"] = over_runs(values, [getattr(top, f"{name}_se") for _, top in tops]).as_dict()
    return row


def front(tracks: Sequence[Track]) -> list[tuple[Track, Point]]:
    """The points of all runs that no other beats, by KL."""
    every = [(track, point) for track in tracks for point in track.points]
    kept = pareto([distance(point) for _, point in every], [track.value(point) for track, point in every])
    chosen = [pair for pair, keep in zip(every, kept, strict=True) if keep]
    return sorted(chosen, key=lambda pair: distance(pair[1]))


def summarise(tracks: Sequence[Track], kl: float, budget: float | None) -> dict[str, Any]:
    """Every method's gain at a KL, at a number of samples where one is given, and at its best; and the front."""
    rows = {}
    for method, own in by_method(tracks).items():
        row: dict[str, Any] = {
            "runs": len(own),
            "start": float(np.mean([track.value(track.start) for track in own])),
            "farthest_kl": float(np.mean([max(point.kl for point in track.points) for track in own])),
        }
        row["at_kl"] = gain(own, roots, math.sqrt(kl)).as_dict()
        if budget is not None:
            row["at_samples"] = gain(own, samples, budget).as_dict()
        row["best"] = best(own)
        rows[method] = row
    beyond = [
        {"method": t.method, "run": str(t.run), "step": p.step, "kl": p.kl, t.score: t.value(p)}
        for t, p in front(tracks)
    ]
    return {"score": tracks[0].score, "kl": kl, "samples": budget, "methods": rows, "pareto": beyond}
