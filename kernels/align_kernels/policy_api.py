"""The public policy loss: arguments checked, an implementation chosen, shapes restored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import _checks, few_logits, policy_ops, reference
from align_kernels._dispatch import choose
from align_kernels._labels import locate
from align_kernels._plan import autocast, chunk_rows, counted_rows
from align_kernels._types import PolicyLoss
from align_kernels.native import Wanted, statistics_dtype
from align_kernels.policy_loss import Sequences, of_few_logits
from align_kernels.policy_terms import KL_ESTIMATORS, LOSSES, Objective, Tokens
from align_kernels.pref_logps import check_sequences, segment_sums


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    bias: Tensor | None = None,
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    ratio: str = "token",
    tis_cap: float | None = None,
    normalizer: Tensor | float | None = None,
    seq_ids: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    check_labels: bool = False,
    impl: str | None = None,
) -> PolicyLoss:
    """K3: a clipped policy-gradient loss from hidden states; the gradients are computed with it, chunk by chunk.

    With r = exp(clamp(logp − old_logp, ±20)) and A the advantage, a token's loss is, by ``loss``,
    ``ppo`` (also ``grpo``, ``dapo``, ``dr_grpo``, which differ in the normaliser alone): −min(r A, clip(r, 1 − ε_l,
    1 + ε_h) A) (Schulman et al. 2017, 1707.06347, eq. 7), at most −c A where A < 0 with ``clip_ratio_c`` c (Ye et al.
    2019, 1912.09729); ``cispo``: −sg(min(r, 1 + ε_h)) A logp (MiniMax 2025, 2506.13585). It is times
    min(exp(old_logp − rollout_logp), ``tis_cap``), plus ``kl_coef`` times the estimator, minus ``entropy_coef`` times
    the entropy. Differentiable in ``hidden``, ``weight`` and ``bias``, once. On a CPU, rows whose derivatives are all
    zero meet no second product.

    Args:
        hidden: ``[…, H]``; see :func:`align_kernels.linear_token_logprobs`, as for what is not named here.
        weight: ``[V, H]``.
        labels: ``[…]``; −100 does not count.
        old_logp: ``[…]``, constant: log-probs under the policy that sampled, recomputed.
        advantages: ``[…]``, constant: one a token.
        mask: ``[…]`` bool or uint8, 1 counts.
        ref_logp: ``[…]``, constant; needed where ``kl_coef`` is not 0.
        rollout_logp: ``[…]``, constant: as the sampler said; needed for ``tis_cap``.
        bias: ``[V]`` or None.
        loss: One of ``ppo``, ``grpo``, ``dapo``, ``dr_grpo``, ``cispo``.
        clip_low: ε_l.
        clip_high: ε_h.
        clip_ratio_c: c of the dual clip, or None.
        kl_coef: Weight of the KL.
        kl_estimator: ``k1`` d, ``k2`` d²/2 or ``k3`` e^−d − 1 + d of d = logp − ref_logp.
        entropy_coef: Weight of the entropy.
        ratio: ``token``, or ``sequence`` (GSPO, 2507.18071): exp of the mean log-ratio of the token's sequence.
        tis_cap: Bound of the importance weight of the sampler, or None for none.
        normalizer: What the sum of the tokens' losses is divided by, a number or scalar tensor; or what a token's loss
            is multiplied by, for each sequence ``[num_seqs]``; by default the number of counted tokens divides.
        seq_ids: ``[…]``, sequence of each counted token, from 0, not descending; needed for sequences. Below the length
            of ``normalizer``, or without one by sequence below the number of tokens.
        rows: int64 ``[M]``, the tokens that the mask counts.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`align_kernels.linear_token_logprobs`; for options that need an
            argument that is missing.
    """
    _checks.one_of("loss", loss, LOSSES)
    _checks.one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    _checks.one_of("ratio", ratio, ("token", "sequence"))
    _checks.positive(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes, tis_cap=tis_cap)
    _checks.floating("accum_dtype", accum_dtype)
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high {clip_high}: they must be 0 or more")
    constants = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    _checks.tokens(mask, labels, **constants, seq_ids=seq_ids)
    _checks.constant(**constants)
    by_sequence = isinstance(normalizer, Tensor) and normalizer.dim() == 1
    _check_needs(kl_coef, ref_logp, tis_cap, rollout_logp, ratio == "sequence" or by_sequence, seq_ids)
    if clip_ratio_c is not None and (loss == "cispo" or clip_ratio_c <= 1 + clip_high):
        raise ValueError(f"clip_ratio_c is {clip_ratio_c}: it must exceed 1 + clip_high, and loss must not be cispo")
    hidden, weight, bias = autocast(hidden, weight, bias)
    _checks.layer(hidden, weight, bias, labels)
    _checks.device(hidden=hidden, weight=weight, labels=labels, mask=mask, bias=bias, seq_ids=seq_ids, **constants)
    chosen = choose("linear_policy_loss", hidden.device, hidden.dtype, impl)
    dtype = statistics_dtype(hidden.dtype)
    rows = counted_rows(mask, rows, labels)

    def counted(values: Tensor | None, to: torch.dtype | None = None) -> Tensor | None:
        if values is None:
            return None
        flat = values.detach().reshape(-1)
        return (flat if rows is None else flat.index_select(0, rows)).to(to or values.dtype)

    few_labels = counted(labels)
    ids = counted(seq_ids, torch.int64)
    assert few_labels is not None
    num_seqs = len(normalizer) if by_sequence and isinstance(normalizer, Tensor) else labels.numel()
    if ids is not None:
        check_sequences(ids, num_seqs)
    weights = _weights(few_labels, weight.shape[0], normalizer, ids, dtype)
    old, a, ref, rollout = (counted(values, dtype) for values in constants.values())
    assert old is not None
    assert a is not None
    ref = ref if kl_coef else None
    flat = hidden.reshape(-1, hidden.shape[-1])
    settings: dict[str, Any] = {
        "loss": loss,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "clip_ratio_c": clip_ratio_c,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "entropy_coef": entropy_coef,
        "tis_cap": tis_cap,
    }
    if chosen == "native" and few_logits.suits(len(few_labels) * weight.shape[0], flat):
        states = flat if rows is None else flat.index_select(0, rows)
        sequences = Sequences(ids, num_seqs, segment_sums) if ids is not None and ratio == "sequence" else None
        if entropy_coef or softcap is not None:
            wanted = Wanted(temperature, softcap, entropy=True)
            logp, entropy, _, lse, _ = few_logits.row_stats(F.linear(states, weight, bias), few_labels, None, wanted)
        else:
            logp, lse, entropy = few_logits.linear_log_probs(
                states, weight, bias, few_labels, temperature, entropy=True
            )
        assert entropy is not None
        found: tuple[Any, ...] = of_few_logits(
            logp,
            entropy,
            lse,
            locate(few_labels, len(weight))[1],
            Tokens(old, a, weights, ref, rollout),
            Objective(loss, clip_low, clip_high, clip_ratio_c, kl_coef, kl_estimator, tis_cap),
            entropy_coef=entropy_coef,
            sequences=sequences,
        )
    elif chosen == "reference":
        states = flat if rows is None else flat[rows]
        stats = reference.token_stats(
            reference.logits(states, weight, bias), few_labels, entropy=True, temperature=temperature, softcap=softcap
        )
        assert stats.entropy is not None
        if few_labels.is_cpu or check_labels:
            locate(few_labels, weight.shape[0], check=True)
        inside = (few_labels >= 0) & (few_labels < weight.shape[0])
        found = reference.policy_loss(
            stats.logp, stats.entropy, inside, old, a, weights, ref, rollout, ids, ratio=ratio, **settings
        )
    else:
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        sequence_ids = ids if ratio == "sequence" else None
        inputs = (flat, weight, bias, few_labels, rows, old, a, weights, ref, rollout, sequence_ids, num_seqs)
        chunk = chunk_rows(chunk_bytes, weight.shape[0], flat)
        rest = (temperature, softcap, chunk, accum_dtype, needs, check_labels, chosen)
        found = policy_ops.policy_loss(*inputs, *settings.values(), *rest)
    value, logp, entropy, ratios, low, high, approx_kl = found[:7]

    def whole(values: Tensor) -> Tensor:
        if rows is not None:
            values = values.new_zeros(labels.numel()).index_copy(0, rows, values)
        return values.view(labels.shape)

    return PolicyLoss(value, whole(logp), whole(entropy), whole(ratios), low, high, approx_kl)


def _check_needs(
    kl_coef: float,
    ref_logp: Tensor | None,
    tis_cap: float | None,
    rollout_logp: Tensor | None,
    by_sequence: bool,
    seq_ids: Tensor | None,
) -> None:
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef is {kl_coef}: it needs ref_logp")
    if tis_cap is not None and rollout_logp is None:
        raise ValueError(f"tis_cap is {tis_cap}: it needs rollout_logp")
    if by_sequence and seq_ids is None:
        raise ValueError("ratio='sequence' and a normalizer by sequence need seq_ids")
    if seq_ids is not None:
        _checks.dtype("seq_ids", seq_ids, _checks.INTEGERS)


def _weights(
    labels: Tensor, vocabulary: int, normalizer: Tensor | float | None, ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What each counted token's loss is multiplied by, ``[M]``."""
    if normalizer is None:
        count = ((labels >= 0) & (labels < vocabulary)).sum().clamp(min=1)
        return count.to(dtype).reciprocal().expand(len(labels))
    if not isinstance(normalizer, Tensor):
        _checks.positive(normalizer=normalizer)
        return torch.full(labels.shape, 1 / normalizer, dtype=dtype, device=labels.device)
    _checks.device(labels=labels, normalizer=normalizer)
    if normalizer.dim() == 0:
        return normalizer.detach().to(dtype).reciprocal().expand(len(labels))
    if normalizer.dim() > 1:
        raise ValueError(f"normalizer is {list(normalizer.shape)}: it must be a scalar or [num_seqs]")
    assert ids is not None
    return normalizer.detach().to(dtype)[ids]
