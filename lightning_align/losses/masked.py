"""Masked sums, the four reductions of a per-token loss, masked moments and whitening.

Masked entries are removed by ``where``, never by multiplication: what stands in padding, NaN included, does not leak.
(Into gradients it leaks only where an earlier operation made the NaN; the losses therefore clean their *inputs*.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Numerator and denominator of each metric, detached.
Metrics = dict[str, tuple[Tensor, Tensor]]

WHITEN_EPSILON = 1e-8


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 if that is what they are."""
    return values if values.dtype == torch.float64 else values.float()


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ v over the entries where ``mask`` is true; along ``dim``, or over everything."""
    kept = torch.where(mask.bool(), at_least_float32(values), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Σ m v / Σ m; 0 where the mask is empty."""
    total = masked_sum(values, mask, dim)
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return total / count.clamp(min=1)


# ------------------------------------------------------------------ reductions of a per-token loss [B, T] to a scalar
def _divide(total: Tensor, count: Tensor, normaliser: Tensor | float | None) -> Tensor:
    if normaliser is None:
        return total / count.clamp(min=1)
    return total / normaliser


def token_mean(loss_BT: Tensor, mask_BT: Tensor, *, normaliser: Tensor | float | None = None) -> Tensor:
    """Σ_b Σ_t m ℓ / Σ_b Σ_t m.

    Args:
        loss_BT: Per-token loss ``[B, T]``.
        mask_BT: True on tokens that count ``[B, T]``.
        normaliser: Token count of the global batch; by default this batch's own. An empty mask gives 0.
    """
    return _divide(masked_sum(loss_BT, mask_BT), mask_BT.bool().sum(), normaliser)


def sequence_mean(loss_BT: Tensor, mask_BT: Tensor, *, normaliser: Tensor | float | None = None) -> Tensor:
    """Mean over sequences of each one's token mean; sequences with an empty mask leave both sums.

    ``normaliser``: number of non-empty sequences of the global batch; by default this batch's own.
    """
    return _divide(masked_mean(loss_BT, mask_BT, dim=1).sum(), mask_BT.bool().any(1).sum(), normaliser)


def sum_sequence_mean(loss_BT: Tensor, mask_BT: Tensor, *, normaliser: Tensor | float | None = None) -> Tensor:
    """(1/B) Σ_b Σ_t m ℓ; ``normaliser``: number of sequences of the global batch, by default B."""
    return _divide(masked_sum(loss_BT, mask_BT), mask_BT.new_tensor(len(mask_BT), dtype=torch.long), normaliser)


def constant_mean(loss_BT: Tensor, mask_BT: Tensor, *, length: int, normaliser: Tensor | float | None = None) -> Tensor:
    """(1/(B·L)) Σ_b Σ_t m ℓ with a fixed length L (Dr. GRPO); ``normaliser``: number of sequences, by default B."""
    return sum_sequence_mean(loss_BT, mask_BT, normaliser=normaliser) / length


# Reductions that need nothing but loss and mask; `constant_mean` also needs its length.
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "sum_sequence": sum_sequence_mean,
    "constant": constant_mean,
}


# ------------------------------------------------------------------ statistics of the global batch
def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, Σ v and Σ v² over the mask, ``[3]`` float64; add them over ranks to get those of the global batch."""
    kept = torch.where(mask.bool(), values.detach().double(), 0.0)
    return torch.stack([mask.bool().sum().double(), kept.sum(), (kept * kept).sum()])


def mean_and_var(total: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased unless said otherwise) from summed :func:`moments`, float64."""
    count, first, second = total.unbind()
    mean = first / count.clamp(min=1)
    squared = (second - count * mean * mean).clamp(min=0)
    return mean, squared / (count - int(unbiased)).clamp(min=1)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    global_moments: Tensor | None = None,
) -> Tensor:
    """(v − mean) / sqrt(var + 1e-8) on the mask, 0 elsewhere; the statistics carry no gradient.

    Args:
        values: Any shape.
        mask: Same shape; true on valid entries.
        shift_mean: Otherwise the mean is added back and only the scale changes.
        unbiased: Divide the variance by n − 1, as TRL does.
        global_moments: :func:`moments` summed over ranks; by default those of ``values``.

    Returns:
        Whitened values; with fewer than two valid entries, the values as they were.
    """
    values = at_least_float32(values)
    total = moments(values, mask) if global_moments is None else global_moments
    mean, var = mean_and_var(total, unbiased=unbiased)
    scale = torch.rsqrt(var + WHITEN_EPSILON)
    white = ((values.double() - mean) * scale + (0.0 if shift_mean else mean)).to(values.dtype)
    return torch.where(total[0] < 2, values, torch.where(mask.bool(), white, 0.0))


def explained_variance(error_moments: Tensor, return_moments: Tensor) -> float:
    """1 − Var(G − V) / Var(G) from the summed :func:`moments` of G − V and of G.

    1 is a perfect value function, 0 one that knows no more than the mean; NaN where returns do not vary.
    """
    (_, error), (_, total) = mean_and_var(error_moments), mean_and_var(return_moments)
    return float(1 - error / total) if total > 0 else float("nan")
