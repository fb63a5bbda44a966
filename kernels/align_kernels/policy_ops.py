"""K3 as a ``torch.library`` operator: the gradients are outputs of forward, scaled by backward on the device."""

from typing import Any

import torch
from torch import Tensor

from align_kernels import _checks, pref_logps
from align_kernels.layer import Layer
from align_kernels.native import NativeRows, Wanted, statistics_dtype
from align_kernels.ops import LAYER_SCHEMA, check_here, without_autocast
from align_kernels.policy_loss import Sequences, loss_and_gradients
from align_kernels.policy_terms import Objective, Tokens

INPUTS = 27


def _policy_loss(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, logp, entropy, ratio, low, high, approximate KL) and gradients of hidden states, weight and bias."""
    hidden, weight, bias, labels, rows, old_logp, advantages, weights, ref_logp, rollout_logp, ids, num_seqs = inputs[
        :12
    ]
    loss, low, high, dual, kl_coef, estimator, entropy_coef, tis_cap = inputs[12:20]
    temperature, softcap, chunk, accum_dtype, needs, check_labels, impl = inputs[20:]
    wanted = Wanted(temperature, softcap, entropy=True)
    sums = pref_logps.segment_sums
    if impl == "triton":
        from align_kernels import pref_logps_kernel, token_stats_kernel

        passes: Any = token_stats_kernel.TritonRows(wanted)
        sums = pref_logps_kernel.segment_sums
    else:
        passes = NativeRows(wanted)
    found = loss_and_gradients(
        passes,
        Layer(hidden, weight, bias, rows, chunk),
        labels,
        Tokens(old_logp, advantages, weights, ref_logp, rollout_logp),
        Objective(loss, low, high, dual, kl_coef, estimator, tis_cap),
        entropy_coef=entropy_coef,
        needs=(needs[0], needs[1], needs[2]),
        sequences=None if ids is None else Sequences(ids, num_seqs, sums),
        check=check_here(labels, check_labels),
        accum_dtype=accum_dtype,
    )
    grads = tuple(hidden.new_empty(0) if grad is None else grad for grad in found.grads)
    return *found[:7], *grads


policy_loss_op = torch.library.custom_op(
    "align_kernels::linear_policy_loss",
    _policy_loss,
    mutates_args=(),
    schema=f"({LAYER_SCHEMA}, Tensor old_logp, Tensor advantages, Tensor weights, Tensor? ref_logp, "
    "Tensor? rollout_logp, Tensor? seq_ids, SymInt num_seqs, str loss, float clip_low, float clip_high, "
    "float? clip_ratio_c, float kl_coef, str kl_estimator, float entropy_coef, float? tis_cap, float temperature, "
    "float? softcap, SymInt chunk, ScalarType? accum_dtype, bool[] needs, bool check_labels, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@policy_loss_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, labels = inputs[:4]
    needs = inputs[24]
    dtype = statistics_dtype(hidden.dtype)
    scalar = hidden.new_empty((), dtype=dtype)
    columns = [hidden.new_empty(labels.shape, dtype=dtype) for _ in range(3)]
    counts = [hidden.new_empty((), dtype=torch.int64) for _ in range(2)]
    grads = [
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    return scalar, *columns, *counts, torch.empty_like(scalar), *grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[7:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * INPUTS
    upstream = grads[0]
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *(x * upstream.to(x.dtype) if need else None for x, need in needed), *(None,) * (INPUTS - 3)


policy_loss_op.register_autograd(_grad, setup_context=_setup)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _policy_loss(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    @_checks.first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _grad(ctx, *grads)


def policy_loss(*inputs: Any) -> tuple[Tensor, ...]:
    """:func:`_policy_loss`, differentiable in hidden states, weight and bias."""
    eager = inputs[-1] == "native" and not torch.compiler.is_compiling()
    with without_autocast(inputs[0].device.type):
        return _PolicyLoss.apply(*inputs) if eager else policy_loss_op(*inputs)
