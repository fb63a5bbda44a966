"""Which checkpoint to keep, by what is known of the run (METHODS section 14)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

from lightning_align.lab.overopt import Array, Interval
from lightning_align.lab.places import Noise, noise, scattered
from lightning_align.lab.runs import Curve, Point

Policy = Literal["gold", "heldout", "winrate", "peak", "knee", "budget"]
POLICIES: tuple[Policy, ...] = ("gold", "heldout", "winrate", "peak", "knee", "budget")
NO_KNEE = 0.02  # of the range of the proxy: what rounding makes of a straight line
CALLED = {  # columns that go before the plain ones
    "heldout_lower": "lower bound of the held-out rewards",
    "length_controlled_win_rate": "length-controlled win rate",
}
PATIENCE = 3  # checkpoints in a row in which the proxy rises while the held-out reward falls, before it is said


@dataclass(frozen=True)
class KnownPeak:
    """A fitted peak with an interval of β above 0.

    Attributes:
        d: Where it is, √KL.
        gain: Gold there over the start.
        source: What it was fitted to, in words.
        runs: The runs it was fitted to, as :func:`~lightning_align.lab.regret.place_of` has them.
    """

    d: Interval
    gain: Interval
    source: str
    runs: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Choice:
    """A chosen checkpoint.

    Attributes:
        point: The measurement it rests on.
        policy: What chose it.
        best: The point with the best score, where one within a standard error of it was taken.
        se: Standard error the rule allowed, for ``gold``, ``heldout`` and ``winrate``.
        checkpoint: File to keep; None if the run kept none.
        checkpoint_step: Its step: the same, else the nearest over √KL of those that were saved.
        gold: Gold that is predicted there, with its 95 % interval; None where nothing is known of it.
        gain: Whether ``gold`` is a gain over the start and not a score.
        reason: In one or two sentences.
    """

    point: Point
    policy: Policy
    best: Point | None = None
    se: float = 0.0
    checkpoint: Path | None = None
    checkpoint_step: int | None = None
    gold: Interval | None = None
    gain: bool = False
    reason: str = ""


def choose(curve: Curve) -> Choice | None:
    """By gold where there is one, else by the knee; ties go to the smaller KL, then to the earlier step.

    None without gold and without a knee.
    """
    if curve.has_gold:
        return select(curve, "gold")
    try:
        return select(curve, "knee")
    except ValueError:
        return None


def automatic(curve: Curve, *, peak: KnownPeak | None = None) -> Policy:
    """The strongest policy that the measurements allow: gold, held-out reward, win rate, an earlier peak, the knee."""
    for policy, score in (("gold", "gold"), ("heldout", "heldout"), ("winrate", "win_rate")):
        if any(math.isfinite(getattr(point, score)) for point in curve.points):
            return policy  # type: ignore[return-value]
    return "knee" if peak is None else "peak"


def select(curve: Curve, policy: Policy, *, budget: float | None = None, peak: KnownPeak | None = None) -> Choice:
    """Choose by one policy.

    Args:
        curve: The run.
        policy: One of :data:`POLICIES`.
        budget: No checkpoint with more KL than this is chosen, by whatever policy.
        peak: For ``peak``.

    Raises:
        ValueError: The run lacks what the policy needs; the text says what.
    """
    points = [point for point in curve.points if math.isfinite(point.kl)]
    if budget is not None:
        within = [point for point in points if point.kl <= budget]
        if points and not within:
            least = min(point.kl for point in points)
            raise ValueError(f"no checkpoint has a KL of {budget:g} or less: the smallest is {least:.3g}")
        points = within
    if not points:
        raise ValueError("no checkpoint has a KL")
    choice = _RULES[policy](replace(curve, points=points), budget, peak)
    step = _saved_nearest(curve, choice.point, budget)
    return choice if step is None else replace(choice, checkpoint=curve.checkpoints[step], checkpoint_step=step)


def _saved_nearest(curve: Curve, point: Point, budget: float | None) -> int | None:
    """Step of the file nearest to a measurement over √KL; where the KL of a file was not measured, it lies between."""
    if point.step in curve.checkpoints:
        return point.step
    measured = sorted((p.step, p.kl) for p in curve.points if math.isfinite(p.kl))
    saved = list(curve.checkpoints)
    kls = np.interp(saved, [step for step, _ in measured], [kl for _, kl in measured]).tolist()
    found = [
        (abs(math.sqrt(max(kl, 0.0)) - math.sqrt(max(point.kl, 0.0))), kl, step)
        for step, kl in zip(saved, kls, strict=True)
        if budget is None or kl <= budget
    ]
    return min(found)[-1] if found else None


# ---------------------------------------------------------------------------------------------------------- the rules
def _by_gold(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    point, best, se = one_standard_error(curve.points)
    scored = [p for p in curve.points if math.isfinite(p.gold)]
    known = point.gold_se if math.isfinite(point.gold_se) else best.gold_se
    error = Noise(known, math.inf) if math.isfinite(known) else scattered(scored, [p.gold for p in scored])
    return Choice(
        point, "gold", best, se, gold=error.around(point.gold),
        reason=_within("gold score", point, best, se) + " The score there is a little flattered: it made the choice.",
    )  # fmt: skip


def _by_heldout(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    point, best, se = one_standard_error(curve.points, "heldout")
    reason = _within(_called(curve, "heldout", "held-out reward"), point, best, se)
    step = parting(curve.points)
    if step is not None:
        reason += f" Over {PATIENCE} checkpoints up to step {step} the proxy rose while the held-out reward fell."
    return Choice(point, "heldout", best, se, reason=reason)


def _by_win_rate(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    if not any(math.isfinite(point.win_rate) for point in curve.points):
        raise ValueError("no checkpoint has a win rate: measure one, or name its column (--columns win_rate=NAME)")
    point, best, se = one_standard_error(curve.points, "win_rate")
    name = _called(curve, "win_rate", "win rate")
    reason = f"{_within(name, point, best, se)} Its {name} against the start is {point.win_rate:.0%}."
    return Choice(point, "winrate", best, se, reason=reason)


def _by_peak(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    if peak is None:
        raise ValueError("there is no fitted peak: give --fit with the overopt.json of a run that has one")
    valid = _ordered(point for point in curve.points if math.isfinite(point.d))
    if not valid:
        raise ValueError("every KL was estimated below 0")
    inside = [point for point in valid if peak.d.low <= point.d <= peak.d.high]
    point = min(inside or valid, key=lambda p: (abs(p.d - peak.d.estimate), p.d, p.step))
    reason = f"It is nearest to the peak at KL {peak.d.estimate**2:.3g} ({peak.source})."
    if not inside:
        reason += (
            f" No checkpoint lies within the interval of the peak, KL {peak.d.low**2:.3g} to {peak.d.high**2:.3g}."
        )
    return Choice(point, "peak", gold=peak.gain if inside else None, gain=True, reason=reason)


def _by_knee(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    reason = (
        "A weak hint: beyond this knee the proxy gains less for the KL it costs; the proxy cannot show its own errors."
    )
    return Choice(knee(curve.points), "knee", reason=reason)


def _by_budget(curve: Curve, budget: float | None, peak: KnownPeak | None) -> Choice:
    if budget is None:
        raise ValueError("budget needs a KL: give --budget")
    point = max(curve.points, key=lambda p: (p.kl, -p.step))
    return Choice(
        point, "budget", reason=f"A weak hint: it has the largest KL up to {budget:g}; no score was looked at."
    )


_RULES: dict[Policy, Callable[[Curve, float | None, KnownPeak | None], Choice]] = {
    "gold": _by_gold,
    "heldout": _by_heldout,
    "winrate": _by_win_rate,
    "peak": _by_peak,
    "knee": _by_knee,
    "budget": _by_budget,
}


def _called(curve: Curve, field: str, name: str) -> str:
    """A score by the column that stands for it, where that is not the plain one."""
    return CALLED.get(curve.columns.get(field, ""), name)


def _within(score: str, point: Point, best: Point, se: float) -> str:
    if point == best:
        return f"It has the best {score}, and no smaller KL comes within one standard error ({se:.2g}) of it."
    return f"The smallest KL whose {score} is within one standard error ({se:.2g}) of the best, at step {best.step}."


def _ordered(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda p: (p.kl, p.step))


def parting(points: Sequence[Point]) -> int | None:
    """The first step at which the proxy has risen and the held-out reward fallen :data:`PATIENCE` times in a row."""
    both = sorted((p for p in points if math.isfinite(p.proxy) and math.isfinite(p.heldout)), key=lambda p: p.step)
    run = 0
    for before, after in pairwise(both):
        run = run + 1 if after.proxy > before.proxy and after.heldout < before.heldout else 0
        if run == PATIENCE:
            return after.step
    return None


def one_standard_error(points: Sequence[Point], score: str = "gold") -> tuple[Point, Point, float]:
    """The smallest KL whose score lies within one standard error of the best.

    Args:
        points: The checkpoints.
        score: ``gold``, ``heldout`` or ``win_rate``.

    Returns:
        The point, the best point, and the standard error used: the best point's own, else
        :func:`~lightning_align.lab.places.noise`.
    """
    measured = _ordered(p for p in points if math.isfinite(getattr(p, score)))
    if not measured:
        raise ValueError(f"no checkpoint has a {score} score: use knee")
    values = {p: float(getattr(p, score)) for p in measured}
    best = max(measured, key=lambda p: values[p])  # the first of equals has the smallest KL
    own = float(getattr(best, f"{score}_se"))
    se = own if math.isfinite(own) else noise(measured, [values[p] for p in measured])
    return next(p for p in measured if values[p] >= values[best] - se), best, se


def knee(points: Sequence[Point]) -> Point:
    """Kneedle (Satopää 2011) on the proxy over d, made monotone first: where the gain is largest for the KL it cost.

    Raises:
        ValueError: The proxy rises along a straight line over d, or later than that: there is no knee.
    """
    if not any(math.isfinite(point.proxy) for point in points):
        raise ValueError("no point has a proxy score")
    measured = _ordered(p for p in points if math.isfinite(p.proxy) and p.kl >= 0)
    if len({point.d for point in measured}) > 1:
        proxy = isotonic_regression(np.array([p.proxy for p in measured])).x
        gain = _unit(proxy) - _unit(np.array([point.d for point in measured]))
        if gain.max() > NO_KNEE:
            return measured[int(np.argmax(gain))]
    raise ValueError(
        "no knee: the proxy gains no more for its KL at first than later; give a score (gold, heldout or win_rate), "
        "--fit or --budget"
    )


def _unit(values: Array) -> Array:
    """Scaled to [0, 1]; all 0 when they are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
