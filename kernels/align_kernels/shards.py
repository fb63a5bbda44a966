"""Statistics over a vocabulary that is split over the ranks of a process group."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from align_kernels._labels import only
from align_kernels._types import TokenStats
from align_kernels.native import RowStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """This rank's part of a vocabulary: its first column, and the ranks that share the rest."""

    start: int
    group: "ProcessGroup"


def merge_vocab_stats(stats: TokenStats, process_group: "ProcessGroup") -> TokenStats:
    """Statistics over the whole vocabulary from each rank's own columns, by one all-gather of 4 numbers a token.

    Called by every rank, for the same tokens. With w_r = exp(lse_r − lse) the weight of rank r: entropy
    H = Σ w_r (H_r − log w_r), logp = logp_r + lse_r − lse on the rank r that has the label.

    Args:
        stats: Of this rank's columns, without KL and argmax; ``logp`` is +inf, which no log-prob is, where the label is
            a column of another rank.
        process_group: The ranks that share the vocabulary.

    Returns:
        The merged statistics; a label on no rank has log-prob 0. Not differentiable.
    """
    if stats.kl is not None or stats.argmax is not None:
        raise ValueError("stats: KL and argmax cannot be merged from statistics of shards")
    inside = stats.logp != torch.inf
    rows = RowStats(stats.logp.reshape(-1), stats.lse.reshape(-1), _flat(stats.entropy))
    merged, logp, _ = merge(rows, inside.reshape(-1), process_group)
    shape = stats.logp.shape
    entropy = None if merged.entropy is None else merged.entropy.view(shape)
    return TokenStats(logp.view(shape), entropy, None, merged.lse.view(shape), None)


def merge(stats: RowStats, inside: Tensor | None, group: "ProcessGroup") -> tuple[RowStats, Tensor, Tensor]:
    """Merges the statistics of rows ``[n]`` over shards.

    Args:
        stats: Of this shard, without KL and argmax.
        inside: Which labels are columns of this shard; None for all.
        group: The ranks.

    Returns:
        The statistics over all shards, whose ``logp`` is still of this shard's own column for the row; the log-probs of
        the labels, 0 where no shard has them; and which labels some shard has.
    """
    none = torch.zeros_like(stats.lse)
    entropy = none if stats.entropy is None else stats.entropy
    has_label = torch.ones_like(none) if inside is None else inside.to(none.dtype)
    mine = torch.stack([stats.lse, entropy, only(stats.logp, inside), has_label])
    ranks = torch.distributed.get_world_size(group)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(gathered, mine, group=group)
    lse_r, entropy_r, logp_r, inside_r = torch.stack(gathered, 1)
    lse = lse_r.logsumexp(0)
    log_w = lse_r - lse
    w = log_w.exp()
    logp = torch.where(inside_r > 0, logp_r + log_w, 0.0).sum(0)
    own_w = stats.lse - lse
    merged = RowStats(
        torch.where(own_w == -torch.inf, own_w, stats.logp + own_w),
        lse,
        None if stats.entropy is None else torch.where(w > 0, w * (entropy_r - log_w), 0.0).sum(0),
    )
    return merged, logp, (inside_r > 0).any(0)


def sum_over_shards(partial: Tensor, group: "ProcessGroup") -> Tensor:
    """The sum over the ranks, in float32 or wider, in the dtype of ``partial``."""
    total = partial.to(torch.promote_types(partial.dtype, torch.float32))
    torch.distributed.all_reduce(total, group=group)
    return total.to(partial.dtype)


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)
