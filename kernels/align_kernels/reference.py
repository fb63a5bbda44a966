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
    nothing = p == 0  # p > 0 would hide a NaN
    return torch.where(nothing, 0.0, p * torch.where(nothing, 0.0, values)).sum(-1)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden·weightᵀ + bias`` in float32 or wider."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    product = hidden.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def kl_term(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Schulman's k1, k2, k3 of d = logp − ref_logp."""
    d = logp - ref_logp
    return {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d}[estimator]


def policy_loss(
    logp: Tensor,
    entropy: Tensor,
    counted: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    seq_ids: Tensor | None = None,
    *,
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    ratio: str = "token",
    tis_cap: float | None = None,
) -> PolicyLoss:
    """The loss of tokens ``[N]``, of those counted; ``weights`` multiply it. See ``linear_policy_loss``."""
    zero = torch.zeros_like(logp)
    log_ratio = torch.where(counted, logp - old_logp, zero)
    d = log_ratio
    if ratio == "sequence":
        assert seq_ids is not None
        d = zero
        for sequence in seq_ids.unique():
            tokens = counted & (seq_ids == sequence)
            d = torch.where(tokens, log_ratio[tokens].mean(), d)
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
        per_token = per_token * (old_logp - rollout_logp).exp().clamp(max=tis_cap)
    if ref_logp is not None:
        per_token = per_token + kl_coef * kl_term(logp, ref_logp, kl_estimator)
    per_token = torch.where(counted, (per_token - entropy_coef * entropy) * weights, zero)
    return PolicyLoss(
        per_token.sum(),
        torch.where(counted, logp, zero).detach(),
        torch.where(counted, entropy, zero).detach(),
        torch.where(counted, r, zero).detach(),
        (low & counted).sum(),
        (high & counted).sum(),
        (log_ratio.detach() ** 2 / 2).sum() / counted.sum().clamp(min=1),
    )
