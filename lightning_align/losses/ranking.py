"""Whole rankings as one choice after another: the Plackett–Luce loss of reward models.

Legend: G prompts, K responses of the longest ranking, N orders.
"""

from functools import cache
from itertools import permutations
from random import Random

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics, at_least_float32, masked_sum

ENUMERATED = 4  # so many tied responses stand in all their orders
ORDERS = 24  # 4!, a multiple of 3! and 2!; of more tied responses, so many orders are drawn


def plackett_luce_loss(
    scores: Tensor, rows: Tensor, ranks: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Σ_g w_g [−Σ_{k<K} (r_(k) − logsumexp_{j≥k} r_(j))] / (K − 1), r_(1) the best; Luce 1959, Plackett 1975.

    With K = 2 it is Bradley–Terry. Tied responses share their places: the loss is its mean over the orders in which
    they can stand, all orders of up to four, 24 fixed ones of more (twelve drawn once, and their reverses).

    A *sum*; the caller divides once, by the weight of the global batch.

    Args:
        scores: One per response ``[R]``.
        rows: Rows of ``scores`` that belong to a prompt ``[G, K]``, −1 where it has fewer.
        ranks: Their ranks ``[G, K]``; 1 is best, equal is a tie.
        weight: w ≥ 0 of a prompt ``[G]``, 1 by default; one of weight 0 touches nothing.

    Returns:
        The summed loss; metric ``loss``.
    """
    scores = at_least_float32(scores)
    weight = scores.new_ones(len(rows)) if weight is None else weight.to(scores.dtype)
    counted, real = weight > 0, rows >= 0
    values = torch.where(real & counted[:, None], scores[rows.clamp(min=0)], 0.0)
    orders = orders_of(ranks, real)  # [N, G, K]
    best_first = values.expand_as(orders).gather(-1, orders)
    present = real.sum(1, keepdim=True)
    place = torch.arange(rows.shape[1], device=rows.device)
    # [G, K, K]: what is left to choose from at each place; a place beyond the last chooses itself
    left = ((place >= place[:, None]) & (place < present[..., None])) | torch.eye(
        len(place), dtype=torch.bool, device=rows.device
    )
    rest = torch.where(left, best_first[..., None, :], -torch.inf).logsumexp(-1)
    per_prompt = (rest - best_first).sum(-1).mean(0) / (present[:, 0] - 1).clamp(min=1)
    loss = masked_sum(weight * per_prompt, counted)
    return loss, {"loss": (loss.detach(), masked_sum(weight, counted))}


def orders_of(ranks: Tensor, real: Tensor) -> Tensor:
    """Orders ``[N, G, K]`` of each prompt's responses, best first and padding last; N = 1 where nothing ties."""
    tied = (ranks[:, :, None] == ranks[:, None, :]) & real[:, :, None] & real[:, None, :]
    size, place = tied.sum(-1), tied.tril(-1).sum(-1)  # of the block that a response ties in, and in that block
    number = ORDERS if bool((size > 1).any()) else 1
    among = _places(ranks.shape[1], ranks.device)[size, place][..., :number].movedim(-1, 0)  # [N, G, K]
    key = ranks.double() + among / (ranks.shape[1] + 1)
    return torch.where(real, key, torch.inf).argsort(dim=-1, stable=True)


@cache
def _places(longest: int, device: torch.device) -> Tensor:
    """``[size, place, n]``: where the response at a place of a block of that size stands in the n-th order of it."""
    table = torch.zeros(longest + 1, longest, ORDERS, dtype=torch.float64)
    for size in range(2, longest + 1):
        if size <= ENUMERATED:
            known = list(permutations(range(size)))
            orders = [known[n % len(known)] for n in range(ORDERS)]
        else:
            random = Random(size)
            drawn = [tuple(random.sample(range(size), size)) for _ in range(ORDERS // 2)]
            orders = drawn + [tuple(size - 1 - place for place in order) for order in drawn]
        table[size, :size] = torch.tensor(orders, dtype=torch.float64).T
    return table.to(device)
