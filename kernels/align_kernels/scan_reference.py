"""Reference of the scan operations: loops over tokens in float64, as the formulas are written; the truth in tests.

Sequences lie end to end in flat rows: sequence i is the half-open span ``spans[i]``, of a padded row or between two
boundaries of ``cu_seqlens``.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from align_kernels.scan_checks import result_dtype


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    log_rho: Tensor | None,
    *,
    gamma: float,
    lam: float,
    mask_mode: str,
    rho_bar: float,
    c_bar: float,
) -> tuple[Tensor, Tensor]:
    """A_t = ρ_t (r_t + γ V_n − V_t) + γλ c_t A_n over the steps of each sequence, n the step after t; returns A + V.

    Arguments as in :func:`align_kernels.gae`; ρ_t = min(ρ̄, e^log_rho), c_t = min(c̄, e^log_rho), both 1 without them.
    """
    reward, value = _numbers(rewards), _numbers(values)
    valid = _numbers(mask) if mask is not None else [1.0] * len(reward)
    done = _numbers(dones) if dones is not None else [0.0] * len(reward)
    rho = c = [1.0] * len(reward)
    if log_rho is not None:
        # of the logarithms, since e^log_rho may overflow; this way round a NaN stays
        rho, c = ([math.exp(min(x, math.log(bar))) for x in _numbers(log_rho)] for bar in (rho_bar, c_bar))
    advantages, returns = [0.0] * len(reward), [0.0] * len(reward)
    for index, (lo, hi) in enumerate(spans(rewards, cu_seqlens)):
        after = float(bootstrap[index]) if bootstrap is not None else 0.0
        next_value, next_advantage = after, 0.0
        seen = False  # a valid step to the right
        for t in reversed(range(lo, hi)):
            if not valid[t] and mask_mode != "dense":
                if mask_mode == "stop" and seen:
                    next_value, next_advantage = 0.0, 0.0
                continue
            seen = True
            if done[t]:
                next_value, next_advantage = 0.0, 0.0
            delta = rho[t] * (reward[t] + gamma * next_value - value[t])
            next_advantage = delta + gamma * lam * c[t] * next_advantage
            next_value = value[t]
            if valid[t]:
                advantages[t], returns[t] = next_advantage, next_advantage + value[t]
    return _tensor(advantages, rewards, values), _tensor(returns, rewards, values)


def token_kl(logp: float, ref_logp: float, estimator: str) -> float:
    """k1 d, k2 d²/2 or k3 e^−d − 1 + d for d = logp − ref_logp."""
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    # The first form loses everything to rounding where d is small.
    return math.expm1(-d) + d if abs(d) > 1e-3 else d * d / 2 - d**3 / 6 + d**4 / 24


def shaped_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float,
) -> tuple[Tensor, Tensor]:
    """r_t = −β kl_t on valid tokens, the clipped score added on each sequence's last one; and Σ kl_t per sequence."""
    policy, reference, valid = _numbers(logp), _numbers(ref_logp), _numbers(mask)
    rewards, sums = [0.0] * len(policy), []
    for index, (lo, hi) in enumerate(spans(logp, cu_seqlens)):
        steps = [t for t in range(lo, hi) if valid[t]]
        kl = [token_kl(policy[t], reference[t], kl_estimator) for t in steps]
        for t, x in zip(steps, kl, strict=True):
            rewards[t] = -kl_coef * x
        if steps:
            rewards[steps[-1]] += min(max(float(scores[index]), -score_clip), score_clip)
        sums.append(math.fsum(kl))
    return _tensor(rewards, logp, ref_logp), torch.tensor(sums, dtype=result_dtype(logp, ref_logp), device=logp.device)


def moments(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Count, mean and sum of squared differences from it over each sequence's valid tokens, ``[S, 3]``."""
    number, valid = _numbers(values), _numbers(mask)
    rows = []
    for lo, hi in spans(values, cu_seqlens):
        kept = [number[t] for t in range(lo, hi) if valid[t]]
        mean = sum(kept) / max(len(kept), 1)
        rows.append([float(len(kept)), mean, sum((x - mean) ** 2 for x in kept)])
    return torch.tensor(rows, dtype=result_dtype(values), device=values.device).view(-1, 3)


def shaped(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]`` and moments ``[S, 3]``: shaped_advantages before its whitening."""
    inputs = (logp, ref_logp, scores, mask, cu_seqlens)
    rewards, kl_sum = shaped_rewards(*inputs, kl_coef=kl_coef, kl_estimator=kl_estimator, score_clip=score_clip)
    tensors = (rewards, values, mask, None, bootstrap, cu_seqlens, None)
    advantages, returns = gae(*tensors, gamma=gamma, lam=lam, mask_mode="skip", rho_bar=1.0, c_bar=1.0)
    return advantages, returns, rewards, kl_sum, moments(advantages, mask, cu_seqlens)


def whiten_(values: Tensor, mask: Tensor, partials: Tensor, *, whiten: bool, shift_mean: bool) -> Tensor:
    """(v − mean) / sqrt(var + 1e-8) in place on valid tokens, the mean added back without ``shift_mean``.

    ``partials`` are :func:`moments`. With fewer than two valid tokens the values stay as they are. Returns (mean, var).
    """
    triples = partials.double().tolist()
    count = sum(n for n, _, _ in triples)
    mean = sum(n * m for n, m, _ in triples) / max(count, 1.0)
    var = sum(squares + n * (m - mean) ** 2 for n, m, squares in triples) / max(count, 1.0)
    if whiten and count >= 2:
        white = (values.double() - mean) / math.sqrt(var + 1e-8) + (0.0 if shift_mean else mean)
        values.copy_(torch.where(mask.bool(), white, 0.0))
    return torch.tensor([mean, var], dtype=partials.dtype, device=partials.device)


def spans(tokens: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Where each sequence begins and ends in the flattened tokens."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return list(pairwise(bounds))
    batch, length = tokens.shape
    return [(row * length, (row + 1) * length) for row in range(batch)]


def _numbers(tensor: Tensor) -> list[float]:
    return tensor.double().flatten().tolist()


def _tensor(numbers: list[float], like: Tensor, other: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=result_dtype(like, other), device=like.device).view(like.shape)
