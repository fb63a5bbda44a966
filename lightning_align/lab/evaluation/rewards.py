"""Metrics of a reward model on comparisons: does it rank as people do, and does it know how sure to be?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import CELLS, Estimate, bca, ratios
from lightning_align.lab.overopt import LEVEL, Array
from lightning_align.losses.reward_metrics import confidence_bins, expected_calibration_error, hits
from lightning_align.rewards.learned import LearnedReward

Index = NDArray[np.int64]
BINS = 10  # of the calibration error
DRAWS = 2000  # of labels, to see what error a calibrated model would show


@dataclass(frozen=True)
class Comparisons:
    """Decided pairs.

    Attributes:
        records: With ``prompt``, ``chosen`` and ``rejected``.
        places: Where each comes from, for messages.
        group: Number of each pair's prompt ``[P]``, from 0; pairs of one prompt are resampled together.
        skipped: How many records were left out, by reason.
    """

    records: list[dict[str, Any]]
    places: list[str]
    group: Index
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


def decided(records: Sequence[dict[str, Any]]) -> tuple[list[int], dict[str, int]]:
    """Positions of the records that say which answer is better, and how many do not, by reason.

    As in training: a tie has no better side, and a record of weight 0 is no record.
    """
    kept: list[int] = []
    skipped: dict[str, int] = {}
    for index, record in enumerate(records):
        reason = "a tie" if record.get("tie") else "its weight is 0" if record.get("weight", 1.0) == 0 else None
        if reason is None:
            kept.append(index)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    return kept, skipped


def score_differences(reward: LearnedReward, comparisons: Comparisons) -> Array:
    """Δ = score(chosen) − score(rejected) of every pair ``[P]``; σ(Δ) is the model's probability of the label.

    Raises:
        UserError: At a score that is not a finite number.
    """
    sides = []
    prompts = [record["prompt"] for record in comparisons.records]
    for side in ("chosen", "rejected"):
        answers = [record[side] for record in comparisons.records]
        scores = reward.score(prompts, answers, finished=[True] * len(answers), records=comparisons.records)
        bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise UserError(
                f"{reward.source} gives {float(scores[bad[0]])} to the {side} answer of {comparisons.places[bad[0]]} "
                f"({len(bad):,} of {len(scores):,} have no finite score): its weights are damaged, train it again"
            )
        sides.append(scores.double().numpy())
    return np.asarray(sides[0] - sides[1], dtype=np.float64)


def pair_metrics(delta: Array, group: Index, *, seed: int = 0) -> dict[str, Estimate]:
    """``accuracy`` (equal scores count ½), ``loss`` −log σ(Δ), ``brier`` (1 − σ(Δ))² and ``ece``.

    Intervals are by bootstrap over prompts. Noise can only raise the calibration error: its interval is corrected for
    some of that (BCa), and :func:`calibrated_error` says what noise alone would give.
    """
    tensor = torch.from_numpy(delta)
    right = hits(tensor).numpy()
    rows = {
        "accuracy": right,
        "loss": -logsigmoid(tensor).numpy(),
        "brier": (1 - torch.sigmoid(tensor).numpy()) ** 2,
    }
    ones = _by_group(np.ones_like(delta), group)
    metrics = ratios({name: (_by_group(values, group), ones) for name, values in rows.items()}, seed=seed)
    confidence, bins = _binned(tensor)
    gaps = bins * (confidence - right)[:, None]
    table = np.column_stack([*(_by_group(gaps[:, bin_], group) for bin_ in range(BINS)), ones])
    error = bca(table, lambda sums: np.abs(sums[:, :BINS]).sum(1) / sums[:, BINS], seed=seed)
    assert abs(error.value - expected_calibration_error(tensor, num_bins=BINS)) < 1e-9
    return metrics | {"ece": error}


def calibrated_error(delta: Array, *, seed: int = 0) -> tuple[float, float]:
    """What the calibration error of these scores would be if their probabilities were right.

    Labels are drawn from the probabilities (Vaicenavicius 2019, 1902.06977).

    Returns:
        The 95 % quantile, and the p-value: how often the error is at least the one found.
    """
    tensor = torch.from_numpy(delta)
    found = expected_calibration_error(tensor, num_bins=BINS)
    confidence, bins = _binned(tensor)
    generator = np.random.default_rng(seed)
    at_once = max(1, CELLS // len(delta))
    errors = []
    for start in range(0, DRAWS, at_once):
        right = generator.random((min(at_once, DRAWS - start), len(delta))) < confidence
        errors.append(np.abs((confidence - right) @ bins).sum(1) / len(delta))
    drawn = np.concatenate(errors)
    return float(np.quantile(drawn, LEVEL)), float((1 + np.sum(drawn >= found)) / (1 + DRAWS))


def _binned(delta: torch.Tensor) -> tuple[Array, Array]:
    """Confidence σ(|Δ|) of each pair ``[P]``, and a one in the column of its bin ``[P, BINS]``."""
    confidence, index = confidence_bins(delta, num_bins=BINS)
    return confidence.numpy(), np.eye(BINS)[index.numpy()]


def _by_group(values: Array, group: Index) -> Array:
    """Sums of pairs' values over each prompt."""
    return np.bincount(group, weights=values).astype(np.float64)


def subsets(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, dict[str, Index]]:
    """Positions of the records that have each value of each field; those without it are left out."""
    found: dict[str, dict[str, list[int]]] = {name: {} for name in fields}
    for index, record in enumerate(records):
        for name in fields:
            if record.get(name) is not None:
                found[name].setdefault(str(record[name]), []).append(index)
    return {
        name: {value: np.array(rows, dtype=np.int64) for value, rows in sorted(by_value.items())}
        for name, by_value in found.items()
    }
