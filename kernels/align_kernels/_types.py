"""What the vocabulary operations take and return."""

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of tokens, float32 (float64 for float64 inputs), in the shape of the labels; None where not asked for.

    Args:
        logp: Log-probability of each label, in nats; 0 where the label is outside the vocabulary or masked.
        entropy: Of each distribution, in nats.
        kl: Exact KL of each distribution from the reference's, Σ p (log p − log q), in nats.
        lse: Log of the sum of the exponentials of the logits.
        argmax: The most likely token, int64.
    """

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    lse: Tensor
    argmax: Tensor | None


class Reference(NamedTuple):
    """The distribution q of the exact KL in :func:`linear_token_logprobs`; constants, whatever their flags say.

    Args:
        hidden: ``[…, H′]``, as many rows as the policy has.
        weight: ``[V, H′]``.
        bias: ``[V]`` or None.
        temperature: Divides its logits.
        softcap: Bounds its logits, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None


class PolicyLoss(NamedTuple):
    """A policy loss and what a training loop logs of it; everything but ``loss`` is detached.

    Args:
        loss: Scalar, float32 (float64 for float64 inputs).
        logp: Log-prob of each token, in the shape of the labels; 0 where masked.
        entropy: Of each distribution; 0 where masked.
        ratio: exp(logp − old_logp), or of the sequence for ``ratio="sequence"``; 0 where masked.
        clip_low_count: Tokens whose gradient the lower clip removed, int64 scalar.
        clip_high_count: Likewise for the upper clip; for ``cispo`` the tokens whose weight it bounded.
        approx_kl: Mean of ½ (logp − old_logp)² over the counted tokens, scalar.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clip_low_count: Tensor
    clip_high_count: Tensor
    approx_kl: Tensor
