"""How over-optimisation scales with reward-model size, its data and the policy's size: Gao et al. 2022, section 3.

Every claim is judged over seeds: a slope, a ratio or a correlation of each seed, and Student's interval over them. A
peak that no run reached, or that lies before the first point, is censored: it never enters as a number, and slopes are
then those of the gain at a distance that all runs reach.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from lightning_align.lab.claims import Verdict, judge
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.overopt import Array, FormFit, design, fit_form

SIMILAR = math.log(1.5)  # largest log ratio of distances that counts as similar
FEWEST_POINTS = 4
STATEMENTS = {
    "S1": "larger reward models allow larger updates before gold falls",
    "S2": "below a threshold of comparisons the reward model's size does not help",
    "S3": "larger policies gain less from the same reward model",
    "S4": "policies of different sizes peak at a similar KL",
    "S5": "a reward model with a lower validation loss gives a higher gain",
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
        start: True score of the policy before training.
        reward_loss: Validation loss of the reward model; NaN if unknown.
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
    run: Path | None = None


@dataclass(frozen=True)
class Law:
    """The law of one run: its fit, and where it peaks unless that is censored."""

    measured: Measured
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

    def gain_at(self, d: float) -> float:
        """R at a distance."""
        return float(self.fit(d))


@dataclass(frozen=True)
class Finding:
    """A claim with what the sweep says of it; ``estimate`` is over seeds."""

    claim: str
    estimate: Estimate
    verdict: Verdict
    reason: str
    runs: Sequence[Path] = ()
    details: dict[str, Any] = field(default_factory=dict)


def fit_law(measured: Measured) -> Law | None:
    """Least squares of R(d) = d(α − β ln d); None for too few distances."""
    if len(np.unique(measured.d)) < FEWEST_POINTS:
        return None
    fit = fit_form(measured.d, measured.gold - measured.start, "rl")
    place = fit.peak_d
    censored = None
    if place is None:
        censored = "no peak: β ≤ 0"
    elif place >= measured.d.max():
        censored = "beyond the farthest checkpoint"
    elif place <= measured.d.min():
        censored = "before the first checkpoint"
    return Law(measured, fit, censored)


def with_common_start(runs: Sequence[Measured]) -> list[Measured]:
    """Starts averaged over the runs of a policy size: one model, measured with other samples in each run."""
    sizes = {run.policy_parameters for run in runs}
    mean = {size: float(np.mean([run.start for run in runs if run.policy_parameters == size])) for size in sizes}
    return [Measured(**{**run.__dict__, "start": mean[run.policy_parameters]}) for run in runs]


# ---------------------------------------------------------------------------------------------------------- slopes
def slopes(
    laws: Sequence[Law],
    x: Callable[[Law], float],
    y: Callable[[Law], float],
    group: Callable[[Law], object] = lambda law: None,
) -> Array:
    """Least squares slope of y on x of each seed, within groups; a seed with one x in every group says nothing."""
    found = []
    for seed in sorted({law.measured.seed for law in laws}):
        across, up = 0.0, 0.0
        for key in {group(law) for law in laws}:
            own = [law for law in laws if law.measured.seed == seed and group(law) == key and math.isfinite(y(law))]
            if len({x(law) for law in own}) < 2:
                continue
            xs, ys = np.array([x(law) for law in own]), np.array([y(law) for law in own])
            across += float(((xs - xs.mean()) ** 2).sum())
            up += float(((xs - xs.mean()) * (ys - ys.mean())).sum())
        if across > 0:
            found.append(up / across)
    return np.array(found)


def ln_reward(law: Law) -> float:
    """ln of the reward model's parameters."""
    return math.log(law.measured.reward_parameters)


def ln_policy(law: Law) -> float:
    """ln of the policy's parameters."""
    return math.log(law.measured.policy_parameters)


def measure_of_gain(laws: Sequence[Law]) -> tuple[Callable[[Law], float], str]:
    """R* where every run has one, else R at the largest distance that all of them reach."""
    if all(law.censored is None for law in laws):
        return lambda law: law.peak_gain, "R*"
    common = min(float(law.measured.d.max()) for law in laws)
    return lambda law: law.gain_at(common), f"R at KL {common**2:.1f}"


# ---------------------------------------------------------------------------------------------------------- claims
def assess(runs: Sequence[Measured]) -> tuple[list[Law], list[Finding]]:
    """The law of every run, and what the sweep says of each claim."""
    laws = [law for law in map(fit_law, with_common_start(runs)) if law is not None]
    by_reward = _most_common(laws, lambda law: law.measured.policy_parameters)
    largest = max(((law.measured.reward_parameters, law.measured.comparisons) for law in laws), default=None)
    by_policy = [law for law in laws if (law.measured.reward_parameters, law.measured.comparisons) == largest]
    return laws, [larger_rewards(by_reward), threshold(by_reward), *policies(by_policy), loss_foretells(by_reward)]


def _most_common(laws: Sequence[Law], key: Callable[[Law], int]) -> list[Law]:
    """Those of the policy that most runs have: the sweep over reward models."""
    values = [key(law) for law in laws]
    return [law for law in laws if key(law) == max(set(values), key=lambda value: (values.count(value), value))]


