"""The law of over-optimisation, Gao, Schulman & Hilton 2022 (2210.10760): gold over d = √KL(π‖π_init).

    RL        R(d) = d(α − β ln d)     peak at d* = exp(α/β − 1), R* = β·d*
    best-of-n R(d) = d(α − β d)        peak at d* = α/(2β),       R* = α²/(4β)

R is the gold score minus its value at the start, so R(0) = 0. Both forms are linear in (α, β). The start is measured,
or fitted beside them as an intercept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
FormName = Literal["rl", "bon"]
PeakStatus = Literal["in range", "none", "uncertain", "beyond", "before"]

FORMULAS: dict[FormName, str] = {"rl": "R(d) = d(α − β ln d)", "bon": "R(d) = d(α − β d)"}
SMALLEST_D = 0.1  # the RL form has infinite slope at 0: points nearer than this say where R starts, not how it bends
FEWEST_POINTS = 4  # two parameters need more than two points to have an error
REPLICATES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval; infinite ends mean no bound."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class FormFit:
    """One fitted form; ``intercept`` is the fitted score at the start, 0 when it was fixed, and no part of R."""

    form: FormName
    alpha: float
    beta: float
    intercept: float = 0.0

    def __call__(self, d: Array | float) -> Array:
        """R at distance ``d``: the gain over the start."""
        return design(np.asarray(d, dtype=np.float64), self.form) @ np.array([self.alpha, self.beta])

    @property
    def peak_d(self) -> float | None:
        """d* where R′(d*) = 0; None for β ≤ 0, where there is no maximum."""
        return self._peak(0)

    @property
    def peak_reward(self) -> float | None:
        """R* = R(d*)."""
        return self._peak(1)

    @property
    def collapse_d(self) -> float | None:
        """Where R is back to 0 beyond its peak: exp(α/β) or α/β; None where there is no peak above 0."""
        place = self.peak_d
        if place is None or place <= 0:
            return None
        return place * (2.0 if self.form == "bon" else math.e)

    def _peak(self, which: int) -> float | None:
        found = float(peaks(self.form, np.array([self.alpha]), np.array([self.beta]))[which][0])
        return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Peak:
    """Where the fit is highest, d*, and its gain there over the start, R*."""

    d: Interval
    reward: Interval

    @property
    def kl(self) -> Interval:
        """d*²."""
        return Interval(self.d.estimate**2, self.d.low**2, self.d.high**2)


@dataclass(frozen=True)
class FormResult:
    """A fit with what is known about its errors.

    Attributes:
        fit: The fit itself.
        alpha: With its interval; so is ``beta``.
        peak: None when β ≤ 0.
        status: Whether the peak may be reported. ``uncertain``: the interval of β reaches 0; ``beyond`` and ``before``:
            the fit puts it outside the distances that were measured.
        rmse: Weighted root mean square error of the points.
        band_d: Grid of distances from 0 to the farthest; ``band_low`` and ``band_high`` are the pointwise interval of R
            there and, when the start was fitted, of its error too.
    """

    fit: FormFit
    alpha: Interval
    beta: Interval
    peak: Peak | None
    status: PeakStatus
    rmse: float
    band_d: Array
    band_low: Array
    band_high: Array


def design(d: Array, form: FormName) -> Array:
    """Basis ``[..., 2]``: (d, −d ln d) or (d, −d²); d ln d is 0 at 0 by continuity."""
    second = d * d if form == "bon" else d * np.log(np.where(d > 0, d, 1.0))
    return np.stack([d, -second], axis=-1)


def peaks(form: FormName, alpha: Array, beta: Array) -> tuple[Array, Array]:
    """d* and R* of many fits ``[N]``; infinite for β ≤ 0, and never below 0."""
    safe = np.where(beta > 0, beta, 1.0)
    if form == "bon":
        place = np.maximum(alpha / (2 * safe), 0.0)
        height = alpha * place / 2
    else:
        place = np.exp(np.minimum(alpha / safe - 1, 600.0))  # short of the largest double
        height = safe * place
    return np.where(beta > 0, place, np.inf), np.where(beta > 0, height, np.inf)


def solver(d: Array, form: FormName, weights: Array, *, free_intercept: bool) -> tuple[Array, Array]:
    """Basis X ``[n, p]`` and the matrix P ``[p, n]`` with coefficients = P·R: weighted least squares."""
    basis = design(d, form)
    if free_intercept:
        basis = np.concatenate([basis, np.ones((len(d), 1))], axis=1)
    root = np.sqrt(weights)
    inverse = np.linalg.pinv(basis * root[:, None])
    return basis, np.asarray(inverse * root, dtype=np.float64)


def fit_form(
    d: Array, reward: Array, form: FormName = "rl", *, weights: Array | None = None, free_intercept: bool = False
) -> FormFit:
    """Weighted linear least squares of one form to points (d, R).

    Args:
        d: Distances √KL ``[n]``, all above 0.
        reward: Gold minus its start ``[n]``.
        form: ``rl`` or ``bon``.
        weights: 1/se² of each point ``[n]``; None for equal ones.
        free_intercept: Fit R(0) too instead of fixing it at 0.
    """
    d, reward = np.asarray(d, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    fewest = 3 if free_intercept else 2
    if len(np.unique(d)) < fewest:
        raise ValueError(f"{len(np.unique(d))} distances for {fewest} coefficients: give at least {fewest}")
    if not (d > 0).all():
        raise ValueError(f"distances must be above 0, the smallest is {d.min()}: leave those points out")
    weights = np.ones_like(d) if weights is None else np.asarray(weights, dtype=np.float64)
    _, solve = solver(d, form, weights, free_intercept=free_intercept)
    coefficients = solve @ reward
    return FormFit(form, *(float(value) for value in coefficients))


def bootstrap(
    d: Array,
    reward: Array,
    form: FormName,
    *,
    weights: Array | None = None,
    free_intercept: bool = False,
    start_se: float = 0.0,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Array:
    """Coefficients ``[replicates, p]`` of refits to resampled points: a moving-block bootstrap in the given order.

    Checkpoints of one run follow one another, so their errors are drawn in blocks of neighbours; the distances stay as
    they are. Residuals are divided by √(1 − leverage) and widened by :func:`small_sample_factor`, without which the
    intervals would be too short. One run says nothing about other seeds: the intervals understate what training again
    would do.

    Args:
        d: Distances ``[n]`` in the order of training.
        reward: Gold minus its start ``[n]``.
        form: ``rl`` or ``bon``.
        weights: 1/se² of each point.
        free_intercept: As in :func:`fit_form`.
        start_se: Standard error of the start that was subtracted; it moves all points together.
        replicates: How many refits.
        seed: Of the resampling.
    """
    count = len(d)
    weights = np.ones(count) if weights is None else weights
    basis, solve = solver(d, form, weights, free_intercept=free_intercept)
    fitted = basis @ (solve @ reward)
    leverage = np.clip(np.einsum("np,pn->n", basis, solve), 0.0, 0.99)
    root = np.sqrt(weights)
    errors = (reward - fitted) * root / np.sqrt(1 - leverage)
    block = max(1, round(count ** (1 / 3)))
    blocks = -(-count // block)
    errors = (errors - errors.mean()) * small_sample_factor(count, basis.shape[1], block)
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, count, size=(replicates, blocks))
    index = ((starts[:, :, None] + np.arange(block)) % count).reshape(replicates, -1)[:, :count]
    drawn = fitted + errors[index] / root + start_se * generator.standard_normal((replicates, 1))
    return drawn @ solve.T


def small_sample_factor(count: int, coefficients: int, block: int) -> float:
    """What a percentile interval lacks with few points: Student's t for the normal, and the mean that centring took."""
    student = stats.t.ppf((1 + LEVEL) / 2, max(1, count - coefficients)) / stats.norm.ppf((1 + LEVEL) / 2)
    return float(student * math.sqrt(count / max(1, count - block)))


