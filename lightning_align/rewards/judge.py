"""Direct RLAIF: a judge's rating as the reward, without a reward model in between (Lee et al. 2023, 2309.00267)."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.feedback.journal import key_of
from lightning_align.feedback.judges import Judge
from lightning_align.feedback.models import LocalModel
from lightning_align.feedback.sources import kind_of_judge, load_language_model
from lightning_align.feedback.wording_file import read_wording
from lightning_align.rewards.base import Prompt

LOW_MASS = 0.5  # probability of any rating below which the question is at fault
KEPT = 262_144  # ratings in memory

_LOGGER = logging.getLogger(__name__)


class JudgeReward:
    """Expected rating of a completion by a judge, on [−1, 1]; NaN where it gives none. Ratings are kept in memory.

    Args:
        judge: Who rates.

    Attributes:
        num_asked: Completions that were rated.
        num_failed: Those without a rating: a reply that is none, or an endpoint without an answer.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.num_asked = 0
        self.num_failed = 0
        self._known: dict[str, float] = {}
        self._warned = False

    @classmethod
    def load(cls, source: str, wording: str) -> "JudgeReward":
        """From a run, a path, a hub id or an endpoint, asked by a wording."""
        if kind_of_judge(source) == "function":
            raise UserError(f"reward {source} is a function, which needs no wording: leave judge out")
        return cls(Judge(load_language_model(source), read_wording(wording)))

    def to(self, device: torch.device) -> None:
        """Move a model of this process."""
        if isinstance(self.judge.model, LocalModel):
            self.judge.model.model.to(device)  # type: ignore[arg-type]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One rating per completion ``[B]``."""
        keys = [key_of(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        missing = {key: row for row, key in enumerate(keys) if key not in self._known}
        found: dict[str, float] = {}
        if missing:
            rows = list(missing.values())
            rating = self.judge.rate([prompts[row] for row in rows], [completions[row] for row in rows])
            found = dict(zip(missing, rating.reward.tolist(), strict=True))
            self._note(rating.mass, rating.reward)
        values = [self._known[key] if key in self._known else found[key] for key in keys]
        if len(self._known) + len(found) > KEPT:
            self._known.clear()
        self._known |= {key: value for key, value in found.items() if not math.isnan(value)}
        return torch.tensor(values, dtype=torch.float32)

    def _note(self, mass: Tensor, reward: Tensor) -> None:
        failed = int(reward.isnan().sum())
        if failed and not self.num_failed:
            _LOGGER.warning(
                "judge %s gave %d completions no rating: they get no score; later ones are only counted",
                self.judge.name,
                failed,
            )
        self.num_asked += len(reward)
        self.num_failed += failed
        mean = float(mass.nanmean())
        if mean < LOW_MASS and not self._warned:
            self._warned = True
            _LOGGER.warning(
                "judge %s gives a rating with probability %.2g only: its wording does not suit it, and its ratings say "
                "little",
                self.judge.name,
                mean,
            )
