"""Judgements to records: rankings, or preferences between pairs of answers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from lightning_align.data.records import Record
from lightning_align.feedback.human.tasks import OVERALL, Item, Judgement

Combine = Literal["each", "soft"]
HELPFULNESS = "helpfulness"


@dataclass
class Export:
    """Records, and what became of the judgements.

    Attributes:
        records: Canonical records of one kind.
        judgements: How many are in them.
        ties: Pairs, or rankings, without a better side.
        skipped: How many judgements say nothing, by the reason given.
        unsafe: Pairs left out because the answer preferred was flagged unsafe and the other was not.
        strengths: Judgements whose strength the records have no place for.
    """

    records: list[Record] = field(default_factory=list)
    judgements: int = 0
    ties: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unsafe: int = 0
    strengths: int = 0


def ranked(judgements: Iterable[Judgement]) -> Export:
    """One record of kind ``ranked`` a judgement."""
    export = Export()
    for judgement in _said(judgements, export):
        ranks = judgement.verdict.ranks
        export.ties += len(set(ranks)) == 1
        export.strengths += judgement.verdict.strength is not None
        answers = {"completions": list(judgement.item.answers), "ranks": list(ranks)}
        export.records.append({"prompt": judgement.item.prompt, **answers, **_aspect(judgement.aspect)})
    return export


def preferences(judgements: Iterable[Judgement], *, combine: Combine = "each", keep_unsafe: bool = False) -> Export:
    """Records of kind ``preference``, one a pair of answers.

    Args:
        judgements: In any order; skips are counted and left out.
        combine: ``each`` makes a record of each judgement. ``soft`` makes one of all judgements of an aspect:
            ``chosen`` is what most prefer, ``soft_label`` the share of annotators who do, with a tie as half of one.
        keep_unsafe: Keeps pairs whose better answer alone was flagged unsafe, by at least half of those who judge it.
            They are left out otherwise, unless helpfulness is what was judged (Touvron et al. 2023, 2307.09288,
            section 3.1: safer answers are to be preferred).
    """
    export = Export()
    groups: dict[object, list[Judgement]] = {}
    for number, judgement in enumerate(_said(judgements, export)):
        key = number if combine == "each" else (judgement.item.id, judgement.aspect)
        groups.setdefault(key, []).append(judgement)
    for group in groups.values():
        item, aspect = group[0].item, group[0].aspect
        export.strengths += combine == "soft" and sum(judgement.verdict.strength is not None for judgement in group)
        for pair in combinations(range(len(item.answers)), 2):
            share = _share(group, *pair)
            better, worse = pair if share >= 0.5 else pair[::-1]
            is_tie = share == 0.5
            unsafe = _is_unsafe(group, better) and not _is_unsafe(group, worse)
            if unsafe and not is_tie and aspect != HELPFULNESS and not keep_unsafe:
                export.unsafe += 1
                continue
            export.ties += is_tie
            label: Record = {"soft_label": max(share, 1 - share)} if combine == "soft" else _label(group[0], is_tie)
            export.records.append({**_sides(item, better, worse), **label, **_aspect(aspect)})
    return export


def _said(judgements: Iterable[Judgement], export: Export) -> Iterator[Judgement]:
    """Those that are no skips; both are counted."""
    for judgement in judgements:
        if judgement.verdict.skipped is None:
            export.judgements += 1
            yield judgement
        else:
            export.skipped[judgement.verdict.skipped] += 1


def _share(group: Sequence[Judgement], first: int, second: int) -> float:
    """Share of judgements that prefer the first of two answers; a tie counts as half."""
    gaps = [judgement.verdict.ranks[second] - judgement.verdict.ranks[first] for judgement in group]
    return sum(0.5 if gap == 0 else float(gap > 0) for gap in gaps) / len(gaps)


def _is_unsafe(group: Sequence[Judgement], answer: int) -> bool:
    return 2 * sum(answer in judgement.verdict.unsafe for judgement in group) >= len(group)


def _sides(item: Item, better: int, worse: int) -> Record:
    return {"prompt": item.prompt, "chosen": item.answers[better], "rejected": item.answers[worse]}


def _label(judgement: Judgement, is_tie: bool) -> Record:
    if is_tie:
        return {"tie": True}
    return {} if judgement.verdict.strength is None else {"strength": judgement.verdict.strength}


def _aspect(aspect: str) -> Record:
    return {} if aspect == OVERALL else {"aspect": aspect}
