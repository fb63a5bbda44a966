"""The playground's written gold standard as a reward: meant for measuring, not for training."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align.playground import gold
from lightning_align.rewards.base import Prompt

Aspect = Literal["gold", "helpfulness", "safety"]


class PlaygroundReward:
    """Gold score of a completion, or one of its two aspects.

    Args:
        aspect: ``gold`` (helpfulness and safety combined), ``helpfulness`` or ``safety``.
    """

    def __init__(self, aspect: Aspect = "gold") -> None:
        self.aspect = aspect

    def to(self, device: torch.device) -> None:
        """A parser has no device."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One score per completion ``[B]``."""
        index = ("gold", "helpfulness", "safety").index(self.aspect)
        scores = [_scores(_request(prompt), text)[index] for prompt, text in zip(prompts, completions, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def _request(prompt: Prompt) -> str:
    """What the user asked last."""
    return prompt if isinstance(prompt, str) else [turn["content"] for turn in prompt if turn["role"] == "user"][-1]


@lru_cache(maxsize=65_536)  # the three aspects of one completion are asked for one after another
def _scores(prompt: str, completion: str) -> tuple[float, float, float]:
    score = gold(prompt, completion)
    return score.gold, score.helpfulness, score.safety
