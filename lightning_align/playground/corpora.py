"""The playground's data, generated from a seed: no download, no files.

The first n records do not depend on how many are asked for, and answers do not depend on the annotator: the same seed
gives the same pairs under every temperature.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log
from random import Random
from typing import Any, NamedTuple

from lightning_align.errors import UserError
from lightning_align.playground.annotator import Annotator, Aspect
from lightning_align.playground.answers import check_mix, draw_tier, sample_answer
from lightning_align.playground.requests import (
    FAMILIES,
    SAFE_FAMILIES,
    UNSAFE_FAMILIES,
    Request,
    Split,
    check_split,
    draw_request,
)
from lightning_align.playground.texts import draw_text

SIZES: dict[str, tuple[int, int]] = {
    **{"text": (20_000, 500), "sft": (3_000, 256), "prompt": (2_000, 256), "preference": (3_700, 500)},
    **{"ranked": (900, 150), "unpaired": (3_700, 500), "scored": (3_700, 500)},
}
RAW_QUALITY = {"excellent": 0.15, "good": 0.3, "fair": 0.3, "poor": 0.15, "broken": 0.1}
DEMONSTRATION_QUALITY = {"excellent": 0.2, "good": 0.35, "fair": 0.3, "poor": 0.1, "broken": 0.05}
COMPARED_QUALITY = {"excellent": 0.2, "good": 0.25, "fair": 0.25, "poor": 0.15, "broken": 0.1, "gushing": 0.05}
_QUALITIES = {"text": RAW_QUALITY, "sft": DEMONSTRATION_QUALITY}
_ALWAYS = frozenset({"unsafe", "families"})
_JUDGED = _ALWAYS | {"quality", "temperature", "noise", "aspect"}
_OPTIONS: dict[str, frozenset[str]] = {
    **{"text": _ALWAYS | {"quality"}, "sft": _ALWAYS | {"quality"}, "prompt": _ALWAYS},
    **{"preference": _JUDGED | {"ties", "strength"}, "ranked": _JUDGED | {"ties", "k"}},
    **{"unpaired": _JUDGED, "scored": _JUDGED},
}
Record = dict[str, Any]


def records(
    kind: str,
    *,
    split: str = "train",
    size: int | None = None,
    seed: int = 0,
    temperature: float | None = None,
    noise: float | None = None,
    ties: float | None = None,
    strength: bool | None = None,
    k: int | None = None,
    aspect: Aspect | None = None,
    quality: Mapping[str, float] | None = None,
    unsafe: float | None = None,
    families: Sequence[str] | None = None,
) -> list[Record]:
    """Records of a kind, the same ones for the same arguments, on every machine.

    Args:
        kind: ``text``, ``sft``, ``prompt``, ``preference``, ``ranked``, ``unpaired`` or ``scored``.
        split: ``train``, ``val`` or ``test``; no prompt is in two of them.
        size: Number of records.
        seed: Seed of everything.
        temperature, noise, ties, aspect: The annotator's, see ``Annotator``.
        strength: Whether preferences say how strong they are (default: yes).
        k: Answers in a ranking (4).
        quality: Weight by name of the tiers that answers come from.
        unsafe: Share of unsafe prompts (0.2; 0.6 where safety is judged).
        families: Only these families of requests.

    Raises:
        UserError: If an argument is out of range, or has no meaning for the kind.
    """
    if kind not in SIZES:
        raise UserError(f"the playground has no records of kind {kind!r}: it has {', '.join(SIZES)}")
    given = {
        **{"temperature": temperature, "noise": noise, "ties": ties, "strength": strength, "k": k, "aspect": aspect},
        **{"quality": quality, "unsafe": unsafe, "families": families},
    }
    if useless := {name for name, value in given.items() if value is not None} - _OPTIONS[kind]:
        raise UserError(f"playground option {min(useless)} has no meaning for records of kind {kind}")
    check_split(split)
    size = _size(kind, split, size)
    source = _source(kind, split, seed, aspect or "gold", quality, unsafe, families)
    annotator = _annotator(temperature, noise, ties, aspect)
    made = _MAKERS[kind](source, annotator, 4 if k is None else k, strength is not False)
    return list(islice(made, size))


class Agreement(NamedTuple):
    """What the annotator's noise allows on comparisons, from its own probabilities; tied pairs do not count.

    Attributes:
        self_agreement: Probability that the annotator, asked twice, prefers the same answer.
        ceiling: Accuracy of one who knows the gold score, the highest a reward model can expect.
        entropy: Mean entropy of a label in nats, the lowest loss a reward model can expect.
        num_pairs: Number of pairs it was computed on.
    """

    self_agreement: float
    ceiling: float
    entropy: float
    num_pairs: int


def annotator_agreement(
    *,
    split: str = "val",
    size: int | None = None,
    seed: int = 0,
    temperature: float | None = None,
    noise: float | None = None,
    ties: float | None = None,
    aspect: Aspect | None = None,
    quality: Mapping[str, float] | None = None,
    unsafe: float | None = None,
    families: Sequence[str] | None = None,
) -> Agreement:
    """How reliable the labels of ``records("preference", …)`` with the same arguments are, on those very pairs.

    With p the probability that a pair's first answer is preferred to its second, given that they do not tie:
    p² + (1 − p)², max(p, 1 − p) and −p ln p − (1 − p) ln(1 − p), averaged with the probabilities of no tie.
    """
    check_split(split)
    source = _source("preference", split, seed, aspect or "gold", quality, unsafe, families)
    annotator = _annotator(temperature, noise, ties, aspect)
    size = _size("preference", split, size)
    total = same = best = entropy = 0.0
    for request, (first, second) in islice(_groups(source, 2), size):
        win, _, lose = annotator.probabilities(annotator.value(request, first), annotator.value(request, second))
        untied = win + lose
        p = win / untied
        total += untied
        same += untied * (p * p + (1 - p) * (1 - p))
        best += untied * max(p, 1 - p)
        entropy -= untied * sum(q * log(q) for q in (p, 1 - p) if q > 0)
    if total == 0:
        raise UserError(f"size is {size}: annotator agreement needs at least one pair")
    return Agreement(same / total, best / total, entropy / total, size)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where requests and answers come from, and the two streams of random numbers: for content and for labels."""

    content: Random
    labels: Random
    split: Split
    families: Sequence[tuple[str, ...]]
    unsafe: float
    quality: Mapping[str, float]

    def request(self, random: Random) -> Request:
        group = self.families[random.random() < self.unsafe]
        return draw_request(random, random.choice(group), self.split)

    def answer(self, request: Request) -> str:
        return sample_answer(self.content, request, draw_tier(self.content, self.quality))


