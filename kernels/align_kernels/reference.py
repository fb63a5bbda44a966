"""Plain torch for every vocabulary operation: textbook formulas, no chunks, no tricks; the truth in tests.

Computes in float32 or wider: give float64 for the truth. Gradients are autograd's.
"""

import torch
from torch import Tensor

from align_kernels._types import PolicyLoss, TokenStats

# exp(20) ≈ 5e8: a log-ratio further out would overflow; clipping has long removed its gradient.
MAX_LOG_RATIO = 20.0


def transform(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """z = cap·tanh(x/cap)/temperature in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    entropy: bool = False,
    argmax: bool = False,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_temperature: float | None = None,
    ref_softcap: float | None = None,
) -> TokenStats:
    """Statistics of logits ``[…, V]``; the reference is transformed like the policy by default."""
    z = transform(logits, temperature, softcap)
    lse = z.logsumexp(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    inside = (labels >= 0) & (labels < z.shape[-1])
    logp = torch.where(inside, log_p.gather(-1, torch.where(inside, labels, 0)[..., None].long())[..., 0], 0.0)
    kl = None
    if ref_logits is not None:
        same = ref_temperature is None
        q = transform(ref_logits.detach(), ref_temperature or temperature, softcap if same else ref_softcap)
        kl = _expectation(p, log_p - q.log_softmax(-1).to(z.dtype))
    counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()

    def kept(values: Tensor) -> Tensor:
        return torch.where(counted, values, torch.zeros_like(values))

    return TokenStats(
        kept(logp),
        kept(-_expectation(p, log_p)) if entropy else None,
        None if kl is None else kept(kl),
        kept(lse),
        kept(z.argmax(-1)) if argmax else None,
    )


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Σ p·v; what has probability 0 contributes 0, whatever its value."""
    return torch.where(p > 0, p * torch.where(p > 0, values, 0.0), 0.0).sum(-1)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden·weightᵀ + bias`` in float32 or wider."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    product = hidden.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def kl_term(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Schulman's k1, k2, k3 of d = logp − ref_logp."""
    d = logp - ref_logp
    return {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d}[estimator]


def sequence_sum(values: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Σ of the values of each sequence, by a loop."""
    return torch.stack([values[seq_ids == i].sum() for i in range(num_seqs)]) if num_seqs else values[:0]


def policy_loss(
    logp: Tensor,
    entropy: Tensor,
    counted: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    ratio: str = "token",
    tis_cap: float | None = None,
    normalizer: Tensor | None = None,
    seq_ids: Tensor | None = None,
) -> PolicyLoss:
    """The loss of log-probs ``[N]``, of the counted tokens; see :func:`align_kernels.linear_policy_loss`."""
    zero = torch.zeros_like(logp)
    old_logp, advantages = (torch.where(counted, values.to(logp.dtype), zero) for values in (old_logp, advantages))
    log_ratio = torch.where(counted, logp - old_logp, zero)
    d = log_ratio
    if ratio == "sequence":
        assert seq_ids is not None
        ids = torch.where(counted, seq_ids, 0)
        sums = torch.stack([torch.where(counted & (ids == i), d, zero).sum() for i in range(len(d))])
        sizes = torch.stack([(counted & (ids == i)).sum() for i in range(len(d))])
        d = torch.where(counted, (sums / sizes.clamp(min=1))[ids], zero)
    r = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if loss == "cispo":
        per_token = -r.detach().clamp(max=1 + clip_high) * advantages * logp
        low, high = torch.zeros_like(counted), r > 1 + clip_high
    else:
        per_token = -torch.minimum(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)
        low, high = (r < 1 - clip_low) & (advantages < 0), (r > 1 + clip_high) & (advantages > 0)
        if clip_ratio_c is not None:
            per_token = torch.where(advantages < 0, torch.minimum(per_token, -clip_ratio_c * advantages), per_token)
    if tis_cap is not None:
        assert rollout_logp is not None
        per_token = per_token * torch.where(counted, old_logp - rollout_logp, zero).exp().clamp(max=tis_cap).detach()
    if ref_logp is not None:
        per_token = per_token + kl_coef * kl_term(
            logp, torch.where(counted, ref_logp.to(logp.dtype), logp), kl_estimator
        )
    per_token = per_token - entropy_coef * entropy
    count = counted.sum()
    if normalizer is None:
        weights = torch.ones_like(logp) / count.clamp(min=1)
    elif normalizer.dim() == 0:
        weights = torch.ones_like(logp) / normalizer
    else:
        assert seq_ids is not None
        weights = normalizer[torch.where(counted, seq_ids, 0)]
    return PolicyLoss(
        torch.where(counted, per_token * weights, zero).sum(),
        torch.where(counted, logp, zero).detach(),
        torch.where(counted, entropy, zero).detach(),
        torch.where(counted, r, zero).detach(),
        (low & counted).sum(),
        (high & counted).sum(),
        (log_ratio.detach() ** 2 / 2).sum() / count.clamp(min=1),
    )
