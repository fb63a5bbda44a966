"""K3: a policy loss and its gradients from hidden states, in one pass over chunks of logits that are never kept.

Log-probs of a chunk give the derivatives of its tokens' losses, those turn the chunk into its gradient in place, and
two products end it: three products in all. With ``ratio="sequence"`` no token's derivative is known before the last
log-prob: the chunks are computed twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import linear_logp
from align_kernels._labels import locate, only
from align_kernels.layer import Layer, LayerGrads
from align_kernels.linear_logp import Rows
from align_kernels.native import RowGrads, RowStats, joined
from align_kernels.policy_terms import Objective, Terms, Tokens, policy_terms

# Rows without a gradient are left out of the products where that saves more than a copy of the others costs.
WORTH_DROPPING = 0.875
SegmentSums = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Sequences(NamedTuple):
    """Sequence numbers of the counted tokens ``[M]``, and how to add up by them."""

    ids: Tensor
    num: int
    sums: SegmentSums


class Found(NamedTuple):
    """Of the counted tokens ``[M]``; gradients of the loss are None where not needed."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor
    approx_kl: Tensor
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


def loss_and_gradients(
    rows: Rows,
    layer: Layer,
    labels: Tensor,
    tokens: Tokens,
    objective: Objective,
    *,
    entropy_coef: float,
    needs: tuple[bool, bool, bool],
    sequences: Sequences | None = None,
    check: bool = False,
    accum_dtype: torch.dtype | None = None,
) -> Found:
    """The loss of the tokens that count, and its gradients."""
    index, known = locate(labels, layer.weight.shape[0], check=check)
    if sequences is None:
        grads, stats, terms = _in_one_pass(
            rows, layer, index, known, tokens, objective, entropy_coef, needs, accum_dtype
        )
    else:
        columns, _ = linear_logp.forward(rows, layer, None, labels, keep=False)
        stats = columns.stats
        terms, by_logp = _sequence_terms(stats, known, tokens, objective, sequences)
        upstream = RowGrads(by_logp, _entropy_gradient(tokens, known, entropy_coef))
        grads = (None, None, None)
        if any(needs):
            grads = linear_logp.backward(rows, layer, None, columns, None, upstream, needs, accum_dtype=accum_dtype)
    return _found(stats, known, tokens, terms, entropy_coef, grads)


