"""Losses of reward models: comparisons of two (Bradley–Terry; K-wise is the same with weights), and regression."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum


class Pairs(NamedTuple):
    """Comparisons ``[P]`` with every option filled in; what has weight 0 is clean, whatever stood there."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    margin: Tensor
    label: Tensor

    @property
    def delta(self) -> Tensor:
        """r_c − r_r."""
        return self.chosen - self.rejected


def pairs_of(
    scores: Tensor,
    pair_chosen: Tensor,
    pair_rejected: Tensor,
    *,
    weight: Tensor | None = None,
    margin: Tensor | None = None,
    label: Tensor | None = None,
) -> Pairs:
    """Scores of the two sides of each pair with weight (1), margin (0) and label (1); see :func:`preference_loss`."""
    chosen, rejected = scores[pair_chosen], scores[pair_rejected]
    weight = torch.ones_like(chosen) if weight is None else weight.to(scores.dtype)
    label = torch.ones_like(chosen) if label is None else label.to(scores.dtype)
    margin = torch.zeros_like(chosen) if margin is None else margin.to(scores.dtype)
    # the scores of padding rows may be anything
    return Pairs(chosen.where(weight > 0, 0.0), rejected.where(weight > 0, 0.0), weight, margin, label)


def preference_loss(
    scores: Tensor,
    pair_chosen: Tensor,
    pair_rejected: Tensor,
    *,
    weight: Tensor | None = None,
    margin: Tensor | None = None,
    label: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Σ_p w_p [−q logsigmoid(Δ − m) − (1 − q) logsigmoid(m − Δ) + c (r_c + r_r)²].

    Δ = r_c − r_r and q = p (1 − ε) + (1 − p) ε.

    A *sum*; the caller divides once, by the weight of the global batch. Bradley & Terry 1952; margins: LLaMA-2
    (2307.09288, appendix); K-wise: InstructGPT (2203.02155, eq. 1), each pair of a prompt weighing 1 / (number of its
    untied pairs); centring: Eisenstein et al. 2023 (2312.09244).

    Args:
        scores: One per response ``[R]``, each response encoded once.
        pair_chosen: Rows of ``scores`` ``[P]``.
        pair_rejected: Rows of ``scores`` ``[P]``.
        weight: w ≥ 0 ``[P]``, 1 by default; a pair of weight 0 touches neither loss nor metrics.
        margin: m ``[P]``, 0 by default.
        label: p, probability that chosen is the better one ``[P]``: 1 by default, ½ for a tie.
        label_smoothing: ε, share of labels believed to be swapped.
        center_coef: c (0.01 is common).

    Returns:
        The summed loss; metrics ``loss`` and those of :func:`comparison_metrics`.
    """
    scores = at_least_float32(scores)
    pairs = pairs_of(scores, pair_chosen, pair_rejected, weight=weight, margin=margin, label=label)
    belief = pairs.label * (1 - label_smoothing) + (1 - pairs.label) * label_smoothing
    ahead = pairs.delta - pairs.margin
    per_pair = -belief * logsigmoid(ahead) - (1 - belief) * logsigmoid(-ahead)
    loss = masked_sum(pairs.weight * per_pair, pairs.weight > 0) + centring(pairs, center_coef)
    metrics = comparison_metrics(scores, pair_chosen, pair_rejected, weight=pairs.weight, label=pairs.label)
    return loss, {"loss": (loss.detach(), masked_sum(pairs.weight, pairs.weight > 0)), **metrics}


def centring(pairs: Pairs, center_coef: float) -> Tensor:
    """c Σ_p w_p (r_c + r_r)²: keeps scores near 0 (Eisenstein et al. 2023)."""
    if not center_coef:
        return pairs.weight.new_zeros(())
    return center_coef * masked_sum(pairs.weight * (pairs.chosen + pairs.rejected) ** 2, pairs.weight > 0)


@torch.no_grad()
def comparison_metrics(
    scores: Tensor, pair_chosen: Tensor, pair_rejected: Tensor, *, weight: Tensor, label: Tensor
) -> Metrics:
    """TRL's metrics of comparisons, whatever the loss.

    ``accuracy`` (equal scores count ½; pairs labelled ½ do not), ``margin`` (mean Δ), and ``mean_reward``,
    ``min_reward``, ``max_reward`` over the responses of weighted pairs. Arguments as for :func:`preference_loss`.
    """
    scores = at_least_float32(scores)
    weight, label = weight.to(scores.dtype), label.to(scores.dtype)
    delta = scores[pair_chosen] - scores[pair_rejected]
    counted = weight > 0
    decided = counted & (label != 0.5)
    hits = 0.5 * (1 + torch.sign(delta) * torch.sign(label - 0.5))
    used = torch.zeros_like(scores, dtype=torch.bool)  # each response once, padding rows not at all
    used[pair_chosen[counted]] = True
    used[pair_rejected[counted]] = True
    return {
        "accuracy": (masked_sum(weight * hits, decided), masked_sum(weight, decided)),
        "margin": (masked_sum(weight * delta, counted), masked_sum(weight, counted)),
        **_reward_metrics(scores, used),
    }


def regression_loss(
    scores: Tensor, targets: Tensor, *, weight: Tensor | None = None, delta: float | None = None
) -> tuple[Tensor, Metrics]:
    """Σ_i w_i ½ (r_i − s_i)², or with ``delta`` the Huber loss: δ (|r_i − s_i| − δ/2) beyond δ.

    A *sum*, as :func:`preference_loss`.

    Args:
        scores: r, one per response ``[R]``.
        targets: s ``[R]``, standardised.
        weight: w ≥ 0 ``[R]``, 1 by default; a response of weight 0 touches neither loss nor metrics.
        delta: δ (1 is common).

    Returns:
        The summed loss; metrics ``loss``, ``mean_reward``, ``min_reward``, ``max_reward``.
    """
    scores = at_least_float32(scores)
    weight = torch.ones_like(scores) if weight is None else weight.to(scores.dtype)
    used = weight > 0
    error = torch.where(used, scores - targets.to(scores.dtype), 0.0)
    per_response = 0.5 * error**2 if delta is None else _huber(error, delta)
    loss = masked_sum(weight * per_response, used)
    return loss, {"loss": (loss.detach(), masked_sum(weight, used)), **_reward_metrics(scores.detach(), used)}


def _huber(error: Tensor, delta: float) -> Tensor:
    return huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def _reward_metrics(scores: Tensor, used: Tensor) -> Metrics:
    some = used.any().to(scores.dtype)
    least = torch.where(used, scores, torch.inf).amin()
    most = torch.where(used, scores, -torch.inf).amax()
    return {
        "mean_reward": (masked_sum(scores, used), used.sum().to(scores.dtype)),
        "min_reward": (torch.where(some > 0, least, 0.0), some),
        "max_reward": (torch.where(some > 0, most, 0.0), some),
    }
