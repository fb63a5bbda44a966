"""Methods side by side: true score over KL and over the samples that it took, of several runs of each."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, over_runs
from lightning_align.lab.figures import distance
from lightning_align.lab.frontier_tracks import Track, mean_gain, roots, samples, together
from lightning_align.lab.grid import cell_of
from lightning_align.lab.measured import check_alike, read_measured
from lightning_align.lab.pareto import pareto
from lightning_align.lab.runs import Point, load_curve, read_episodes

MOST_METHODS = 10  # in one picture
BEST_OF_N = "best-of-n"
BEST_OF_FILE = re.compile(r"best_of(_\d+)?\.csv")  # as lab frontier --best-of names them
SCORES = {"gold": "true score (gold)", "heldout": "held-out judge", "win_rate": "win rate", "proxy": "reward (proxy)"}


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
            {
                name: {row["step"]: _numbers(row["per_prompt"][name]) for row in measured if name in row["per_prompt"]}
                for name in SCORES
            },
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
    """Stage and labels of a run of a sweep, without the seed's; else the name of the folder or the file.

    Files of best-of-n, one for each start and reward, are seeds of one.
    """
    if BEST_OF_FILE.fullmatch(run.name) and run.is_file():
        return BEST_OF_N
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
            "or --source eval to take the evaluations in training (DPO has none)"
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
    """Mean gain of the score over the start, of runs that came that far; see :func:`mean_gain` for its interval."""
    reached = [track for track in tracks if math.isfinite(track.at(place, where)) and len(track.points) > 1]
    return mean_gain([(track, track.shares(place, where)) for track in reached])


def best(tracks: Sequence[Track]) -> dict[str, Any]:
    """The highest score of each run on average, where it was, and the gain; the highest of many is flattered."""
    tops = [(track, track.top) for track in tracks]
    shares = [np.array([point is top for point in track.points], dtype=np.float64) for track, top in tops]
    drawn = [t.samples[list(t.points).index(top)] for t, top in tops]
    row: dict[str, Any] = {
        tracks[0].score: float(np.mean([track.value(top) for track, top in tops])),
        "kl": float(np.mean([top.kl for _, top in tops])),
        "steps": [top.step for _, top in tops],
        "samples": float(np.mean(drawn)),
        "gain": mean_gain([(t, own) for t, own in zip(tracks, shares, strict=True) if len(t.points) > 1]).as_dict(),
    }
    for name in ("win_rate", "heldout"):
        values = [getattr(top, name) for _, top in tops]
        if all(map(math.isfinite, values)):
            errors = [getattr(top, f"{name}_se") for _, top in tops]
            by_prompt = together([t.by_prompt(own, name) for t, own in zip(tracks, shares, strict=True)], tracks)
            row[f"{name}_there"] = over_runs(values, errors, by_prompt).as_dict()
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
