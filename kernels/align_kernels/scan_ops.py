"""The scan operations, K5 and K6: public functions, checks of their arguments, and ``torch.library`` operators."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from align_kernels import _checks, scan_tensors
from align_kernels._dispatch import choose
from align_kernels.scan_checks import check_boundaries, check_layout, check_sequences, check_tokens, result_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

MASK_MODES = ("skip", "stop", "dense")
KL_ESTIMATORS = ("k1", "k2", "k3")


class VTrace(NamedTuple):
    """Truncated importance weights for GAE on off-policy samples (V-trace, Espeholt et al. 2018, 1802.01561).

    Args:
        log_rho: log π(a|s) − log μ(a|s) of each token, in the shape of the rewards.
        rho_bar: Bound ρ̄ on the weight of a temporal difference.
        c_bar: Bound c̄ on the weight with which later ones are traced back.
    """

    log_rho: Tensor
    rho_bar: float = 1.0
    c_bar: float = 1.0


class Shaped(NamedTuple):
    """What :func:`shaped_advantages` returns; float32 (float64 for float64 inputs), 0 outside the mask.

    Args:
        advantages: GAE, whitened if asked for; in the shape of ``logp``.
        returns: Advantages before whitening, plus values.
        rewards: −β kl_t, and the score on each sequence's last valid token.
        kl_sum: Σ_t kl_t of each sequence ``[S]``.
        mean: Of the advantages before whitening, over all valid tokens of all ranks; scalar.
        var: Their biased variance; scalar.
    """

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl_sum: Tensor
    mean: Tensor
    var: Tensor


# ------------------------------------------------------------------ public functions
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask_mode: str = "skip",
    vtrace: VTrace | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, 1506.02438) by a scan from the right.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1}, G_t = A_t + V_t, where t + 1 is the next step of the sequence.
    With ``vtrace``, A_t = min(ρ̄, ρ_t) δ_t + γλ min(c̄, ρ_t) A_{t+1}. Inputs are constants: nothing carries a gradient.

    Args:
        rewards: ``[B, T]`` padded, or ``[N]`` packed with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        values: Value of the state before each token, same shape.
        gamma: Discount γ per step, in [0, 1].
        lam: λ, in [0, 1].
        mask: True (or 1) on valid tokens, same shape, bool or uint8; all by default.
        dones: True on tokens that end an episode: nothing after them counts. Same shape, bool or uint8.
        bootstrap: Value after the last valid step of each sequence ``[B]`` or ``[S]``; 0 by default.
        cu_seqlens: Boundaries ``[S + 1]`` of packed sequences, from 0 to N, int32 or int64. Checked on a CPU; on a GPU,
            tokens outside of them count to the first or last sequence.
        mask_mode: ``skip`` passes over invalid tokens without discount, whatever stands there; ``stop`` lets one end
            the episode; ``dense`` takes every token for a step and only clears the result.
        vtrace: Off-policy correction.
        impl: ``triton``, ``native`` or ``reference``; by default what :func:`available_impls` names first.

    Returns:
        Advantages and returns, float32 (float64 for float64 inputs), 0 on invalid tokens.

    Raises:
        ValueError: Shapes that do not match, γ or λ outside [0, 1], bounds that are not positive, an unknown mode.
        TypeError: A dtype not named above.
        RuntimeError: Tensors on different devices, or an ``impl`` that cannot run here.
    """
    check_layout("rewards", rewards, cu_seqlens, gamma, lam)
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode is {mask_mode!r}: it must be one of {', '.join(MASK_MODES)}")
    check_tokens("rewards", rewards, {"values": values}, {"mask": mask, "dones": dones})
    check_sequences("rewards", rewards, cu_seqlens, {"bootstrap": bootstrap})
    log_rho, rho_bar, c_bar = vtrace if vtrace is not None else (None, 1.0, 1.0)
    if log_rho is not None:
        check_tokens("rewards", rewards, {"vtrace.log_rho": log_rho}, {})
        if not (rho_bar > 0 and c_bar > 0):
            raise ValueError(f"vtrace has rho_bar {rho_bar} and c_bar {c_bar}: both must be above 0")
    chosen = choose("gae", rewards.device, result_dtype(rewards, values), impl)
    tensors = _detached(rewards, values, mask, dones, bootstrap, cu_seqlens, log_rho)
    run: Callable[..., Any] = _gae if _directly(tensors[0], chosen) else gae_op
    return run(*tensors, float(gamma), float(lam), mask_mode, float(rho_bar), float(c_bar), chosen)


