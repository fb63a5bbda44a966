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
    analyse_form,
)
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.select import Choice, choose, noise

START_KL = SMALLEST_D**2  # a point with less KL than this is the start
Z = float(stats.norm.ppf((1 + LEVEL) / 2))
WINDOW = 3  # checkpoints that are averaged where two places of the curve are compared


@dataclass(frozen=True)
class Place:
    """Mean scores of a few neighbouring checkpoints; standard errors beside them."""

    points: tuple[Point, ...]
    kl: float
    gold: float
    gold_se: float
    proxy: float
    proxy_se: float


@dataclass(frozen=True)
class Analysis:
    """All that the figure, the page and the JSON say.

    Attributes:
        curve: The measurements.
        form: The form that fits the method; the other is shown beside it.
        forms: Results by form; empty when there are too few points or no gold.
        start_gold: R(0) = 0 stands for this gold score; nan without gold or when nothing is known of the start.
        start_fitted: Whether it was fitted, because no checkpoint is near KL 0.
        fitted: Points used in the fit.
        gold_noise: Standard error of one gold score, measured or estimated from the scatter.
        start: Checkpoints at KL 0; so are ``peak`` (nearest the fitted or else the best place) and ``end``.
        rise: Gold at the end minus gold at the start; None without a start.
        fall: Gold at the end minus gold at the peak; None when the peak is the end.
        proxy_gain: Proxy at the end minus proxy at the peak.
        choice: The checkpoint to keep.
    """

    curve: Curve
    form: FormName
    forms: dict[FormName, FormResult]
    start_gold: float
    start_fitted: bool
    fitted: tuple[Point, ...]
    gold_noise: float
    start: Place | None
    peak: Place | None
    end: Place
    rise: Interval | None
    fall: Interval | None
    proxy_gain: Interval | None
    choice: Choice

    @property
    def result(self) -> FormResult | None:
        """The form that fits the method."""
        return self.forms.get(self.form)

    @property
    def peak_in_range(self) -> bool:
        """Whether a fitted peak may be shown."""
        return self.result is not None and self.result.status == "in range"

    @property
    def falls(self) -> bool:
        """Whether gold at the end is below gold at the peak by more than noise."""
        return self.fall is not None and self.fall.high < 0


def analyse(curve: Curve, *, form: FormName = "rl") -> Analysis:
    """Fit, compare the places of the curve, choose."""
    gold = [point for point in curve.points if math.isfinite(point.gold)]
    gold_noise = _typical_se(gold, [p.gold_se for p in gold], [p.gold for p in gold])
    start_points = _start(gold or curve.points)
    usable = tuple(point for point in gold if point.d >= SMALLEST_D)
    enough = len(usable) >= FEWEST_POINTS + (not start_points) and len({p.d for p in usable}) > 2
    forms = _fit_both(usable, start_points, gold_noise) if enough else {}
    start_gold = math.nan
    if gold and start_points:
        start_gold = float(np.mean([p.gold for p in start_points]))
    elif forms:
        start_gold = forms[form].fit.intercept
    places = _Places(curve.points, gold_noise)
    start, end = places.at(start_points) if start_points else None, places.end()
    peak, critical = _peak(places, forms.get(form)) if gold else (None, Z)
    apart = peak is not None and not set(peak.points) & set(end.points)
    return Analysis(
        curve=curve,
        form=form,
        forms=forms,
        start_gold=start_gold,
        start_fitted=bool(forms) and not start_points,
        fitted=usable if enough else (),
        gold_noise=gold_noise,
        start=start,
        peak=peak,
        end=end,
        rise=_gold_change(start, end, Z) if start is not None else None,
        fall=_gold_change(peak, end, critical) if peak is not None and apart else None,
        proxy_gain=_proxy_change(peak, end) if peak is not None and apart else None,
        choice=choose(curve),
    )


def _start(points: Sequence[Point]) -> list[Point]:
    """Points that stand for KL 0: those nearer than the fit can use, else the first if its estimate is not positive."""
    near = [point for point in points if abs(point.kl) < START_KL]
    first = min(points, key=lambda point: point.step)
    return near or ([first] if first.kl <= 0 else [])


