"""Win rates without the advantage of length (Dubois 2024, 2404.04475): what they would be between equally long answers.

    logit P(model k wins on prompt x) = θ_k + φ · tanh(Δ_kx / s)      LC_k = σ(θ_k)

Δ is the difference in length and s its standard deviation over all models and prompts; φ is common to the models, so
that one whose answers are always longer is judged by what length gained the others. This is the variant without a
difficulty for each instruction.
"""

import math

import numpy as np

from lightning_align.lab.evaluation.intervals import CELLS, Estimate
from lightning_align.lab.overopt import Array, percentile_interval

RIDGE = 1.0  # on φ, as much as one prompt weighs
LOOSE = 1e-6  # on θ: a model that always wins has none
STEPS, LONGEST_STEP = 30, 2.0
REPLICATES = 1000


def length_controlled(
    results: Array, length_differences: Array, *, seed: int = 0, replicates: int = REPLICATES
) -> list[Estimate]:
    """Length-controlled win rate of each model of a panel over one other, with bootstrap intervals over prompts.

    Swapping the sides gives 1 − LC; a model against itself has ½.

    Args:
        results: What each of K models gets of each of P prompts ``[K, P]``, 0 to 1; NaN leaves the prompt out.
        length_differences: Length of the model's answer minus the other's ``[K, P]``.
        seed: Of the resampling.
        replicates: How many resamples.

    Returns:
        NaN of a model without any verdict, and NaN ends where fewer than two prompts have one.
    """
    models, prompts = results.shape
    scale = float(length_differences.std())
    design = np.zeros((models, prompts, models + 1))
    for model in range(models):
        design[model, :, model] = 1.0
    design[:, :, models] = np.tanh(length_differences / (scale if scale > 0 else 1.0))
    known = np.isfinite(results)
    design, targets = design.reshape(-1, models + 1), np.where(known, results, 0.5).ravel()

    def rates(counts: Array) -> Array:
        weights = known[None] * counts[:, None, :]
        chance = 1 / (1 + np.exp(-_fit(design, targets, weights.reshape(len(counts), -1))[:, :models]))
        return np.where(weights.any(2), chance, np.nan)

    values = rates(np.ones((1, prompts)))[0]
    generator = np.random.default_rng(seed)
    even = np.full(prompts, 1 / prompts)
    at_once = max(1, CELLS // design.size)
    sizes = [min(at_once, replicates - start) for start in range(0, replicates, at_once)]
    table = np.concatenate(
        [rates(generator.multinomial(prompts, even, size=size).astype(np.float64)) for size in sizes]
    )
    return [_estimate(float(value), table[:, model], int(known[model].sum())) for model, value in enumerate(values)]


def _estimate(value: float, drawn: Array, prompts: int) -> Estimate:
    """A rate with its interval; resamples without a verdict (NaN) say nothing."""
    if prompts < 2:
        return Estimate(value if prompts else math.nan, math.nan, math.nan, prompts)
    drawn = drawn[np.isfinite(drawn)]
    interval = percentile_interval(value, drawn)
    return Estimate(value, interval.low, interval.high, prompts, float(drawn.std()))


def _fit(design: Array, targets: Array, weights: Array) -> Array:
    """Coefficients ``[R, K + 1]`` of weighted logistic regressions with the ridge on the last, by Newton's method.

    Args:
        design: ``[N, K + 1]``.
        targets: ``[N]``, 0 to 1.
        weights: ``[R, N]``, a row for each regression.
    """
    size = design.shape[1]
    ridge = np.full(size, LOOSE)
    ridge[-1] = RIDGE
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    coefficients = np.zeros((len(weights), size))
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-coefficients @ design.T))
        slope = (weights * (targets - chance)) @ design - ridge * coefficients
        curvature = ((weights * chance * (1 - chance)) @ products).reshape(-1, size, size) + np.diag(ridge)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        coefficients += np.clip(step, -LONGEST_STEP, LONGEST_STEP)
        if np.abs(step).max() < 1e-10:
            break
    return coefficients
