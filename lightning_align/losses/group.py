"""Policy gradients without a value function: advantages from groups of completions, and the losses that use them.

Legend: B completions, T tokens; rows with the same ``group`` answer the same prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_align.losses.kl import k3
from lightning_align.losses.masked import (
    REDUCTIONS,
    Metrics,
    at_least_float32,
    masked_mean,
    masked_sum,
    mean_and_var,
    moments,
)
from lightning_align.losses.policy import MAX_LOG_RATIO

STD_EPSILON = 1e-4  # TRL's, added to a standard deviation that divides

Advantages = tuple[Tensor, Tensor]


# ------------------------------------------------------------------ advantages
def _spread(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R − R̄ of each row's group, the group's standard deviation (n − 1) and count n of scored rows, each ``[B]``.

    In float64. Rewards are first shifted by their group's least, so that equal ones give exactly 0.
    """
    scored = ~rewards.isnan()
    _, row = group.unique(return_inverse=True)
    rewards, empty = rewards.detach().double(), rewards.new_zeros(len(rewards), dtype=torch.float64)

    def total(values: Tensor) -> Tensor:
        return empty.index_add(0, row, values)[row]

    count = total(scored.double())
    least = (empty + torch.inf).scatter_reduce(0, row, rewards.where(scored, torch.inf), "amin")[row]
    shifted = torch.where(scored, rewards - least, 0.0)
    centred = torch.where(scored, shifted - total(shifted) / count.clamp(min=1), 0.0)
    return centred, (total(centred**2) / (count - 1).clamp(min=1)).sqrt(), count


def _as(rewards: Tensor, advantages: Tensor, std: Tensor) -> Advantages:
    dtype = at_least_float32(rewards).dtype
    return advantages.to(dtype), std.to(dtype)


def reinforce(
    rewards: Tensor, group: Tensor, *, baseline: Tensor | float | None = None, batch_moments: Tensor | None = None
) -> Advantages:
    """A_i = R_i − b; b is ``baseline`` (an average of earlier batches), or the mean of the batch's other rewards.

    Williams 1992. Arguments as for :func:`batch_std`; a batch of one without a baseline has advantage 0.
    """
    _, std, _ = _spread(rewards, group)
    scored, values = ~rewards.isnan(), rewards.detach().double()
    if baseline is None:
        count, total, _ = (moments(rewards, scored) if batch_moments is None else batch_moments).unbind()
        advantages = torch.where(count > 1, (count * values - total) / (count - 1).clamp(min=1), 0.0)
    else:
        advantages = values - baseline
    return _as(rewards, advantages.where(scored, 0.0), std)


def rloo(rewards: Tensor, group: Tensor) -> Advantages:
    """A_i = R_i − mean of the group's others = n/(n − 1) · (R_i − R̄). Arguments as for :func:`batch_std`.

    Kool et al. 2019; Ahmadian et al. 2024 (2402.14740).
    """
    centred, std, count = _spread(rewards, group)
    return _as(rewards, centred * count / (count - 1).clamp(min=1), std)


def grpo(rewards: Tensor, group: Tensor) -> Advantages:
    """A_i = (R_i − R̄)/(s + 1e-4), s the group's standard deviation (n − 1). Arguments as for :func:`batch_std`.

    DeepSeekMath, Shao et al. 2024 (2402.03300), with TRL's constants.
    """
    centred, std, _ = _spread(rewards, group)
    return _as(rewards, centred / (std + STD_EPSILON), std)


def dr_grpo(rewards: Tensor, group: Tensor) -> Advantages:
    """A_i = R_i − R̄ of the group, Liu et al. 2025 (2503.20783). Arguments as for :func:`batch_std`."""
    centred, std, _ = _spread(rewards, group)
    return _as(rewards, centred, std)


