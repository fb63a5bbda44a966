"""The vocabulary operations as ``torch.library`` operators, with shapes for tracing and gradients for autograd.

Each is a pair, forward and backward. In eager mode the native implementations go through the same functions wrapped in
:class:`torch.autograd.Function`, which costs 60 µs less a call than an operator: as much as a small vocabulary itself.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from align_kernels import _checks, gemm, linear_logp, native_logits
from align_kernels._labels import locate
from align_kernels.layer import Layer
from align_kernels.native import NativeRows, RowGrads, RowStats, Wanted, statistics_dtype
from align_kernels.shards import Shard


def _given(values: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Operators return tensors: an empty one stands for None."""
    return like.new_empty(0, dtype=dtype) if values is None else values


def _stats(entropy: Tensor, kl: Tensor, lse: Tensor, column_logp: Tensor, ref_lse: Tensor, wanted: Wanted) -> RowStats:
    """What backward needs, from an operator's outputs."""
    has_kl = wanted.kl
    return RowStats(
        column_logp, lse, entropy if wanted.entropy else None, kl if has_kl else None, ref_lse if has_kl else None
    )


def _grads(grads: tuple[Tensor | None, ...], like: Tensor) -> RowGrads:
    logp, entropy, kl, lse = grads
    return RowGrads(torch.zeros_like(like) if logp is None else logp, entropy, kl, lse)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operands are in the dtype they are to be multiplied in: autocast must not narrow what was widened."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_here(labels: Tensor, check: bool) -> bool:
    """Labels on the CPU are always checked: it costs no wait."""
    return check or labels.device.type == "cpu"


# ---------------------------------------------------------------------- K1: from logits
def _token_stats(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    argmax: bool,
    inplace_grad: bool,
    check_labels: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, KL, lse, argmax, log-prob of the label's column, the reference's lse) of rows ``[N]``."""
    wanted = Wanted(temperature, softcap, entropy, argmax, ref_logits is not None, temperature, softcap)
    check = check_here(labels, check_labels)
    if impl == "triton":
        from align_kernels import token_stats_kernel

        logp, stats = token_stats_kernel.forward(logits, labels, ref_logits, mask, wanted, check)
    else:
        logp, stats = native_logits.forward(logits, labels, ref_logits, mask, wanted, check)
    return (
        logp,
        _given(stats.entropy, logp),
        _given(stats.kl, logp),
        stats.lse,
        _given(stats.argmax, logp, torch.int64),
        stats.logp,
        _given(stats.ref_lse, logp),
    )


def _token_stats_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    stats: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> None:
    entropy, kl, lse, column_logp, ref_lse = stats
    wanted = Wanted(temperature, softcap, entropy.numel() > 0, False, ref_logits is not None, temperature, softcap)
    row_stats = _stats(entropy, kl, lse, column_logp, ref_lse, wanted)
    grads = _grads((grad_logp, grad_entropy, grad_kl, grad_lse), lse)
    if impl == "triton":
        from align_kernels import token_stats_kernel

        token_stats_kernel.backward(out, logits, labels, ref_logits, mask, row_stats, grads, wanted)
    else:
        native_logits.backward(out, logits, labels, ref_logits, mask, row_stats, grads, wanted)


token_stats_op = torch.library.custom_op("align_kernels::token_stats", _token_stats, mutates_args=())


@token_stats_op.register_fake
def _(logits, labels, ref_logits, mask, temperature, softcap, entropy, argmax, inplace_grad, check_labels, impl):  # type: ignore[no-untyped-def]
    def rows(wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        shape = labels.shape if wanted else (0,)
        return logits.new_empty(shape, dtype=dtype or statistics_dtype(logits.dtype))

    kl = ref_logits is not None
    return rows(), rows(entropy), rows(kl), rows(), rows(argmax, torch.int64), rows(), rows(kl)


@torch.library.custom_op("align_kernels::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    stats: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    """Gradient with respect to the logits."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = (grad_logp, grad_entropy, grad_kl, grad_lse)
    _token_stats_backward(*grads, out, logits, labels, ref_logits, mask, stats, temperature, softcap, impl)
    return out


@token_stats_backward_op.register_fake
def _(g0, g1, g2, g3, logits, labels, ref_logits, mask, stats, temperature, softcap, impl):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("align_kernels::token_stats_backward_", mutates_args=("logits",))
def token_stats_backward_inplace_op(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    stats: list[Tensor],
    temperature: float,
    softcap: float | None,
    impl: str,
) -> None:
    """Writes the gradient with respect to the logits over the logits."""
    grads = (grad_logp, grad_entropy, grad_kl, grad_lse)
    _token_stats_backward(*grads, logits, logits, labels, ref_logits, mask, stats, temperature, softcap, impl)


