"""What a person is asked and what a person says: plain values without a database or a page."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_align.data.records import ASPECTS, STRENGTHS
from lightning_align.data.templates import Completion, Prompt
from lightning_align.errors import UserError, nearest
from lightning_align.feedback.journal import key_of

OVERALL = "overall"  # the aspect of those who are not asked to judge aspects apart
MOST_ANSWERS = 9  # one digit each


@dataclass(frozen=True)
class Plan:
    """How prompts are handed out; fixed when a store is made, because judgements are comparable only under one plan.

    Args:
        aspects: What is judged apart, in this order; ``(OVERALL,)`` for one ranking.
        overlap: Share of prompts that several annotators judge.
        annotators_per_prompt: How many, of those.
        seed: Of who overlaps, of the order of prompts and of that of answers.

    Raises:
        UserError: An aspect is unknown or given twice, or a number is out of its range.
    """

    aspects: tuple[str, ...] = (OVERALL,)
    overlap: float = 0.2
    annotators_per_prompt: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for aspect in self.aspects:
            if aspect not in (OVERALL, *ASPECTS):
                raise UserError(f"--aspects: {aspect!r} is unknown{nearest(aspect, ASPECTS)} ({', '.join(ASPECTS)})")
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise UserError(f"--aspects {' '.join(self.aspects)}: give each once, or leave the option out")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"--overlap is {self.overlap:g}: give a share of the prompts, from 0 to 1")
        if self.annotators_per_prompt < 2:
            raise UserError(f"--annotators_per_prompt is {self.annotators_per_prompt}: give at least 2, or --overlap 0")

    def wanted(self, number: int) -> int:
        """How many annotators are to judge the prompt that came as ``number``, from 0.

        Those that overlap come at equal distances, so that their share is exact for any number of prompts.
        """
        start = int(key_of("overlap", self.seed), 16) / 16**32
        is_shared = math.floor(start + (number + 1) * self.overlap) > math.floor(start + number * self.overlap)
        return self.annotators_per_prompt if is_shared else 1

    def turn(self, prompt_key: str) -> str:
        """What prompts are sorted by before they are handed out."""
        return key_of("turn", self.seed, prompt_key)

    def shown(self, prompt_key: str, annotator: str, num_answers: int) -> tuple[int, ...]:
        """The order in which an annotator sees the answers of a prompt, each time the same: their numbers ``[K]``."""
        order = list(range(num_answers))
        random.Random(key_of("shown", self.seed, prompt_key, annotator)).shuffle(order)
        return tuple(order)


@dataclass(frozen=True)
class Item:
    """A prompt and its answers.

    Attributes:
        id: In the store.
        key: Hash of the prompt and its answers.
        prompt: Text or messages.
        answers: Two to nine different ones ``[K]``.
        place: Where it was read.
    """

    id: int
    key: str
    prompt: Prompt
    answers: tuple[Completion, ...]
    place: str


@dataclass(frozen=True)
class Verdict:
    """What a person says of one item; numbers of answers are those of :attr:`Item.answers`.

    Args:
        ranks: Of each answer ``[K]``: 1 is best, equal is a tie; dense. Empty if the item was skipped.
        strength: How much better the better of two is (:data:`STRENGTHS`); None for ties and for more than two.
        unsafe: Numbers of the answers that are unsafe.
        skipped: Why nothing is said; None if something is.

    Raises:
        ValueError: It is no such thing. The message is for the one who judges.
    """

    ranks: tuple[int, ...] = ()
    strength: str | None = None
    unsafe: tuple[int, ...] = ()
    skipped: str | None = None

    def check(self, num_answers: int) -> None:
        """Raise :class:`ValueError` if this cannot be said of so many answers."""
        if self.skipped is not None:
            if not self.skipped.strip() or self.ranks or self.strength:
                raise ValueError("a skip has a reason and no ranking")
        elif len(self.ranks) != num_answers:
            raise ValueError(f"{len(self.ranks)} of {num_answers} answers are ranked: rank all of them, or skip")
        elif sorted(set(self.ranks)) != list(range(1, len(set(self.ranks)) + 1)):
            raise ValueError(f"ranks are {list(self.ranks)}: they count from 1 without a gap")
        if self.strength is not None and (self.strength not in STRENGTHS or sorted(self.ranks) != [1, 2]):
            raise ValueError(f"strength {self.strength!r}: one of {', '.join(STRENGTHS)}, of two answers without a tie")
        if len(set(self.unsafe)) < len(self.unsafe) or not set(self.unsafe) <= set(range(num_answers)):
            raise ValueError(f"unsafe answers are {list(self.unsafe)}: give numbers below {num_answers}, each once")


@dataclass(frozen=True)
class Judgement:
    """A verdict with everything that was noted about it.

    Attributes:
        item: What was judged.
        annotator: Name.
        aspect: One of the plan's.
        verdict: What was said.
        shown: Numbers of the answers from the first shown to the last ``[K]``; empty where that is not known.
        time: When it was saved, in seconds since 1970.
        seconds: From when the page was shown until it was sent; NaN where unknown.
    """

    item: Item
    annotator: str
    aspect: str
    verdict: Verdict
    shown: tuple[int, ...]
    time: float
    seconds: float


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """Ranks without gaps from any numbers where less is better: ``(2, 5, 2)`` gives ``(1, 2, 1)``."""
    levels = sorted(set(ranks))
    return tuple(levels.index(rank) + 1 for rank in ranks)
