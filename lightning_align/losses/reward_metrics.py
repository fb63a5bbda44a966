"""What tells a good reward model from a bad one: accuracy, calibration, reliability and dependence on length.

The functions take score differences Δ = r_chosen − r_rejected of pairs ``[P]``, or scores ``[R]``, of a whole
evaluation set on the CPU, and return plain numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_INVERSE_TEMPERATURE = 1e3


def hits(delta: Tensor) -> Tensor:
    """1 where chosen scores higher, ½ where equal, 0 else; ``[P]`` float64."""
    return 0.5 * (1 + torch.sign(delta.double()))


def accuracy(delta: Tensor) -> float:
    """Share of pairs ranked as labelled; equal scores count ½."""
    return float(hits(delta).mean())


def accuracy_by_strength(delta: Tensor, strength: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Accuracy by strength of preference, an index into ``names``; other pairs are left out."""
    return {
        name: accuracy(delta[strength == index]) for index, name in enumerate(names) if bool((strength == index).any())
    }


def accuracy_length_matched(
    delta: Tensor, chosen_length: Tensor, rejected_length: Tensor, *, tolerance: float = 0.1
) -> float:
    """Accuracy of the pairs whose lengths differ by at most ``tolerance`` of the longer one; NaN without any."""
    longer = torch.maximum(chosen_length, rejected_length)
    close = (chosen_length - rejected_length).abs() <= tolerance * longer
    return accuracy(delta[close])


def confidence_bins(delta: Tensor, *, num_bins: int = 10) -> tuple[Tensor, Tensor]:
    """Confidence σ(|Δ|) of each pair ``[P]`` float64, and its bin ``[P]``, of equal width on [½, 1]; Δ is finite."""
    confidence = torch.sigmoid(delta.double().abs())
    return confidence, ((confidence - 0.5) / 0.5 * num_bins).long().clamp(max=num_bins - 1)


def expected_calibration_error(delta: Tensor, *, num_bins: int = 10) -> float:
    """Σ_b n_b/N |accuracy_b − confidence_b|, of :func:`confidence_bins`."""
    confidence, index = confidence_bins(delta, num_bins=num_bins)
    gap = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, index, confidence - hits(delta))
    return float(gap.abs().sum() / len(delta))


def brier_score(delta: Tensor) -> float:
    """Mean (1 − σ(Δ))². Guessing ½ always costs ¼."""
    return float(((1 - torch.sigmoid(delta.double())) ** 2).mean())


@dataclass(frozen=True)
class ReliabilityBin:
    """One point of the reliability curve."""

    delta: float  # mean |Δ|
    predicted: float  # mean σ(|Δ|)
    accuracy: float  # observed
    count: int


def reliability_bins(delta: Tensor, *, num_bins: int = 10) -> list[ReliabilityBin]:
    """Observed accuracy against predicted σ(|Δ|), in bins of equal count by |Δ| (the N+ study's figure)."""
    size, order = delta.double().abs().sort()
    parts = zip(size.tensor_split(num_bins), hits(delta)[order].tensor_split(num_bins), strict=True)
    return [
        ReliabilityBin(float(s.mean()), float(torch.sigmoid(s).mean()), float(h.mean()), len(s))
        for s, h in parts
        if len(s)
    ]


def fit_temperature(delta: Tensor, *, iterations: int = 100) -> float:
    """The T > 0 that minimises mean −logsigmoid(Δ/T): above 1, scores are too confident. Reported, never applied.

    Convex in 1/T, so bisection on the derivative; T is kept within [1e-3, 1e3].
    """
    delta = delta.double()
    low, high = 1 / MAX_INVERSE_TEMPERATURE, MAX_INVERSE_TEMPERATURE
    for _ in range(iterations):
        middle = (low * high) ** 0.5
        slope = -(delta * logsigmoid(-middle * delta).exp()).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / low


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties share their mean rank."""
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two columns ``[R]``, such as scores and lengths; NaN when either is constant."""
    x, y = _ranks(first), _ranks(second)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def kendall_tau(delta: Tensor, group: Tensor) -> float:
    """Mean over prompts of (concordant − discordant) / pairs; ``group`` ``[P]`` says which prompt a pair is of."""
    _, inverse, counts = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, torch.sign(delta.double()))
    return float((sums / counts).mean())


