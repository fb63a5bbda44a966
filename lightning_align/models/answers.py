"""Log-probs of whole answers, wherever their tokens lie: in padded rows, packed, or behind a prompt they share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.models.logprobs import TokenStats, token_stats
from lightning_align.models.lora import WithoutAdapter


@dataclass(frozen=True)
class AnswerRows:
    """Sequences in rows, and where the tokens of each answer are: B rows of T slots, R answers of at most C tokens.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, true for real tokens.
        slots: ``[R, C]``, index into the B·T slots of each token of an answer.
        mask: ``[R, C]``, true where there is a token; the index elsewhere is 0.
        position_ids: ``[B, T]`` of packed rows.
        document_ids: ``[B, T]`` of packed rows, −1 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    slots: Tensor
    mask: Tensor
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None


@dataclass(frozen=True)
class AnswerStats:
    """Of answers ``[R]``, summed over their tokens; None where not asked for.

    Args:
        logp: Log-prob of the answer in nats.
        length: Number of its tokens, float.
        entropy: Of the distributions that its tokens were drawn from, in nats.
        correct: How many of its tokens have the highest probability.
        mean_logit: Of the logits that its tokens were drawn with, their mean over the vocabulary.
    """

    logp: Tensor
    length: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    mean_logit: Tensor | None = None


def answer_stats(
    model: nn.Module,
    rows: AnswerRows,
    *,
    entropy: bool = False,
    correct: bool = False,
    mean_logit: bool = False,
) -> AnswerStats:
    """Statistics of the answers under ``model``, differentiable in log-prob and entropy; the head sees no prompt."""
    stats = answer_token_stats(model, rows, entropy=entropy, correct=correct, mean_logit=mean_logit)

    def total(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.sum(1)

    return AnswerStats(
        stats.logp.sum(1),
        rows.mask.sum(1).to(stats.logp.dtype),
        total(stats.entropy),
        total(stats.correct),
        total(stats.mean_logit),
    )


def answer_token_stats(model: nn.Module | WithoutAdapter, rows: AnswerRows, **options: Any) -> TokenStats:
    """Statistics of each token of the answers ``[R, C]``, 0 where there is none.

    Args:
        model: As for :func:`token_stats`.
        rows: Where the answers are.
        options: What else :func:`token_stats` takes: ``temperature``, ``entropy``, ``ref_model`` …
    """
    wanted = torch.zeros_like(rows.attention_mask, dtype=torch.bool).view(-1)
    wanted[rows.slots[rows.mask]] = True
    stats = token_stats(
        model,
        rows.input_ids,
        rows.attention_mask,
        mask=wanted.view_as(rows.attention_mask),
        position_ids=rows.position_ids,
        document_ids=rows.document_ids,
        **options,
    )

    def gathered(values: Tensor | None) -> Tensor | None:
        # gathered, not scattered: the order of summation is that of the tokens
        return None if values is None else values.reshape(-1)[rows.slots].where(rows.mask, 0)

    logp, *others = map(gathered, stats)
    assert logp is not None
    return TokenStats(logp, *others)
