"""How over-optimisation scales with reward-model size, its data and the policy's size: Gao et al. 2022, section 3.

Each run of a sweep gets a law R(d) = d(α − β ln d). A peak that no checkpoint reached, or that lies before the first,
is censored: it never enters as a number, and what is compared then is the gain at a distance that all runs reach.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from lightning_align.lab.evaluation.intervals import student
from lightning_align.lab.overopt import (
    FEWEST_POINTS,
    Array,
    FormFit,
    PeakStatus,
    bootstrap,
    fit_form,
    peak_status,
    percentile_interval,
)

CENSORED: Mapping[PeakStatus, str | None] = {
    "none": "no peak: β ≤ 0",
    "uncertain": "no peak: the interval of β reaches 0",
    "beyond": "beyond the farthest checkpoint",
    "before": "before the first checkpoint",
    "in range": None,
}


@dataclass(frozen=True)
class Measured:
    """One run of a sweep.

    Attributes:
        reward_parameters: Of the reward model, without embeddings.
        comparisons: That it learnt from.
        policy_parameters: Of the policy, without embeddings.
        seed: Label of the repetition.
        d: Distances √KL of its checkpoints ``[n]``, all of at least :data:`~.overopt.SMALLEST_D`.
        gold: True scores there ``[n]``.
        start: True score of the policy before training, as this run measured it.
        start_se: Its standard error; NaN if unknown.
        reward_loss: Validation loss of the reward model; NaN if unknown.
        reward_accuracy: Its accuracy there; NaN if unknown.
        label_entropy: Lowest loss that the labels allow; 0 if unknown.
        gold_se: Standard errors of ``gold`` ``[n]``; None if unknown.
        seconds: That training the policy took; NaN if unknown.
        run: Where it lies.
    """

    reward_parameters: int
    comparisons: int
    policy_parameters: int
    seed: str
    d: Array
    gold: Array
    start: float
    reward_loss: float = math.nan
    reward_accuracy: float = math.nan
    label_entropy: float = 0.0
    gold_se: Array | None = None
    start_se: float = math.nan
    seconds: float = math.nan
    run: Path | None = None


@dataclass(frozen=True)
class Law:
    """The law of one run: the start it was fitted with, the fit, and why its peak is censored, if it is.

    A peak that :func:`~.overopt.peak_status` would not report is.
    """

    measured: Measured
    start: float
    fit: FormFit
    censored: str | None

    @property
    def peak_d(self) -> float:
        """d*; NaN where it is censored."""
        return math.nan if self.censored or self.fit.peak_d is None else self.fit.peak_d

    @property
    def peak_gain(self) -> float:
        """R*; NaN where d* is censored."""
        return math.nan if self.censored or self.fit.peak_reward is None else self.fit.peak_reward

    @property
    def gains(self) -> Array:
        """True score minus the start at each checkpoint ``[n]``."""
        return self.measured.gold - self.start

    def gain_at(self, d: float) -> float:
        """R at a distance."""
        return float(self.fit(d))


Number = Callable[[Law], float]


def fit_law(measured: Measured, start: tuple[float, float] | None = None) -> Law | None:
    """Least squares of R(d) = d(α − β ln d), by 1/se² where the errors are known; None for too few distances.

    Args:
        measured: The run.
        start: Score at the start and its standard error; None for those that the run measured.
    """
    if len(np.unique(measured.d)) < FEWEST_POINTS:
        return None
    score, error = (measured.start, measured.start_se) if start is None else start
    d, gains, known = measured.d, measured.gold - score, weights(measured)
    fit = fit_form(d, gains, "rl", weights=known)
    drawn = bootstrap(d, gains, "rl", weights=known, start_se=error if math.isfinite(error) else 0.0)
    status = peak_status(fit.peak_d, percentile_interval(fit.beta, drawn[:, 1]), d)
    return Law(measured, score, fit, CENSORED[status])


def weights(measured: Measured) -> Array | None:
    """1/se² of each point ``[n]``; None where an error is not known."""
    errors = measured.gold_se
    known = errors is not None and bool((np.isfinite(errors) & (errors > 0)).all())
    return 1 / errors**2 if errors is not None and known else None


def fit_laws(runs: Sequence[Measured]) -> list[Law]:
    """The law of every run with enough distances.

    Starts are averaged over the runs of a policy size: they share one model, and each only drew other samples of it.
    Runs with the very same start share one measurement of it, which counts once.
    """
    sizes = {run.policy_parameters for run in runs}
    start = {size: _mean_start([run for run in runs if run.policy_parameters == size]) for size in sizes}
    laws = [fit_law(run, start[run.policy_parameters]) for run in runs]
    return [law for law in laws if law is not None]


def _mean_start(runs: Sequence[Measured]) -> tuple[float, float]:
    """The mean of the starts that were measured, and its standard error."""
    over = student(np.array(sorted({run.start for run in runs})))
    return over.value, over.se if over.n > 1 else runs[0].start_se


def without_law(runs: Sequence[Measured]) -> list[str]:
    """The runs that have too few distances for a law, in words."""
    told = []
    for run in runs:
        if (count := len(np.unique(run.d))) < FEWEST_POINTS:
            sizes = f"reward model of {run.reward_parameters:,}, {run.comparisons:,} comparisons"
            where = run.run or f"{sizes}, policy of {run.policy_parameters:,}, seed {run.seed}"
            told.append(
                f"{where} has a true score at {count} distances from the start, and a law needs {FEWEST_POINTS}"
            )
    return told


# ---------------------------------------------------------------------------------------------------------- the sweeps
def reward_sweep(laws: Sequence[Law]) -> list[Law]:
    """Those of one policy: the one trained against most reward models, of equals the largest."""
    return _widest(laws, _policy, _reward)


def policy_sweep(laws: Sequence[Law]) -> list[Law]:
    """Those against one kind of reward model: the one with most policy sizes, of equals the largest."""
    return _widest(laws, _reward, _policy)


def _policy(law: Law) -> tuple[int, ...]:
    return (law.measured.policy_parameters,)


def _reward(law: Law) -> tuple[int, ...]:
    return law.measured.reward_parameters, law.measured.comparisons


def _widest(
    laws: Sequence[Law], fixed: Callable[[Law], tuple[int, ...]], varied: Callable[[Law], tuple[int, ...]]
) -> list[Law]:
    values: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for law in laws:
        values.setdefault(fixed(law), set()).add(varied(law))
    chosen = max(values, key=lambda value: (len(values[value]), value), default=None)
    return [law for law in laws if fixed(law) == chosen]


def missing_cells(laws: Sequence[Law]) -> list[str]:
    """Combinations of sizes, data and seed that the sweeps lack, in words."""
    missing = []
    by_reward, by_policy = reward_sweep(laws), policy_sweep(laws)
    seeds = sorted({law.measured.seed for law in laws})
    there = {(*_reward(law), law.measured.seed) for law in by_reward}
    sizes, data = ({_reward(law)[index] for law in by_reward} for index in (0, 1))
    for size, comparisons, seed in product(sorted(sizes), sorted(data), seeds):
        if (size, comparisons, seed) not in there:
            missing.append(f"reward model of {size:,}, {comparisons:,} comparisons, seed {seed}")
    those = {(*_policy(law), law.measured.seed) for law in by_policy}
    for size, seed in product(sorted({law.measured.policy_parameters for law in by_policy}), seeds):
        if (size, seed) not in those and not (by_reward and (size,) == _policy(by_reward[0])):
            missing.append(f"policy of {size:,}, seed {seed}")
    return missing


# ---------------------------------------------------------------------------------------------------------- slopes
def lines(laws: Sequence[Law], x: Number, y: Number, group: Callable[[Law], Hashable] = lambda law: None) -> Array:
    """Intercept and slope of y on x, ``[seeds, 2]``: least squares within groups, the intercept their mean.

    A seed with a single x in every group says nothing, and has no row.
    """
    found = []
    for seed in sorted({law.measured.seed for law in laws}):
        across, up, means = 0.0, 0.0, []
        for key in {group(law): None for law in laws}:
            own = [law for law in laws if law.measured.seed == seed and group(law) == key and math.isfinite(y(law))]
            if len({x(law) for law in own}) < 2:
                continue
            xs, ys = np.array([x(law) for law in own]), np.array([y(law) for law in own])
            across += float(((xs - xs.mean()) ** 2).sum())
            up += float(((xs - xs.mean()) * (ys - ys.mean())).sum())
            means.append((float(xs.mean()), float(ys.mean())))
        if across > 0:
            middle_x, middle_y = np.mean(means, axis=0)
            found.append((float(middle_y - up / across * middle_x), up / across))
    return np.array(found).reshape(-1, 2)


def slopes(laws: Sequence[Law], x: Number, y: Number, group: Callable[[Law], Hashable] = lambda law: None) -> Array:
    """The slopes of :func:`lines` ``[seeds]``."""
    return lines(laws, x, y, group)[:, 1]


def ln_reward(law: Law) -> float:
    """ln of the reward model's parameters."""
    return math.log(law.measured.reward_parameters)


def ln_policy(law: Law) -> float:
    """ln of the policy's parameters."""
    return math.log(law.measured.policy_parameters)


def comparisons(law: Law) -> int:
    """That its reward model learnt from."""
    return law.measured.comparisons


def measure_of_gain(laws: Sequence[Law]) -> tuple[Number, str]:
    """R* where every run has one, else R at the largest distance that all of them reach."""
    if all(law.censored is None for law in laws):
        return lambda law: law.peak_gain, "R*"
    common = min(float(law.measured.d.max()) for law in laws)
    return lambda law: law.gain_at(common), f"R at KL {common**2:.1f}"
