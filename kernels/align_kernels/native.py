"""Statistics of rows of logits in library calls: the fast CPU implementation, which works on any device.

:class:`NativeRows` has the two passes over a chunk of logits that every vocabulary operation is made of. Where only
log-probs are wanted, forward leaves probabilities in place of the logits: backward is then matrix products alone, with
the upstream gradient of a row multiplied into its hidden state. Nothing is compiled: in cache, the exponentials of a
chunk cost a tenth of its products, and a compiler would take seconds to save less (docs/kernels.md has the figures).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels._labels import chunks

# p·log p is 0 in float32 and float64 below this log p; unlike −inf, it can be multiplied by p = 0.
LEAST_LOG_P = -1e4
CACHE_BYTES = 4 * 2**20


class Wanted(NamedTuple):
    """What to compute of rows, and how logits become log-probabilities: softmax(cap·tanh(x/cap)/temperature).

    Args:
        temperature: Of the policy.
        softcap: Of the policy, or None.
        entropy: Whether to compute entropies.
        argmax: Whether to find the most likely token.
        kl: Whether there is a reference.
        ref_temperature: Of the reference.
        ref_softcap: Of the reference, or None.
    """

    temperature: float = 1.0
    softcap: float | None = None
    entropy: bool = False
    argmax: bool = False
    kl: bool = False
    ref_temperature: float = 1.0
    ref_softcap: float | None = None

    @property
    def log_probs_only(self) -> bool:
        """Whether probabilities are all that backward needs of a row."""
        return not self.entropy and not self.kl and self.softcap is None


class RowStats(NamedTuple):
    """Statistics of rows ``[n]`` in float32 or wider; None where not wanted. ``labels`` lie inside the vocabulary."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    ref_lse: Tensor | None = None
    argmax: Tensor | None = None

    def at(self, part: slice | Tensor) -> "RowStats":
        """Of some of the rows."""
        return RowStats(*(None if values is None else values[part] for values in self))  # type: ignore[arg-type]


class RowGrads(NamedTuple):
    """Upstream gradients of rows ``[n]``; all but that of the log-prob may be None for zero."""

    logp: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    lse: Tensor | None = None

    def at(self, part: slice | Tensor) -> "RowGrads":
        """Of some of the rows."""
        return RowGrads(*(None if values is None else values[part] for values in self))  # type: ignore[arg-type]

    @property
    def others(self) -> Tensor:
        """What multiplies p_j of every column, but for entropy and KL: g_lse − g_lp."""
        return self.logp.neg() if self.lse is None else self.lse - self.logp


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def joined(found: list[RowStats], wanted: Wanted, like: Tensor) -> RowStats:
    """The statistics of all chunks, or of no rows."""
    if len(found) == 1:
        return found[0]
    if found:
        return RowStats(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)))  # type: ignore[arg-type]
    return _of_nothing(wanted, like.new_empty(0, dtype=statistics_dtype(like.dtype)))


def _of_nothing(wanted: Wanted, zero: Tensor) -> RowStats:
    """Statistics of rows over a vocabulary without tokens."""
    kl = zero.clone() if wanted.kl else None
    return RowStats(
        zero,
        zero - torch.inf,
        zero.clone() if wanted.entropy else None,
        kl,
        None if kl is None else kl - torch.inf,
        zero.long() if wanted.argmax else None,
    )


