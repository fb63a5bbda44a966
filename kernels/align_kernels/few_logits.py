"""Statistics of few logits: as few library calls as they take, since there a call costs as much as its work."""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels._checks import first_derivative
from align_kernels._labels import chunks, locate, only
from align_kernels.native import LEAST_LOG_P, Wanted, from_largest, mark

# Up to so many logits a call is dominated by what Python costs.
FEW_LOGITS = 2**20
# Logits of a block that stays in a core's cache, and rows below which products lose speed.
BLOCK_LOGITS = 2**18
LEAST_BLOCK_ROWS = 128
NARROW = 128  # hidden size

Stats: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]


def suits(elements: int, x: Tensor) -> bool:
    """Whether so many logits, in the dtype and on the device of ``x``, are few."""
    # a graph would have to guard against the size; and a compiled one has no overhead to save
    narrow = x.dtype not in (torch.float32, torch.float64)
    return 0 < elements <= FEW_LOGITS and x.is_cpu and not narrow and not torch.compiler.is_compiling()


def row_stats(x: Tensor, labels: Tensor, ref_x: Tensor | None, wanted: Wanted) -> Stats:
    """Log-prob, entropy, KL, log-sum and argmax of logits ``[n, V]``; labels of −100 have log-prob 0."""
    z = _transformed(x, wanted.temperature, wanted.softcap)
    argmax = z.argmax(1) if wanted.argmax else None
    if wanted.entropy and ref_x is None:
        index, inside = locate(labels, x.shape[1], check=True)
        logp, entropy, lse = _LogProbsAndEntropy.apply(z, index)
        return only(logp, inside), entropy, None, lse, argmax
    log_p = z.log_softmax(1)
    try:
        logp = -F.nll_loss(log_p, labels.long(), reduction="none")
    except IndexError:
        locate(labels, x.shape[1], check=True)
        raise
    entropy = kl = None
    if ref_x is not None:
        p = log_p.exp()
        log_q = _transformed(ref_x, wanted.ref_temperature, wanted.ref_softcap).log_softmax(1).to(log_p.dtype)
        difference = log_p - log_q
        # only −inf, which is rare, needs care with what has probability 0; its products are NaN
        kl = (p * difference).sum(1)
        if not _finite(kl):
            kl = (p * difference.masked_fill(p == 0, 0.0)).sum(1)
        if wanted.entropy:
            entropy = -(p * log_p).sum(1)
            if not _finite(entropy):
                entropy = -(p * log_p.clamp(min=LEAST_LOG_P)).sum(1)
    return logp, entropy, kl, _log_sum(z, log_p), argmax


def _log_sum(z: Tensor, log_p: Tensor) -> Tensor:
    """Any column that is not −inf tells it."""
    first = z[:, 0]
    if _finite(first):
        return first - log_p[:, 0]
    peak = z.amax(1)
    return torch.where(peak == -torch.inf, peak, peak - log_p.amax(1))


class _LogProbsAndEntropy(torch.autograd.Function):
    """Both from one log-softmax, and their gradient in one pass less than autograd's, with a third of its memory."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = z.log_softmax(1)
        logp, p, lse = log_p.gather(1, index[:, None])[:, 0], log_p.exp(), _log_sum(z, log_p)
        entropy = torch.linalg.vecdot(p, log_p).neg_()
        if not _finite(entropy):  # 0·(−inf) must be 0, here and in the backward pass
            entropy = torch.linalg.vecdot(p, log_p.clamp_(min=LEAST_LOG_P)).neg_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_p, p, index, logp, entropy)
            ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        """dz_j = g_lp·(1[j = label] − p_j) − g_H·p_j·(log p_j + H) + g_lse·p_j."""
        log_p, p, index, logp, entropy = ctx.saved_tensors
        by_logp, by_entropy, by_lse = (torch.zeros_like(logp) if g is None else g for g in grads)
        others = by_lse - by_logp
        # the label's column takes 1 − p from the log-prob: by subtraction it would be lost to rounding as p nears 1
        at_label = (by_lse - by_entropy * (logp.clamp(min=LEAST_LOG_P) + entropy)) * logp.exp() - by_logp * torch.expm1(
            logp
        )
        if grads[1] is None:
            grad = p * others[:, None]
        else:
            rest = others - by_entropy * entropy
            grad = torch.addcmul(rest[:, None], log_p, by_entropy[:, None], value=-1).mul_(p)
        return grad.scatter_(1, index[:, None], at_label[:, None]), None


def linear_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob, log-sum and, without a gradient, entropy of few logits of hidden states ``[n, H]``."""
    index, inside = locate(labels, len(weight), check=True)
    return _LinearLogProbs.apply(hidden, weight, bias, index, inside, temperature, entropy)