def percentile_interval(estimate: float, values: Array) -> Interval:
    """95 % percentile interval ``[replicates]``; takes members of ``values``, so that infinities stay what they are."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(values, tails, method="inverted_cdf")
    return Interval(estimate, float(low), float(high))


def analyse_form(
    d: Array,
    reward: Array,
    form: FormName,
    *,
    weights: Array | None = None,
    free_intercept: bool = False,
    start_se: float = 0.0,
    seed: int = 0,
) -> FormResult:
    """Fit one form and say how sure it is; arguments as in :func:`bootstrap`."""
    fit = fit_form(d, reward, form, weights=weights, free_intercept=free_intercept)
    drawn = bootstrap(d, reward, form, weights=weights, free_intercept=free_intercept, start_se=start_se, seed=seed)
    alpha, beta = percentile_interval(fit.alpha, drawn[:, 0]), percentile_interval(fit.beta, drawn[:, 1])
    places, heights = peaks(form, drawn[:, 0], drawn[:, 1])
    peak = None
    if fit.peak_d is not None and fit.peak_reward is not None:
        peak = Peak(percentile_interval(fit.peak_d, places), percentile_interval(fit.peak_reward, heights))
    grid = np.linspace(0.0, float(d.max()), 121)
    curves = drawn[:, :2] @ design(grid, form).T
    if free_intercept:
        curves += drawn[:, 2:] - fit.intercept
    low, high = np.quantile(curves, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return FormResult(
        fit=fit,
        alpha=alpha,
        beta=beta,
        peak=peak,
        status=peak_status(fit.peak_d, beta, d),
        rmse=weighted_rmse(fit, d, reward, weights),
        band_d=grid,
        band_low=low,
        band_high=high,
    )


def peak_status(place: float | None, beta: Interval, d: Array) -> PeakStatus:
    """Whether a peak may be reported: β above 0 with its interval, and d* between the distances measured."""
    if place is None:
        return "none"
    if beta.low <= 0:
        return "uncertain"
    if place >= d.max():
        return "beyond"
    return "before" if place <= d.min() else "in range"


def weighted_rmse(fit: FormFit, d: Array, reward: Array, weights: Array | None) -> float:
    """√(Σ w e² / Σ w)."""
    weights = np.ones_like(d) if weights is None else weights
    return float(np.sqrt(np.sum(weights * (reward - fit.intercept - fit(d)) ** 2) / weights.sum()))
