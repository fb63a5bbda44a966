"""What is logged of preference optimisation, under TRL's names, as sums over pairs or answers that are divided once.

Rewards are implicit: β Λ, or β times the log-prob where no reference is compared with.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_align.losses.masked import Metrics, masked_sum
from lightning_align.losses.preference import Pairs, log_odds_ratio

ROUNDING = 64  # units in the last place


@torch.no_grad()
def pair_sums(
    pairs: Pairs, weight: Tensor, label: Tensor, *, beta: float, reference_free: bool, per_token: bool
) -> Metrics:
    """``rewards/…`` and ``logps/…`` of pairs.

    Args:
        pairs: Log-probs and lengths ``[P]``.
        weight: w ≥ 0 ``[P]``; a pair of weight 0 touches nothing.
        label: Probability that chosen is the better one ``[P]``; pairs labelled ½ have no accuracy.
        beta: Scale of the rewards.
        reference_free: Rewards are of log-probs, not of ratios.
        per_token: Log-probs (and rewards of them) are means over an answer's tokens.

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (rewards that are equal
        but for the rounding of log-probs count ½: at the start, policy and reference are the same),
        ``logps/chosen``, ``logps/rejected``.
    """
    sums = (pairs.chosen_logp, pairs.rejected_logp)
    logps = (pairs.chosen_mean, pairs.rejected_mean) if per_token else sums
    chosen, rejected = logps if reference_free else (pairs.chosen_ratio, pairs.rejected_ratio)
    counted = weight > 0
    decided = counted & (label != 0.5)
    ahead = chosen - rejected
    ahead = ahead.where(ahead.abs() > _rounding(pairs), 0.0)
    hits = 0.5 * (1 + torch.sign(ahead) * torch.sign(label - 0.5))
    total = masked_sum(weight, counted)

    def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
        return masked_sum(weight * values, counted), total

    return {
        "rewards/chosen": mean_of(beta * chosen),
        "rewards/rejected": mean_of(beta * rejected),
        "rewards/margins": mean_of(beta * (chosen - rejected)),
        "rewards/accuracies": (masked_sum(weight * hits, decided), masked_sum(weight, decided)),
        "logps/chosen": mean_of(logps[0]),
        "logps/rejected": mean_of(logps[1]),
    }


def _rounding(pairs: Pairs) -> Tensor:
    """What log-probs of these pairs may be off by ``[P]``, however rows are batched."""
    largest = pairs.chosen_logp.abs().maximum(pairs.rejected_logp.abs())
    return ROUNDING * torch.finfo(largest.dtype).eps * largest


@torch.no_grad()
def odds_sums(pairs: Pairs, weight: Tensor) -> Metrics:
    """ORPO's ``log_odds_chosen`` (the log of the odds ratio) and ``log_odds_ratio`` (its logsigmoid), as TRL has it."""
    counted = weight > 0
    odds, total = log_odds_ratio(pairs), masked_sum(weight, counted)
    return {
        "log_odds_chosen": (masked_sum(weight * odds, counted), total),
        "log_odds_ratio": (masked_sum(weight * logsigmoid(odds), counted), total),
    }


@torch.no_grad()
def answer_sums(logp: Tensor, ratio: Tensor, label: Tensor, weight: Tensor, *, beta: float) -> Metrics:
    """``rewards/…`` and ``logps/…`` of single answers ``[R]``; ``label`` is true for good ones."""
    sums: Metrics = {}
    for side, of_side in (("chosen", label.bool()), ("rejected", ~label.bool())):
        counted = of_side & (weight > 0)
        total = masked_sum(weight, counted)
        sums[f"rewards/{side}"] = masked_sum(beta * weight * ratio, counted), total
        sums[f"logps/{side}"] = masked_sum(weight * logp, counted), total
    return sums
