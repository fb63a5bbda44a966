"""Comparisons that may tie: probabilities of win, tie and loss with one learnt parameter."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum
from lightning_align.losses.reward_model import centring, comparison_metrics, pairs_of


def rao_kupper(delta: Tensor, eta: Tensor) -> Tensor:
    """Log-probabilities ``[3, P]`` of win, tie and loss; Rao & Kupper 1967.

    P(win) = σ(Δ − η), P(loss) = σ(−Δ − η), P(tie) = 1 − P(win) − P(loss) = (e^(2η) − 1) P(win) P(loss).

    Args:
        delta: Δ = r_i − r_j ``[P]``.
        eta: η ≥ 0, half the width of the band in which two are perceived as equal.
    """
    win, loss = logsigmoid(delta - eta), logsigmoid(-delta - eta)
    log_expm1 = 2 * eta + torch.log(-torch.expm1(-2 * eta))  # of 2η, without overflow
    return torch.stack([win, win + loss + log_expm1, loss])


def davidson(delta: Tensor, kappa: Tensor) -> Tensor:
    """Log-probabilities ``[3, P]`` of win, tie and loss; Davidson 1970.

    They are proportional to e^(r_i), ν e^((r_i + r_j) / 2) and e^(r_j).

    Args:
        delta: Δ = r_i − r_j ``[P]``.
        kappa: κ = ln ν.
    """
    return log_softmax(torch.stack([delta / 2, kappa.expand_as(delta), -delta / 2]), dim=0)


@dataclass(frozen=True)
class TieModel:
    """A model of ties and its one parameter.

    Attributes:
        name: As in the options.
        log_probabilities: Of win, tie and loss ``[3, P]``, from differences ``[P]`` and the parameter.
        from_free: The parameter from a number without bounds, which is what an optimiser moves.
        to_free: That number from the parameter.
        start: The parameter at the start: about one pair in twenty of equal scores ties.
    """

    name: str
    log_probabilities: Callable[[Tensor, Tensor], Tensor]
    from_free: Callable[[Tensor], Tensor]
    to_free: Callable[[float], float]
    start: float


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


TIE_MODELS = {
    "rao_kupper": TieModel("rao_kupper", rao_kupper, softplus, _inverse_softplus, 0.1),
    "davidson": TieModel("davidson", davidson, lambda free: free, lambda kappa: kappa, math.log(0.1)),
}


def tied_preference_loss(
    scores: Tensor,
    pair_chosen: Tensor,
    pair_rejected: Tensor,
    parameter: Tensor,
    *,
    log_probabilities: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor | None = None,
    margin: Tensor | None = None,
    label: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Σ_p w_p [−ln P(tie)] over pairs labelled ½, Σ_p w_p [−q ln P(win) − (1 − q) ln P(loss)] over the others.

    P at Δ − m; q as in :func:`~lightning_align.losses.reward_model.preference_loss`, whose arguments these are. A tie
    has no margin, and smoothing swaps sides, which makes no tie.

    Args:
        scores: One per response ``[R]``.
        pair_chosen: Rows of ``scores`` ``[P]``.
        pair_rejected: Rows of ``scores`` ``[P]``.
        parameter: η or κ, a scalar.
        log_probabilities: :func:`rao_kupper` or :func:`davidson`.
        weight: w ≥ 0 ``[P]``.
        margin: m ``[P]``.
        label: p ``[P]``; exactly ½ for a tie.
        label_smoothing: ε.
        center_coef: c.

    Returns:
        The summed loss; metrics ``loss``, those of ``comparison_metrics``, and the shares of ties, ``ties/predicted``
        and ``ties/observed``.
    """
    scores = at_least_float32(scores)
    pairs = pairs_of(scores, pair_chosen, pair_rejected, weight=weight, margin=margin, label=label)
    tied, counted = pairs.label == 0.5, pairs.weight > 0
    ahead = pairs.delta - pairs.margin.where(~tied, 0.0)
    win, tie, lose = log_probabilities(ahead, parameter.to(scores.dtype))
    belief = pairs.label * (1 - label_smoothing) + (1 - pairs.label) * label_smoothing
    per_pair = torch.where(tied, -tie, -belief * win - (1 - belief) * lose)
    loss = masked_sum(pairs.weight * per_pair, counted) + centring(pairs, center_coef)
    total = masked_sum(pairs.weight, counted)
    _, predicted, _ = log_probabilities(pairs.delta.detach(), parameter.detach().to(scores.dtype)).exp()
    return loss, {
        "loss": (loss.detach(), total),
        "ties/predicted": (masked_sum(pairs.weight * predicted, counted), total),
        "ties/observed": (masked_sum(pairs.weight, counted & tied), total),
        **comparison_metrics(scores, pair_chosen, pair_rejected, weight=pairs.weight, label=pairs.label),
    }