def shaped_advantages(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    bootstrap: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    shift_mean: bool = True,
    cu_seqlens: Tensor | None = None,
    process_group: "ProcessGroup | None" = None,
    impl: str | None = None,
) -> Shaped:
    """KL reward, terminal score, GAE and masked whitening, in at most two launches; InstructGPT's PPO (2203.02155).

    r_t = −β kl_t, plus the score on the last valid token; A by :func:`gae` with ``mask_mode="skip"``; then
    (A − mean)·rsqrt(var + 1e-8) over the valid tokens, with the biased variance. With fewer than two valid tokens the
    advantages stay as they are. kl_t is estimated from d = logp − ref_logp: ``k1`` d, ``k2`` d²/2, ``k3`` e^−d − 1 + d;
    an exact KL can be given as ``logp``, with zeros as ``ref_logp`` and ``k1``. Nothing carries a gradient.

    Args:
        logp: Of the sampled tokens under the policy, ``[B, T]`` padded or ``[N]`` packed; a dtype of :func:`gae`.
        ref_logp: Under the reference, same shape.
        values: Value of the state before each token, same shape.
        scores: One per sequence ``[B]`` or ``[S]``; that of a sequence without valid tokens is not used.
        mask: True (or 1) on valid tokens, same shape, bool or uint8.
        kl_coef: β.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        score_clip: Scores are clipped to ± this first; not at all by default.
        bootstrap: Value after the last valid step ``[B]`` or ``[S]``; 0 by default.
        gamma: γ, in [0, 1].
        lam: λ, in [0, 1].
        whiten: Whether to whiten the advantages; mean and variance are returned in any case.
        shift_mean: Otherwise the mean is added back and only the scale changes.
        cu_seqlens: Boundaries ``[S + 1]`` of packed sequences, as in :func:`gae`.
        process_group: Statistics are those of all its ranks; each must call, with or without valid tokens.
        impl: As in :func:`gae`.

    Raises:
        ValueError, TypeError, RuntimeError: As in :func:`gae`.
    """
    check_layout("logp", logp, cu_seqlens, gamma, lam)
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}: it must be one of {', '.join(KL_ESTIMATORS)}")
    if score_clip is not None and not score_clip > 0:
        raise ValueError(f"score_clip is {score_clip}: it must be above 0, or None")
    if mask is None:
        raise TypeError("mask is None: give a bool or uint8 tensor, True on valid tokens")
    check_tokens("logp", logp, {"ref_logp": ref_logp, "values": values}, {"mask": mask})
    check_sequences("logp", logp, cu_seqlens, {"scores": scores, "bootstrap": bootstrap})
    chosen = choose("shaped_advantages", logp.device, result_dtype(logp, ref_logp, values), impl)
    tensors = _detached(logp, ref_logp, values, scores, mask, bootstrap, cu_seqlens)
    clip = float("inf") if score_clip is None else float(score_clip)
    directly = _directly(tensors[0], chosen)
    run: Callable[..., Any] = _shaped if directly else shaped_op
    finish: Callable[..., Any] = _whiten_ if directly else whiten_op
    advantages, returns, rewards, kl_sum, moments = run(
        *tensors, float(kl_coef), kl_estimator, clip, float(gamma), float(lam), chosen
    )
    if process_group is not None:
        moments = scan_tensors.merge_over_ranks(moments, process_group)
    mean, var = finish(advantages, mask, moments, whiten, shift_mean, chosen).unbind()
    return Shaped(advantages, returns, rewards, kl_sum, mean, var)


# ------------------------------------------------------------------ operators
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    log_rho: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
    rho_bar: float,
    c_bar: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """:func:`gae` of checked arguments."""
    check_boundaries(cu_seqlens, len(rewards))
    tensors = map(_unit_stride, (rewards, values, mask, dones, bootstrap, cu_seqlens, log_rho))
    options = {"gamma": gamma, "lam": lam, "mask_mode": mask_mode, "rho_bar": rho_bar, "c_bar": c_bar}
    return _implementation("gae", impl)(*tensors, **options)


gae_op = torch.library.custom_op("align_kernels::gae", _gae, mutates_args=())


@gae_op.register_fake
def _(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _shaped(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    score_clip: float,
    gamma: float,
    lam: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, Σ KL ``[S]``; count, mean and squared differences of advantages ``[S, 3]``."""
    check_boundaries(cu_seqlens, len(logp))
    tensors = map(_unit_stride, (logp, ref_logp, values, scores, mask, bootstrap, cu_seqlens))
    options = {"kl_coef": kl_coef, "kl_estimator": kl_estimator, "score_clip": score_clip, "gamma": gamma, "lam": lam}
    return _implementation("shaped", impl)(*tensors, **options)


shaped_op = torch.library.custom_op("align_kernels::shaped", _shaped, mutates_args=())


@shaped_op.register_fake
def _(
    logp: Tensor, ref_logp: Tensor, values: Tensor, scores: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, sequences = result_dtype(logp, ref_logp, values), scores.shape[0]
    advantages, returns, rewards = (logp.new_empty(logp.shape, dtype=dtype) for _ in range(3))
    return (
        advantages,
        returns,
        rewards,
        logp.new_empty(sequences, dtype=dtype),
        logp.new_empty((sequences, 3), dtype=dtype),
    )


def _whiten_(values: Tensor, mask: Tensor, moments: Tensor, whiten: bool, shift_mean: bool, impl: str) -> Tensor:
    """Whitens contiguous ``values`` in place where ``mask``, if asked to; mean and biased variance ``[2]``."""
    return _implementation("whiten_", impl)(values, mask, moments, whiten=whiten, shift_mean=shift_mean)


whiten_op = torch.library.custom_op("align_kernels::whiten_", _whiten_, mutates_args={"values"})


@whiten_op.register_fake
def _(values: Tensor, mask: Tensor, moments: Tensor, whiten: bool, shift_mean: bool, impl: str) -> Tensor:
    return moments.new_empty(2)


def _directly(tokens: Tensor, impl: str) -> bool:
    """Native functions go without the operator around them, which takes longer than they do, unless they are traced."""
    return impl == "native" and type(tokens) is Tensor and not torch.compiler.is_compiling()


def _implementation(op: str, impl: str) -> Callable[..., Any]:
    """The function ``op`` of an implementation; Triton is imported by those who use it."""
    if impl == "triton":
        from align_kernels import gae_kernel, shaped_kernel

        return getattr(gae_kernel if op == "gae" else shaped_kernel, op)
    from align_kernels import scan_native, scan_reference

    return getattr(scan_native if impl == "native" else scan_reference, op)


def _detached(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Constants, whose memory holds their numbers (a lazily negated tensor's does not)."""
    return tuple(None if x is None else x.detach().resolve_neg() for x in tensors)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """Rows may lie anywhere; tokens of a row must be neighbours, or are copied."""
    return None if x is None else _checks.unit_stride(x)