def batch_std(rewards: Tensor, group: Tensor, *, batch_moments: Tensor | None = None) -> Advantages:
    """A_i = (R_i − R̄ of the group)/(s + 1e-4), s the standard deviation (n − 1) of the whole batch.

    Hu et al. 2025 (2501.03262), as TRL's ``scale_rewards="batch"``.

    Args:
        rewards: R ``[B]``, NaN where unscored: such a row has advantage 0 and is part of no mean, std or count.
        group: Number of each row's prompt ``[B]`` int64. Groups may differ in size, and have to be whole.
        batch_moments: :func:`~lightning_align.losses.masked.moments` of the rewards summed over the global batch; by
            default those of ``rewards``.

    Returns:
        Advantages ``[B]``, and the standard deviation of each row's *group* ``[B]``; both 0 where only one is scored.
        Groups of equal rewards have exactly 0. No gradient.
    """
    centred, std, _ = _spread(rewards, group)
    total = moments(rewards, ~rewards.isnan()) if batch_moments is None else batch_moments
    _, var = mean_and_var(total, unbiased=True)
    return _as(rewards, centred / (var.sqrt() + STD_EPSILON), std)


ADVANTAGES: dict[str, Callable[..., Advantages]] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "batch_std": batch_std,
}


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to L_max − L_cache tokens, falling linearly to −1 at L_max, and −1 beyond; ``[B]``.

    DAPO, Yu et al. 2025 (2503.14476), eq. 13.

    Args:
        lengths: Tokens of each completion ``[B]``.
        max_length: L_max (20,480 in the paper).
        buffer: L_cache (4,096 in the paper).
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}: it must be positive and at most max_length, {max_length}")
    return ((max_length - buffer - at_least_float32(lengths)) / buffer).clamp(-1, 0)


# ------------------------------------------------------------------ ratios
def _sequence_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(log_ratio, mask, dim=1)[:, None]


def _sequence_sum(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(log_ratio, mask, dim=1)[:, None]


def _sequence_token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return _sequence_mean(log_ratio, mask).detach() + log_ratio - log_ratio.detach()


# Log-ratio whose exp weighs a token, [B, T], or [B, 1] if it is the same for all tokens of a completion
RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, mask: log_ratio,
    "sequence": _sequence_mean,  # GSPO
    "sequence_token": _sequence_token,  # GSPO-token
    "sequence_sum": _sequence_sum,  # RLOO
}


