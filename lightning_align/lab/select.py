"""Which checkpoint to keep: the least KL that is as good as the best, or without a gold score the knee of the proxy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

from lightning_align.lab.overopt import Array
from lightning_align.lab.runs import Curve, Point

Policy = Literal["gold", "knee"]


@dataclass(frozen=True)
class Choice:
    """A chosen checkpoint.

    Attributes:
        point: The measurement it rests on.
        policy: ``gold`` (one-standard-error rule) or ``knee`` (proxy only, the weakest).
        best: The point with the best gold score, for ``gold``.
        se: Standard error the rule allowed, for ``gold``.
        checkpoint: File to keep; None if the run kept none.
        checkpoint_step: Its step, which is the nearest that was saved.
    """

    point: Point
    policy: Policy
    best: Point | None = None
    se: float = 0.0
    checkpoint: Path | None = None
    checkpoint_step: int | None = None


def choose(curve: Curve) -> Choice:
    """By gold where there is one, else by the knee; ties go to the smaller KL, then to the earlier step."""
    if curve.has_gold:
        point, best, se = one_standard_error(curve.points)
        choice = Choice(point, "gold", best, se)
    else:
        choice = Choice(knee(curve.points), "knee")
    if not curve.checkpoints:
        return choice
    step = min(curve.checkpoints, key=lambda saved: (abs(saved - choice.point.step), saved))
    return replace(choice, checkpoint=curve.checkpoints[step], checkpoint_step=step)


def one_standard_error(points: Sequence[Point]) -> tuple[Point, Point, float]:
    """The smallest KL whose gold lies within one standard error of the best.

    Returns:
        The point, the best point, and the standard error used: the best point's own, else :func:`noise`.
    """
    measured = sorted((p for p in points if math.isfinite(p.gold)), key=lambda p: (p.kl, p.step))
    if not measured:
        raise ValueError("no point has a gold score: use knee")
    best = max(measured, key=lambda p: p.gold)  # the first of equals has the smallest KL
    se = best.gold_se if math.isfinite(best.gold_se) else noise(measured, [p.gold for p in measured])
    return next(p for p in measured if p.gold >= best.gold - se), best, se


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


def knee(points: Sequence[Point]) -> Point:
    """Kneedle (Satopää 2011) on the proxy over d, made monotone first: where the gain is largest for the KL it cost."""
    measured = sorted(
        (p for p in points if math.isfinite(p.proxy) and p.kl >= 0), key=lambda p: (p.kl, p.step)
    ) or sorted((p for p in points if math.isfinite(p.proxy)), key=lambda p: (p.kl, p.step))
    if not measured:
        raise ValueError("no point has a proxy score")
    d = np.array([math.sqrt(max(p.kl, 0.0)) for p in measured])
    proxy = isotonic_regression(np.array([p.proxy for p in measured])).x
    gain = _unit(proxy) - _unit(d)
    return measured[int(np.argmax(gain))]


def _unit(values: Array) -> Array:
    """Scaled to [0, 1]; all 0 when they are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)
