"""The clipped value loss of PPO."""

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum, token_mean


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    normaliser: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """½ token mean of max((v − G)², (clip(v, v_old − ε, v_old + ε) − G)²). Gradient flows through ``values`` only.

    Args:
        values: Current value estimates ``[B, T]``.
        old_values: Estimates at sampling time ``[B, T]``.
        returns: Targets G, from unwhitened advantages ``[B, T]``.
        mask: True on completion tokens ``[B, T]``; what stands elsewhere does not matter.
        cliprange_value: ε; None switches the clip off.
        normaliser: Token count of the global batch; by default this batch's own.

    Returns:
        The loss, and its masked mean and ``val/clipfrac_avg`` as metrics.
    """
    mask = mask.bool()
    values = torch.where(mask, at_least_float32(values), 0.0)
    old_values = torch.where(mask, at_least_float32(old_values.detach()), 0.0)
    returns = torch.where(mask, at_least_float32(returns.detach()), 0.0)
    squared = (values - returns) ** 2
    worst = squared
    if cliprange_value is not None:
        near = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
        worst = torch.maximum(squared, (near - returns) ** 2)
    per_token = 0.5 * worst
    count = mask.sum().to(per_token.dtype)
    metrics: Metrics = {
        "loss/value_avg": (masked_sum(per_token.detach(), mask), count),
        "val/clipfrac_avg": (masked_sum((worst > squared).detach(), mask), count),
    }
    return token_mean(per_token, mask, normaliser=normaliser), metrics