class NativeRows:
    """Forward and backward of chunks of rows, with scratch memory that serves one chunk after another.

    Args:
        wanted: What to compute.
        shard: Whether the logits are those of a part of the vocabulary, and probabilities thus not their softmax.
    """

    in_place = False  # backward leaves the logits alone

    def __init__(self, wanted: Wanted, *, shard: bool = False) -> None:
        self.wanted = wanted
        self.shard = shard
        self.by_probabilities = wanted.log_probs_only and not shard
        self._scratch: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ forward
    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        ref_x: Tensor | None = None,
        *,
        overwrite: bool = False,
        probabilities: bool = False,
    ) -> RowStats:
        """Statistics of logits ``[n, V]`` for labels ``[n]`` in ``[0, V)``.

        With ``overwrite``, ``x`` holds nothing of use afterwards; with ``probabilities``, what :meth:`mark` makes.
        """
        if not x.shape[1]:
            return _of_nothing(self.wanted, x.new_zeros(len(x), dtype=statistics_dtype(x.dtype)))
        overwrite = overwrite or probabilities
        found = [
            self._forward(x[part], labels[part], None if ref_x is None else ref_x[part], overwrite, probabilities)
            for part in self._passes(x)
        ]
        return joined(found, self.wanted, x)

    def _forward(
        self, x: Tensor, labels: Tensor, ref_x: Tensor | None, overwrite: bool, probabilities: bool
    ) -> RowStats:
        wanted = self.wanted
        z = self._transformed(x, wanted.temperature, wanted.softcap, "z", overwrite)
        column = labels[:, None]
        picked = z.gather(1, column)[:, 0]
        argmax = z.argmax(1) if wanted.argmax else None
        out = self._buffer("z", x) if z is x and not overwrite else z
        if wanted.entropy or wanted.kl:
            return self._with_expectations(z, out, picked, ref_x)._replace(argmax=argmax)
        # a finite label needs no pass for the maximum; whether all are is known without waiting on a CPU alone
        if not probabilities and x.is_cpu and bool(picked.isfinite().all()):
            logp = torch.log_softmax(z, 1, out=out).gather(1, column)[:, 0]
            return RowStats(logp, picked - logp, argmax=argmax)
        peak = z.amax(1)
        torch.softmax(z, 1, out=out)
        logp, lse, _ = from_largest(picked - peak, peak, out)
        if probabilities:
            mark(out, column, logp)
            if out is not x:
                x.copy_(out)
        return RowStats(logp, lse, argmax=argmax)

    def mark(self, x: Tensor, labels: Tensor, logp: Tensor) -> None:
        """Overwrites logits with p − 1[j = label], given the labels' log-probs."""
        for part in self._passes(x):
            rows = x[part]
            z = self._transformed(rows, self.wanted.temperature, self.wanted.softcap, "z", True)
            torch.softmax(z, 1, out=z)
            mark(z, labels[part, None], logp[part])
            if z is not rows:
                rows.copy_(z)

    def _with_expectations(self, z: Tensor, out: Tensor, picked: Tensor, ref_x: Tensor | None) -> RowStats:
        """Statistics with entropy and KL; ``out`` is overwritten."""
        peak = z.amax(1)
        shifted = torch.sub(z, peak[:, None], out=out)
        p = torch.softmax(shifted, 1, out=self._buffer("p", z))
        logp, lse, log_sum = from_largest(picked - peak, peak, p)
        log_p = shifted.sub_(log_sum[:, None])
        stats = RowStats(logp, lse)
        if ref_x is not None:
            # step by step as above, so that equal logits have a KL of exactly 0
            y = self._transformed(ref_x, self.wanted.ref_temperature, self.wanted.ref_softcap, "y")
            peak = y.amax(1)
            shifted = torch.sub(y, peak[:, None], out=self._buffer("y", ref_x))
            q = torch.softmax(shifted, 1, out=self._buffer("q", ref_x))
            _, ref_lse, log_sum = from_largest(peak, peak, q)
            log_q = shifted.sub_(log_sum[:, None])
            kl = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0).mul_(p).sum(1)
            stats = stats._replace(kl=kl, ref_lse=ref_lse)
        if self.wanted.entropy:
            stats = stats._replace(entropy=log_p.clamp_(min=LEAST_LOG_P).mul_(p).sum(1).neg_())
        return stats

    # ------------------------------------------------------------------ backward
    def backward(
        self,
        out: Tensor,
        x: Tensor,
        labels: Tensor,
        stats: RowStats,
        grads: RowGrads,
        ref_x: Tensor | None = None,
        *,
        owned: Tensor | None = None,
    ) -> None:
        """Writes the gradient with respect to the logits ``x`` ``[n, V]`` into ``out``, which may be ``x``.

        dz_j = g_lp·1[j = label] + p_j·(g_lse − g_lp − g_H·(log p_j + H) + g_kl·(log p_j − log q_j − KL)), then through
        temperature and soft-cap. The column of the label takes 1 − p from the log-prob: by subtraction it would be lost
        to rounding as p nears 1. Where ``owned`` is false the label is not one of these columns.
        """
        at_label = label_gradient(stats.logp, grads, owned)
        for part in self._passes(x) if x.shape[1] else []:
            ref_rows = None if ref_x is None else ref_x[part]
            self._backward(out[part], x[part], labels[part], stats.at(part), grads.at(part), ref_rows, at_label[part])

    def _backward(
        self,
        out: Tensor,
        x: Tensor,
        labels: Tensor,
        stats: RowStats,
        grads: RowGrads,
        ref_x: Tensor | None,
        at_label: Tensor,
    ) -> None:
        wanted = self.wanted
        slope = None
        if wanted.softcap is not None:
            slope = self._buffer("slope", x).copy_(x).mul_(1 / wanted.softcap).tanh_().square_().neg_().add_(1)
        z = self._transformed(x, wanted.temperature, wanted.softcap, "z")
        grad = out if out.dtype == statistics_dtype(out.dtype) else self._buffer("z", x)
        column, others = labels[:, None], grads.others[:, None]
        if grads.entropy is None and grads.kl is None:
            self._probabilities(z, stats.lse, grad).mul_(others)
        else:
            p = self._probabilities(z, stats.lse, self._buffer("p", x))
            log_p = torch.sub(z, stats.lse[:, None], out=grad)
            rest = self._rest(log_p, p, stats, grads, ref_x)
            at_label = at_label + (rest.gather(1, column) * p.gather(1, column))[:, 0]
            torch.mul(rest.add_(others), p, out=grad)
        grad.scatter_(1, column, at_label[:, None])
        if slope is not None:
            grad.mul_(slope)
        if wanted.temperature != 1.0:
            grad.mul_(1 / wanted.temperature)
        if grad is not out:
            out.copy_(grad)

    def _probabilities(self, z: Tensor, lse: Tensor, out: Tensor) -> Tensor:
        """exp(z − lse) in ``out``; by softmax where that is the same, in two thirds of the time."""
        if self.shard:
            return torch.sub(z, lse[:, None], out=out).exp_()
        return torch.softmax(z, 1, out=out)

    def _rest(self, log_p: Tensor, p: Tensor, stats: RowStats, grads: RowGrads, ref_x: Tensor | None) -> Tensor:
        """What entropy and KL multiply p_j with; overwrites ``log_p``."""
        rest = None
        if grads.kl is not None:
            assert ref_x is not None
            assert stats.kl is not None
            assert stats.ref_lse is not None
            y = self._transformed(ref_x, self.wanted.ref_temperature, self.wanted.ref_softcap, "y")
            log_q = torch.sub(y, stats.ref_lse[:, None], out=self._buffer("y", ref_x))
            rest = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0)
            rest.sub_(stats.kl[:, None]).mul_(grads.kl[:, None])
        if grads.entropy is not None:
            assert stats.entropy is not None
            of_entropy = log_p.clamp_(min=LEAST_LOG_P).add_(stats.entropy[:, None]).mul_(-grads.entropy[:, None])
            rest = of_entropy if rest is None else rest.add_(of_entropy)
        assert rest is not None
        return rest

    # ------------------------------------------------------------------ both
    def _passes(self, x: Tensor) -> list[slice]:
        """Rows that fit a cache in float32, since several passes go over them; on other devices all."""
        fitting = CACHE_BYTES // (4 * x.shape[1]) if x.is_cpu else len(x)
        return list(chunks(len(x), max(1, fitting)))

    def _transformed(
        self, x: Tensor, temperature: float, softcap: float | None, name: str, overwrite: bool = False
    ) -> Tensor:
        """cap·tanh(x/cap)/temperature in float32 or wider: ``x`` where that changes nothing, else scratch."""
        wide = x.dtype == statistics_dtype(x.dtype)
        if wide and softcap is None and temperature == 1.0:
            return x
        z = x if wide and overwrite else self._buffer(name, x).copy_(x)
        if softcap is not None:
            return z.mul_(1 / softcap).tanh_().mul_(softcap / temperature)
        return z if temperature == 1.0 else z.mul_(1 / temperature)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Scratch memory of that name, as large as ``like``, in float32 or wider."""
        held = self._scratch.get(name)
        if held is None or len(held) < len(like):
            held = self._scratch[name] = torch.empty_like(
                like, dtype=statistics_dtype(like.dtype), memory_format=torch.contiguous_format
            )
        return held[: len(like)]


def from_largest(below_peak: Tensor, peak: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of logits so far below the maximum, log-sums, and those less the maximum, of probabilities ``[n, V]``.

    The largest probability is 1/Σe^(z − max): its logarithm is the log-sum, rounded once.
    """
    log_sum = p.amax(1).log_().neg_()
    return below_peak - log_sum, torch.where(peak == -torch.inf, peak, peak + log_sum), log_sum


def mark(p: Tensor, column: Tensor, logp: Tensor) -> None:
    """p − 1 in the label's column, from the log-prob: by subtraction it would be lost to rounding as p nears 1."""
    p.scatter_(1, column, torch.expm1(logp)[:, None])


def label_gradient(logp: Tensor, grads: RowGrads, owned: Tensor | None) -> Tensor:
    """The label's column of the gradient ``[n]``, but for entropy and KL: g_lp·(1 − p) + g_lse·p."""
    complement = torch.expm1(logp)
    if owned is not None:
        complement = torch.where(owned, complement, logp.exp())
    gradient = grads.logp * complement.neg_()
    return gradient if grads.lse is None else gradient.addcmul_(grads.lse, logp.exp())
