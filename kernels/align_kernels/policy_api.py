"""The public policy loss: arguments checked, an implementation chosen, shapes restored."""

from typing import Any, NamedTuple

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
    objective = Objective(loss, clip_low, clip_high, clip_ratio_c, kl_coef, kl_estimator, tis_cap)
    _check_objective(objective)
    _checks.one_of("ratio", ratio, ("token", "sequence"))
    _checks.positive(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    _checks.floating("accum_dtype", accum_dtype)
    constants = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    _checks.tokens(mask, labels, **constants, seq_ids=seq_ids)
    _checks.constant(**constants)
    num_seqs = len(normalizer) if isinstance(normalizer, Tensor) and normalizer.dim() == 1 else None
    _check_needs(kl_coef, ref_logp, tis_cap, rollout_logp, ratio == "sequence" or num_seqs is not None, seq_ids)
    hidden, weight, bias = autocast(hidden, weight, bias)
    _checks.layer(hidden, weight, bias, labels)
    _checks.device(hidden=hidden, weight=weight, labels=labels, mask=mask, bias=bias, seq_ids=seq_ids, **constants)
    chosen = choose("linear_policy_loss", hidden.device, hidden.dtype, impl)
    rows = counted_rows(mask, rows, labels)
    few_labels, ids = _counted(labels, rows), _counted(seq_ids, rows, torch.int64)
    num_seqs = labels.numel() if num_seqs is None else num_seqs
    if ids is not None:
        check_sequences(ids, num_seqs)
    dtype = statistics_dtype(hidden.dtype)
    weights = _weights(few_labels, weight.shape[0], normalizer, ids, dtype)
    old, a, ref, rollout = (_counted(values, rows, dtype) for values in constants.values())
    given = _Given(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        rows,
        few_labels,
        Tokens(old, a, weights, ref if kl_coef else None, rollout),
        Sequences(ids, num_seqs, segment_sums) if ids is not None and ratio == "sequence" else None,
        Wanted(temperature, softcap, entropy=True),
        objective,
        entropy_coef,
        check_labels,
    )
    if chosen == "native" and few_logits.suits(len(few_labels) * weight.shape[0], given.hidden):
        found = _by_few_logits(given)
    elif chosen == "reference":
        found = _by_reference(given)
    else:
        found = _by_operation(given, chunk_rows(chunk_bytes, weight.shape[0], given.hidden), accum_dtype, chosen)
    value, logp, entropy, ratios, low, high, approx_kl = found[:7]
    logp, entropy, ratios = (_scattered(values, rows, labels.shape) for values in (logp, entropy, ratios))
    return PolicyLoss(value, logp, entropy, ratios, low, high, approx_kl)


class _Given(NamedTuple):
    """A layer with all hidden states ``[N, H]``, the ``rows`` of them that count, and all else of these alone."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    labels: Tensor
    tokens: Tokens
    sequences: Sequences | None
    wanted: Wanted
    objective: Objective
    entropy_coef: float
    check_labels: bool

    def states(self) -> Tensor:
        """Hidden states of the tokens that count ``[M, H]``."""
        return self.hidden if self.rows is None else self.hidden.index_select(0, self.rows)


def _by_few_logits(given: _Given) -> tuple[Any, ...]:
    states, weight, bias, labels, wanted = given.states(), given.weight, given.bias, given.labels, given.wanted
    if given.entropy_coef or wanted.softcap is not None:
        logp, entropy, _, lse, _ = few_logits.row_stats(F.linear(states, weight, bias), labels, None, wanted)
    else:
        temperature = wanted.temperature
        logp, lse, entropy = few_logits.linear_log_probs(states, weight, bias, labels, temperature, entropy=True)
    assert entropy is not None
    return of_few_logits(
        logp,
        entropy,
        lse,
        locate(labels, len(weight))[1],
        given.tokens,
        given.objective,
        entropy_coef=given.entropy_coef,
        sequences=given.sequences,
    )


def _by_reference(given: _Given) -> tuple[Any, ...]:
    labels, weight, (temperature, softcap, *_) = given.labels, given.weight, given.wanted
    logits = reference.logits(given.states(), weight, given.bias)
    stats = reference.token_stats(logits, labels, entropy=True, temperature=temperature, softcap=softcap)
    assert stats.entropy is not None
    if labels.is_cpu or given.check_labels:
        locate(labels, weight.shape[0], check=True)
    old, advantages, weights, ref, rollout = given.tokens
    return reference.policy_loss(
        stats.logp,
        stats.entropy,
        (labels >= 0) & (labels < weight.shape[0]),
        old,
        advantages,
        weights,
        ref,
        rollout,
        None if given.sequences is None else given.sequences.ids,
        ratio="token" if given.sequences is None else "sequence",
        entropy_coef=given.entropy_coef,
        **given.objective._asdict(),
    )


def _by_operation(given: _Given, chunk: int, accum_dtype: torch.dtype | None, chosen: str) -> tuple[Any, ...]:
    layer, sequences = (given.hidden, given.weight, given.bias), given.sequences
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in layer]
    ids, num_seqs = (None, 0) if sequences is None else (sequences.ids, sequences.num)
    *objective, tis_cap = given.objective
    temperature, softcap, *_ = given.wanted
    inputs = (*layer, given.labels, given.rows, *given.tokens, ids, num_seqs)
    settings = (*objective, given.entropy_coef, tis_cap, temperature, softcap)
    return policy_ops.policy_loss(*inputs, *settings, chunk, accum_dtype, needs, given.check_labels, chosen)


def _counted(values: Any, rows: Tensor | None, to: torch.dtype | None = None) -> Any:
    """Those of ``[…]`` values that count ``[M]``, constant; None stays None."""
    if values is None:
        return None
    flat = values.detach().reshape(-1)
    return (flat if rows is None else flat.index_select(0, rows)).to(to or values.dtype)


def _scattered(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """The counted tokens' values ``[M]`` in the shape of the labels, with 0 elsewhere."""
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return values.view(shape)


def _check_objective(objective: Objective) -> None:
    _checks.one_of("loss", objective.loss, LOSSES)
    _checks.one_of("kl_estimator", objective.kl_estimator, KL_ESTIMATORS)
    _checks.positive(tis_cap=objective.tis_cap)
    low, high, bound = objective.clip_low, objective.clip_high, objective.clip_ratio_c
    if low < 0 or high < 0:
        raise ValueError(f"clip_low is {low} and clip_high {high}: they must be 0 or more")
    if bound is not None and (objective.loss == "cispo" or bound <= 1 + high):
        raise ValueError(f"clip_ratio_c is {bound}: it must exceed 1 + clip_high, and loss must not be cispo")


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
