"""Statistics of few logits in plain library calls with their own gradients: an autograd function costs more there."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels._labels import locate
from align_kernels.native import LEAST_LOG_P, Wanted

# Up to so many logits a call is dominated by what Python costs.
FEW_LOGITS = 2**20

Stats: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]


def suits(elements: int, x: Tensor) -> bool:
    """Whether so many logits, in the dtype and on the device of ``x``, are few."""
    # a graph would have to guard against the size; and a compiled one has no overhead to save
    narrow = x.dtype not in (torch.float32, torch.float64)
    return 0 < elements <= FEW_LOGITS and x.is_cpu and not narrow and not torch.compiler.is_compiling()


def row_stats(
    x: Tensor, labels: Tensor, ref_x: Tensor | None, wanted: Wanted, *, entropy_gradient: bool = True
) -> Stats:
    """Log-prob, entropy, KL, log-sum and argmax of logits ``[n, V]``; labels of −100 have log-prob 0."""
    z = _transformed(x, wanted.temperature, wanted.softcap)
    log_p = z.log_softmax(1)
    try:
        logp = -F.nll_loss(log_p, labels.long(), reduction="none")
    except IndexError:
        locate(labels, x.shape[1], check=True)
        raise
    entropy = kl = None
    if wanted.entropy or ref_x is not None:
        from_p = log_p if entropy_gradient or ref_x is not None else log_p.detach()
        p = from_p.exp()
        # only −inf, which is rare, needs care with what has probability 0
        finite = bool(log_p.detach().sum().isfinite())
        if wanted.entropy:
            entropy = -(p * (from_p if finite else from_p.clamp(min=LEAST_LOG_P))).sum(1)
        if ref_x is not None:
            log_q = _transformed(ref_x, wanted.ref_temperature, wanted.ref_softcap).log_softmax(1).to(log_p.dtype)
            difference = log_p - log_q
            finite = finite and bool(log_q.sum().isfinite())
            kl = (p * (difference if finite else difference.masked_fill(p == 0, 0.0))).sum(1)
    # any column that is not −inf tells the log-sum
    first = z[:, 0]
    lse = first - log_p[:, 0] if bool(first.detach().isfinite().all()) else z.amax(1) - log_p.amax(1)
    return logp, entropy, kl, lse, z.argmax(1) if wanted.argmax else None


def _transformed(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        return torch.tanh(x / softcap) * (softcap / temperature)
    return x if temperature == 1.0 else x / temperature
