"""How the named parts of a reward become one number: sum, minimum, LLaMA-2's safety gate, ensembles, whitening.

Legend: K parts or members, B completions. NaN means "does not apply": it is left out, never passed on.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_align.losses.masked import masked_whiten, moments

How = Literal["sum", "min", "mean", "uwo", "gate"]
EnsembleHow = Literal["mean", "min", "uwo"]
Whiten = Literal["batch", "running", "none"]
AllReduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes

LOGIT_LIMIT = math.log((1 - 1e-6) / 1e-6)  # probabilities are clamped to [1e-6, 1 − 1e-6]
RUNNING_DECAY = 0.99


@dataclass(frozen=True)
class LengthPenalty:
    """−coef · max(0, tokens − max_length)."""

    coef: float
    max_length: int

    def __call__(self, lengths: Tensor) -> Tensor:
        """The penalty, 0 or below, of completions of so many tokens ``[B]``."""
        return -self.coef * (lengths - self.max_length).clamp(min=0).float()


@dataclass(frozen=True)
class Combination:
    """What is done with the parts.

    Attributes:
        how: ``sum`` (weighted), ``min``, ``mean``, ``uwo`` or ``gate``.
        uwo_coef: λ of ``uwo``.
        threshold: Probability of being safe below which the ``gate`` takes the safety score.
        whiten: What is done with a gated score: whitened over the ``batch``, by ``running`` moments, or ``none``.
        length_penalty: Added at the end.
    """

    how: How = "sum"
    uwo_coef: float = 0.1
    threshold: float = 0.15
    whiten: Whiten = "batch"
    length_penalty: LengthPenalty | None = None


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k s_k over the parts that apply, ``[B]``; NaN where no part of non-zero weight does."""
    counted = [name for name, weight in weights.items() if weight]
    table = torch.stack([parts[name] for name in counted])  # [K, B]
    weight = table.new_tensor([weights[name] for name in counted])[:, None]
    missing = table.isnan()
    total = torch.where(missing, 0.0, table * weight).sum(0)
    return torch.where(missing.all(0), torch.nan, total)


def gate(helpfulness: Tensor, safety: Tensor, is_safety: Tensor, *, threshold: float = 0.15) -> Tensor:
    """The score of the model that counts, as clamped log-odds ``[B]``; LLaMA-2 (2307.09288, section 3.2.3).

    The safety model's where the prompt is about safety, or where it gives the completion a probability σ(r_s) below the
    threshold; else the helpfulness model's. NaN where the model that counts gave none; a safety score that is missing
    does not close the gate of other prompts.

    Args:
        helpfulness: Raw scores of the helpfulness model ``[B]``.
        safety: Raw scores of the safety model ``[B]``.
        is_safety: Whether the prompt is about safety ``[B]`` bool.
        threshold: On the probability scale; compared as log-odds, in which float32 is exact enough.
    """
    closed = is_safety | (safety < math.log(threshold / (1 - threshold)))
    return torch.where(closed, safety, helpfulness).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


# ------------------------------------------------------------------ ensembles; Coste et al. 2023 (2310.02743)
def combine_members(members: Tensor, how: EnsembleHow, *, uwo_coef: float = 0.1) -> Tensor:
    """``mean`` μ, ``min``, or ``uwo`` μ − λ · variance (biased), over the members that apply ``[B]``.

    Args:
        members: Scores ``[K, B]`` on a common scale.
        how: Which.
        uwo_coef: λ; 0.5 for best-of-n, 0.1 for PPO in the paper's implementation.
    """
    if how == "min":
        missing = members.isnan()
        return torch.where(missing.all(0), torch.nan, torch.where(missing, torch.inf, members).amin(0))
    mean = members.nanmean(0)
    return mean if how == "mean" else mean - uwo_coef * _variance(members)


def spread(members: Tensor) -> Tensor:
    """Standard deviation (biased) among the members that apply ``[B]``; NaN where none does."""
    return _variance(members).sqrt()


def _variance(members: Tensor) -> Tensor:
    return ((members - members.nanmean(0)) ** 2).nanmean(0)


# ------------------------------------------------------------------ whitening
class Whitening:
    """(s − mean) / deviation, by the moments of the batch over all processes, or by their running mean.

    Args:
        how: ``batch``, ``running`` (exponential with decay 0.99, from the first batch on) or ``none``.
    """

    def __init__(self, how: Whiten) -> None:
        self.how = how
        self.moments = [0.0, 0.0, 0.0]  # running: weight so far, and weighted mean and mean square

    def __call__(self, scores: Tensor, all_reduce: AllReduce) -> Tensor:
        """Whitened scores ``[B]``; NaN stays NaN, and fewer than two scores stay as they are."""
        if self.how == "none":
            return scores
        scored = ~scores.isnan()
        total = all_reduce(moments(scores, scored))
        if self.how == "running":
            total = self._running(total)
        return torch.where(scored, masked_whiten(scores, scored, global_moments=total), torch.nan)

    def _running(self, total: Tensor) -> Tensor:
        """Count this batch in; the moments of two scores (so many are whitened) with the running mean and variance."""
        if total[0] > 0:
            new = torch.stack([total.new_ones(()), total[1] / total[0], total[2] / total[0]])
            before = total.new_tensor(self.moments)
            self.moments = (RUNNING_DECAY * before + (1 - RUNNING_DECAY) * new).tolist()
        weight, first, second = self.moments
        return total.new_tensor([2.0, 2 * first / weight, 2 * second / weight]) if weight else total