def larger_rewards(laws: Sequence[Law]) -> Finding:
    """S1: slope of d* on ln N, within each amount of data; of the gain where peaks are censored."""
    censored = [law for law in laws if law.censored]
    if censored:
        gain, told = measure_of_gain(laws)
    else:
        gain, told = (lambda law: law.peak_d), "d*"
    found = slopes(laws, ln_reward, gain, lambda law: law.measured.comparisons)
    note = f"; {len(censored)} of {len(laws)} peaks censored" if censored else ""
    return _finding("S1", laws, student(found), "more", f"slope of {told} on ln N, per seed{note}")


def threshold(laws: Sequence[Law]) -> Finding:
    """S2: where data are few the size's slope is not told from 0, and it grows with the data."""
    levels = sorted({law.measured.comparisons for law in laws})
    if len(levels) < 2 or len({law.measured.reward_parameters for law in laws}) < 2:
        return _finding("S2", laws, student(np.array([])), "more", "needs several sizes and several amounts of data")
    gain, told = measure_of_gain(laws)
    at = {level: [law for law in laws if law.measured.comparisons == level] for level in levels}
    by_level = {level: student(slopes(own, ln_reward, gain)) for level, own in at.items()}
    means = {level: _by_seed(own, gain) for level, own in at.items()}
    gains = {level: student(_paired(means[level], means[levels[0]])) for level in levels[1:]}
    enough = next((level for level in levels[1:] if gains[level].low > 0), None)
    few = [level for level in levels if enough is not None and level < enough]
    growth = student(_interaction(at, gain))
    details = {
        "threshold": enough,
        "slope_by_comparisons": {str(level): estimate.as_dict() for level, estimate in by_level.items()},
        "gain_over_fewest": {str(level): estimate.as_dict() for level, estimate in gains.items()},
    }
    verdict, reason = judge(growth, "more", 0.0)
    helps = [level for level in few if by_level[level].low > 0]
    if verdict == "supported" and enough is None:
        verdict, reason = "undecided", "no amount of data is told from the smallest"
    elif verdict != "undecided" and helps:
        verdict, reason = "contradicted", f"size helps at {helps[0]} comparisons, below the threshold of {enough}"
    what = f"growth of the slope of {told} on ln N with ln D, per seed; threshold: {enough or 'none found'}"
    return Finding("S2", growth, verdict, f"{what}; {reason}", _runs(laws), details)


def policies(laws: Sequence[Law]) -> list[Finding]:
    """S3 and S4, of policies of several sizes against the same reward model."""
    sizes = sorted({law.measured.policy_parameters for law in laws})
    if len(sizes) < 2:
        nothing = student(np.array([]))
        return [_finding(claim, laws, nothing, "more", "needs policies of several sizes") for claim in ("S3", "S4")]
    gain, told = measure_of_gain(laws)
    less = student(slopes(laws, ln_policy, gain))
    starts = student(slopes(laws, ln_policy, lambda law: law.measured.start))
    details = {"slope_of_start": starts.as_dict()}
    s3 = _finding(
        "S3", laws, less, "less", f"slope of {told} on ln P, per seed; the start rises {starts.value:+.2f} per ln P"
    )
    known = [law for law in laws if law.censored is None]
    ends = [
        {law.measured.seed: law.peak_d for law in known if law.measured.policy_parameters == size} for size in sizes
    ]
    ratios = np.array([math.log(ends[-1][seed] / ends[0][seed]) for seed in ends[0] if seed in ends[-1]])
    note = f"; {len(laws) - len(known)} of {len(laws)} peaks censored" if len(known) < len(laws) else ""
    similar = student(ratios)
    verdict, reason = judge(similar, "equal", SIMILAR)
    told = f"ln of d* of the largest policy over the smallest, per seed, within ±ln 1.5{note}"
    s4 = Finding("S4", similar, verdict, f"{told}; {reason}", _runs(laws))
    return [Finding(s3.claim, s3.estimate, s3.verdict, s3.reason, s3.runs, details), s4]


def loss_foretells(laws: Sequence[Law]) -> Finding:
    """S5: rank correlation of validation loss and gain over the reward models, per seed."""
    known = [law for law in laws if math.isfinite(law.measured.reward_loss)]
    gain, told = measure_of_gain(known) if known else ((lambda law: math.nan), "R*")
    found = []
    for seed in sorted({law.measured.seed for law in known}):
        own = [law for law in known if law.measured.seed == seed]
        pairs = np.array([(law.measured.reward_loss, gain(law)) for law in own])
        if len(own) >= FEWEST_POINTS and (pairs.std(axis=0) > 0).all():
            found.append(float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic))
    return _finding("S5", known, student(np.array(found)), "less", f"rank correlation of loss and {told}, per seed")


def _finding(claim: str, laws: Sequence[Law], estimate: Estimate, expect: str, what: str) -> Finding:
    verdict, reason = judge(estimate, expect, 0.0)
    return Finding(claim, estimate, verdict, f"{what}; {reason}", _runs(laws))


