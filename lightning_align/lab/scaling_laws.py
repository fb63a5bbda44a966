"""Laws over sizes and data: the coefficients over ln N, gold over distance and size together, the loss over data."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize

from lightning_align.lab.evaluation.intervals import student
from lightning_align.lab.overopt import Array, FormFit, design
from lightning_align.lab.scaling import Law, comparisons, lines, ln_reward, weights

JOINT = ("a0", "b0", "a1", "b1")


def coefficient_laws(laws: Sequence[Law]) -> dict[str, Any]:
    """α(N) = a₀ + a₁ ln N and β(N) = b₀ + b₁ ln N of each seed, with one slope for all amounts of data."""
    alpha = lines(laws, ln_reward, lambda law: law.fit.alpha, comparisons)
    beta = lines(laws, ln_reward, lambda law: law.fit.beta, comparisons)
    columns = {"a0": alpha[:, 0], "a1": alpha[:, 1], "b0": beta[:, 0], "b1": beta[:, 1]}
    return {name: student(column).as_dict() for name, column in columns.items()}


def joint_law(laws: Sequence[Law]) -> dict[str, Any] | None:
    """R(d, N) = d(a₀ + a₁ ln N − (b₀ + b₁ ln N) ln d) with the most data, fitted to the points of each seed.

    Weights are 1/se² of the points. None with a single size.
    """
    own = _with_most_data(laws)
    if len({law.measured.reward_parameters for law in own}) < 2:
        return None
    seeds = sorted({law.measured.seed for law in own})
    by_seed = [[law for law in own if law.measured.seed == seed] for seed in seeds]
    fits = [_joint(each) for each in by_seed if len({law.measured.reward_parameters for law in each}) > 1]
    columns = np.array(fits).reshape(-1, len(JOINT)).T
    return {
        "comparisons": comparisons(own[0]),
        **{name: student(column).as_dict() for name, column in zip(JOINT, columns, strict=True)},
        "rmse": _rmse(_gains(own), _basis(own) @ _joint(own)),
    }


def foretell_largest(laws: Sequence[Law]) -> dict[str, Any] | None:
    """R(d, N) fitted to all but the largest reward models (of the most data), and its error on those.

    Beside it the error of what the largest of the others did, and that of no gain at all; and where the law puts the
    peak, with the mean of those found, none of them where one is censored. None without three sizes.
    """
    own = _with_most_data(laws)
    sizes = sorted({law.measured.reward_parameters for law in own})
    if len(sizes) < 3:
        return None
    far = [law for law in own if law.measured.reward_parameters == sizes[-1]]
    before = [law for law in own if law.measured.reward_parameters == sizes[-2]]
    joint = _joint([law for law in own if law.measured.reward_parameters < sizes[-1]])
    same = _least_squares(_design(before), _gains(before), _weights(before))
    truth = _gains(far)
    size = math.log(sizes[-1])
    foretold = FormFit("rl", float(joint[0] + joint[2] * size), float(joint[1] + joint[3] * size))
    return {
        "parameters": sizes[-1],
        "comparisons": comparisons(own[0]),
        "law": _rmse(truth, _basis(far) @ joint),
        "as_the_next_smaller": _rmse(truth, _design(far) @ same),
        "no_gain": _rmse(truth, np.zeros_like(truth)),
        "d_peak": {"foretold": foretold.peak_d, "found": float(np.mean([law.peak_d for law in far]))},
        "R_peak": {"foretold": foretold.peak_reward, "found": float(np.mean([law.peak_gain for law in far]))},
    }


def loss_law(laws: Sequence[Law]) -> dict[str, float] | None:
    """L(D) = L∞ + (D_c/D)^γ of the largest reward models, L∞ not below the entropy of the labels.

    None with fewer than three amounts of data, or without a fit.
    """
    size = max((law.measured.reward_parameters for law in laws), default=0)
    own = [law for law in laws if law.measured.reward_parameters == size and math.isfinite(law.measured.reward_loss)]
    data = np.array([comparisons(law) for law in own], dtype=np.float64)
    loss = np.array([law.measured.reward_loss for law in own])
    if len(np.unique(data)) < 3:
        return None
    entropy = min(law.measured.label_entropy for law in own)
    middle = float(np.log(data).mean())

    def law_of(d: Array, floor: float, height: float, power: float) -> Array:
        return np.asarray(floor + np.exp(height - power * (np.log(d) - middle)))

    room = max(float(loss.min()) - entropy, 1e-3)
    guess = (entropy + room / 2, math.log(room), 0.5)
    limits = ([entropy, -50, 0.01], [np.inf, 50, 3])
    try:
        found, _ = optimize.curve_fit(law_of, data, loss, p0=guess, bounds=limits, maxfev=20000)
    except RuntimeError:
        return None
    floor, height, power = (float(value) for value in found)
    return {
        "floor": floor,
        "label_entropy": entropy,
        "scale": math.exp(middle + height / power),
        "power": power,
        "rmse": _rmse(loss, law_of(data, floor, height, power)),
        "parameters": float(size),
    }


def _with_most_data(laws: Sequence[Law]) -> list[Law]:
    most = max(map(comparisons, laws), default=0)
    return [law for law in laws if comparisons(law) == most]


def _joint(laws: Sequence[Law]) -> Array:
    return _least_squares(_basis(laws), _gains(laws), _weights(laws))


def _least_squares(basis: Array, values: Array, weights: Array) -> Array:
    root = np.sqrt(weights)
    return np.asarray(np.linalg.lstsq(basis * root[:, None], values * root, rcond=None)[0])


def _design(laws: Sequence[Law]) -> Array:
    return np.concatenate([design(law.measured.d, "rl") for law in laws])


def _basis(laws: Sequence[Law]) -> Array:
    """(d, −d ln d) and both times ln N, a row for each point."""
    parts = [design(law.measured.d, "rl") for law in laws]
    wide = [np.concatenate([part, part * ln_reward(law)], axis=1) for part, law in zip(parts, laws, strict=True)]
    return np.concatenate(wide)


def _gains(laws: Sequence[Law]) -> Array:
    return np.concatenate([law.gains for law in laws])


def _weights(laws: Sequence[Law]) -> Array:
    """1/se² of each point; equal ones where an error is not known."""
    found = [weights(law.measured) for law in laws]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return np.ones(sum(len(law.measured.d) for law in laws))
    return np.concatenate(known)


def _rmse(truth: Array, predicted: Array) -> float:
    return float(np.sqrt(np.mean((truth - predicted) ** 2)))