def _found(
    stats: RowStats,
    known: Tensor | None,
    tokens: Tokens,
    terms: Terms,
    entropy_coef: float,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Found:
    assert stats.entropy is not None
    logp, entropy = only(stats.logp, known), only(stats.entropy, known)
    d = only(logp - tokens.old_logp, known)
    count = torch.as_tensor(len(d), device=d.device) if known is None else known.sum()
    return Found(
        only(terms.loss - entropy_coef * tokens.weights * entropy, known).sum(),
        logp,
        entropy,
        only(terms.ratio, known),
        _count(terms.low, known),
        _count(terms.high, known),
        (d * d).sum() / (2 * count.clamp(min=1)),
        grads,
    )


def of_few_logits(
    logp: Tensor,
    entropy: Tensor,
    lse: Tensor,
    known: Tensor | None,
    tokens: Tokens,
    objective: Objective,
    *,
    entropy_coef: float,
    sequences: Sequences | None,
) -> Found:
    """The same of statistics that exist; autograd takes the loss's derivatives by log-prob to what they came from."""
    with torch.no_grad():
        stats = RowStats(logp.detach(), lse.detach(), entropy.detach())
        if sequences is None:
            terms = policy_terms(stats.logp, only(stats.logp - tokens.old_logp, known), tokens, objective)
            by_logp = only(terms.by_ratio + terms.by_logp, known)
        else:
            terms, by_logp = _sequence_terms(stats, known, tokens, objective, sequences)
        by_entropy = _entropy_gradient(tokens, known, entropy_coef)
        found = _found(stats, known, tokens, terms, entropy_coef, (None, None, None))
    if not logp.requires_grad:
        return found
    slope = (
        torch.dot(by_logp, logp) if by_entropy is None else torch.dot(by_logp, logp) + torch.dot(by_entropy, entropy)
    )
    return found._replace(loss=slope + (found.loss - slope.detach()))


def _count(flags: Tensor, known: Tensor | None) -> Tensor:
    return (flags if known is None else flags & known).sum()


def _entropy_gradient(tokens: Tokens, known: Tensor | None, coef: float) -> Tensor | None:
    return only(-coef * tokens.weights, known) if coef else None


def _in_one_pass(
    rows: Rows,
    layer: Layer,
    index: Tensor,
    known: Tensor | None,
    tokens: Tokens,
    objective: Objective,
    entropy_coef: float,
    needs: tuple[bool, bool, bool],
    accum_dtype: torch.dtype | None,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], RowStats, Terms]:
    parts = layer.parts()
    total = LayerGrads.zeros(layer, needs, accum_dtype, sums=max(2, len(parts)), rows_may_lack=True)
    buffer = layer.empty_logits(min(layer.chunk, len(layer)))
    by_entropy = _entropy_gradient(tokens, known, entropy_coef)
    found, terms = [], []
    for part in parts:
        x = layer.logits_into(buffer, part)
        stats = rows.forward(x, index[part], overwrite=not any(needs))
        of_part, inside = tokens.at(part), None if known is None else known[part]
        term = policy_terms(stats.logp, only(stats.logp - of_part.old_logp, inside), of_part, objective)
        found.append(stats)
        terms.append(term)
        if any(needs):
            grads = RowGrads(
                only(term.by_ratio + term.by_logp, inside), None if by_entropy is None else by_entropy[part]
            )
            _add_chunk(rows, layer, total, part, x, index[part], stats, grads)
    return total.rounded(layer), joined(found, rows.wanted, layer.hidden), _joined_terms(terms, tokens.old_logp)


def _joined_terms(terms: list[Terms], like: Tensor) -> Terms:
    """The terms of all chunks, or of no tokens."""
    if terms:
        return Terms(*(torch.cat(values) for values in zip(*terms, strict=True)))
    none = like.new_empty(0)
    return Terms(none, none, none, none, none.bool(), none.bool())


def _add_chunk(
    rows: Rows,
    layer: Layer,
    total: LayerGrads,
    part: slice,
    x: Tensor,
    index: Tensor,
    stats: RowStats,
    grads: RowGrads,
) -> None:
    """Adds a chunk's gradients; on a CPU without the rows whose derivatives are all zero."""
    chosen: slice | Tensor = part
    if x.is_cpu:
        alive = (grads.logp != 0) | (grads.logp != grads.logp)
        alive = alive if grads.entropy is None else alive | (grads.entropy != 0)
        lives = alive.nonzero()[:, 0]
        if len(lives) < WORTH_DROPPING * len(x):
            x, index, stats, grads = x.index_select(0, lives), index[lives], stats.at(lives), grads.at(lives)
            chosen = lives + part.start
    if len(index):
        rows.backward(x, x, index, stats, grads)
        total.add(layer, chosen, x)


def _sequence_terms(
    stats: RowStats, known: Tensor | None, tokens: Tokens, objective: Objective, sequences: Sequences
) -> tuple[Terms, Tensor]:
    """Terms where the ratio is the sequence's, exp of the mean of its log-ratios, and derivatives by log-prob."""
    counted = torch.ones_like(stats.logp, dtype=torch.bool) if known is None else known
    ids = sequences.ids
    sums, sizes = sequences.sums(only(stats.logp - tokens.old_logp, known), counted, ids, sequences.num)
    sizes = sizes.clamp(min=1)
    terms = policy_terms(stats.logp, (sums / sizes)[ids], tokens, objective)
    by_mean, _ = sequences.sums(only(terms.by_ratio, known), counted, ids, sequences.num)
    return terms, only((by_mean / sizes)[ids] + terms.by_logp, known)