def _runs(laws: Sequence[Law]) -> list[Path]:
    return [law.measured.run for law in laws if law.measured.run is not None]


def _by_seed(laws: Sequence[Law], gain: Callable[[Law], float]) -> dict[str, float]:
    seeds = {law.measured.seed for law in laws}
    return {seed: float(np.mean([gain(law) for law in laws if law.measured.seed == seed])) for seed in sorted(seeds)}


def _paired(one: dict[str, float], other: dict[str, float]) -> Array:
    return np.array([one[seed] - other[seed] for seed in one if seed in other])


def _interaction(at: dict[int, list[Law]], gain: Callable[[Law], float]) -> Array:
    """Of each seed the slope, on ln D, of the slope of the gain on ln N."""
    found = []
    for seed in sorted({law.measured.seed for own in at.values() for law in own}):
        pairs = []
        for level, own in at.items():
            slope = slopes([law for law in own if law.measured.seed == seed], ln_reward, gain)
            pairs += [(math.log(level), float(slope[0]))] if len(slope) else []
        if len(pairs) > 1:
            x, y = np.array(pairs).T
            found.append(float(stats.linregress(x, y).slope))
    return np.array(found)


# ---------------------------------------------------------------------------------------------------------- laws
def coefficient_laws(laws: Sequence[Law]) -> dict[str, Any]:
    """α(N) = a₀ + a₁ ln N and β(N) = b₀ + b₁ ln N, slopes per seed within each amount of data."""
    group: Callable[[Law], object] = lambda law: law.measured.comparisons  # noqa: E731
    return {
        "alpha_per_ln_n": student(slopes(laws, ln_reward, lambda law: law.fit.alpha, group)).as_dict(),
        "beta_per_ln_n": student(slopes(laws, ln_reward, lambda law: law.fit.beta, group)).as_dict(),
    }


def foretell_largest(laws: Sequence[Law]) -> dict[str, Any] | None:
    """R(d, N) fitted to all but the largest reward models (of the most data), and its error on those.

    Beside it the error of what the largest of the others did, and that of no gain at all; None without three sizes.
    """
    most = max((law.measured.comparisons for law in laws), default=0)
    own = [law for law in laws if law.measured.comparisons == most]
    sizes = sorted({law.measured.reward_parameters for law in own})
    if len(sizes) < 3:
        return None
    near = [law for law in own if law.measured.reward_parameters < sizes[-1]]
    far = [law for law in own if law.measured.reward_parameters == sizes[-1]]
    joint = np.linalg.lstsq(_basis(near), _gains(near), rcond=None)[0]
    before = [law for law in own if law.measured.reward_parameters == sizes[-2]]
    same = np.linalg.lstsq(_design(before), _gains(before), rcond=None)[0]
    truth = _gains(far)

    def error(predicted: Array) -> float:
        return float(np.sqrt(np.mean((truth - predicted) ** 2)))

    return {
        "parameters": sizes[-1],
        "comparisons": most,
        "law": error(_basis(far) @ joint),
        "as_the_next_smaller": error(_design(far) @ same),
        "no_gain": error(np.zeros_like(truth)),
    }


def _design(laws: Sequence[Law]) -> Array:
    return np.concatenate([design(law.measured.d, "rl") for law in laws])


def _basis(laws: Sequence[Law]) -> Array:
    """(d, −d ln d) and both times ln N, a row for each point."""
    parts = []
    for law in laws:
        columns = design(law.measured.d, "rl")
        parts.append(np.concatenate([columns, columns * ln_reward(law)], axis=1))
    return np.concatenate(parts)


def _gains(laws: Sequence[Law]) -> Array:
    return np.concatenate([law.measured.gold - law.measured.start for law in laws])


def loss_law(laws: Sequence[Law]) -> dict[str, float] | None:
    """L(D) = L∞ + (D_c/D)^γ of the largest reward models; None with fewer than three amounts of data, or no fit."""
    size = max((law.measured.reward_parameters for law in laws), default=0)
    own = [law for law in laws if law.measured.reward_parameters == size and math.isfinite(law.measured.reward_loss)]
    data = np.array([law.measured.comparisons for law in own], dtype=np.float64)
    loss = np.array([law.measured.reward_loss for law in own])
    if len(np.unique(data)) < 3:
        return None

    def law_of(d: Array, floor: float, scale: float, power: float) -> Array:
        return np.asarray(floor + np.exp(power * (scale - np.log(d))))

    guess = (float(loss.min()) * 0.9, float(np.log(data.min())) - 3.0, 0.5)
    try:
        found, _ = optimize.curve_fit(
            law_of, data, loss, p0=guess, bounds=([0, -50, 0.01], [np.inf, 50, 3]), maxfev=20000
        )
    except RuntimeError:
        return None
    floor, scale, power = (float(value) for value in found)
    error = float(np.sqrt(np.mean((law_of(data, floor, scale, power) - loss) ** 2)))
    return {"floor": floor, "scale": math.exp(scale), "power": power, "rmse": error, "parameters": float(size)}
