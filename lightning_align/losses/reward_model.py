"""Pairwise (Bradley–Terry) loss of reward models; K-wise is the same with weights."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum


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
        The summed loss; metrics ``loss``, ``accuracy`` (equal scores count ½; pairs labelled ½ do not), ``margin``
        (mean Δ), and ``mean_reward``, ``min_reward``, ``max_reward`` over the responses of weighted pairs.
    """
    scores = at_least_float32(scores)
    chosen, rejected = scores[pair_chosen], scores[pair_rejected]
    weight = torch.ones_like(chosen) if weight is None else weight.to(scores.dtype)
    label = torch.ones_like(chosen) if label is None else label.to(scores.dtype)
    margin = torch.zeros_like(chosen) if margin is None else margin.to(scores.dtype)
    # the scores of padding rows may be anything
    chosen, rejected = chosen.where(weight > 0, 0.0), rejected.where(weight > 0, 0.0)
    delta = chosen - rejected
    belief = label * (1 - label_smoothing) + (1 - label) * label_smoothing
    per_pair = -belief * logsigmoid(delta - margin) - (1 - belief) * logsigmoid(margin - delta)
    if center_coef:
        per_pair = per_pair + center_coef * (chosen + rejected) ** 2
    loss = masked_sum(weight * per_pair, weight > 0)
    return loss, _metrics(loss, scores, pair_chosen, pair_rejected, weight, label)


@torch.no_grad()
def _metrics(
    loss: Tensor, scores: Tensor, pair_chosen: Tensor, pair_rejected: Tensor, weight: Tensor, label: Tensor
) -> Metrics:
    delta = scores[pair_chosen] - scores[pair_rejected]
    counted = weight > 0
    decided = counted & (label != 0.5)
    hits = 0.5 * (1 + torch.sign(delta) * torch.sign(label - 0.5))
    used = torch.zeros_like(scores, dtype=torch.bool)  # each response once, padding rows not at all
    used[pair_chosen[counted]] = True
    used[pair_rejected[counted]] = True
    some = used.any().to(scores.dtype)
    least = torch.where(used, scores, torch.inf).amin()
    most = torch.where(used, scores, -torch.inf).amax()
    return {
        "loss": (loss.detach(), masked_sum(weight, counted)),
        "accuracy": (masked_sum(weight * hits, decided), masked_sum(weight, decided)),
        "margin": (masked_sum(weight * delta, counted), masked_sum(weight, counted)),
        "mean_reward": (masked_sum(scores, used), used.sum().to(scores.dtype)),
        "min_reward": (torch.where(some > 0, least, 0.0), some),
        "max_reward": (torch.where(some > 0, most, 0.0), some),
    }
