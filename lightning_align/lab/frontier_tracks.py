"""A run as a track: its score at any place along training, and its gain over the start, of several runs together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_align.lab.evaluation.intervals import Estimate, over_runs, shared_error, student
from lightning_align.lab.figures import distance
from lightning_align.lab.overopt import Array
from lightning_align.lab.runs import Point

TOLERANCE = 1e-3  # in √KL: rounding leaves the start a little above 0


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
        prompts: By score and step what each prompt has, where checkpoints were measured one like the other.
    """

    method: str
    run: Path
    points: Sequence[Point]
    samples: Sequence[float]
    score: str = "gold"
    source: str = "plain"
    settings: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    prompts: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)

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
        return self.mixed(self.shares(place, where, score), score)

    def mixed(self, shares: Array, score: str | None = None) -> float:
        """Score of a mixture of points."""
        used = [(share, getattr(point, score or self.score)) for share, point in zip(shares, self.points, strict=True)]
        return float(sum(share * value for share, value in used if share != 0))

    def by_prompt(self, shares: Array, score: str | None = None) -> Array | None:
        """The score of a mixture of points, prompt by prompt ``[P]``; None where that is not known."""
        known = self.prompts.get(score or self.score, {})
        used = [(share, point.step) for share, point in zip(shares, self.points, strict=True) if share != 0]
        if not all(step in known for _, step in used):
            return None
        return np.asarray(sum(share * np.array(known[step], dtype=np.float64) for share, step in used))

    def gains(self, shares: Array) -> Array | None:
        """Gain of a mixture of points over the start, prompt by prompt ``[P]``; None where that is not known."""
        mixed, start = self.by_prompt(shares), self.by_prompt(np.eye(len(shares))[0])
        return None if mixed is None or start is None else mixed - start

    def gain_error(self, shares: Array) -> float:
        """Standard error of the gain of a mixture of points over the start.

        0 at the start itself. Over paired prompts where their values are known, else as if both were measured on
        prompts of their own.
        """
        used = [(share, point) for share, point in zip(shares, self.points, strict=True) if share != 0]
        if all(point is self.start for _, point in used):
            return 0.0
        gains = self.gains(shares)
        if gains is None:
            nearest = max(used, key=lambda pair: float(pair[0]))[1]
            return math.hypot(self.error(self.start), self.error(nearest))
        return student(gains[np.isfinite(gains)]).se


def roots(track: Track) -> list[float]:
    """√KL of the points."""
    return [distance(point) for point in track.points]


def samples(track: Track) -> Sequence[float]:
    """Answers given so far."""
    return track.samples


# -------------------------------------------------------------------------------------------------------- runs together
def mean_gain(mixtures: Sequence[tuple[Track, Array]]) -> Estimate:
    """Mean gain over the start of runs, each at a mixture of its points, with the interval of :func:`over_runs`.

    An interval over runs holds the error that all of them share too, see :func:`shared_gain_error`.
    """
    return over_runs(
        [track.mixed(shares) - track.value(track.start) for track, shares in mixtures],
        [track.gain_error(shares) for track, shares in mixtures],
        _gains_together(mixtures),
        shared=shared_gain_error(mixtures),
    )


def shared_gain_error(mixtures: Sequence[tuple[Track, Array]]) -> float:
    """Standard error that the gains of runs over the start have in common.

    Where their prompts are known it is that of the start's answers and of the prompts; else that of the start, where
    all have the very same, measured once. 0 where nothing is known to be shared.
    """
    by_prompt = _gains_together(mixtures)
    if by_prompt is not None:
        return shared_error(by_prompt)
    starts = {(track.value(track.start), track.error(track.start)) for track, _ in mixtures}
    if len(starts) != 1:
        return 0.0
    ((_, error),) = starts
    moved = float(np.mean([1 - shares[0] for _, shares in mixtures]))  # nothing at the start itself
    return moved * error if math.isfinite(error) else 0.0


def _gains_together(mixtures: Sequence[tuple[Track, Array]]) -> Array | None:
    return together([track.gains(shares) for track, shares in mixtures], [track for track, _ in mixtures])


def together(rows: Sequence[Array | None], tracks: Sequence[Track]) -> Array | None:
    """What runs have of each prompt ``[R, P]``; None where it is not known, or the prompts are not the same."""
    known = [row for row in rows if row is not None]
    prompts = {(len(row), track.settings.get("prompts_hash")) for row, track in zip(known, tracks, strict=False)}
    return np.stack(known) if len(known) == len(rows) and len(prompts) == 1 else None
