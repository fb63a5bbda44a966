"""The public vocabulary operations: arguments checked, an implementation chosen, shapes restored."""

import functools
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import _checks, gemm, ops, reference
from align_kernels._dispatch import choose
from align_kernels._labels import locate
from align_kernels._types import Reference, TokenStats
from align_kernels.native import statistics_dtype
from align_kernels.shards import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MIB = 2**20
# Below this many logits a call costs less than an autograd function in Python: plain library calls are faster.
FEW_LOGITS = 2**18
# Logits at a time: about a last-level cache, or enough to fill a GPU; on a CPU at least as many rows as fill a product.
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}
LEAST_CHUNK_ROWS = 128
MOST_KEPT_ON_CPU = 1024 * MIB


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
        labels: ``[…]`` int64 or int32. Outside ``[0, V)`` the log-prob is 0 with zero gradient: on a CPU −100 alone may be.
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
    plain = chosen == "native" and softcap is None and not (entropy or argmax or inplace_grad)
    if plain and mask is None and ref_logits is None and _is_small(x.numel(), x):
        logp, lse = _plain_stats(x, flat_labels, temperature)
        return TokenStats(logp.view(labels.shape), None, None, lse.view(labels.shape), None)
    ref_x = None if ref_logits is None else _checks.unit_stride(ref_logits.detach().reshape(-1, vocabulary))
    x = _checks.unit_stride(x)
    settings = (temperature, softcap, entropy, argmax, inplace_grad, check_labels, chosen)
    stats = ops.token_stats(x, flat_labels, ref_x, flat_mask, *settings)[:5]
    return _shaped(stats, labels.shape, entropy, ref_logits is not None, argmax)


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

    x = hidden·weightᵀ + bias in chunks of rows, then as :func:`token_stats`. A logit scale s is ``temperature=1/s``, and
    with a soft-cap c outside of it (c·tanh(s·x/c)) ``softcap=c/s, temperature=1/s``. Differentiable in ``hidden``,
    ``weight`` and ``bias``; what needs no gradient costs no product.

    Args:
        hidden: ``[…, H]`` float32, bfloat16, float16, or float64 (native and reference only). Under autocast ``hidden``,
            ``weight`` and ``bias`` are cast to its dtype.
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
            ``recompute`` does not (4 products), ``auto`` keeps what fits a quarter of the memory free at first use.
        chunk_bytes: Logits at a time; by default 32 MiB on a CPU and 256 MiB on a GPU.
        accum_dtype: In which chunks of the weight's gradient are summed; by default float32.
        process_group: Ranks that share the vocabulary, each with its rows of ``weight`` and the same tokens.
        vocab_start: First row of this rank's ``weight`` in the vocabulary.
        check_labels: On a GPU, raise for labels outside ``[0, V)`` other than −100; waits for the device.
        impl: ``auto``, ``triton``, ``native`` or ``reference``.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`token_stats`.
    """
    _checks.one_of("save", save, ("auto", "logits", "recompute"))
    _checks.positive(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    _checks.tokens(mask, labels)
    hidden, weight, bias = autocast(hidden, weight, bias)
    _checks.layer(hidden, weight, bias, labels)
    _checks.device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    shard = _shard(process_group, vocab_start, ref is not None or argmax)
    chosen = choose("linear_token_logprobs", hidden.device, hidden.dtype, impl)
    flat = hidden.reshape(-1, hidden.shape[-1])
    ref = _flat_reference(ref, flat, weight)
    rows = counted_rows(mask, rows, labels)
    few_labels = labels.reshape(-1) if rows is None else labels.reshape(-1)[rows]
    count, vocabulary = len(few_labels), len(weight)
    plain = chosen == "native" and softcap is None and shard is None and not (entropy or argmax)
    if plain and ref is None and _is_small(count * vocabulary, flat):
        states = flat if rows is None else flat.index_select(0, rows)
        logp, lse = _plain_stats(F.linear(states, weight, bias), few_labels, temperature)
        stats: tuple[Tensor | None, ...] = (logp, None, None, lse, None)
    elif chosen == "reference":
        stats = _reference_stats(
            flat, weight, bias, ref, few_labels, rows, entropy, argmax, temperature, softcap, shard, check_labels
        )
    else:
        needed = any(x is not None and x.requires_grad for x in (hidden, weight, bias)) and torch.is_grad_enabled()
        keep = needed and keeps(save, count, vocabulary, flat)
        q = (None, None, None, 1.0, None) if ref is None else ref
        settings = (temperature, softcap, entropy, argmax, q[3], q[4], keep, chunk_rows(chunk_bytes, vocabulary, flat))
        stats = ops.linear_stats(
            flat, weight, bias, few_labels, rows, *q[:3], *settings, accum_dtype, check_labels, chosen, shard=shard
        )[:5]
    if rows is not None:
        stats = tuple(None if x is None or not len(x) else _spread(x, rows, labels.numel()) for x in stats)
    return _shaped(stats, labels.shape, entropy, ref is not None, argmax)
