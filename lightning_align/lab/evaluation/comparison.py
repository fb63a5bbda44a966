"""Win rates: who of two policies answers better, by the verdicts of a judge that sees both orders."""

import numpy as np

from lightning_align.lab.overopt import Array


def verdicts(first: Array, second: Array, *, tie_eps: float = 0.0) -> Array:
    """1 where the first scores higher, 0 where the second does, ½ where they differ by at most ``tie_eps``.

    Args:
        first: Scores of the answer shown first, of any shape that broadcasts with the other's.
        second: Scores of the answer shown second.
        tie_eps: Half the width of the tie band. NaN scores give NaN.
    """
    difference = first - second
    return np.where(np.abs(difference) <= tie_eps, 0.5, np.where(np.isnan(difference), np.nan, difference > 0))


def both_orders(a_first: Array, b_first: Array) -> Array:
    """What A gets of a prompt: 1 if it wins in both orders, 0 if it loses in both, else ½.

    Args:
        a_first: The judge's verdict for A where A is shown first (1, ½, 0).
        b_first: The judge's verdict for B where B is shown first.
    """
    mean = (a_first + 1 - b_first) / 2
    return np.where((mean == 0) | (mean == 1) | np.isnan(mean), mean, 0.5)


def consistency(a_first: Array, b_first: Array) -> Array:
    """1 where both orders favour the same answer (or neither), else 0; NaN where a verdict is."""
    same = a_first == 1 - b_first
    return np.where(np.isnan(a_first + b_first), np.nan, same.astype(np.float64))


def score_judge(scores_a: Array, scores_b: Array, *, tie_eps: float = 0.0) -> tuple[Array, Array]:
    """Verdicts of a judge that scores one answer at a time, of every pair of samples: ``a_first``, ``b_first``.

    Args:
        scores_a: Scores ``[P, M]`` of M samples of A for each of P prompts.
        scores_b: Scores ``[P, N]`` of B.
        tie_eps: See :func:`verdicts`.

    Returns:
        Two arrays ``[P, M, N]``.
    """
    a, b = scores_a[:, :, None], scores_b[:, None, :]
    return verdicts(a, b, tie_eps=tie_eps), verdicts(b, a, tie_eps=tie_eps)


def per_prompt(values: Array) -> Array:
    """Means over the samples of each prompt ``[P, …]`` to ``[P]``; NaN where a prompt has none."""
    flat = values.reshape(len(values), -1)
    known = np.isfinite(flat)
    count = known.sum(1)
    total = np.where(known, flat, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
