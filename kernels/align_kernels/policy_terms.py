"""From log-probs to a policy loss and its derivative with respect to them, token by token: the arithmetic of K3."""

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.reference import MAX_LOG_RATIO

LOSSES = ("ppo", "grpo", "dapo", "dr_grpo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")
SMALL = 1e-3  # below it, expm1(−d) + d is cancellation, and its series exact


class Objective(NamedTuple):
    """Which loss, and its constants; see :func:`align_kernels.linear_policy_loss`."""

    loss: str
    clip_low: float
    clip_high: float
    clip_ratio_c: float | None
    kl_coef: float
    kl_estimator: str
    tis_cap: float | None


class Tokens(NamedTuple):
    """What is known of the counted tokens ``[n]`` but for their log-probs, in float32 or wider."""

    old_logp: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logp: Tensor | None
    rollout_logp: Tensor | None

    def at(self, part: slice) -> "Tokens":
        """Of some of the tokens."""
        return Tokens(*(None if values is None else values[part] for values in self))  # type: ignore[arg-type]


class Terms(NamedTuple):
    """Loss of each token ``[n]``, its derivatives, and what the clip did.

    Args:
        loss: Weighted, without entropy.
        by_ratio: Derivative of the weighted loss with respect to the log-ratio that the ratio is made of.
        by_logp: Derivative with respect to the log-prob by other ways.
        ratio: exp of the log-ratio.
        low: Whether the lower clip removed the gradient.
        high: Whether the upper one did.
    """

    loss: Tensor
    by_ratio: Tensor
    by_logp: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor


def policy_terms(logp: Tensor, log_ratio: Tensor, tokens: Tokens, objective: Objective) -> Terms:
    """Terms of tokens with log-probs ``[n]`` and log-ratios ``[n]``, logp − old_logp or their sequence's mean."""
    a = tokens.advantages
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    # beyond the clamp the ratio is constant
    slope = torch.where(log_ratio.abs() <= MAX_LOG_RATIO, ratio, 0.0)
    floor, ceiling = 1 - objective.clip_low, 1 + objective.clip_high
    zero = torch.zeros_like(logp)
    if objective.loss == "cispo":
        bounded = ratio.clamp(max=ceiling)
        loss, by_ratio, by_logp = -bounded * a * logp, zero, -bounded * a
        low, high = torch.zeros_like(a, dtype=torch.bool), ratio > ceiling
    else:
        low, high = (ratio < floor) & (a < 0), (ratio > ceiling) & (a > 0)
        loss = -torch.minimum(ratio * a, ratio.clamp(floor, ceiling) * a)
        by_ratio, by_logp = torch.where(low | high, 0.0, -slope * a), zero
        if objective.clip_ratio_c is not None:
            bound = -objective.clip_ratio_c * a
            by_ratio = torch.where((a < 0) & (loss > bound), 0.0, by_ratio)
            loss = torch.where(a < 0, torch.minimum(loss, bound), loss)
    if objective.tis_cap is not None:
        assert tokens.rollout_logp is not None
        tis = (tokens.old_logp - tokens.rollout_logp).exp().clamp(max=objective.tis_cap)
        loss, by_ratio, by_logp = loss * tis, by_ratio * tis, by_logp * tis
    if tokens.ref_logp is not None:
        kl, slope = kl_terms(logp - tokens.ref_logp, objective.kl_estimator)
        loss, by_logp = loss + objective.kl_coef * kl, by_logp + objective.kl_coef * slope
    w = tokens.weights
    return Terms(loss * w, by_ratio * w, by_logp * w, ratio, low, high)


def kl_terms(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimator of the KL from d = logp − ref_logp, and its derivative."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d * d / 2, d
    change = torch.expm1(-d)
    series = d * d * (0.5 - d * (1 / 6 - d / 24))
    return torch.where(d.abs() < SMALL, series, change + d), -change
