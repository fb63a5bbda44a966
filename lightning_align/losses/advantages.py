"""Per-token rewards, from which :func:`align_kernels.gae` estimates advantages."""

import torch
from torch import Tensor

from lightning_align.losses.masked import at_least_float32


def scored_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """``mask`` ``[B, T]`` without the sequences that have no score (NaN): advantage 0, and part of no statistic."""
    return mask.bool() & ~scores.isnan()[:, None]


def shaped_rewards(kl: Tensor, mask: Tensor, scores: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = −β kl_t on the mask, plus the sequence's score on its last masked token; ``[B, T]``, no gradient.

    Args:
        kl: Per-token KL estimate or exact KL ``[B, T]``.
        mask: True on completion tokens ``[B, T]``; a sequence with an empty mask gets no reward at all.
        scores: One per sequence ``[B]``; the last token is EOS where there is one.
        kl_coef: β.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * at_least_float32(kl.detach()), 0.0)
    later = mask.flip(1).cumsum(1).flip(1)  # masked tokens from t on: 1 at the last one
    return rewards + torch.where(mask & (later == 1), scores.detach().to(rewards.dtype)[:, None], 0.0)