def _typical_se(points: Sequence[Point], known: Sequence[float], values: Sequence[float]) -> float:
    """Root mean square of the standard errors that were measured, else an estimate from the scatter."""
    finite = [se for se in known if math.isfinite(se)]
    return float(np.sqrt(np.mean(np.square(finite)))) if finite else noise(points, values)


def _fit_both(usable: Sequence[Point], start: Sequence[Point], gold_noise: float) -> dict[FormName, FormResult]:
    """Both forms on the same points, so that their errors compare."""
    d = np.array([point.d for point in usable])
    origin = float(np.mean([point.gold for point in start])) if start else 0.0
    errors = np.array([point.gold_se for point in usable])
    weights = 1 / errors**2 if np.isfinite(errors).all() and (errors > 0).all() else None
    start_se = gold_noise / math.sqrt(len(start)) if start else 0.0
    reward = np.array([point.gold for point in usable]) - origin
    names: tuple[FormName, ...] = ("rl", "bon")
    return {
        name: analyse_form(d, reward, name, weights=weights, free_intercept=not start, start_se=start_se)
        for name in names
    }


class _Places:
    """Means over a few neighbouring checkpoints with their standard errors."""

    def __init__(self, points: Sequence[Point], gold_noise: float) -> None:
        self.gold_noise = gold_noise
        proxies = [p for p in points if math.isfinite(p.proxy)]
        self.proxy_noise = _typical_se(proxies, [p.proxy_se for p in proxies], [p.proxy for p in proxies])
        golds = [p for p in points if math.isfinite(p.gold)]
        self.points = golds or proxies
        self.width = max(1, min(WINDOW, len(self.points) // 4))

    def at(self, points: Sequence[Point]) -> Place:
        root = math.sqrt(len(points))
        proxies = [p.proxy for p in points if math.isfinite(p.proxy)]
        return Place(
            tuple(points),
            kl=float(np.mean([p.kl for p in points])),
            gold=float(np.mean([p.gold for p in points])),
            gold_se=self.gold_noise / root,
            proxy=float(np.mean(proxies)) if proxies else math.nan,
            proxy_se=self.proxy_noise / math.sqrt(max(1, len(proxies))),
        )

    def end(self) -> Place:
        """The last by training step."""
        return self.at(sorted(self.points, key=lambda p: p.step)[-self.width :])

    def nearest(self, d: float) -> Place:
        """Those nearest to a distance."""
        valid = [p for p in self.points if math.isfinite(p.d)]
        return self.at(sorted(valid, key=lambda p: (abs(p.d - d), p.d, p.step))[: self.width])

    def best(self) -> tuple[Place, float]:
        """The best neighbours along the KL axis, and a critical value that pays for having looked for them."""
        ordered = sorted(self.points, key=lambda p: (p.kl, p.step))
        windows = [self.at(ordered[i : i + self.width]) for i in range(len(ordered) - self.width + 1)]
        # Bonferroni: the best of many windows stands above the others by chance alone
        critical = float(stats.norm.ppf(1 - (1 - LEVEL) / 2 / len(windows)))
        return max(windows, key=lambda window: window.gold), critical


def _peak(places: _Places, result: FormResult | None) -> tuple[Place, float]:
    """Where the fit has its peak, else the best place; and how many standard errors make a difference from there."""
    if result is not None and result.status == "in range" and result.fit.peak_d is not None:
        return places.nearest(result.fit.peak_d), Z
    return places.best()


def _gold_change(before: Place, after: Place, critical: float) -> Interval:
    return _interval(after.gold - before.gold, critical * math.hypot(before.gold_se, after.gold_se))


def _proxy_change(before: Place, after: Place) -> Interval:
    return _interval(after.proxy - before.proxy, Z * math.hypot(before.proxy_se, after.proxy_se))


def _interval(estimate: float, reach: float) -> Interval:
    return Interval(estimate, estimate - reach, estimate + reach)
