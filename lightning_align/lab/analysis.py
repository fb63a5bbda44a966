"""From a curve to its result: where gold starts, how it bends, whether it falls, and which checkpoint to keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_align.lab.overopt import (
    FEWEST_POINTS,
    LEVEL,
    SMALLEST_D,
    FormName,
    FormResult,
    Interval,
    Peak,
    analyse_form,
)
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.select import Choice, choose, noise

START_KL = 1e-3  # a point with less KL than this is the start; the RL form is steep there, so it must be small
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


@dataclass(frozen=True)
class Analysis:
    """All that the figure, the page and the JSON say.

    Attributes:
        curve: The measurements.
        form: The form that fits the method; the other is shown beside it.
        forms: Results by form; empty when there are too few points or no gold.
        fitted: Points used in the fit.
        start_gold: R(0) = 0 stands for this gold score; nan when nothing is known of the start.
        start_fitted: Whether it was fitted, because no checkpoint is near KL 0 or because that was asked for.
        misfit: Whether gold at the fitted peak is below the best by more than noise: the form does not fit the run.
        gold_noise: Of one gold score, measured or estimated from the scatter.
        proxy_slope: Of a straight line through the proxy over d; nan without two distances.
        start: Checkpoints at KL 0, if any.
        peak: Checkpoints nearest the claimed peak, else the best; None without gold.
        end: The last checkpoints.
        rise: Gold at the peak minus gold at the start, or at the smallest KL without one. This and the next three are
            None where one of the two is missing or they share a checkpoint.
        change: Gold at the end minus gold at the start, or at the smallest KL without one.
        fall: Gold at the end minus gold at the peak.
        proxy_gain: Proxy at the end minus proxy at the peak.
        choice: The checkpoint to keep.
    """

    curve: Curve
    form: FormName
    forms: dict[FormName, FormResult]
    fitted: tuple[Point, ...]
    start_gold: float
    start_fitted: bool
    misfit: bool
    gold_noise: Noise
    proxy_slope: float
    start: Place | None
    peak: Place | None
    end: Place
    rise: Interval | None
    change: Interval | None
    fall: Interval | None
    proxy_gain: Interval | None
    choice: Choice

    @property
    def result(self) -> FormResult | None:
        """The form that fits the method."""
        return self.forms.get(self.form)

    @property
    def fitted_peak(self) -> Peak | None:
        """The peak of the fit, where it may be claimed: the measured scores must rise to it and come down from it.

        They need not come down by more than noise: that is what :attr:`falls` says.
        """
        comes_down = self.fall is not None and self.fall.estimate < 0
        return _claimable(self.result) if self.rises and comes_down and not self.misfit else None

    @property
    def falls(self) -> bool:
        """Whether gold at the end is below gold at the peak by more than noise."""
        return self.fall is not None and self.fall.high < 0

    @property
    def rises(self) -> bool:
        """Whether gold at the peak is above the start by more than noise."""
        return self.rise is not None and self.rise.low > 0


def analyse(curve: Curve, *, form: FormName = "rl", free_start: bool = False) -> Analysis:
    """Fit, compare the places of the curve, choose.

    Args:
        curve: The measurements.
        form: ``rl`` or ``bon``, whichever the method is.
        free_start: Fit the gold score at the start too, instead of taking the measured one. Done anyway without one.
    """
    gold = [point for point in curve.points if math.isfinite(point.gold)]
    places = _Places(curve.points)
    start_points = _start(gold or curve.points)
    origin = [] if free_start else start_points
    usable = tuple(point for point in gold if point.d >= SMALLEST_D)
    enough = len(usable) >= FEWEST_POINTS + (not origin) and len({point.d for point in usable}) > 2
    forms = _fit_both(usable, origin, places.gold_noise.se) if enough else {}
    start, end = places.at(start_points) if start_points else None, places.end()
    first = start if start is not None else places.first()
    fitted_start = forms[form].fit.intercept if forms and not origin else math.nan
    peak, looks, misfit = _peak(places, forms.get(form), start_points) if gold else (None, 1, False)
    return Analysis(
        curve=curve,
        form=form,
        forms=forms,
        fitted=usable if enough else (),
        start_gold=start.gold if start is not None and math.isnan(fitted_start) else fitted_start,
        start_fitted=not math.isnan(fitted_start),
        misfit=misfit,
        gold_noise=places.gold_noise,
        proxy_slope=_slope(curve.points),
        start=start,
        peak=peak,
        end=end,
        rise=places.gold_change(first, peak, looks),
        change=places.gold_change(first, end) if gold else None,
        fall=places.gold_change(peak, end, looks),
        proxy_gain=places.proxy_change(peak, end),
        choice=choose(curve),
    )


def _start(points: Sequence[Point]) -> list[Point]:
    """Points that stand for KL 0: those that have hardly moved, else the first if its estimate is not positive."""
    near = [point for point in points if abs(point.kl) < START_KL]
    first = min(points, key=lambda point: point.step)
    return near or ([first] if first.kl <= 0 else [])


def _fit_both(usable: Sequence[Point], origin: Sequence[Point], gold_noise: float) -> dict[FormName, FormResult]:
    """Both forms on the same points, so that their errors compare; without an ``origin`` the start is fitted."""
    d = np.array([point.d for point in usable])
    base = float(np.mean([point.gold for point in origin])) if origin else 0.0
    errors = np.array([point.gold_se for point in usable])
    weights = 1 / errors**2 if np.isfinite(errors).all() and (errors > 0).all() else None
    start_se = gold_noise / math.sqrt(len(origin)) if origin else 0.0
    reward = np.array([point.gold for point in usable]) - base
    names: tuple[FormName, ...] = ("rl", "bon")
    return {
        name: analyse_form(d, reward, name, weights=weights, free_intercept=not origin, start_se=start_se)
        for name in names
    }


def _claimable(result: FormResult | None) -> Peak | None:
    return result.peak if result is not None and result.status == "in range" else None


class _Places:
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


def _peak(places: _Places, result: FormResult | None, start: Sequence[Point]) -> tuple[Place, int, bool]:
    """Where the fit has its peak, unless gold is clearly better elsewhere; else the best place.

    The start is no part of a fitted peak, however near: the rise is measured from it.

    Returns:
        The place, from how many it was picked, and whether fit and measurement disagree.
    """
    best, looks = places.best()
    claimed = _claimable(result)
    if claimed is None:
        return best, looks, False
    nearest = places.nearest(claimed.d.estimate, start)
    better = places.gold_change(nearest, best, looks)
    misfit = better is not None and better.low > 0
    return (best, looks, True) if misfit else (nearest, 1, False)


def _noise(points: Sequence[Point], values: Sequence[float], known: Sequence[float]) -> Noise:
    """Root mean square of the standard errors that were measured, else an estimate from the scatter."""
    finite = [se for se in known if math.isfinite(se)]
    if finite:
        return Noise(float(np.sqrt(np.mean(np.square(finite)))), math.inf)
    # overlapping differences of neighbours hold about half as much as independent ones
    return Noise(noise(points, values), max(1.0, (len(points) - 2) / 2))


def _slope(points: Sequence[Point]) -> float:
    """Least squares line through the proxy over d."""
    pairs = [(p.d, p.proxy) for p in points if math.isfinite(p.d) and math.isfinite(p.proxy)]
    if len({d for d, _ in pairs}) < 2:
        return math.nan
    d, proxy = np.array(pairs).T
    return float(stats.linregress(d, proxy).slope)
