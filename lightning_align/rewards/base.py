"""A reward is a list of named parts that each score text, and a rule that makes one number of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.rewards.combination import (
    AllReduce,
    Combination,
    Whitening,
    combine_members,
    gate,
    spread,
    weighted_sum,
)
from lightning_align.rewards.ensemble import EnsembleReward
from lightning_align.rewards.scorer import Prompt, Scorer

__all__ = ["GATED", "LENGTH_PENALTY", "Part", "Prompt", "Reward", "Scorer", "Scores"]

PATIENCE = 64  # completions in a row without any score before a reward is taken to be broken
GATED = ("helpfulness", "safety")  # names of the parts that a gate chooses from
LENGTH_PENALTY = "length_penalty"  # name under which it is logged


@dataclass(frozen=True)
class Part:
    """One named part of a reward."""

    name: str
    source: str
    weight: float  # 0: measured and reported, but not part of the total
    scorer: Scorer


@dataclass(frozen=True)
class Scores:
    """Scores of B completions.

    Attributes:
        total: What is learnt from ``[B]`` float32, NaN where no part that counts applies.
        parts: Each part's scores ``[B]`` float32, unweighted, NaN where it does not apply.
        proxy: ``total`` before whitening ``[B]``, on a scale that stays the same all along a run.
        spreads: Of each ensemble, the standard deviation of its members ``[B]``.
    """

    total: Tensor
    parts: dict[str, Tensor]
    proxy: Tensor
    spreads: dict[str, Tensor] = field(default_factory=dict)


class Reward:
    """Named parts and their :class:`Combination`.

    Args:
        parts: At least one with a weight other than 0; names are unique.
        combination: By default Σ_k w_k s_k over the parts that apply; the remaining weights are kept as they are, never
            renormalised.
    """

    def __init__(self, parts: Sequence[Part], combination: Combination | None = None) -> None:
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"reward parts are {names}: names must be unique")
        if not any(part.weight for part in parts):
            raise ValueError(f"reward parts {names} all have weight 0: at least one must count")
        self.parts = tuple(parts)
        self.weights = {part.name: part.weight for part in parts}
        self.combination = combination or Combination()
        if self.combination.how == "gate" and not set(GATED) <= set(names):
            raise ValueError(f"reward parts are {names}: a gate chooses between {' and '.join(GATED)}")
        self.whitening = Whitening(self.combination.whiten if self.combination.how == "gate" else "none")
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
        lengths: Tensor | None = None,
        all_reduce: AllReduce = torch.clone,
        held_out: bool = False,
    ) -> Scores:
        """Total and parts for each completion; a part that fails for one leaves all others untouched.

        Args:
            prompts: See :class:`Scorer`, as for ``completions``, ``finished`` and ``records``.
            completions: Their texts.
            finished: Whether each ended by itself.
            records: The prompts' records; ``is_safety`` of them decides a gate.
            lengths: Tokens of each completion ``[B]``, for a length penalty.
            all_reduce: Sums a tensor over all processes, for statistics of the global batch.
            held_out: Only measured, not learnt from: nothing is whitened.
        """
        values, spreads = {}, {}
        for part in self.parts:
            values[part.name], members = self._score_part(part, prompts, completions, finished, records)
            if members is not None:
                spreads[part.name] = spread(members)
        proxy = self._combined(values, records, spreads)
        total = proxy if held_out else self.whitening(proxy, all_reduce)
        for extra in self._extras(values, lengths):
            proxy, total = proxy + extra, total + extra
        self._check_some(total)
        return Scores(total, values, proxy, spreads)

    def _score_part(
        self,
        part: Part,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> tuple[Tensor, Tensor | None]:
        """Scores ``[B]`` and, of an ensemble, those of its members ``[K, B]``."""
        options: dict[str, Any] = {"finished": finished, "records": records}
        if isinstance(part.scorer, EnsembleReward):
            members = part.scorer.score_members(prompts, completions, **options).to(self.device)
            return part.scorer.combine(members), members
        scores = part.scorer.score(prompts, completions, **options)
        if scores.shape != (len(completions),):
            raise ValueError(
                f"part {part.name} gave scores of shape {tuple(scores.shape)} for {len(completions)} texts"
            )
        return scores.detach().float().to(self.device), None

    def _combined(
        self, values: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]], spreads: dict[str, Tensor]
    ) -> Tensor:
        """One number from the parts that count; parts that are an ensemble together add to ``spreads``."""
        how = self.combination.how
        if how == "sum":
            return weighted_sum(values, self.weights)
        if how == "gate":
            is_safety = torch.tensor([bool(record.get("is_safety")) for record in records], device=self.device)
            helpfulness, safety = (values[name] for name in GATED)
            return gate(helpfulness, safety, is_safety, threshold=self.combination.threshold)
        members = torch.stack([values[name] for name, weight in self.weights.items() if weight])
        if how != "min":
            spreads["parts"] = spread(members)
        return combine_members(members, how, uwo_coef=self.combination.uwo_coef)

    def _extras(self, values: dict[str, Tensor], lengths: Tensor | None) -> list[Tensor]:
        """What is added after whitening: further parts of a gate, and the length penalty, which joins ``values``."""
        extras = []
        if self.combination.how == "gate":
            further = {name: weight for name, weight in self.weights.items() if weight and name not in GATED}
            if further:
                extras.append(weighted_sum(values, further).nan_to_num(0.0))
        if self.combination.length_penalty is not None:
            if lengths is None:
                raise ValueError("a length penalty needs the lengths of the completions")
            values[LENGTH_PENALTY] = self.combination.length_penalty(lengths.to(self.device))
            extras.append(values[LENGTH_PENALTY])
        return extras

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

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """What the next score depends on beside the parts."""
        return {"whitening": self.whitening.moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the statistics so far."""
        self.whitening.moments = list(state["whitening"])
