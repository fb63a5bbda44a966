"""ReST's Improve step: how much each kept completion weighs (Gulcehre et al. 2023, 2308.08998).

Legend: B completions, T tokens.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.masked import Metrics, at_least_float32

ImproveLoss = Literal["bc", "gold", "v_mpo", "weighted_bc"]
LARGEST_WEIGHT = 20.0  # of weighted behavioural cloning, as in advantage-weighted regression (1910.00177)


def reward_weights(
    rewards: Tensor, loss: ImproveLoss, *, everyone: Tensor, threshold: Tensor | float, temperature: float
) -> Tensor:
    """Weight of each kept completion ``[B]``, 0 or more; their scale does not matter, the loss is divided by their sum.

    - ``bc`` and ``gold``: 1.
    - ``weighted_bc``: exp((R − τ)/T), at most 20.
    - ``v_mpo``: exp(R/T) in the better half of all that was kept, 0 in the other (Song et al. 2019, 1909.12238).

    Args:
        rewards: R of the kept completions ``[B]``.
        loss: Which of the losses.
        everyone: R of all that was kept, over all ranks ``[N]``.
        threshold: τ that they are above, one or ``[B]``.
        temperature: T.
    """
    rewards = at_least_float32(rewards)
    if loss == "weighted_bc":
        return torch.exp((rewards - threshold) / temperature).clamp(max=LARGEST_WEIGHT)
    if loss == "v_mpo":
        everyone = at_least_float32(everyone).to(rewards.device)
        weights = torch.exp((rewards - everyone.max()) / temperature)  # the largest is 1: nothing overflows
        return weights.where(rewards >= everyone.median(), 0.0)
    return torch.ones_like(rewards)


def improve_loss(
    logp: Tensor, mask: Tensor, weights: Tensor, *, gold_power: float = 0.0, gold_floor: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Σ_i w_i Σ_t −u_t log p(y_t): a *sum*; the caller divides once, by Σ w over the tokens of the global batch.

    Args:
        logp: Log-probs of the completions' tokens ``[B, T]``.
        mask: True on them ``[B, T]``.
        weights: w, of :func:`reward_weights` ``[B]``.
        gold_power: u = max(p^α, floor) without gradient, with α this: tokens that the policy finds unlikely teach less
            (GOLD, Pang and He 2021, 2009.07839). 0: u = 1.
        gold_floor: Least u.

    Returns:
        The loss, and ``loss`` and ``empty_batches`` as metrics.
    """
    logp = at_least_float32(logp)
    token_weights = weights.to(logp.dtype)[:, None] * mask
    loss, metrics = token_cross_entropy(logp, token_weights)
    if gold_power:
        trust = torch.exp(gold_power * logp.detach().where(mask.bool(), 0.0)).clamp(min=gold_floor)
        loss, _ = token_cross_entropy(logp, token_weights * trust)
        metrics["loss"] = (loss.detach(), metrics["loss"][1])
    return loss, metrics
