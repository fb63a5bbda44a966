"""A reward that asks several models, trained alike from different seeds, and heeds what they disagree on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.rewards.combination import EnsembleHow, combine_members
from lightning_align.rewards.scorer import Prompt, Scorer


class EnsembleReward:
    """Members asked one after another; their scores must be on a common scale.

    Args:
        members: At least two.
        how: ``mean``, ``min`` or ``uwo``.
        uwo_coef: λ of ``uwo``.
    """

    def __init__(self, members: Sequence[Scorer], how: EnsembleHow = "mean", *, uwo_coef: float = 0.1) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble of {len(members)}: give at least two members")
        self.members = tuple(members)
        self.how = how
        self.uwo_coef = uwo_coef

    def to(self, device: torch.device) -> None:
        """Move every member."""
        for member in self.members:
            member.to(device)

    def score_members(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """Scores of each member ``[K, B]``."""
        scores = [m.score(prompts, completions, finished=finished, records=records) for m in self.members]
        return torch.stack([score.detach().float().cpu() for score in scores])

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One score per completion ``[B]``."""
        members = self.score_members(prompts, completions, finished=finished, records=records)
        return self.combine(members)

    def combine(self, members: Tensor) -> Tensor:
        """One score ``[B]`` from those of the members ``[K, B]``."""
        return combine_members(members, self.how, uwo_coef=self.uwo_coef)
