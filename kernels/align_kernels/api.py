"""The public vocabulary operations: arguments checked, an implementation chosen, shapes restored."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import _checks, few_logits, ops, reference
from align_kernels._dispatch import choose
from align_kernels._labels import locate
from align_kernels._plan import autocast, chunk_rows, counted_rows, keeps
from align_kernels._types import Reference, TokenStats
from align_kernels.few_logits import Stats
from align_kernels.native import Wanted
from align_kernels.shards import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    inplace_grad: bool = False,
    check_labels: bool = False,
    impl: str | None = None,
) -> TokenStats:
    """K1: log-prob of each label, entropy, exact KL and more from logits, in one pass; the backward pass is another.

    z = cap·tanh(x/cap)/temperature; logp = log softmax(z)[label]; KL = Σ p (log p − log q) with q the softmax of the
    reference's logits, transformed alike. Differentiable in ``logits``.

    Args:
        logits: ``[…, V]`` float32, bfloat16, float16, or float64 (native and reference only).
        labels: ``[…]`` int64 or int32. One outside ``[0, V)`` has log-prob 0 and no gradient; on a CPU −100 alone may.
        ref_logits: ``[…, V]``, a constant; asks for the KL.
        entropy: Whether to compute entropies.
        argmax: Whether to find the most likely tokens.
        mask: ``[…]`` bool or uint8, 1 counts; other tokens get 0 everywhere and are not read.
        temperature: Divides the logits.
        softcap: Bounds the logits, or None.
        inplace_grad: Write the gradient over ``logits``, which must be no leaf and needed by no other operation.
        check_labels: On a GPU, raise for labels outside ``[0, V)`` other than −100; waits for the device.
        impl: ``auto``, ``triton``, ``native`` or ``reference``; see :mod:`align_kernels._dispatch`.

    Raises:
        ValueError: Shapes that do not match, a label outside the vocabulary, a temperature or soft-cap not positive.
        TypeError: A dtype not listed.
        RuntimeError: Tensors on different devices; an ``impl`` that cannot run here.
    """
    _checks.positive(temperature=temperature, softcap=softcap)
    _checks.tokens(mask, labels)
    _checks.logits(logits, labels)
    _checks.device(logits=logits, labels=labels, ref_logits=ref_logits, mask=mask)
    if ref_logits is not None:
        _checks.dtype("ref_logits", ref_logits, _checks.FLOATS)
        _checks.shape("ref_logits", ref_logits, logits.shape, "logits")
        _checks.constant(ref_logits=ref_logits)
    if inplace_grad and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_grad: logits is a leaf, and its gradient cannot take its place")
    chosen = choose("token_stats", logits.device, logits.dtype, impl)
    vocabulary = logits.shape[-1]
    flat_labels = labels.reshape(-1)
    flat_mask = None if mask is None else mask.reshape(-1).bool()
    if chosen == "reference":
        _check_labels(flat_labels if flat_mask is None else flat_labels[flat_mask], vocabulary, check_labels)
        return reference.token_stats(
            logits,
            labels,
            ref_logits=ref_logits,
            entropy=entropy,
            argmax=argmax,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
        )
    x = logits.reshape(-1, vocabulary)
    ref_x = None if ref_logits is None else ref_logits.detach().reshape(-1, vocabulary)
    if chosen == "native" and mask is None and not inplace_grad and few_logits.suits(x.numel(), x):
        wanted = Wanted(temperature, softcap, entropy, argmax, ref_x is not None, temperature, softcap)
        return _shaped(few_logits.row_stats(x, flat_labels, ref_x, wanted), None, labels.shape)
    ref_x = None if ref_x is None else _checks.unit_stride(ref_x)
    settings = (temperature, softcap, entropy, argmax, inplace_grad, check_labels, chosen)
    logp, h, kl, lse, top, *_ = ops.token_stats(_checks.unit_stride(x), flat_labels, ref_x, flat_mask, *settings)
    found = (logp, h if entropy else None, None if ref_x is None else kl, lse, top if argmax else None)
    return _shaped(found, None, labels.shape)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref: Reference | None = None,
    entropy: bool = False,
    argmax: bool = False,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    save: str = "auto",
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int = 0,
    check_labels: bool = False,
    impl: str | None = None,
) -> TokenStats:
    """K2: log-prob of each label from hidden states, without the logits of all tokens at once.

    x = hidden·weightᵀ + bias in chunks of rows, then as :func:`token_stats`. A logit scale s is ``temperature=1/s``,
    and with a soft-cap c outside of it, c·tanh(s·x/c), also ``softcap=c/s``. Differentiable in ``hidden``, ``weight``
    and ``bias``; what needs no gradient costs no product.

    Args:
        hidden: ``[…, H]`` float32, bfloat16, float16, or float64 (native and reference only). Under autocast it,
            ``weight`` and ``bias`` are cast to autocast's dtype.
        weight: ``[V, H]`` in the dtype of ``hidden``; a plain tensor, so inside the forward of a sharded head.
        labels: ``[…]`` int64 or int32; see :func:`token_stats`.
        bias: ``[V]`` or None.
        ref: Asks for the exact KL from this distribution over the same vocabulary.
        entropy: Whether to compute entropies.
        argmax: Whether to find the most likely tokens.
        mask: ``[…]`` bool or uint8, 1 counts; other tokens get 0 everywhere and meet no product. On a GPU a mask there
            costs one wait to count it, unless ``rows`` says the same.
        rows: int64 ``[M]``, the tokens that count, each once, of the flattened shape.
        temperature: Divides the logits.
        softcap: Bounds the logits, or None.
        save: What serves the backward pass: ``logits`` keeps them in the dtype of the product (3 products),
            ``recompute`` does not (4 products), ``auto`` keeps what fits a sixteenth of the device's memory, on a CPU
            at most 1 GiB.
        chunk_bytes: Logits at a time; by default 64 MiB on a CPU and 256 MiB on a GPU.
        accum_dtype: In which chunks of the weight's gradient are summed; by default float32.
        process_group: Ranks that share the vocabulary, each with its rows of ``weight`` and the same tokens.
        vocab_start: First row of this rank's ``weight`` in the vocabulary.
        check_labels: On a GPU, raise for labels outside ``[0, V)`` other than −100; waits for the device.
        impl: ``auto``, ``triton``, ``native`` or ``reference``.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`token_stats`.
    """
    stats, rows = counted_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        ref=ref,
        entropy=entropy,
        argmax=argmax,
        mask=mask,
        rows=rows,
        temperature=temperature,
        softcap=softcap,
        save=save,
        chunk_bytes=chunk_bytes,
        accum_dtype=accum_dtype,
        process_group=process_group,
        vocab_start=vocab_start,
        check_labels=check_labels,
        impl=impl,
    )
    return _shaped(stats, rows, labels.shape)


def counted_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref: Reference | None = None,
    entropy: bool = False,
    argmax: bool = False,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    save: str = "auto",
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int = 0,
    check_labels: bool = False,
    impl: str | None = None,
) -> tuple[Stats, Tensor | None]:
    """:func:`linear_token_logprobs` of the tokens that count alone, ``[M]``, and which they are; None for all."""
    _checks.one_of("save", save, ("auto", "logits", "recompute"))
    _checks.positive(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    _checks.floating("accum_dtype", accum_dtype)
    _checks.tokens(mask, labels)
    hidden, weight, bias = autocast(hidden, weight, bias)
    _checks.layer(hidden, weight, bias, labels)
    _checks.device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    shard = _shard(process_group, vocab_start, ref is not None or argmax)
    chosen = choose("linear_token_logprobs", hidden.device, hidden.dtype, impl)
    if chosen == "reference" and shard is not None:
        raise ValueError("process_group: the reference implementation knows no shards")
    flat = hidden.reshape(-1, hidden.shape[-1])
    ref = _flat_reference(ref, flat, weight)
    rows = counted_rows(mask, rows, labels)
    few_labels = labels.reshape(-1) if rows is None else labels.reshape(-1)[rows]
    count, vocabulary = len(few_labels), len(weight)
    q = Reference(None, None) if ref is None else ref  # type: ignore[arg-type]
    found: Stats
    if chosen == "native" and shard is None and few_logits.suits(count * vocabulary, flat):
        states = flat if rows is None else flat.index_select(0, rows)
        ref_x = None if ref is None else F.linear(ref.hidden if rows is None else ref.hidden[rows], q.weight, q.bias)
        wanted = Wanted(temperature, softcap, entropy, argmax, ref is not None, q.temperature, q.softcap)
        if wanted.log_probs_only and not argmax:
            logp, lse, _ = few_logits.linear_log_probs(states, weight, bias, few_labels, temperature)
            found = (logp, None, None, lse, None)
        else:
            found = few_logits.row_stats(F.linear(states, weight, bias), few_labels, ref_x, wanted)
    elif chosen == "reference":
        options = {"entropy": entropy, "argmax": argmax, "temperature": temperature, "softcap": softcap}
        found = _reference_stats(flat, weight, bias, ref, few_labels, rows, check_labels, **options)
    else:
        needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        settings = (temperature, softcap, entropy, argmax, q.temperature, q.softcap)
        keep, chunk = needed and keeps(save, count, vocabulary, flat), chunk_rows(chunk_bytes, vocabulary, flat)
        inputs = (flat, weight, bias, few_labels, rows, q.hidden, q.weight, q.bias)
        logp, h, kl, lse, top, *_ = ops.linear_stats(
            *inputs, *settings, keep, chunk, accum_dtype, check_labels, chosen, shard=shard
        )
        found = (logp, h if entropy else None, None if ref is None else kl, lse, top if argmax else None)
    return found, rows


# ---------------------------------------------------------------------- parts
def _check_labels(labels: Tensor, vocabulary: int, check: bool) -> None:
    if check or labels.device.type == "cpu":
        locate(labels, vocabulary, check=True)


def _reference_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref: Reference | None,
    labels: Tensor,
    rows: Tensor | None,
    check: bool,
    **wanted: Any,
) -> TokenStats:
    """K2 by the reference, of the rows that count."""
    _check_labels(labels, len(weight), check)
    chosen = slice(None) if rows is None else rows
    ref_logits = None if ref is None else reference.logits(ref.hidden[chosen], ref.weight, ref.bias)
    if ref is not None:
        wanted |= {"ref_temperature": ref.temperature, "ref_softcap": ref.softcap}
    return reference.token_stats(
        reference.logits(hidden[chosen], weight, bias), labels, ref_logits=ref_logits, **wanted
    )


def _shard(group: "ProcessGroup | None", start: int, more: bool) -> Shard | None:
    if group is None:
        if start:
            raise ValueError(f"vocab_start is {start}, but there is no process_group that shares the vocabulary")
        return None
    if more:
        raise ValueError("process_group: KL and argmax are not computed over a vocabulary that is shared")
    return Shard(start, group)


def _flat_reference(ref: Reference | None, hidden: Tensor, weight: Tensor) -> Reference | None:
    """The reference as constants, its hidden states ``[N, H′]``."""
    if ref is None:
        return None
    _checks.positive(**{"ref.temperature": ref.temperature, "ref.softcap": ref.softcap})
    states, ref_weight, bias = autocast(ref.hidden, ref.weight, ref.bias)
    states = states.detach().reshape(-1, states.shape[-1])
    if len(states) != len(hidden) or len(ref_weight) != len(weight):
        raise ValueError(
            f"ref: hidden has {len(states)} rows and weight {len(ref_weight)} tokens, "
            f"but the policy has {len(hidden)} rows and {len(weight)} tokens"
        )
    _checks.layer(states, ref_weight, bias, states[:, 0])
    _checks.device(hidden=hidden, ref_hidden=states, ref_weight=ref_weight, ref_bias=bias)
    return Reference(states, ref_weight.detach(), None if bias is None else bias.detach(), ref.temperature, ref.softcap)


def _spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_copy(0, rows, values)


def _shaped(stats: Stats, rows: Tensor | None, shape: torch.Size) -> TokenStats:
    """Statistics of the counted rows in the shape of the labels, 0 elsewhere."""
    if rows is not None:
        stats = tuple(None if x is None else _spread(x, rows, shape.numel()) for x in stats)  # type: ignore[assignment]
    if len(shape) != 1:
        stats = tuple(None if x is None else x.view(shape) for x in stats)  # type: ignore[assignment]
    return TokenStats(*stats)
