"""Hindsight instruction relabelling (HIR): learn each output under the instruction that it does follow.

Zhang et al. 2023 (2302.05206). Legend: B outputs, T tokens, K candidate instructions of an output.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum

ABSENT = -1  # number of a candidate that an output does not have


class Candidates(NamedTuple):
    """Instructions that an output is compared under: the distinct ones of the batch, and negatives of its own.

    Args:
        logp: ℓ ``[B, K]``, mean log-prob of output i's tokens given candidate k; sums instead of means saturate.
        instruction: Number of each candidate's instruction ``[B, K]`` int64, the same for equal texts; ``ABSENT``
            where an output has fewer than K, whatever else stands there.
        own: Column of the instruction that output i follows ``[B]`` int64.
    """

    logp: Tensor
    instruction: Tensor
    own: Tensor


def hindsight_loss(
    logp: Tensor,
    loss_weights: Tensor,
    candidates: Candidates | None = None,
    *,
    mean_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    contrast_coef: float = 1.0,
    entropy_coef: float = 0.001,
    label_smoothing: float = 0.1,
    token_normaliser: Tensor | float | None = None,
    output_normaliser: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """L = L_sup + α L_contrast − β H̄: :func:`smoothed_cross_entropy`, :func:`contrastive_loss`, mean entropy.

    The first and the last are means over tokens (weighted ones, and all that are learnt), the second over outputs.

    Args:
        logp: Log-probs of the outputs' tokens under their own instructions ``[B, T]``.
        loss_weights: 0 where nothing is learnt, else the weight of the record ``[B, T]``.
        candidates: Needed if α is not 0.
        mean_logp: As for :func:`smoothed_cross_entropy`; needed if ε is not 0.
        entropy: Entropy at each token under the own instruction, with gradient ``[B, T]``; needed if β is not 0.
        contrast_coef: α.
        entropy_coef: β.
        label_smoothing: ε.
        token_normaliser: Σ of ``loss_weights`` over the global batch; by default this batch's own. The entropy is
            divided by it as well, so its tokens weigh what they weigh in L_sup.
        output_normaliser: Outputs of the global batch that are learnt; by default this batch's own.

    Returns:
        The loss; metrics ``hir/loss_sup``, ``hir/loss_contrast``, ``hir/contrast_accuracy``, ``hir/entropy`` (where
        given) and ``empty_batches``.
    """
    if contrast_coef and candidates is None:
        raise ValueError(f"contrast_coef is {contrast_coef}: it needs candidates")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {entropy_coef}: it needs the entropy of the tokens")
    learnt = loss_weights > 0
    loss, metrics = smoothed_cross_entropy(logp, loss_weights, mean_logp, label_smoothing=label_smoothing)
    tokens = metrics["hir/loss_sup"][1]
    per_token = tokens.clamp(min=torch.finfo(tokens.dtype).tiny) if token_normaliser is None else token_normaliser
    loss = loss / per_token
    if entropy is not None:
        total = masked_sum(loss_weights * at_least_float32(entropy), learnt)
        metrics["hir/entropy"] = (total.detach(), tokens)
        loss = loss - entropy_coef * total / per_token
    if candidates is not None:
        contrast, contrast_metrics = contrastive_loss(candidates, rows=learnt.any(1))
        outputs = contrast_metrics["hir/loss_contrast"][1]
        per_output = outputs.clamp(min=1) if output_normaliser is None else output_normaliser
        loss = loss + contrast_coef * contrast / per_output
        metrics |= contrast_metrics
    return loss, metrics


def smoothed_cross_entropy(
    logp: Tensor, loss_weights: Tensor, mean_logp: Tensor | None = None, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Σ_t −w_t [(1 − ε) log p(y_t) + ε (1/V) Σ_v log p(v)]: a *sum*; the caller divides once, by Σ w.

    Without ε it is :func:`~lightning_align.losses.lm.token_cross_entropy`.

    Args:
        logp: Log-probs of the tokens, any shape; whatever stands where the weight is 0 does not matter.
        loss_weights: Same shape: 0 where nothing is learnt, else the weight of the token's record.
        mean_logp: Mean over the vocabulary of the log-probs at each token, with gradient, same shape.
        label_smoothing: ε, the probability that the label spreads over the vocabulary.

    Returns:
        The summed loss; metrics ``hir/loss_sup`` and ``empty_batches``.
    """
    if label_smoothing and mean_logp is None:
        raise ValueError(f"label_smoothing is {label_smoothing}: it needs mean_logp, the mean over the vocabulary")
    loss, metrics = token_cross_entropy(at_least_float32(logp), loss_weights)
    if label_smoothing and mean_logp is not None:
        spread, _ = token_cross_entropy(at_least_float32(mean_logp), loss_weights)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return loss, {"hir/loss_sup": (loss.detach(), metrics["loss"][1]), "empty_batches": metrics["empty_batches"]}


def contrastive_loss(candidates: Candidates, *, rows: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Σ_i −[ℓ_ii − logsumexp_k ℓ_ik]: a *sum*; the caller divides once, by the number of outputs.

    It keeps the model from ignoring instructions: an output must be less likely under others than under its own.
    Gradient flows through every ℓ. An instruction that is a candidate several times counts once, or it would be its
    own negative.

    Args:
        candidates: Of B outputs.
        rows: False on outputs to leave out ``[B]``; by default none.

    Returns:
        The summed loss; metrics ``hir/loss_contrast`` and ``hir/contrast_accuracy`` (own instruction the likeliest;
        shared with those that are equally likely).
    """
    own = candidates.own
    rows = torch.ones_like(own, dtype=torch.bool) if rows is None else rows.bool()
    counted = _distinct(candidates.instruction, own)
    scores = at_least_float32(candidates.logp).where(counted, -torch.inf)
    scores = torch.where(rows[:, None], scores, 0.0)  # NaN and all −inf would have NaN for a gradient
    right = scores.gather(1, own[:, None])[:, 0]
    loss = masked_sum(scores.logsumexp(1) - right, rows)
    best = scores.detach() == scores.detach().amax(1, keepdim=True)
    hits = best.gather(1, own[:, None])[:, 0] / best.sum(1).to(scores.dtype)
    count = rows.sum().to(scores.dtype)
    return loss, {
        "hir/loss_contrast": (loss.detach(), count),
        "hir/contrast_accuracy": (masked_sum(hits, rows), count),
    }


def _distinct(instruction: Tensor, own: Tensor) -> Tensor:
    """True on one column of each instruction that a row has ``[B, K]``: its own, or the first."""
    column = torch.arange(instruction.shape[1], device=instruction.device)
    rank = torch.where(column == own[:, None], -1, column)  # the own comes before all others
    same = instruction[:, :, None] == instruction[:, None, :]
    repeated = (same & (rank[:, None, :] < rank[:, :, None])).any(2)
    return (instruction != ABSENT) & ~repeated
