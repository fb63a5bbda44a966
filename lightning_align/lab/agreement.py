"""Whether those who judge the same answers say the same, and whether places decide (docs/human.md).

A unit is a pair of answers of one item under one aspect; its values are +1 where an annotator prefers the first of the
two, −1 for the second and 0 for a tie. Intervals are over items, which are what was drawn independently: the pairs of a
ranking of four answers are not. They are BCa, because percentile intervals of shares near 1 are too narrow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_align.feedback.human.tasks import Judgement
from lightning_align.lab.evaluation.intervals import Estimate, bca
from lightning_align.lab.overopt import LEVEL, Array

Integers = NDArray[np.int64]
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)


# --------------------------------------------------------------------------------------------- Krippendorff's alpha
def coincidences(counts: Array) -> Array:
    """Coincidences of values ``[U, V, V]``: n_uc (n_uk − δ_ck) / (m_u − 1), with m_u the number of values of a unit.

    Args:
        counts: n_uc, how often value c was given to unit u ``[U, V]``. Units with fewer than two values give zeros.
    """
    given = counts.sum(1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    return pairs / np.maximum(given - 1, 1)[:, None, None]


def nominal(table: Array) -> Array:
    """Squared differences of values ``[V, V]`` that are only equal or not."""
    return 1 - np.eye(table.shape[-1])


def ordinal(table: Array) -> Array:
    """Squared differences ``[…, V, V]`` of ordered values: (Σ n_g of g from c to k, less (n_c + n_k)/2)²."""
    n = table.sum(-1)
    middle = np.cumsum(n, -1) - n / 2
    return (middle[..., :, None] - middle[..., None, :]) ** 2


def alpha(table: Array, difference: Callable[[Array], Array]) -> Array:
    """Krippendorff's α = 1 − (n − 1) Σ o_ck δ²_ck / Σ n_c n_k δ²_ck (Krippendorff 2011).

    1 is perfect agreement, 0 what chance gives with these values, below 0 less. NaN where all values are equal.

    Args:
        table: Sums of :func:`coincidences` over units ``[…, V, V]``, values in order.
        difference: :func:`nominal`, :func:`ordinal`, or another function of the table that gives δ² ``[…, V, V]``.
    """
    squared = difference(table)
    n = table.sum(-1)
    observed = (table * squared).sum((-1, -2))
    expected = (n[..., :, None] * n[..., None, :] * squared).sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (n.sum(-1) - 1) * observed / np.where(expected > 0, expected, np.nan)


# ------------------------------------------------------------------------------------------------------------ votes
@dataclass(frozen=True)
class Votes:
    """What everybody said of each pair, an entry a vote.

    Attributes:
        item: Number of the item ``[N]``.
        unit: Number of the pair of its answers, under an aspect ``[N]``.
        annotator: Number of who said it ``[N]``.
        value: +1, 0 or −1 ``[N]``.
    """

    item: Integers
    unit: Integers
    annotator: Integers
    value: Integers

    @classmethod
    def of(cls, judgements: Sequence[Judgement], names: Sequence[str]) -> "Votes":
        """Votes of judgements that are no skips, by annotators of these names."""
        units: dict[tuple[int, str, int, int], int] = {}
        number = {name: index for index, name in enumerate(names)}
        rows = []
        for judgement in judgements:
            ranks, name = judgement.verdict.ranks, number[judgement.annotator]
            for second in range(len(ranks)):
                for first in range(second):
                    unit = units.setdefault((judgement.item.id, judgement.aspect, first, second), len(units))
                    gap = ranks[second] - ranks[first]
                    rows.append((judgement.item.id, unit, name, (gap > 0) - (gap < 0)))
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)

    @cached_property
    def counts(self) -> Array:
        """How often each unit was given −1, 0 and +1 ``[U, 3]``."""
        counts = np.zeros((self.unit.max(initial=-1) + 1, 3))
        np.add.at(counts, (self.unit, self.value + 1), 1.0)
        return counts

    def shared(self) -> "Votes":
        """Those on units that somebody else judged too."""
        kept = self.counts.sum(1)[self.unit] > 1
        unit = np.unique(self.unit[kept], return_inverse=True)[1]
        return Votes(self.item[kept], unit, self.annotator[kept], self.value[kept])

    def decided(self) -> "Votes":
        """Those that are no ties."""
        kept = self.value != 0
        return Votes(self.item[kept], self.unit[kept], self.annotator[kept], self.value[kept])


def reliability(votes: Votes, difference: Callable[[Array], Array]) -> Estimate:
    """α of the votes, each pair in both orders, with its interval over items.

    Which answer of a pair is called the first is nobody's choice, so (n₋, n₀, n₊) counts as (n₊, n₀, n₋) as well. An
    ordinal difference of −1 and +1 is then always four times that of either from a tie.
    """
    shared = votes.shared()
    if not len(shared.value):
        return UNKNOWN
    tables = coincidences(shared.counts)
    tables = tables + tables[:, ::-1, ::-1]
    items, row = np.unique(shared.item, return_inverse=True)
    rows = np.zeros((len(items), 9))
    item_of_unit = np.zeros(len(tables), dtype=np.int64)
    item_of_unit[shared.unit] = row
    np.add.at(rows, item_of_unit, tables.reshape(-1, 9))

    def statistic(sums: Array) -> Array:
        return alpha(sums.reshape(-1, 3, 3), difference)

    if math.isnan(statistic(rows.sum(0))[0]):
        return Estimate(math.nan, math.nan, math.nan, len(items))
    return bca(rows, lambda sums: np.nan_to_num(statistic(sums), nan=1.0))  # nothing differs in a resample of ties


def agreement(votes: Votes, annotator: int | None = None) -> Estimate:
    """Share of comparisons of two annotators' votes on a unit that are equal, with its interval over items.

    Args:
        votes: All of them.
        annotator: Only comparisons of this one with others.
    """
    shared = votes.shared()
    mine = np.ones(len(shared.value), dtype=bool) if annotator is None else shared.annotator == annotator
    if not mine.any():
        return UNKNOWN
    counts = shared.counts
    unit, value = shared.unit[mine], shared.value[mine]
    row = np.unique(shared.item[mine], return_inverse=True)[1]
    rows = np.zeros((row.max() + 1, 2))
    np.add.at(rows, row, np.stack([counts[unit, value + 1] - 1, counts.sum(1)[unit] - 1], axis=1))
    return bca(rows, lambda sums: sums[:, 0] / sums[:, 1])


# ------------------------------------------------------------------------------------------------------------ places
def first_wins(judgements: Sequence[Judgement]) -> Estimate:
    """Share of decided pairs whose winner was shown before the loser: ½ where places do not matter.

    The order in which answers are shown is drawn, so the variance of the share around ½ is known: that over orders,
    with the rankings as they are. The interval is Clopper and Pearson's with the number of independent pairs that has
    this variance (Korn & Graubard 1998); for judgements of two answers it is the exact binomial one. What somebody says
    of one item under several aspects counts as one draw, because its order is the same. Judgements whose order is not
    known leave it.
    """
    first, decided, variance, count = 0.0, 0.0, 0.0, 0
    ordered = sorted((judgement for judgement in judgements if judgement.shown), key=_drawn_as)
    for _, group in groupby(ordered, key=_drawn_as):
        wins = np.zeros((1, 1))  # of each shown answer over each other, +1 or −1, summed over aspects
        before = decided
        for judgement in group:
            ranks = np.array(judgement.verdict.ranks)[list(judgement.shown)]
            over = np.sign(ranks[None, :] - ranks[:, None])
            wins = wins + over
            decided += float(np.abs(np.triu(over)).sum())
        first += float(np.triu(wins).sum())
        variance += float((wins**2).sum() / 2 + (wins.sum(1) ** 2).sum()) / 3  # of that sum, over orders
        count += decided > before
    if not variance:
        return UNKNOWN
    share, size = 0.5 + first / (2 * decided), decided**2 / variance
    tail, won, lost = (1 - LEVEL) / 2, share * size, (1 - share) * size
    low = float(stats.beta.ppf(tail, won, lost + 1)) if won > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, won + 1, lost)) if lost > 0 else 1.0
    return Estimate(share, low, high, count, 0.5 / math.sqrt(size))


def _drawn_as(judgement: Judgement) -> tuple[int, str]:
    return judgement.item.id, judgement.annotator


def is_biased(share: Estimate) -> bool:
    """Whether the interval of a share excludes one half."""
    return share.low > 0.5 or share.high < 0.5