@torch.no_grad()
def pair_metrics(scores: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`calibration_metrics` needs of one batch: one row a decided pair of positive weight, on the CPU.

    Args:
        scores: One per response ``[R]``.
        batch: A responses batch (``pair_*``, ``completion_mask``, ``group``).
    """
    decided = (batch["pair_weight"] > 0) & (batch["pair_label"] != 0.5)
    # a label below one half says that the second response is the better one
    upright = batch["pair_label"][decided] > 0.5
    first, second = batch["pair_chosen"][decided], batch["pair_rejected"][decided]
    better, worse = torch.where(upright, first, second), torch.where(upright, second, first)
    lengths = batch["completion_mask"].sum(1)
    pairs = {
        "chosen": scores[better].double(),
        "rejected": scores[worse].double(),
        "chosen_length": lengths[better],
        "rejected_length": lengths[worse],
        "strength": batch["pair_strength"][decided],
        "group": batch["group"][better],
    }
    return {name: values.cpu() for name, values in pairs.items()}


def calibration_metrics(batches: Sequence[Mapping[str, Tensor]], strengths: Sequence[str]) -> dict[str, float]:
    """Metrics of a whole evaluation from the :func:`pair_metrics` of its batches; what is undefined is left out.

    ``accuracy/<strength>``, ``accuracy_length_matched``, ``ece``, ``brier``, ``temperature_fit``,
    ``length_correlation``, ``mean`` and ``std`` of the scores, and ``rank/kendall_tau`` where prompts have several
    pairs. Every pair counts once; the weighted accuracy is one of the sums of an evaluation.
    """
    pairs = _concatenated(batches)
    if not len(pairs["chosen"]):
        return {}
    delta = pairs["chosen"] - pairs["rejected"]
    scores = torch.cat([pairs["chosen"], pairs["rejected"]])
    lengths = torch.cat([pairs["chosen_length"], pairs["rejected_length"]])
    metrics = {
        "accuracy_length_matched": accuracy_length_matched(delta, pairs["chosen_length"], pairs["rejected_length"]),
        "ece": expected_calibration_error(delta),
        "brier": brier_score(delta),
        "temperature_fit": fit_temperature(delta),
        "length_correlation": spearman(scores, lengths),
        "mean": float(scores.mean()),
        "std": float(scores.std(unbiased=False)),
    }
    by_strength = accuracy_by_strength(delta, pairs["strength"], strengths)
    metrics |= {f"accuracy/{name}": value for name, value in by_strength.items()}
    if len(pairs["group"].unique()) < len(delta):
        metrics["rank/kendall_tau"] = kendall_tau(delta, pairs["group"])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def differences(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Δ of every pair of the :func:`pair_metrics` of an evaluation ``[P]``."""
    return torch.cat([batch["chosen"] - batch["rejected"] for batch in batches])


@torch.no_grad()
def score_metrics(scores: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`regression_metrics` needs of one batch: one row a response of positive weight, on the CPU.

    Args:
        scores: One per response ``[R]``, in the unit of the batch's ``score``.
        batch: A responses batch (``score``, ``response_weight``, ``completion_mask``).
    """
    used = batch["response_weight"] > 0
    columns = {"predicted": scores, "score": batch["score"], "length": batch["completion_mask"].sum(1)}
    return {name: values[used].double().cpu() for name, values in columns.items()}


def regression_metrics(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Metrics of a whole evaluation from the :func:`score_metrics` of its batches; what is undefined is left out.

    ``mae`` and ``rmse`` in the unit of the scores, ``r2`` (share of their variance that is explained), ``spearman``,
    ``length_correlation``, ``mean`` and ``std`` of what is predicted.
    """
    predicted, score, length = (
        torch.cat([batch[name] for batch in batches]) for name in ("predicted", "score", "length")
    )
    if not len(score):
        return {}
    error = predicted - score
    variance = float(score.var(unbiased=False))
    metrics = {
        "mae": float(error.abs().mean()),
        "rmse": float((error**2).mean().sqrt()),
        "r2": 1 - float((error**2).mean()) / variance if variance > 0 else math.nan,
        "spearman": spearman(predicted, score),
        "length_correlation": spearman(predicted, length),
        "mean": float(predicted.mean()),
        "std": float(predicted.std(unbiased=False)),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _concatenated(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batches end to end, with groups numbered through."""
    offset, groups = 0, []
    for batch in batches:
        groups.append(batch["group"] + offset)
        offset += int(batch["group"].max()) + 1 if len(batch["group"]) else 0
    pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return pairs | {"group": torch.cat(groups)}