def _token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ref_logits, mask, temperature, softcap, _, _, inplace_grad, _, impl = inputs
    _, entropy, kl, lse, argmax, column_logp, ref_lse = output
    ctx.save_for_backward(logits, labels, ref_logits, mask, entropy, kl, lse, column_logp, ref_lse)
    ctx.settings = (temperature, softcap, impl)
    ctx.inplace_grad = inplace_grad
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax, column_logp, ref_lse)


def _token_stats_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, ref_logits, mask, *stats = ctx.saved_tensors
    arguments = (*grads[:4], logits, labels, ref_logits, mask, stats, *ctx.settings)
    if all(grad is None for grad in grads[:4]):
        return (None,) * 11
    if ctx.inplace_grad:
        token_stats_backward_inplace_op(*arguments)
        return logits.detach(), *(None,) * 10
    return token_stats_backward_op(*arguments), *(None,) * 10


token_stats_op.register_autograd(_token_stats_grad, setup_context=_token_stats_setup)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        # not by setup_context, for whose sake autograd would inspect a signature in every call, 200 µs
        output = _token_stats(*inputs)
        _token_stats_setup(ctx, inputs, output)
        return output

    @staticmethod
    @_checks.first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _token_stats_grad(ctx, *grads)


def token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`_token_stats`, differentiable in the logits."""
    eager = arguments[-1] == "native" and not torch.compiler.is_compiling()
    return _TokenStats.apply(*arguments) if eager else token_stats_op(*arguments)


# ---------------------------------------------------------------------- K2: from hidden states
def _passes(wanted: Wanted, impl: str, shard: Shard | None = None) -> linear_logp.Rows:
    if impl == "triton":
        from align_kernels import token_stats_kernel

        return token_stats_kernel.TritonRows(wanted)
    return NativeRows(wanted, shard=shard is not None)


def _reference(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, layer: Layer) -> Layer | None:
    return None if hidden is None or weight is None else Layer(hidden, weight, bias, layer.rows, layer.chunk)


def _linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    argmax: bool,
    ref_temperature: float,
    ref_softcap: float | None,
    keep: bool,
    chunk: int,
    accum_dtype: torch.dtype | None,
    check_labels: bool,
    impl: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, KL, lse, argmax, column's log-prob, reference's lse, known labels, kept) of rows ``[M]``."""
    wanted = Wanted(temperature, softcap, entropy, argmax, ref_hidden is not None, ref_temperature, ref_softcap)
    layer = Layer(hidden, weight, bias, rows, chunk)
    columns, kept = linear_logp.forward(
        _passes(wanted, impl, shard),
        layer,
        _reference(ref_hidden, ref_weight, ref_bias, layer),
        labels,
        keep=keep,
        check=shard is None and check_here(labels, check_labels),
        shard=shard,
    )
    logp, stats = columns.logp, columns.stats
    return (
        logp,
        _given(stats.entropy, logp),
        _given(stats.kl, logp),
        stats.lse,
        _given(stats.argmax, logp, torch.int64),
        stats.logp,
        _given(stats.ref_lse, logp),
        torch.ones_like(labels, dtype=torch.bool) if columns.known is None else columns.known,
        layer.empty_logits(0) if kept is None else kept,
    )


