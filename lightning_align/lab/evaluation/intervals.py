"""Intervals by bootstrap over prompts, and p-values by paired permutation (METHODS section 16).

Rows are what was drawn independently, one a prompt; all samples of a prompt stay together. Numbers that are NaN (a
completion without that score) leave every sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from lightning_align.lab.overopt import LEVEL, Array, percentile_interval

REPLICATES = 10_000
SEEDS = 3  # runs of a method from which on an interval is one over runs
CELLS = 4_000_000  # numbers drawn at a time: of many prompts, fewer replicates


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the ends are NaN where fewer than two rows say something.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Rows it rests on.
        se: Standard error over the rows; NaN where there is none.
    """

    value: float
    low: float
    high: float
    n: int
    se: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``value``, ``ci`` with both ends, ``n`` and ``se``."""
        fields = asdict(self)
        return {"value": self.value, "ci": [fields["low"], fields["high"]], "n": self.n, "se": self.se}


def resampled_sums(columns: Array, *, seed: int = 0, replicates: int = REPLICATES) -> Array:
    """Sums of columns ``[n, K]`` over n rows drawn with replacement, ``[replicates, K]``.

    Every column sees the same draws, so that ratios and differences of sums are those of one resample.
    """
    rows = len(columns)
    generator = np.random.default_rng(seed)
    at_once = max(1, CELLS // rows)
    parts = []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        drawn = generator.integers(0, rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        parts.append(counts @ columns)
    return np.concatenate(parts)


def ratios(
    columns: Mapping[str, tuple[Array, Array]], *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Estimate]:
    """Σ numerator / Σ denominator of each pair of columns ``[n]``, with percentile intervals over rows.

    The standard error is that of the linearised ratio, which for a denominator of ones is the usual one of a mean.
    """
    filled = {name: _filled(*pair) for name, pair in columns.items()}
    rows = len(next(iter(filled.values()))[0])
    table = np.stack([column for pair in filled.values() for column in pair], axis=1)
    sums = resampled_sums(table, seed=seed, replicates=replicates) if rows > 1 else np.zeros((1, table.shape[1]))
    estimates = {}
    for index, (name, (numerator, denominator)) in enumerate(filled.items()):
        counted = int((denominator != 0).sum())
        if counted == 0:
            estimates[name] = Estimate(math.nan, math.nan, math.nan, 0)
            continue
        value = float(numerator.sum() / denominator.sum())
        if counted == 1:
            estimates[name] = Estimate(value, math.nan, math.nan, 1)
            continue
        top, bottom = sums[:, 2 * index], sums[:, 2 * index + 1]
        interval = percentile_interval(value, top[bottom != 0] / bottom[bottom != 0])
        spread = float(np.sum((numerator - value * denominator) ** 2)) / (counted * (counted - 1))
        se = math.sqrt(spread) * counted / abs(float(denominator.sum()))
        estimates[name] = Estimate(value, interval.low, interval.high, counted, se)
    return estimates


def means(columns: Mapping[str, Array], *, seed: int = 0, replicates: int = REPLICATES) -> dict[str, Estimate]:
    """The mean of each column ``[n]``; see :func:`ratios`."""
    pairs = {name: (column, np.ones_like(column)) for name, column in columns.items()}
    return ratios(pairs, seed=seed, replicates=replicates)


def bca(
    columns: Array, statistic: Callable[[Array], Array], *, seed: int = 0, replicates: int = REPLICATES
) -> Estimate:
    """A function of column sums with its bias-corrected and accelerated interval (Efron 1987).

    For statistics that resampling moves to one side, such as a sum of absolute values.

    Args:
        columns: ``[n, K]``, a row per prompt.
        statistic: From sums ``[R, K]`` to values ``[R]``.
        seed: Of the resampling.
        replicates: How many resamples.
    """
    rows, total = len(columns), columns.sum(0, keepdims=True)
    value = float(statistic(total)[0])
    if rows < 2:
        return Estimate(value, math.nan, math.nan, rows)
    drawn = np.sort(statistic(resampled_sums(columns, seed=seed, replicates=replicates)))
    below = (np.sum(drawn < value) + np.sum(drawn <= value)) / 2
    bias = stats.norm.ppf(np.clip(below, 0.5, replicates - 0.5) / replicates)
    without_one = statistic(total - columns)
    deviation = without_one.mean() - without_one
    scale = float(np.sum(deviation**2)) ** 1.5
    acceleration = float(np.sum(deviation**3)) / (6 * scale) if scale > 0 else 0.0
    tails = np.asarray(stats.norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])) + bias
    shares = np.asarray(stats.norm.cdf(bias + tails / (1 - acceleration * tails)))
    low, high = np.quantile(drawn, shares, method="inverted_cdf")
    return Estimate(value, float(low), float(high), rows, float(drawn.std(ddof=1)))


def student(values: Array) -> Estimate:
    """The mean of a few independent values ``[n]`` with Student's interval."""
    count = len(values)
    value = float(values.mean()) if count else math.nan
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    se = float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * se
    return Estimate(value, value - reach, value + reach, count, se)


