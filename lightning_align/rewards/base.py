"""A reward is a list of named, weighted parts; each scores text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_align.errors import UserError

# A prompt or a conversation, as it stands in the record.
Prompt = str | list[dict[str, str]]


PATIENCE = 64  # completions in a row without any score before a reward is taken to be broken


class Scorer(Protocol):
    """Scores completions as text, so that policy and reward may use different tokenizers."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One float32 score per completion ``[B]``; NaN where this scorer does not apply.

        Args:
            prompts: Prompt of each completion.
            completions: Text without special tokens.
            finished: Whether the completion ended by itself (EOS or a stop string).
            records: The prompts' records, with any further columns.
        """

    def to(self, device: torch.device) -> None:
        """Move what there is to move."""


@dataclass(frozen=True)
class Part:
    """One named part of a reward."""

    name: str
    source: str
    weight: float  # 0: measured and reported, but not part of the total
    scorer: Scorer


@dataclass(frozen=True)
class Scores:
    """Scores of B completions."""

    total: Tensor  # [B] float32, NaN where no weighted part applies
    parts: dict[str, Tensor]  # name -> [B] float32, unweighted, NaN where the part does not apply


class Reward:
    """Σ_k w_k s_k over the parts that apply; the remaining weights are kept as they are, never renormalised.

    Args:
        parts: At least one with a weight other than 0; names are unique.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"reward parts are {names}: names must be unique")
        if not any(part.weight for part in parts):
            raise ValueError(f"reward parts {names} all have weight 0: at least one must count")
        self.parts = tuple(parts)
        self.device = torch.device("cpu")
        self._unscored: int | None = 0  # completions so far, as long as none of them got a score

    def to(self, device: torch.device) -> None:
        """Score on ``device`` from now on; scores are returned there."""
        self.device = device
        for part in self.parts:
            part.scorer.to(device)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Scores:
        """Total and parts for each completion; a part that fails for one leaves all others untouched."""
        values: dict[str, Tensor] = {}
        for part in self.parts:
            scores = part.scorer.score(prompts, completions, finished=finished, records=records)
            if scores.shape != (len(completions),):
                raise ValueError(
                    f"part {part.name} gave scores of shape {tuple(scores.shape)} for {len(completions)} texts"
                )
            values[part.name] = scores.detach().float().to(self.device)
        total = combine(values, {part.name: part.weight for part in self.parts})
        self._check_some(total)
        return Scores(total, values)

    def _check_some(self, total: Tensor) -> None:
        """A part may apply to few completions; a reward that never does would let a run learn nothing in silence."""
        if self._unscored is None or not total.isnan().all():
            self._unscored = None
            return
        self._unscored += len(total)
        if self._unscored >= PATIENCE:
            sources = ", ".join(part.source for part in self.parts if part.weight)
            raise UserError(
                f"reward {sources} gave none of the first {self._unscored} completions a finite number: there is "
                "nothing to learn from"
            )


def combine(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k s_k over the parts that are not NaN, ``[B]``; NaN where no part of non-zero weight has a value."""
    counted = [name for name, weight in weights.items() if weight]
    table = torch.stack([parts[name] for name in counted])  # [K, B]
    weight = table.new_tensor([weights[name] for name in counted])[:, None]
    missing = table.isnan()
    total = torch.where(missing, 0.0, table * weight).sum(0)
    return torch.where(missing.all(0), torch.nan, total)
