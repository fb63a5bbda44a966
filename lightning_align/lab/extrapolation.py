"""Whether the law predicts: fitted to the near points alone, how far off it is at the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_align.lab.joint import Series, fit_jointly
from lightning_align.lab.overopt import FEWEST_POINTS, Array, FormName

SHARES = (1 / 2, 1 / 3)  # of the points, the farthest, that are predicted
LAST = 3  # near points whose mean is "it stays as it is"
FORMS: tuple[FormName, ...] = ("rl", "bon")
Prediction = Callable[[Series, Series], Array]  # of a run's near points and its far ones: R at the far ones ``[n]``


@dataclass(frozen=True)
class Foresight:
    """Weighted root mean square errors at the far points, all of them the same points.

    Attributes:
        share: Of the points that count as far.
        near: Points that the predictions may see.
        far: Points predicted.
        left_out: Far points of runs that have no near ones.
        predicted: Of each form, fitted to the near points.
        hindsight: Of each form, fitted to all points: as near as it can come.
        constant: Of the mean of each run's last near points: nothing changes.
        linear: Of a straight line through the near points, each run with its own start.
    """

    share: float
    near: int
    far: int
    left_out: int
    predicted: dict[FormName, float]
    hindsight: dict[FormName, float]
    constant: float
    linear: float

    def beats_baselines(self, form: FormName) -> bool:
        """Whether the law was nearer than both baselines."""
        return self.predicted[form] < min(self.constant, self.linear)


def foresee(runs: Sequence[Series], share: float) -> Foresight | None:
    """Split all points by distance, predict the farthest ``share``; None when too few tell two coefficients apart.

    A run that begins beyond the near points says nothing of its start there, and is left out if that is to be fitted.
    """
    every_d = np.sort(np.concatenate([run.d for run in runs]))
    count = int(len(every_d) * share)
    if count < 2:
        return None
    border = every_d[len(every_d) - count]
    pairs = [(run.take(run.d < border), run.take(run.d >= border)) for run in runs]
    known = [(near, far) for near, far in pairs if len(near.d)]
    left_out = sum(len(far.d) for near, far in pairs if not len(near.d))
    nears = [near for near, _ in known]
    distances = len(np.unique(np.concatenate([near.d for near in nears]))) if nears else 0
    if distances < FEWEST_POINTS or sum(len(far.d) for _, far in known) < 2:
        return None
    try:
        hindsight = {form: _error(known, _law(runs, form)) for form in FORMS}
        predicted = {form: _error(known, _law(nears, form)) for form in FORMS}
    except ValueError:  # one distance so far out that the others are one beside it
        return None
    return Foresight(
        share=share,
        near=sum(len(near.d) for near in nears),
        far=sum(len(far.d) for _, far in known),
        left_out=left_out,
        predicted=predicted,
        hindsight=hindsight,
        constant=_error(known, _stays),
        linear=_error(known, _line(nears)),
    )


def _error(pairs: Sequence[tuple[Series, Series]], predict: Prediction) -> float:
    squares = [far.weights * (far.reward - predict(near, far)) ** 2 for near, far in pairs]
    return math.sqrt(sum(float(s.sum()) for s in squares) / sum(float(far.weights.sum()) for _, far in pairs))


def _law(runs: Sequence[Series], form: FormName) -> Prediction:
    """The form fitted to ``runs``; a start that was not measured is always taken from the near points."""
    fit = fit_jointly(runs, form)
    return lambda near, far: near.start(fit) + fit(far.d)


def _stays(near: Series, far: Series) -> Array:
    last = np.argsort(near.d, kind="stable")[-LAST:]
    return np.full(len(far.d), near.reward[last].mean())


def _line(nears: Sequence[Series]) -> Prediction:
    centred = [(near.d - near.d.mean(), near.reward - near.reward.mean()) for near in nears]
    spread = sum(float(d @ d) for d, _ in centred)
    slope = sum(float(d @ reward) for d, reward in centred) / spread if spread else 0.0
    return lambda near, far: near.reward.mean() + slope * (far.d - near.d.mean())