def over_runs(
    values: Sequence[float], errors: Sequence[float], prompts: Array | None = None, *, shared: float = 0.0
) -> Estimate:
    """Mean of runs that were measured alike, with its 95 % interval.

    From :data:`SEEDS` runs on it is Student's over them. The prompts are the same for all, and their error is no part
    of it, nor does it need to be where methods on those prompts are compared. Of fewer runs it is over the prompts, and
    says nothing of other seeds.

    Args:
        values: Of each run ``[R]``.
        errors: Standard error of each ``[R]``; used where ``prompts`` are not known, as if the runs had prompts of
            their own.
        prompts: What each run has of each prompt ``[R, P]``; NaN leaves the prompt out.
        shared: Standard error of what the runs have in common (:func:`shared_error`), for an interval over runs.
    """
    if not len(values) or len(values) >= SEEDS:
        return widened(student(np.array(values)), shared)
    value = float(np.mean(values))
    if prompts is None:
        return widened(Estimate(value, value, value, len(values), 0.0), math.hypot(*errors) / len(values))
    means = prompts.mean(0)
    over = student(means[np.isfinite(means)])
    reach = (over.high - over.low) / 2
    return Estimate(value, value - reach, value + reach, len(values), over.se)


def widened(estimate: Estimate, error: float) -> Estimate:
    """An estimate whose interval about it holds a further, independent standard error.

    Both reaches are added as independent errors are, the way of Graybill and Wang (1980) for sums of variances.
    """
    reach = math.hypot(estimate.high - estimate.value, float(stats.norm.ppf((1 + LEVEL) / 2)) * error)
    se = math.hypot(estimate.se, error)
    return Estimate(estimate.value, estimate.value - reach, estimate.value + reach, estimate.n, se)


def shared_error(prompts: Array) -> float:
    """Standard error over prompts of what several runs have in common; 0 where they have nothing.

    The covariance of two runs over the prompts is the variance of what they share: a start that was measured once for
    all of them, and prompts of which all gain more. The answers that each run drew by itself are no part of it.

    Args:
        prompts: What each run has of each prompt ``[R, P]``; NaN leaves the prompt out.
    """
    known = prompts[:, np.isfinite(prompts).all(0)]
    runs, count = known.shape
    if runs < 2 or count < 2:
        return 0.0
    covariance = np.cov(known)
    between = float(covariance.sum() - np.trace(covariance)) / (runs * (runs - 1))
    return math.sqrt(max(0.0, between) / count)


def _filled(numerator: Array, denominator: Array) -> tuple[Array, Array]:
    """Both as doubles, with 0 where one of them is NaN."""
    known = np.isfinite(numerator) & np.isfinite(denominator)
    top = np.where(known, numerator, 0.0).astype(np.float64)
    return top, np.where(known, denominator, 0.0).astype(np.float64)


def permutation_p(differences: Array, *, seed: int = 0, replicates: int = REPLICATES) -> float:
    """Two-sided p-value of paired differences ``[n]``: how often random signs give a mean as far from 0.

    (1 + number as far) / (1 + replicates), so that it is never 0. NaN without a difference.
    """
    known = differences[np.isfinite(differences)].astype(np.float64)
    if not len(known):
        return math.nan
    observed = abs(known.sum())
    generator = np.random.default_rng(seed)
    at_once, as_far = max(1, CELLS // len(known)), 0
    for start in range(0, replicates, at_once):
        signs = generator.integers(0, 2, size=(min(at_once, replicates - start), len(known)), dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs @ known) >= observed * (1 - 1e-12)).sum())
    return (1 + as_far) / (1 + replicates)
