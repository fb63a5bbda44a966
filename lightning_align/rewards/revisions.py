"""What a reward says of the completions of chains of revision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.feedback.revise import Chain
from lightning_align.rewards.base import Reward, Scores


def score_revisions(
    reward: Reward, chains: Sequence[Chain], records: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[Tensor, Tensor]:
    """Total and harmlessness of every completion of chains of one length, ``[P, N + 1]`` each.

    Harmlessness is the reward's part of the name ``safety``, or ends in ``_safety``; the total where there is none.

    Args:
        reward: What scores.
        chains: P chains of N steps; at least one.
        records: Those of their prompts.
        options: Of :meth:`Reward.score`.
    """
    replies = [reply for chain in chains for reply in chain.completions()]
    size = len(replies) // len(chains)
    scores = reward.score(
        [chain.prompt for chain in chains for _ in range(size)],
        [reply.text for reply in replies],
        finished=[reply.finished for reply in replies],
        records=[record for record in records for _ in range(size)],
        # as far as a penalty for length goes, in words
        lengths=torch.tensor([len(reply.text.split()) for reply in replies]),
        held_out=True,
        **options,
    )
    return scores.proxy.view(-1, size), harmlessness(scores).view(-1, size)


def harmlessness(scores: Scores) -> Tensor:
    """The part for safety ``[B]``, or the total."""
    for name, part in scores.parts.items():
        if name == "safety" or name.endswith("_safety"):
            return part
    return scores.proxy
