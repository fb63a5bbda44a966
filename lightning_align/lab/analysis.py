"""From a curve to its result: where gold starts, how it bends, whether it falls, and which checkpoint to keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_align.lab.extrapolation import SHARES, Foresight, foresee
from lightning_align.lab.joint import Series
from lightning_align.lab.overopt import (
    FEWEST_POINTS,
    SMALLEST_D,
    FormName,
    FormResult,
    Interval,
    Peak,
    analyse_form,
)
from lightning_align.lab.places import Noise, Place, Places, collapse
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.select import Choice, choose

START_KL = 1e-3  # a point with less KL than this is the start; the RL form is steep there, so it must be small


@dataclass(frozen=True)
class Analysis:
    """All that the figure, the page and the JSON say.

    Attributes:
        curve: The measurements.
        form: The form that fits the method; the other is shown beside it.
        forms: Results by form; empty when there are too few points or no gold.
        series: The points of the fit; None where there is none.
        foresight: How well the forms predict the farthest half and third of the points from the nearer ones.
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
        choice: The checkpoint to keep; None without gold and without a knee of the proxy.
    """

    curve: Curve
    form: FormName
    forms: dict[FormName, FormResult]
    series: Series | None
    foresight: tuple[Foresight, ...]
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
    choice: Choice | None

    @property
    def result(self) -> FormResult | None:
        """The form that fits the method."""
        return self.forms.get(self.form)

    @property
    def kept_d(self) -> float:
        """√KL of the checkpoint to keep; 0 for a negative estimate, and where there is none."""
        return math.sqrt(max(self.choice.point.kl, 0.0)) if self.choice is not None else 0.0

    @property
    def fitted_peak(self) -> Peak | None:
        """The peak of the fit, where it may be claimed: the measured scores must rise to it and come down from it.

        They need not come down by more than noise: that is what :attr:`falls` says.
        """
        comes_down = self.fall is not None and self.fall.estimate < 0
        return _claimable(self.result) if self.rises and comes_down and not self.misfit else None

    @property
    def fitted_collapse(self) -> float | None:
        """KL beyond the fitted peak at which the fit is back at the start; None where no checkpoint lies beyond it."""
        result = self.result
        if result is None or result.status not in ("in range", "before") or result.fit.collapse_d is None:
            return None
        d = [point.d for point in self.fitted]
        return result.fit.collapse_d**2 if min(d) <= result.fit.collapse_d <= max(d) else None

    @property
    def measured_collapse(self) -> float | None:
        """The same of the measured scores, averaged over neighbours: where they first come back to the start."""
        gold = [point for point in self.curve.points if math.isfinite(point.gold) and math.isfinite(point.d)]
        return collapse(gold, self.start_gold)

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
    places = Places(curve.points)
    at_start = start_points(gold or curve.points)
    origin = [] if free_start else at_start
    usable = tuple(point for point in gold if point.d >= SMALLEST_D)
    enough = len(usable) >= FEWEST_POINTS + (not origin) and len({point.d for point in usable}) > 2
    series = _series(usable, origin, places.gold_noise.se) if enough else None
    forms = _fit_both(series) if series is not None else {}
    start, end = places.at(at_start) if at_start else None, places.end()
    first = start if start is not None else places.first()
    fitted_start = forms[form].fit.intercept if forms and not origin else math.nan
    peak, looks, misfit = _peak(places, forms.get(form), at_start) if gold else (None, 1, False)
    return Analysis(
        curve=curve,
        form=form,
        forms=forms,
        series=series,
        foresight=tuple(found for share in SHARES if (found := foresee([series], share)) is not None)
        if series is not None
        else (),
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


def start_points(points: Sequence[Point]) -> list[Point]:
    """Points that stand for KL 0: those that have hardly moved, else the first if its estimate is not positive."""
    near = [point for point in points if abs(point.kl) < START_KL]
    first = min(points, key=lambda point: point.step)
    return near or ([first] if first.kl <= 0 else [])


def _series(usable: Sequence[Point], origin: Sequence[Point], gold_noise: float) -> Series:
    """Points to fit; without an ``origin`` the start is fitted too."""
    base = float(np.mean([point.gold for point in origin])) if origin else 0.0
    errors = np.array([point.gold_se for point in usable])
    known = np.isfinite(errors).all() and (errors > 0).all()
    return Series(
        d=np.array([point.d for point in usable]),
        reward=np.array([point.gold for point in usable]) - base,
        weights=1 / errors**2 if known else np.ones(len(usable)),
        free=not origin,
        start_se=gold_noise / math.sqrt(len(origin)) if origin else 0.0,
    )


def _fit_both(series: Series) -> dict[FormName, FormResult]:
    """Both forms on the same points, so that their errors compare."""
    names: tuple[FormName, ...] = ("rl", "bon")
    return {
        name: analyse_form(
            series.d, series.reward, name, weights=series.weights, free_intercept=series.free,
            start_se=series.start_se,
        )
        for name in names
    }  # fmt: skip


def _claimable(result: FormResult | None) -> Peak | None:
    return result.peak if result is not None and result.status == "in range" else None


def _peak(places: Places, result: FormResult | None, start: Sequence[Point]) -> tuple[Place, int, bool]:
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


def _slope(points: Sequence[Point]) -> float:
    """Least squares line through the proxy over d."""
    pairs = [(p.d, p.proxy) for p in points if math.isfinite(p.d) and math.isfinite(p.proxy)]
    if len({d for d, _ in pairs}) < 2:
        return math.nan
    d, proxy = np.array(pairs).T
    return float(stats.linregress(d, proxy).slope)