class _LinearLogProbs(torch.autograd.Function):
    """Forward leaves p − 1[j = label] in place of the logits; the gradients are two products with it, as in K2."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        inside: Tensor | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        column = index[:, None]
        if entropy:
            p, logp, lse, entropies = _with_entropy(hidden, weight, bias, column, temperature)
            ctx.mark_non_differentiable(entropies)
        else:
            z = _logits(hidden, weight, bias, temperature)
            peak = z.amax(1)
            below_peak = z.gather(1, column)[:, 0].sub_(peak)
            p, entropies = torch.softmax(z, 1, out=z), None
            logp, lse, _ = from_largest(below_peak, peak, p)
        if any(ctx.needs_input_grad):
            mark(p, column, logp)
            ctx.save_for_backward(hidden, weight, index, inside, p)
            ctx.temperature = temperature
            ctx.set_materialize_grads(False)
        return logp if inside is None else only(logp, inside), lse, entropies

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_logp: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, index, inside, marked = ctx.saved_tensors
        scale = hidden.new_zeros(len(hidden)) if grad_logp is None else only(grad_logp, inside).neg_()
        if grad_lse is not None:  # of the label's column: p·g_lse = (p − 1)·g_lse + g_lse
            scale = scale + grad_lse
            marked = (marked * scale[:, None]).scatter_add_(1, index[:, None], grad_lse[:, None])
            scale = torch.ones_like(scale)
        if ctx.temperature != 1.0:
            scale = scale / ctx.temperature
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            (marked @ weight).mul_(scale[:, None]) if needs_hidden else None,
            _weight_gradient(marked, hidden * scale[:, None]) if needs_weight else None,
            marked.T @ scale if needs_bias else None,
            *(None,) * 4,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    z = F.linear(hidden, weight, bias)
    return z if temperature == 1.0 else z.mul_(1 / temperature)


def _with_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, log-probs of the labels' columns, log-sums and entropies, block by block.

    The entropy needs logits beside probabilities. A second array of all logits would cost more than the rest together:
    the allocator gives such arrays back to the system and gets every page anew.
    """
    p = hidden.new_empty(len(hidden), len(weight))
    found = []
    for part in chunks(len(hidden), max(LEAST_BLOCK_ROWS, BLOCK_LOGITS // len(weight))):
        z = _logits(hidden[part], weight, bias, temperature)
        peak = z.amax(1)
        below_peak = z.gather(1, column[part])[:, 0].sub_(peak)
        shifted = z.sub_(peak[:, None])
        rows = torch.softmax(shifted, 1, out=p[part])
        logp, lse, log_sum = from_largest(below_peak, peak, rows)
        entropy = log_sum - torch.linalg.vecdot(rows, shifted)
        if not _finite(entropy):  # 0·(−inf) must be 0
            entropy = log_sum - torch.linalg.vecdot(rows, shifted.clamp_(min=LEAST_LOG_P))
        found.append((logp, lse, entropy))
    logp, lse, entropy = (torch.cat(values) for values in zip(*found, strict=True))
    return p, logp, lse, entropy


def _weight_gradient(marked: Tensor, hidden: Tensor) -> Tensor:
    """``[V, H]`` of ``[n, V]`` and ``[n, H]``; for narrow layers and many rows the transposed product is faster."""
    if hidden.shape[1] <= NARROW and len(marked) >= marked.shape[1]:
        return (hidden.T @ marked).T.contiguous()
    return marked.T @ hidden


def _finite(values: Tensor) -> bool:
    return bool(values.detach().isfinite().all())


def _transformed(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        return torch.tanh(x / softcap) * (softcap / temperature)
    return x if temperature == 1.0 else x / temperature
