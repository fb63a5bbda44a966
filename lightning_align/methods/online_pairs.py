"""From samples to pairs that any preference loss can learn from."""

import math

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics, masked_sum
from lightning_align.methods.dpo_objectives import Batch, PairObjective
from lightning_align.methods.sampling import SamplingModule
from lightning_align.models.answers import AnswerStats
from lightning_align.rollout.types import Experience, Rollout


def best_and_worst(scores: Tensor, rollout: Rollout, *, above: float | Tensor = -math.inf) -> tuple[list[int], int]:
    """Rows of a pair for each prompt, the best of its completions before the worst.

    Args:
        scores: Of completions ``[B]``; those that are NaN have none.
        rollout: The completions.
        above: What the best must score more than, one or ``[B]``.

    Returns:
        The rows, and the number of prompts without a pair: fewer than two scores, all equal, or none high enough.
    """
    values, high = scores.tolist(), (scores > above).tolist()
    rows: list[int] = []
    prompts = rollout.rows_of_prompts()
    for group in prompts:
        scored = [row for row in group if values[row] == values[row]]
        if scored:
            best, worst = max(scored, key=values.__getitem__), min(scored, key=values.__getitem__)
            rows += [best, worst] if values[best] > values[worst] and high[best] else []
    return rows, len(prompts) - len(rows) // 2


def as_pairs(samples: Experience, rows: list[int]) -> Experience:
    """The pairs at ``rows``; without any, a stand-in with which a rank takes part in every step."""
    return samples.select(rows) if rows else samples.select([0, 1]).without_learning()


def pair_loss(
    module: SamplingModule, objective: PairObjective, pairs: Experience, normaliser: Tensor
) -> tuple[Tensor, Metrics]:
    """Mean over pairs of a preference loss.

    Args:
        module: Whose policy learns.
        objective: The loss.
        pairs: Two completions of each prompt; the one that scores more is the better one. ``ref_logp`` is of tokens
            ``[B, T]`` or of whole completions ``[B]``.
        normaliser: Number of pairs of the global minibatch.
    """
    loss, sums = objective.loss(_Answers(module, pairs), _batch(pairs, normaliser))
    sums.pop("num_tokens")  # the optimiser's steps have a count of their own, episodes
    return loss / normaliser, sums


def number_of_pairs(pairs: Experience) -> Tensor:
    """Pairs that there is something to learn from; the stand-in of a rank without any is none."""
    return pairs.completion_mask.any(1).sum() // 2


def _batch(pairs: Experience, normaliser: Tensor) -> Batch:
    """A micro-batch as preference losses read it."""
    rows = torch.tensor(pairs.rollout.rows_of_prompts(), device=pairs.scores.device)
    first, second = rows.unbind(1)
    ahead = pairs.scores[first] >= pairs.scores[second]
    chosen, rejected = torch.where(ahead, first, second), torch.where(ahead, second, first)
    learnt = pairs.completion_mask.any(1)
    weight = learnt[chosen].float()
    return {
        "attention_mask": pairs.attention_mask,
        "response_weight": learnt.float(),
        "score": pairs.scores,
        "pair_chosen": chosen,
        "pair_rejected": rejected,
        "pair_weight": weight,
        "pair_label": torch.ones_like(weight),
        "pair_margin": torch.zeros_like(weight),
        "window_weight": normaliser,
    }


class _Answers:
    """What an objective asks of the policy, about samples."""

    def __init__(self, module: SamplingModule, pairs: Experience) -> None:
        self.module = module
        self.pairs = pairs
        self.all_reduce = module.all_reduce
        self.gather = module.gather

    def answers(self, batch: Batch, *, measure: bool = True) -> tuple[AnswerStats, Tensor | None]:
        """Statistics of the completions with gradient, and their log-probs under the reference."""
        stats = self.module.completion_stats(self.module.model, self.pairs.rollout, entropy=measure)
        mask = self.pairs.completion_mask
        entropy = None if stats.entropy is None else stats.entropy.sum(1)
        assert self.pairs.ref_logp is not None
        reference = self.pairs.ref_logp
        if reference.ndim == 2:
            reference = masked_sum(reference, mask, 1)
        return AnswerStats(stats.logp.sum(1), mask.sum(1).to(stats.logp.dtype), entropy, None), reference
