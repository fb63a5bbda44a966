"""Statistics of hidden states under an output layer, in chunks of rows, with a backward pass of its own.

With z = cap·tanh(scale·(W h + b)/cap)/τ and log p = log-softmax(z), per row: log p of the label, the entropy H, and the
exact KL from a reference. The gradient of a row with respect to z is

    g_lp·(1[j = label] − p_j) − g_H·p_j·(log p_j + H) + g_kl·p_j·(log p_j − log q_j − KL)

Log-probs are kept for the backward pass where they fit a budget and recomputed chunk by chunk where not. Faster kernels
for a device take the place of :func:`chunked_row_stats` through :data:`IMPLEMENTATIONS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIB = 2**20
# Logits at a time: about the last-level cache, or enough to fill a GPU.
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 256 * MIB}
KEEP_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}  # log-probs kept for the backward pass up to this size
OTHER_DEVICE = "cpu"


class RowStats(NamedTuple):
    """Statistics of rows ``[N]``: log-prob of the label, entropy, exact KL, whether the label is the most likely."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    correct: Tensor | None


@dataclass(frozen=True)
class Head:
    """An output layer: ``softcap·tanh(scale·(weight·h + bias)/softcap)``, without the cap where there is none.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        softcap: Bound of the logits (Gemma 2), or None.
        scale: Multiplies the logits (Cohere; 1/``logits_scaling`` for Granite).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[…, V]`` of hidden states ``[…, H]`` in float32 or wider."""
        return self.transform(F.linear(hidden, self.weight.to(hidden.dtype), _cast(self.bias, hidden.dtype)), 1.0)

    def transform(self, logits: Tensor, temperature: float) -> Tensor:
        """Scale, soft-cap and temperature, in float32 or wider. Out of place."""
        logits = logits.to(_statistics_dtype(logits.dtype))
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / temperature)
        factor = self.scale / temperature
        return logits if factor == 1.0 else logits * factor


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------- from logits
def logits_row_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    correct: bool = False,
    ref_logits: Tensor | None = None,
) -> RowStats:
    """Statistics of logits ``[N, V]`` and labels ``[N]`` by plain autograd; ``ref_logits`` ask for the KL."""
    log_probs = (logits.to(_statistics_dtype(logits.dtype)) / temperature).log_softmax(-1)
    logp = log_probs.gather(1, labels[:, None])[:, 0]
    probs = log_probs.exp() if entropy or ref_logits is not None else None
    kl = None
    if ref_logits is not None and probs is not None:
        ref_log_probs = (ref_logits.detach().to(log_probs.dtype) / temperature).log_softmax(-1)
        kl = _expectation(probs, log_probs - ref_log_probs)
    return RowStats(
        logp,
        -_expectation(probs, log_probs) if entropy and probs is not None else None,
        kl,
        log_probs.detach().argmax(-1) == labels if correct else None,
    )


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Σ p·v per row; a symbol of probability 0 contributes 0, whatever its value."""
    return (probs * torch.where(probs > 0, values, 0.0)).sum(-1)


# ---------------------------------------------------------------------- from hidden states
def linear_row_stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    correct: bool = False,
    reference: tuple[Tensor, Head] | None = None,
) -> RowStats:
    """Statistics of hidden states ``[N, H]`` under a head, differentiable in both.

    Args:
        hidden: Rows that predict a token each.
        head: The output layer.
        labels: ``[N]`` int64, the tokens predicted.
        temperature: Divides the logits, of the reference too.
        entropy: Whether to compute entropies.
        correct: Whether to compare labels with the most likely token.
        reference: Hidden states and head of the reference for the exact KL, constants.
    """
    device = hidden.device.type
    # under autocast the matrix product runs in its dtype; the casts stay outside so that autograd undoes them
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    head = Head(head.weight.to(dtype), _cast(head.bias, dtype), head.softcap, head.scale)
    if reference is not None:
        ref_hidden, ref = reference
        ref = Head(ref.weight.detach().to(dtype), _cast(ref.bias, dtype), ref.softcap, ref.scale)
        reference = ref_hidden.detach().to(dtype), ref
    compute = IMPLEMENTATIONS.get(device, chunked_row_stats)
    with torch.autocast(device, enabled=False):
        return compute(hidden.to(dtype), head, labels, Wanted(temperature, entropy, correct, reference))


@dataclass(frozen=True)
class Wanted:
    """What to compute of rows; see :func:`linear_row_stats`."""

    temperature: float
    entropy: bool
    correct: bool
    reference: tuple[Tensor, Head] | None


def chunked_row_stats(hidden: Tensor, head: Head, labels: Tensor, wanted: Wanted) -> RowStats:
    """The implementation for every device: chunks of rows, matrix products by the library."""
    return RowStats(*_ChunkedStats.apply(hidden, head.weight, head.bias, labels, head, wanted, torch.is_grad_enabled()))


# Implementations by device type; what is not listed runs ``chunked_row_stats``.
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Head, Tensor, Wanted], RowStats]] = {}


class _ChunkedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        wanted: Wanted,
        differentiable: bool,
    ) -> tuple[Tensor | None, ...]:
        rows, vocabulary = len(hidden), len(weight)
        dtype = _statistics_dtype(hidden.dtype)
        logp, entropy, kl = (torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(3))
        correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
        keep = differentiable and rows * vocabulary * dtype.itemsize <= _budget(KEEP_BYTES, hidden)
        kept = []
        for part in _chunks(hidden, vocabulary):
            log_probs = _log_probs(hidden[part], head, wanted.temperature)
            torch.gather(log_probs, 1, labels[part, None], out=logp[part, None])
            if wanted.correct:
                torch.eq(log_probs.argmax(1), labels[part], out=correct[part])
            if wanted.reference is not None:
                kl[part] = _expectation(log_probs.exp(), log_probs - _reference_log_probs(wanted, part))
            if wanted.entropy:
                log_probs.clamp_(min=torch.finfo(dtype).min)  # 0·(−inf) must be 0, here and in the backward pass
                entropy[part] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
            if keep:
                kept.append(log_probs)
        ctx.save_for_backward(hidden, weight, bias, labels, logp, entropy, kl, *kept)
        ctx.head, ctx.wanted = head, wanted
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct)
        return (
            logp,
            entropy if wanted.entropy else None,
            kl if wanted.reference is not None else None,
            correct if wanted.correct else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logp, entropy, kl, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # chunks are summed in float32: rounding each sum to a narrow dtype would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=_statistics_dtype(weight.dtype)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_statistics_dtype(bias.dtype)) if needs_bias else None
        for index, part in enumerate(_chunks(hidden, len(weight))):
            log_probs = kept[index] if kept else _log_probs(hidden[part], ctx.head, ctx.wanted.temperature)
            stats = RowStats(logp[part], entropy[part], kl[part], None)
            upstream = [None if grad is None else grad[part] for grad in grads[:3]]
            grad_logits = _grad_logits(log_probs, labels[part], stats, upstream, ctx.wanted, part)
            grad_logits = _through_transform(grad_logits, hidden[part], ctx.head, ctx.wanted.temperature)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[part])
        return grad_hidden, _cast(grad_weight, weight.dtype), _cast(grad_bias, weight.dtype), None, None, None, None


def _budget(table: dict[str, int], tensor: Tensor) -> int:
    return table.get(tensor.device.type, table[OTHER_DEVICE])


def _chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    itemsize = _statistics_dtype(hidden.dtype).itemsize
    size = max(1, _budget(CHUNK_BYTES, hidden) // (vocabulary * itemsize))
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def _log_probs(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    return head.transform(F.linear(hidden, head.weight, head.bias), temperature).log_softmax(-1)


def _reference_log_probs(wanted: Wanted, part: slice) -> Tensor:
    assert wanted.reference is not None
    hidden, head = wanted.reference
    return _log_probs(hidden[part], head, wanted.temperature)


def _grad_logits(
    log_probs: Tensor, labels: Tensor, stats: RowStats, upstream: list[Tensor | None], wanted: Wanted, part: slice
) -> Tensor:
    """Gradient with respect to the transformed logits of one chunk; the formula at the top of the module."""
    grad_logp, grad_entropy, grad_kl = upstream
    grad_logp = torch.zeros_like(stats.logp) if grad_logp is None else grad_logp
    probs = log_probs.exp()
    # 1 − p from the log-prob: by subtraction it would be lost to rounding as p nears 1
    at_label = -grad_logp * torch.expm1(stats.logp)
    if grad_entropy is None and grad_kl is None:
        grad = probs.mul_(-grad_logp[:, None])
    else:
        rest = torch.zeros_like(probs)
        if grad_entropy is not None:
            assert stats.entropy is not None
            finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
            rest = torch.addcmul(-(grad_entropy * stats.entropy)[:, None], finite, -grad_entropy[:, None])
        if grad_kl is not None:
            assert stats.kl is not None
            difference = torch.where(probs > 0, log_probs - _reference_log_probs(wanted, part), 0.0)
            rest += grad_kl[:, None] * (difference - stats.kl[:, None])
        at_label += (probs.gather(1, labels[:, None]) * rest.gather(1, labels[:, None]))[:, 0]
        grad = rest.sub_(grad_logp[:, None]).mul_(probs)
    return grad.scatter_(1, labels[:, None], at_label[:, None])


def _through_transform(grad: Tensor, hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Back through scale, soft-cap and temperature, in place."""
    factor = head.scale / temperature
    if head.softcap is not None:
        # the product is repeated rather than kept: few models have a cap, and log-probs do not determine tanh
        raw = F.linear(hidden, head.weight, head.bias).to(grad.dtype)
        grad *= 1 - torch.tanh(raw * (head.scale / head.softcap)).square()
    return grad if factor == 1.0 else grad.mul_(factor)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logitsᵀ·hidden, the product in the operands' dtype and the sum in the total's."""
    if total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.T, hidden)
    else:
        total += grad_logits.T @ hidden