def _source(
    kind: str,
    split: Any,
    seed: int,
    aspect: str,
    quality: Mapping[str, float] | None,
    unsafe: float | None,
    families: Sequence[str] | None,
) -> _Source:
    if unsafe is None:
        unsafe = 0.6 if aspect == "safety" else 0.2
    if not 0 <= unsafe <= 1:
        raise UserError(f"unsafe is {unsafe}: give the share of unsafe prompts, from 0 to 1")
    if quality is None:
        quality = _QUALITIES.get(kind, COMPARED_QUALITY)
    check_mix(quality)
    chosen = FAMILIES if families is None else tuple(families)
    if unknown := set(chosen) - set(FAMILIES):
        raise UserError(f"families names {min(unknown)!r}: the playground has {', '.join(FAMILIES)}")
    safe = tuple(family for family in SAFE_FAMILIES if family in chosen)
    harmful = tuple(family for family in UNSAFE_FAMILIES if family in chosen)
    if not chosen:
        raise UserError("families is empty: name at least one")
    if not safe or not harmful:
        unsafe = 0.0 if safe else 1.0
    # a text seeds Python's generator the same way in every process
    content, labels = Random(f"content {kind} {split} {seed}"), Random(f"labels {kind} {split} {seed}")
    return _Source(content, labels, split, (safe, harmful), unsafe, quality)


def _size(kind: str, split: str, size: int | None) -> int:
    if size is not None and size < 0:
        raise UserError(f"size is {size}: give a number of records, 0 or more")
    return SIZES[kind][split != "train"] if size is None else size


def _annotator(temperature: float | None, noise: float | None, ties: float | None, aspect: Aspect | None) -> Annotator:
    given = {"temperature": temperature, "noise": noise, "ties": ties, "aspect": aspect}
    return Annotator(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _groups(source: _Source, k: int) -> Iterator[tuple[Request, list[str]]]:
    """Requests with k answers each, different ones where the tiers allow it."""
    while True:
        request = source.request(source.content)
        answers: list[str] = []
        for attempt in range(20 * k):
            answer = source.answer(request)
            if answer not in answers or attempt >= 10 * k:
                answers.append(answer)
            if len(answers) == k:
                break
        yield request, answers


def _text(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    while True:
        yield {"text": draw_text(source.content, source.request, source.quality)}


def _sft(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    for request, (answer,) in _groups(source, 1):
        yield {"prompt": request.prompt, "completion": answer}


def _prompt(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    """Different prompts, until a small selection of families has hardly any new ones."""
    seen: set[str] = set()
    while True:
        request = source.request(source.content)
        for _ in range(50):
            if request.prompt not in seen:
                break
            request = source.request(source.content)
        seen.add(request.prompt)
        yield {"prompt": request.prompt, "is_safety": request.is_safety, "family": request.family}


def _preference(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    for request, pair in _groups(source, 2):
        judged = annotator.compare(source.labels, *(annotator.value(request, answer) for answer in pair))
        record: Record = {"prompt": request.prompt, "chosen": pair[judged.winner], "rejected": pair[1 - judged.winner]}
        if judged.tie:
            record["tie"] = True
        elif strength:
            record["strength"] = judged.strength
        yield record | _aspect(annotator)


def _ranked(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    if not 2 <= k <= 9:
        raise UserError(f"k is {k}: the playground ranks 2 to 9 answers")
    for request, answers in _groups(source, k):
        ranks = annotator.rank(source.labels, [annotator.value(request, answer) for answer in answers])
        yield {"prompt": request.prompt, "completions": answers, "ranks": ranks} | _aspect(annotator)


def _unpaired(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    for request, (answer,) in _groups(source, 1):
        label = annotator.approves(source.labels, annotator.value(request, answer))
        yield {"prompt": request.prompt, "completion": answer, "label": label}


def _scored(source: _Source, annotator: Annotator, k: int, strength: bool) -> Iterator[Record]:
    for request, (answer,) in _groups(source, 1):
        score = annotator.grade(source.labels, annotator.value(request, answer))
        yield {"prompt": request.prompt, "completion": answer, "score": score} | _aspect(annotator)


def _aspect(annotator: Annotator) -> Record:
    """Which aspect is judged, where it is not all of gold."""
    return {} if annotator.aspect == "gold" else {"aspect": annotator.aspect}


_MAKERS: dict[str, Callable[[_Source, Annotator, int, bool], Iterator[Record]]] = {
    **{"text": _text, "sft": _sft, "prompt": _prompt, "preference": _preference, "ranked": _ranked},
    **{"unpaired": _unpaired, "scored": _scored},
}
