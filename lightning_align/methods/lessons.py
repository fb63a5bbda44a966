"""What hindsight relabelling learns from: outputs under the instructions that they follow, and others beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from lightning_align.data.templates import Prompt
from lightning_align.feedback.relabel import Relabelled, under
from lightning_align.rollout.types import Experience, Rollout


@dataclass(frozen=True)
class Lesson:
    """An output, and what it is learnt under; plain values, for checkpoints.

    Args:
        iteration: When it was drawn, counted from 0.
        instruction: What it follows, as in :class:`~lightning_align.feedback.relabel.Relabelled`.
        negative: What it does not follow.
        query: What the instruction is about.
        weight: Of its tokens.
        score: What the reward gave it, None for nothing.
        prompt_ids: Instruction and query.
        completion_ids: The output, with the token that ended it.
    """

    iteration: int
    instruction: Prompt
    negative: Prompt | None
    query: Prompt | None
    weight: float
    score: float | None
    prompt_ids: list[int]
    completion_ids: list[int]

    def state(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class HindsightExperience(Experience):
    """Lessons as rows, each with the other prompts that its output is compared under.

    Args:
        weights: Of the rows in the loss ``[B]``.
        negatives: Token ids of those prompts.
    """

    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    negatives: list[list[list[int]]] = field(default_factory=list)


def key(prompt: Prompt) -> str:
    """A text that is the same for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


class Alternatives:
    """The distinct instructions of lessons, from which others' are drawn.

    Args:
        lessons: All of a round, of every process.
        number: Most alternatives of a lesson: its own negative first, then others drawn without replacement.
        seed: What is drawn depends on it and on the lesson, and on nothing else.
    """

    def __init__(self, lessons: Sequence[Lesson], number: int, seed: str) -> None:
        self.number = number
        self.seed = seed
        found: dict[bool, dict[str, Prompt]] = {True: {}, False: {}}
        for lesson in lessons:
            found[lesson.query is None].setdefault(key(lesson.instruction), lesson.instruction)
        # in an order that does not depend on that of the lessons
        self.pools = {whole: [pool[name] for name in sorted(pool)] for whole, pool in found.items()}

    def of(self, lesson: Lesson) -> list[Prompt]:
        """The prompts that a lesson's output is compared under, beside its own; all different."""
        own = [lesson.instruction] if lesson.negative is None else [lesson.instruction, lesson.negative]
        chosen = {key(instruction): instruction for instruction in own[: 1 + self.number]}
        pool = self.pools[lesson.query is None]
        draws = Random(f"{self.seed} {lesson.prompt_ids} {lesson.completion_ids}")
        for instruction in draws.sample(pool, min(len(pool), self.number + 2)):
            if len(chosen) <= self.number:
                chosen.setdefault(key(instruction), instruction)
        del chosen[key(lesson.instruction)]
        return [under(instruction, lesson.query) for instruction in chosen.values()]


def as_experience(
    lessons: Sequence[Lesson],
    negatives: Sequence[list[list[int]]],
    *,
    filler: Lesson,
    rows: int,
    device: torch.device,
) -> HindsightExperience:
    """Rows of lessons, padded on the right.

    Args:
        lessons: What is learnt; none at all is fine.
        negatives: Ids of the other prompts of each.
        filler: Fills up the rows, with nothing to learn: every process takes part in every step.
        rows: Fewest rows.
        device: Where the tensors go.
    """
    count, missing = len(lessons), max(0, rows - len(lessons))
    lessons = [*lessons, *[filler] * missing]
    pairs = [(lesson.prompt_ids, lesson.completion_ids) for lesson in lessons]
    input_ids, attention, completion = padded(pairs)
    completion[count:] = False
    size = len(lessons)
    rollout = Rollout(
        input_ids,
        attention,
        completion,
        engine_logp=torch.zeros(input_ids.shape),
        prompt_lengths=torch.tensor([len(lesson.prompt_ids) for lesson in lessons]),
        prompt_index=torch.arange(size),
        finish_reason=["eos"] * size,
        completions=[""] * size,
        records=[{"prompt": under(lesson.instruction, lesson.query)} for lesson in lessons],
    )
    scores = torch.tensor([torch.nan if lesson.score is None else lesson.score for lesson in lessons])
    weights = torch.tensor([lesson.weight for lesson in lessons])
    return HindsightExperience(
        rollout.to(device),
        scores.to(device),
        weights=weights.to(device),
        negatives=[*negatives, *[[]] * missing],
    )


def padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of prompts with completions, padded on the right, which are real, which are completions; each ``[B, T]``."""
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    ends = torch.tensor([len(prompt) + len(completion) for prompt, completion in pairs])[:, None]
    slots = torch.arange(int(ends.max()))
    input_ids = torch.zeros(len(pairs), len(slots), dtype=torch.int64)
    for row, (prompt, completion) in enumerate(pairs):
        input_ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
    return input_ids, slots < ends, (slots >= starts) & (slots < ends)


def quantiles(scores: Sequence[float]) -> list[float | None]:
    """Share of all scores that each is above, ties counted by half; None where a score is NaN."""
    known = sorted(score for score in scores if score == score)
    below: Mapping[float, int] = {score: place for place, score in reversed(list(enumerate(known)))}
    upto: Mapping[float, int] = {score: place + 1 for place, score in enumerate(known)}
    return [None if s != s else (below[s] + upto[s]) / 2 / len(known) for s in scores]


def satisfaction(relabelled: Sequence[Relabelled], device: torch.device) -> Tensor:
    """1 for what satisfies its prompt, 0 for what does not, NaN where that is not known ``[B]``."""
    values = [torch.nan if hindsight.satisfied is None else float(hindsight.satisfied) for hindsight in relabelled]
    return torch.tensor(values, device=device)
