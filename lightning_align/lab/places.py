"""Means over neighbouring checkpoints of a curve, and their differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_align.lab.overopt import LEVEL, Interval
from lightning_align.lab.runs import Point

WINDOW = 3  # checkpoints that are averaged where two places of the curve are compared


@dataclass(frozen=True)
class Noise:
    """Standard error of one score, and what it rests on.

    Attributes:
        se: The standard error.
        freedom: Degrees of freedom of its estimate; infinite when it was measured.
    """

    se: float
    freedom: float

    def around(self, score: float) -> Interval:
        """95 % interval of one score; without bounds where its error is not known."""
        reach = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.se or math.inf
        return Interval(score, score - reach, score + reach)

    def difference(self, after: float, count: int, before: float, count_before: int, looks: int = 1) -> Interval:
        """95 % interval of one mean minus another, of ``count`` and ``count_before`` scores.

        ``looks`` is from how many places one of them was picked as the best: the best of many stands above the others
        by chance alone (Bonferroni).
        """
        critical = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / looks, self.freedom))
        estimate, reach = after - before, critical * self.se * math.sqrt(1 / count + 1 / count_before)
        return Interval(estimate, estimate - reach, estimate + reach)


@dataclass(frozen=True)
class Place:
    """Mean scores of a few neighbouring checkpoints."""

    points: tuple[Point, ...]
    kl: float
    gold: float
    proxy: float


class Places:
    """Means over a few neighbouring checkpoints, and their differences."""

    def __init__(self, points: Sequence[Point]) -> None:
        golds = [p for p in points if math.isfinite(p.gold)]
        proxies = [p for p in points if math.isfinite(p.proxy)]
        self.gold_noise = _noise(golds, [p.gold for p in golds], [p.gold_se for p in golds])
        self.proxy_noise = _noise(proxies, [p.proxy for p in proxies], [p.proxy_se for p in proxies])
        self.points = golds or proxies
        self.width = max(1, min(WINDOW, len(self.points) // 4))

    def at(self, points: Sequence[Point]) -> Place:
        kl, gold, proxy = (float(np.mean([getattr(p, key) for p in points])) for key in ("kl", "gold", "proxy"))
        return Place(tuple(points), kl, gold, proxy)

    def first(self) -> Place:
        """Those with the smallest KL."""
        return self.at(sorted(self.points, key=lambda p: (p.kl, p.step))[: self.width])

    def end(self) -> Place:
        """The last by training step."""
        return self.at(sorted(self.points, key=lambda p: p.step)[-self.width :])

    def nearest(self, d: float, without: Sequence[Point]) -> Place:
        """Those nearest to a distance, some left out if others remain."""
        finite = [p for p in self.points if math.isfinite(p.d)]
        valid = [p for p in finite if p not in without] or finite
        return self.at(sorted(valid, key=lambda p: (abs(p.d - d), p.d, p.step))[: self.width])

    def best(self) -> tuple[Place, int]:
        """The best neighbours along the KL axis, and how many there were to choose from."""
        ordered = sorted(self.points, key=lambda p: (p.kl, p.step))
        windows = [self.at(ordered[i : i + self.width]) for i in range(len(ordered) - self.width + 1)]
        return max(windows, key=lambda window: window.gold), len(windows)

    def gold_change(self, before: Place | None, after: Place | None, looks: int = 1) -> Interval | None:
        """Gold there minus gold here; None when one is missing or they share a checkpoint."""
        if before is None or after is None or set(before.points) & set(after.points):
            return None
        return self.gold_noise.difference(after.gold, len(after.points), before.gold, len(before.points), looks)

    def proxy_change(self, before: Place | None, after: Place | None) -> Interval | None:
        """The same for the proxy; None too when it was not measured there."""
        if before is None or after is None or set(before.points) & set(after.points):
            return None
        if math.isnan(before.proxy) or math.isnan(after.proxy):
            return None
        return self.proxy_noise.difference(after.proxy, len(after.points), before.proxy, len(before.points))


def noise(points: Sequence[Point], values: Sequence[float]) -> float:
    """Standard error of one value from how it scatters about its neighbours on the curve; 0 below three points.

    Each inner value is compared with the straight line between its neighbours over d (Gasser, Sroka & Jennen-Steinmetz,
    1986). A bend of the curve counts as noise, so that few points give an estimate on the high side.
    """
    position = np.array([math.copysign(math.sqrt(abs(p.kl)), p.kl) for p in points])
    order = np.lexsort((np.array([p.step for p in points]), position))
    x, y = position[order], np.asarray(values, dtype=np.float64)[order]
    if len(x) < 3:
        return 0.0
    gap = x[2:] - x[:-2]
    left = np.where(gap > 0, (x[2:] - x[1:-1]) / np.where(gap > 0, gap, 1.0), 0.5)
    residual = left * y[:-2] + (1 - left) * y[2:] - y[1:-1]
    return float(np.sqrt(np.mean(residual**2 / (left**2 + (1 - left) ** 2 + 1))))


def scattered(points: Sequence[Point], values: Sequence[float]) -> Noise:
    """:func:`noise`; overlapping differences of neighbours hold about half as much as independent ones."""
    return Noise(noise(points, values), max(1.0, (len(points) - 2) / 2))


def _noise(points: Sequence[Point], values: Sequence[float], known: Sequence[float]) -> Noise:
    """Root mean square of the standard errors that were measured, else an estimate from the scatter."""
    finite = [se for se in known if math.isfinite(se)]
    if finite:
        return Noise(float(np.sqrt(np.mean(np.square(finite)))), math.inf)
    return scattered(points, values)


def collapse(points: Sequence[Point], start: float) -> float | None:
    """KL beyond the best place at which gold is back at ``start``, between neighbouring means over d.

    None where gold never rose above the start, or did not come back to it. All points have gold and a distance.
    """
    if not points or math.isnan(start):
        return None
    ordered = sorted(points, key=lambda p: (p.d, p.step))
    width = max(1, min(WINDOW, len(ordered) // 4))
    windows = np.lib.stride_tricks.sliding_window_view
    d = windows(np.array([p.d for p in ordered]), width).mean(axis=1)
    gain = windows(np.array([p.gold for p in ordered]), width).mean(axis=1) - start
    best = int(np.argmax(gain))
    below = np.flatnonzero(gain[best:] <= 0)
    if gain[best] <= 0 or not len(below):
        return None
    after = best + int(below[0])
    before = after - 1
    crossing = d[before] + (d[after] - d[before]) * gain[before] / (gain[before] - gain[after])
    return float(crossing**2)
