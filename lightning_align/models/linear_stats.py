"""Statistics of hidden states under a model's output layer, and of logits, by the operations of ``align_kernels``.

Here stands what these operations do not know: what else a model does to its logits, and which tokens were right.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import align_kernels


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
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        product = F.linear(hidden, self.weight.to(hidden.dtype), bias)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * self.softcap
        return logits if self.scale == 1.0 else logits * self.scale

    @torch.no_grad()
    def mean_logits(self, hidden: Tensor) -> Tensor | None:
        """Mean over the vocabulary ``[…]`` of :meth:`logits`, which one row of means gives; None under a soft-cap."""
        if self.softcap is not None:
            return None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = 0.0 if self.bias is None else self.bias.to(wide).mean()
        return (hidden.to(wide) @ self.weight.mean(0, dtype=wide) + bias) * self.scale

    def over_mean(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """What the logit of each label has over the mean of its row ``[N]``, differentiable; not under a soft-cap."""
        assert self.softcap is None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = self.weight.index_select(0, labels).to(wide) - self.weight.mean(0, dtype=wide)
        over = (hidden.to(wide) * weight).sum(1)
        if self.bias is not None:
            over = over + self.bias.index_select(0, labels).to(wide) - self.bias.to(wide).mean()
        return over * self.scale

    def transform(self, temperature: float) -> tuple[float, float | None]:
        """Temperature and soft-cap that do to ``weight·h + bias`` what scale, cap and ``temperature`` do."""
        return temperature / self.scale, None if self.softcap is None else self.softcap / self.scale


def logits_row_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    correct: bool = False,
    ref_logits: Tensor | None = None,
) -> RowStats:
    """Statistics of logits ``[N, V]`` and labels ``[N]``; ``ref_logits``, constants, ask for the KL."""
    stats = align_kernels.token_stats(
        logits,
        labels,
        ref_logits=None if ref_logits is None else ref_logits.detach(),
        entropy=entropy,
        argmax=correct,
        temperature=temperature,
    )
    return _row_stats(stats, labels)


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
    """Statistics of hidden states ``[N, H]`` under a head, differentiable in both; the logits are not kept in memory.

    Args:
        hidden: Rows that predict a token each.
        head: The output layer.
        labels: ``[N]`` int64, the tokens predicted.
        temperature: Divides the logits, of the reference too.
        entropy: Whether to compute entropies.
        correct: Whether to compare labels with the most likely token.
        reference: Hidden states and head of the reference for the exact KL, constants.
    """
    scaled, softcap = head.transform(temperature)
    stats = align_kernels.linear_token_logprobs(
        hidden.to(head.weight.dtype),
        head.weight,
        labels,
        bias=head.bias,
        ref=None if reference is None else _as_reference(*reference, temperature),
        entropy=entropy,
        argmax=correct,
        temperature=scaled,
        softcap=softcap,
    )
    return _row_stats(stats, labels)


def _as_reference(hidden: Tensor, head: Head, temperature: float) -> align_kernels.Reference:
    return align_kernels.Reference(hidden.to(head.weight.dtype), head.weight, head.bias, *head.transform(temperature))


def _row_stats(stats: align_kernels.TokenStats, labels: Tensor) -> RowStats:
    return RowStats(stats.logp, stats.entropy, stats.kl, None if stats.argmax is None else stats.argmax == labels)