def truncated_importance_weights(logp: Tensor, engine_logp: Tensor, mask: Tensor, *, cap: float = 2.0) -> Tensor:
    """min(exp(logp − engine_logp), cap) ``[B, T]`` on the mask and 1 elsewhere, without gradient.

    Corrects for an engine that samples from slightly other probabilities than the training forward computes.

    Args:
        logp: Log-probs in the training forward under the weights that sampled ``[B, T]``.
        engine_logp: Log-probs that the engine reported ``[B, T]``.
        mask: True on completion tokens ``[B, T]``.
        cap: Largest weight.
    """
    log_ratio = at_least_float32(logp.detach()) - at_least_float32(engine_logp.detach())
    return log_ratio.where(mask.bool(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


# ------------------------------------------------------------------ losses
LOSSES = ("reinforce", "clip", "cispo")


def group_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: str | None = "token",
    loss: str = "clip",
    reduction: str = "sequence",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    importance_weights: Tensor | None = None,
    max_completion_length: int | None = None,
    normaliser: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Reduced per-token loss of a policy gradient; gradient flows through ``logp`` only.

    * ``reinforce``: −A logp (Williams 1992);
    * ``clip``: −min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) (PPO's; GRPO, RLOO, Dr. GRPO, DAPO, GSPO);
    * ``cispo``: −sg(min(ρ, 1 + ε_high)) A logp (MiniMax-M1, 2506.13585): every token keeps a gradient.

    ρ = exp(clamp(d, ±20)), where d = logp − old_logp by ``token``, its mean over the completion's tokens for
    ``sequence`` (GSPO, Zheng et al. 2025, 2507.18071), its sum for ``sequence_sum`` (RLOO); ``sequence_token`` has the
    value of ``sequence`` and its gradient at one token, for advantages that differ by token (GSPO-token).

    Args:
        logp: Log-probs under the current policy ``[B, T]``.
        old_logp: Log-probs under the policy that sampled ``[B, T]``.
        advantages: One per completion ``[B]``, or per token ``[B, T]``. Without score they are 0, and what remains is
            the KL term; :func:`~lightning_align.losses.advantages.scored_mask` and a normaliser drop that too.
        mask: True on completion tokens ``[B, T]``; what stands elsewhere does not matter.
        ratio: A key of ``RATIOS``; None for ``reinforce``, which has no ratio.
        loss: One of ``LOSSES``.
        reduction: A key of ``REDUCTIONS``.
        epsilon: ε of the lower side; ``cispo`` has no lower side.
        epsilon_high: ε of the upper side, by default the same.
        delta: Cap > 1 + ε_high of ρ where A < 0 (two-sided clip, as PPO's dual clip).
        beta: β of a KL term β·k3(logp, ref_logp) that every token adds.
        ref_logp: Log-probs under the reference ``[B, T]``; needed if β is not 0.
        importance_weights: :func:`truncated_importance_weights` ``[B, T]`` of the policy term.
        max_completion_length: L of the ``constant`` reduction.
        normaliser: :func:`reduction_count` of the global batch; by default this batch's own.

    Returns:
        The loss; metrics ``loss``, ``kl`` (with a reference), ``policy/approxkl_avg`` (½ d²), ``val/ratio`` (mean of
        the tokens' e^d), ``empty_batches``, and TRL's clip ratios: shares of tokens, or of completions where they have
        one ρ. ``clip_ratio/low_min`` and ``high_max`` are extremes over this batch's completions, so they do depend
        on how a batch is split.
    """
    _check(ratio, loss, reduction)
    high = epsilon if epsilon_high is None else epsilon_high
    if beta and ref_logp is None:
        raise ValueError(f"beta is {beta}: its KL term needs ref_logp")
    if reduction == "constant" and max_completion_length is None:
        raise ValueError("reduction is 'constant': it needs max_completion_length")
    if delta is not None and (loss != "clip" or delta <= 1 + high):
        raise ValueError(f"delta is {delta}: it must exceed 1 + epsilon_high, and belongs to loss 'clip' alone")
    mask = mask.bool()
    logp, old_logp = (at_least_float32(values).where(mask, 0.0) for values in (logp, old_logp.detach()))
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    advantages = at_least_float32(advantages.detach()).where(mask, 0.0)
    log_ratio = logp - old_logp
    weight = torch.ones_like(logp)
    if ratio is not None:
        weight = RATIOS[ratio](log_ratio, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    metrics = _ratio_metrics(log_ratio.detach(), mask)
    if loss == "clip":
        per_token = _clipped(weight, advantages, epsilon, high, delta)
        metrics |= _clip_metrics(weight.detach(), advantages, mask, epsilon, high)
    else:  # without a ratio, the weight is 1
        per_token = -weight.detach().clamp(max=1 + high) * advantages * logp
    if loss == "cispo":
        clipped = (weight.detach() > 1 + high) & (advantages > 0)
        metrics["cispo_clip_ratio"] = _share(clipped, mask, by_token=weight.shape == mask.shape)
    if importance_weights is not None:
        per_token = per_token * at_least_float32(importance_weights.detach()).where(mask, 0.0)
    if ref_logp is not None:
        kl = k3(logp, ref_logp.detach().where(mask, 0.0))
        metrics["kl"] = (masked_sum(kl.detach(), mask), mask.sum().to(kl.dtype))
        per_token = per_token + beta * kl if beta else per_token
    options = {"length": max_completion_length} if reduction == "constant" else {}
    total = REDUCTIONS[reduction](per_token, mask, normaliser=1.0, **options)
    count = reduction_count(mask, reduction).to(total.dtype)
    metrics["loss"] = (total.detach(), count)
    return total / (count.clamp(min=1) if normaliser is None else normaliser), metrics


def reduction_count(mask: Tensor, reduction: str) -> Tensor:
    """What a reduction divides by: ``mask``'s tokens, its non-empty completions (``sequence``), or all completions.

    Summed over the global batch it is the ``normaliser`` of :func:`group_policy_loss`.
    """
    if reduction == "token":
        return mask.bool().sum()
    if reduction == "sequence":
        return mask.bool().any(1).sum()
    return mask.new_tensor(len(mask), dtype=torch.long)


def _check(ratio: str | None, loss: str, reduction: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}: give one of {', '.join(LOSSES)}")
    if (ratio is None) != (loss == "reinforce") or not (ratio is None or ratio in RATIOS):
        raise ValueError(f"ratio is {ratio!r}: give one of {', '.join(RATIOS)}, and None for loss 'reinforce' alone")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: give one of {', '.join(REDUCTIONS)}")


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A), ρ at most δ."""
    clipped = ratio.clamp(1 - low, 1 + high)
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _share(hits: Tensor, mask: Tensor, *, by_token: bool) -> tuple[Tensor, Tensor]:
    """Hits ``[B, T]`` and their possible number: tokens, or non-empty completions if all tokens of one agree."""
    if not by_token:
        hits, mask = hits.any(1), mask.any(1)  # advantages outside the mask are 0: no hits
    return masked_sum(hits, mask), mask.sum().float()


def _clip_metrics(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Metrics:
    by_token = ratio.shape == mask.shape
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    some = mask.any()
    # padded, because a batch of no rows has no extremes; of an empty completion the mean is 0
    least = pad(masked_mean(below, mask, dim=1).where(mask.any(1), torch.inf), (0, 1), value=torch.inf).amin()
    most = pad(masked_mean(above, mask, dim=1), (0, 1)).amax()
    return {
        "clip_ratio/low_mean": _share(below, mask, by_token=by_token),
        "clip_ratio/high_mean": _share(above, mask, by_token=by_token),
        "clip_ratio/region_mean": _share(below | above, mask, by_token=by_token),
        "clip_ratio/low_min": (least.where(some, 0.0), some.float()),
        "clip_ratio/high_max": (most, some.float()),
    }


def _ratio_metrics(log_ratio: Tensor, mask: Tensor) -> Metrics:
    count = mask.sum().to(log_ratio.dtype)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "policy/approxkl_avg": (masked_sum(0.5 * log_ratio**2, mask), count),
        "val/ratio": (masked_sum(ratio, mask), count),
        "empty_batches": ((count == 0).to(count.dtype), torch.ones_like(count)),
    }


# ------------------------------------------------------------------ the published methods
@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a method.

    Args:
        advantage: A key of ``ADVANTAGES``.
        ratio: Of :func:`group_policy_loss`, as are ``loss``, ``reduction``, ``epsilon`` and ``epsilon_high``.
        kl: Where the KL goes: into the ``reward`` (k1), into the ``loss`` (k3), or nowhere.
        beta: Its coefficient.
        filter: ``zero_std`` leaves out groups of equal rewards and samples others (DAPO's dynamic sampling).
    """

    advantage: str
    ratio: str | None
    loss: str
    reduction: str
    epsilon: float = 0.2
    epsilon_high: float | None = None
    kl: str = "none"
    beta: float = 0.0
    filter: str = "none"


PRESETS: dict[str, Preset] = {
    "reinforce": Preset(
        advantage="reinforce", ratio=None, loss="reinforce", reduction="sum_sequence", kl="reward", beta=0.05
    ),
    "rloo": Preset(advantage="rloo", ratio="sequence_sum", loss="clip", reduction="sequence", kl="reward", beta=0.05),
    "grpo": Preset(advantage="grpo", ratio="token", loss="clip", reduction="sequence", kl="loss", beta=0.04),
    "dr_grpo": Preset(advantage="dr_grpo", ratio="token", loss="clip", reduction="constant"),
    "dapo": Preset(
        advantage="grpo", ratio="token", loss="clip", reduction="token", epsilon_high=0.28, filter="zero_std"
    ),
    "cispo": Preset(advantage="grpo", ratio="token", loss="cispo", reduction="token", epsilon_high=0.28),
    "gspo": Preset(
        advantage="grpo", ratio="sequence", loss="clip", reduction="sequence", epsilon=3e-4, epsilon_high=4e-4
    ),
}