def _linear_stats_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    stats: list[Tensor],
    known: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    ref_temperature: float,
    ref_softcap: float | None,
    keep: bool,
    chunk: int,
    accum_dtype: torch.dtype | None,
    needs: list[bool],
    impl: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not needed."""
    entropy, kl, lse, column_logp, ref_lse = stats
    # as in forward: what was wanted there decides what was kept
    has_entropy = len(entropy) > 0
    wanted = Wanted(temperature, softcap, has_entropy, False, ref_hidden is not None, ref_temperature, ref_softcap)
    layer = Layer(hidden, weight, bias, rows, chunk)
    index, inside = locate(labels, len(weight), 0 if shard is None else shard.start)
    row_stats = _stats(entropy, kl, lse, column_logp, ref_lse, wanted)
    found = linear_logp.backward(
        _passes(wanted, impl, shard),
        layer,
        _reference(ref_hidden, ref_weight, ref_bias, layer),
        linear_logp.Columns(row_stats, column_logp, index, inside, known),
        kept if keep else None,
        _grads((grad_logp, grad_entropy, grad_kl, grad_lse), lse),
        (needs[0], needs[1], needs[2]),
        accum_dtype=accum_dtype,
        shard=shard,
    )
    return tuple(_given(grad, hidden) for grad in found)  # type: ignore[return-value]


LAYER_SCHEMA = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows"
_REFERENCE = "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"
_GRADS = "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_kl, Tensor? grad_lse"

linear_stats_op = torch.library.custom_op(
    "align_kernels::linear_stats",
    _linear_stats,
    mutates_args=(),
    schema=f"({LAYER_SCHEMA}, {_REFERENCE}, float temperature, float? softcap, bool entropy, bool argmax, "
    "float ref_temperature, float? ref_softcap, bool keep, SymInt chunk, ScalarType? accum_dtype, bool check_labels, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _linear_backward_op(name: str, kept: str) -> Any:
    return torch.library.custom_op(
        f"align_kernels::{name}",
        _linear_stats_backward,
        mutates_args=("kept",) if "!" in kept else (),
        schema=f"({_GRADS}, {LAYER_SCHEMA}, {_REFERENCE}, Tensor[] stats, Tensor known, {kept} kept, "
        "float temperature, "
        "float? softcap, float ref_temperature, float? ref_softcap, bool keep, SymInt chunk, ScalarType? accum_dtype, "
        "bool[] needs, str impl) -> (Tensor, Tensor, Tensor)",
    )


linear_stats_backward_op = _linear_backward_op("linear_stats_backward", "Tensor")
# Triton turns the logits it kept into their gradient: one product each for hidden states and weight, no second buffer.
linear_stats_backward_inplace_op = _linear_backward_op("linear_stats_backward_", "Tensor(a!)")


@linear_stats_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, labels, _, ref_hidden, *_ = arguments
    entropy, argmax, keep = arguments[10], arguments[11], arguments[14]

    def rows(wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        return hidden.new_empty(labels.shape if wanted else (0,), dtype=dtype or statistics_dtype(hidden.dtype))

    kl = ref_hidden is not None
    kept = hidden.new_empty(
        (labels.shape[0] if keep else 0, weight.shape[0]), dtype=gemm.compute_dtype(hidden.dtype, hidden.device)
    )
    stats = (rows(), rows(entropy), rows(kl), rows(), rows(argmax, torch.int64), rows(), rows(kl))
    return *stats, rows(dtype=torch.bool), kept


@linear_stats_backward_op.register_fake
@linear_stats_backward_inplace_op.register_fake
def _linear_stats_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, hidden, weight, bias, *_ = arguments
    needs = arguments[-2]
    return tuple(
        torch.empty_like(value) if needed and value is not None else hidden.new_empty(0)
        for value, needed in zip((hidden, weight, bias), needs, strict=True)
    )


def _linear_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    layer, reference = inputs[:5], inputs[5:8]
    _, entropy, kl, lse, argmax, column_logp, ref_lse, known, kept = output
    ctx.save_for_backward(*layer, *reference, entropy, kl, lse, column_logp, ref_lse, known, kept)
    temperature, softcap, _, _, ref_temperature, ref_softcap, keep, chunk, accum_dtype, _, impl, *shard = inputs[8:]
    ctx.settings = (temperature, softcap, ref_temperature, ref_softcap, keep, chunk, accum_dtype)
    ctx.implementation = (impl, *shard)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax, column_logp, ref_lse, known, kept)


def _linear_stats_grad(ctx: Any, compute: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    upstream = grads[:4]
    needs = list(ctx.needs_input_grad[:3])
    if all(grad is None for grad in upstream) or not any(needs):
        return (None,) * ctx.arguments
    *layer_and_reference, entropy, kl, lse, column_logp, ref_lse, known, kept = ctx.saved_tensors
    stats = [entropy, kl, lse, column_logp, ref_lse]
    found = compute(*upstream, *layer_and_reference, stats, known, kept, *ctx.settings, needs, *ctx.implementation)
    needed = tuple(grad if need else None for grad, need in zip(found, needs, strict=True))
    return *needed, *(None,) * (ctx.arguments - 3)


def _linear_stats_op_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    keep, impl = ctx.settings[4], ctx.implementation[0]
    in_place = keep and impl == "triton"
    return _linear_stats_grad(ctx, linear_stats_backward_inplace_op if in_place else linear_stats_backward_op, grads)


linear_stats_op.register_autograd(_linear_stats_op_grad, setup_context=_linear_stats_setup)


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        # not by setup_context, for whose sake autograd would inspect a signature in every call, 200 µs
        output = _linear_stats(*inputs)
        _linear_stats_setup(ctx, inputs, output)
        return output

    @staticmethod
    @_checks.first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _linear_stats_grad(ctx, _linear_stats_backward, grads)


def linear_stats(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, ...]:
    """:func:`_linear_stats`, differentiable in hidden states, weight and bias."""
    with without_autocast(arguments[0].device.type):
        return _dispatched_linear_stats(*arguments, shard=shard)


def _dispatched_linear_stats(*arguments: Any, shard: Shard | None) -> tuple[Tensor, ...]:
    if shard is not None or (arguments[-1] == "native" and not torch.compiler.is_compiling()):
        return _LinearStats.apply(*arguments, shard)
    return linear_stats_op(*arguments)
