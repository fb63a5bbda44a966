"""The playground's written gold standard as a reward: meant for measuring, not for training."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.playground import gold
from lightning_align.rewards.base import Prompt

Aspect = Literal["gold", "helpfulness", "safety"]

_LOGGER = logging.getLogger(__name__)


class PlaygroundReward:
    """Gold score of a completion, or one of its two aspects; NaN for prompts that are none of the playground's.

    Args:
        aspect: ``gold`` (helpfulness and safety combined), ``helpfulness`` or ``safety``.
    """

    def __init__(self, aspect: Aspect = "gold") -> None:
        self.aspect = aspect
        self.num_failed = 0  # completions of prompts that the playground cannot read
        self.num_scored = 0

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
        """One score per completion ``[B]``; raises :class:`UserError` if it never saw a prompt of the playground."""
        index = ("gold", "helpfulness", "safety").index(self.aspect)
        values, foreign = [], None
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                values.append(_scores(_request(prompt), completion)[index])
            except UserError as error:
                values.append(math.nan)
                foreign = error
        failed = sum(math.isnan(value) for value in values)
        self.num_scored += len(values) - failed
        if foreign is not None:
            if self.num_scored == 0:
                raise UserError(f"{foreign}; for other data give another reward, and model.gold null") from foreign
            if self.num_failed == 0:
                _LOGGER.warning(
                    "%d prompts get no %s score (%s); later ones are only counted", failed, self.aspect, foreign
                )
        self.num_failed += failed
        return torch.tensor(values, dtype=torch.float32)


def _request(prompt: Prompt) -> str:
    """What the user asked last; the empty text if nothing."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


@lru_cache(maxsize=65_536)  # the three aspects of one completion are asked for one after another
def _scores(prompt: str, completion: str) -> tuple[float, float, float]:
    score = gold(prompt, completion)
    return score.gold, score.helpfulness, score.safety
