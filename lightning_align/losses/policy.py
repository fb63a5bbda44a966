"""The clipped policy-gradient loss of PPO."""

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum, token_mean

# exp(20) ≈ 5e8: a token whose log-ratio is further out would overflow; clipping has long removed its gradient.
MAX_LOG_RATIO = 20.0


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    normaliser: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Token mean of max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)), ρ = exp(clamp(logp − old_logp, ±20)).

    Schulman et al. 2017 (1707.06347), eq. 7. Gradient flows through ``logp`` only.

    Args:
        logp: Log-probs under the current policy ``[B, T]``.
        old_logp: Log-probs under the policy that sampled ``[B, T]``.
        advantages: One per token ``[B, T]``.
        mask: True on completion tokens ``[B, T]``; what stands elsewhere does not matter.
        cliprange: ε of both sides.
        cliprange_high: ε of the upper side, if another (DAPO's clip-higher).
        dual_clip: c > 1: where A < 0 the loss is at most −A c (Ye et al. 2019, 1912.09729).
        normaliser: Token count of the global batch; by default this batch's own.

    Returns:
        The loss, and as metrics its masked mean, ``policy/clipfrac_avg`` (share of tokens whose gradient the clip
        removed), ``policy/approxkl_avg`` (½ d², TRL's name), ``policy/approxkl_k3`` and the ratio's first two moments.
    """
    mask = mask.bool()
    advantages = torch.where(mask, at_least_float32(advantages.detach()), 0.0)
    # `where` before exp: the gradient of an overflowing masked entry would be 0 · inf
    log_ratio = torch.where(mask, at_least_float32(logp) - at_least_float32(old_logp.detach()), 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = cliprange if cliprange_high is None else cliprange_high
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        if dual_clip <= 1 + high:
            raise ValueError(f"dual_clip is {dual_clip}: it must exceed the upper clip 1 + {high}")
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -advantages * dual_clip), per_token)
    count = mask.sum().to(per_token.dtype)
    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    means = {
        "loss/policy_avg": per_token.detach(),
        "policy/clipfrac_avg": clipped.detach() > unclipped.detach(),
        "policy/approxkl_avg": 0.5 * log_ratio**2,
        "policy/approxkl_k3": torch.expm1(log_ratio) - log_ratio,
        "val/ratio": ratio,
        "val/ratio_squared": ratio**2,
    }
    metrics: Metrics = {name: (masked_sum(values, mask), count) for name, values in means.items()}
    metrics["empty_batches"] = ((count == 0).to(count.dtype), torch.ones_like(count))
    return token_mean(per_token, mask, normaliser=normaliser), metrics
