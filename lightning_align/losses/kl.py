"""Estimators of KL(π‖π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020). Nats.

The exact per-position KL needs both distributions and is computed where the logits are (``models.logprobs``).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_align.losses.masked import at_least_float32, masked_sum


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d = log π − log π_ref, per token: unbiased, may be negative; as a loss its expected gradient is 0."""
    return at_least_float32(logp) - at_least_float32(ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½ d², per token: biased, never negative; as a loss its expected gradient is ∇KL(π‖π_ref)."""
    return 0.5 * k1(logp, ref_logp) ** 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^(−d) − 1 + d, per token: unbiased, never negative; as a loss its expected gradient is ∇KL(π_ref‖π)."""
    d = k1(logp, ref_logp)
    return torch.expm1(-d) + d


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token KL by the estimator of that name, a key of ``KL_ESTIMATORS``."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {estimator!r}: give one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](logp, ref_logp)


def sequence_kl(kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ_t m_t kl_t for each sequence, ``[B]``; its mean over sequences is ``objective/kl``."""
    return masked_sum(kl_BT, mask_BT, dim=1)
