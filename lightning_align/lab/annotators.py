"""What people who rank answers did and how far they agree: all measures of a store of judgements together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_align.feedback.human.tasks import OVERALL, Judgement
from lightning_align.lab.agreement import Votes, agreement, first_wins, nominal, ordinal, reliability
from lightning_align.lab.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Annotator:
    """What one annotator did.

    Attributes:
        judgements: How many, without skips.
        skipped: How many skips.
        ties: Share of pairs; NaN without a judgement, as all shares.
        unsafe: Share of answers flagged unsafe.
        seconds: Median of a judgement; NaN where unknown.
        agreement: With the others, on what they judged too.
        first_wins: See :func:`first_wins`.
    """

    judgements: int
    skipped: int
    ties: float
    unsafe: float
    seconds: float
    agreement: Estimate
    first_wins: Estimate


@dataclass(frozen=True)
class Panel:
    """What several annotators said of the same items.

    Attributes:
        items: How many items two or more have judged.
        pairs: How many pairs of answers.
        nominal, ordinal: Krippendorff's α.
        agreement: Share of comparisons of two votes that are equal.
        agreement_decided: The same of votes that are no ties.
        first_wins: See :func:`first_wins`.
        annotators: By name.
    """

    items: int
    pairs: int
    nominal: Estimate
    ordinal: Estimate
    agreement: Estimate
    agreement_decided: Estimate
    first_wins: Estimate
    annotators: dict[str, Annotator]


def panel(judgements: Sequence[Judgement]) -> Panel:
    """All measures of judgements, of one aspect or of several together."""
    names = sorted({judgement.annotator for judgement in judgements})
    said = [judgement for judgement in judgements if judgement.verdict.skipped is None]
    votes = Votes.of(said, names)
    shared = votes.shared()
    annotators = {}
    for number, name in enumerate(names):
        own = [judgement for judgement in said if judgement.annotator == name]
        values = votes.value[votes.annotator == number]
        flags = [len(judgement.verdict.unsafe) / len(judgement.item.answers) for judgement in own]
        times = [judgement.seconds for judgement in own if not math.isnan(judgement.seconds)]
        annotators[name] = Annotator(
            judgements=len(own),
            skipped=sum(judgement.annotator == name for judgement in judgements) - len(own),
            ties=float(np.mean(values == 0)) if own else math.nan,
            unsafe=float(np.mean(flags)) if own else math.nan,
            seconds=float(np.median(times)) if times else math.nan,
            agreement=agreement(votes, number),
            first_wins=first_wins(own),
        )
    return Panel(
        items=len(set(shared.item.tolist())),
        pairs=len(shared.counts),
        nominal=reliability(votes, nominal),
        ordinal=reliability(votes, ordinal),
        agreement=agreement(votes),
        agreement_decided=agreement(votes.decided()),
        first_wins=first_wins(said),
        annotators=annotators,
    )


def by_aspect(judgements: Sequence[Judgement]) -> dict[str, Panel]:
    """A panel of each aspect that was judged apart; none where only one overall ranking was asked for."""
    aspects = list(dict.fromkeys(judgement.aspect for judgement in judgements))
    chosen = [aspect for aspect in aspects if aspect != OVERALL]
    return {aspect: panel([judgement for judgement in judgements if judgement.aspect == aspect]) for aspect in chosen}


def as_dict(found: Panel) -> dict[str, Any]:
    """For JSON: NaN as None."""
    return {name: _plain(value) for name, value in vars(found).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value.as_dict())
    if isinstance(value, Annotator):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
