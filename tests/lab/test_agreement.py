"""Agreement against published numbers, known crowds, exact enumeration and GPL code that stays outside."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lightning_align.feedback.human.tasks import OVERALL, Item, Judgement, Verdict, dense
from lightning_align.lab.agreement import (
    Votes,
    agreement,
    alpha,
    coincidences,
    first_wins,
    is_biased,
    nominal,
    ordinal,
    reliability,
)
from lightning_align.lab.annotators import as_dict, by_aspect, panel

NAMES = ("ann", "bob", "cat", "dan")
# Krippendorff 2011, example D: four observers, twelve units, 0 where nothing was said.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
)


def interval(table: NDArray[Any]) -> NDArray[Any]:
    values = np.arange(table.shape[-1])
    return np.asarray((values[:, None] - values[None, :]) ** 2, dtype=float)


def judged(
    number: int,
    annotator: str,
    ranks: Sequence[int],
    *,
    shown: Sequence[int] | None = None,
    aspect: str = OVERALL,
    unsafe: tuple[int, ...] = (),
    skipped: str | None = None,
    seconds: float = math.nan,
    num_answers: int | None = None,
) -> Judgement:
    count = num_answers or len(ranks)
    item = Item(number, f"key {number}", f"p{number}", tuple(f"a{n}" for n in range(count)), "here")
    verdict = Verdict(tuple(ranks), None, unsafe, skipped)
    return Judgement(item, annotator, aspect, verdict, tuple(range(count) if shown is None else shown), 0.0, seconds)


def crowd(
    generator: np.random.Generator,
    items: int,
    *,
    answers: int = 2,
    annotators: int = 2,
    temperature: float = 1.0,
    place: float = 0.0,
    level: float = 0.0,
) -> list[Judgement]:
    """Rankings by score plus Gumbel noise, whose pairs follow Bradley–Terry with this temperature.

    ``place`` is what the first place adds to a score, and the last takes off it; scores are rounded to ``level``.
    """
    made = []
    for number in range(items):
        scores = generator.normal(size=answers)
        for name in NAMES[:annotators]:
            shown = generator.permutation(answers)
            seen = scores + temperature * generator.gumbel(size=answers)
            seen[shown] += place * np.linspace(1, -1, answers)
            seen = np.round(seen / level) if level else seen
            made.append(judged(number, name, dense(-seen), shown=shown.tolist()))
    return made


def votes_of(judgements: Sequence[Judgement]) -> Votes:
    return Votes.of(judgements, NAMES)


def true_alpha(temperature: float) -> float:
    """1 − 4 E[p (1 − p)] for differences of two standard normal scores."""
    node, weight = np.polynomial.hermite_e.hermegauss(200)
    p = 1 / (1 + np.exp(-math.sqrt(2) * node / temperature))
    return float(1 - 4 * np.sum(weight * p * (1 - p)) / np.sum(weight))


def test_the_published_example() -> None:
    counts = np.stack([(value == PUBLISHED).sum(0) for value in range(1, 6)], axis=1).astype(float)
    table = coincidences(counts).sum(0)
    assert table.sum() == pytest.approx(40)  # pairable values; the twelfth unit has but one
    found = [round(float(alpha(table, difference)), 3) for difference in (nominal, ordinal, interval)]
    assert found == [0.743, 0.815, 0.849]


@pytest.mark.parametrize(("difference", "level"), [(nominal, "nominal"), (ordinal, "ordinal")])
def test_it_is_the_alpha_of_the_reference_package(difference: Any, level: str) -> None:
    krippendorff = pytest.importorskip("krippendorff")
    for seed in range(20):
        generator = np.random.default_rng(seed)
        judgements = crowd(generator, 12, answers=3, annotators=4, level=1.0)
        judgements = [judgement for judgement in judgements if generator.random() < 0.7]
        votes = votes_of(judgements)
        matrix = np.full((4, votes.unit.max() + 1), np.nan)
        matrix[votes.annotator, votes.unit] = votes.value
        both = np.concatenate([matrix, -matrix], axis=1)
        expected = krippendorff.alpha(reliability_data=both, level_of_measurement=level)
        assert reliability(votes, difference).value == pytest.approx(expected, abs=1e-12)


def test_which_answer_is_called_the_first_does_not_matter() -> None:
    generator = np.random.default_rng(3)
    judgements = crowd(generator, 15, answers=3, annotators=3, level=0.8)
    turned = {number: generator.permutation(3) for number in range(15)}
    renamed = [
        judged(j.item.id, j.annotator, np.array(j.verdict.ranks)[turned[j.item.id]].tolist()) for j in judgements
    ]
    for difference in (nominal, ordinal):
        first, other = (reliability(votes_of(said), difference) for said in (judgements, renamed))
        assert (first.value, first.low, first.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)
        assert 0 < first.low < first.value < first.high < 1
    both = reliability(votes_of(judgements), ordinal).value
    assert both != pytest.approx(reliability(votes_of(judgements), nominal).value, abs=1e-3)  # ties are half way
    assert both == pytest.approx(reliability(votes_of(judgements), interval).value)


@pytest.mark.parametrize(("answers", "annotators", "temperature"), [(2, 2, 0.5), (4, 3, 1.0)])
def test_a_crowd_of_known_temperature_has_the_alpha_it_must(answers: int, annotators: int, temperature: float) -> None:
    judgements = crowd(np.random.default_rng(7), 1500, answers=answers, annotators=annotators, temperature=temperature)
    found, expected = reliability(votes_of(judgements), nominal), true_alpha(temperature)
    assert found.low < expected < found.high
    assert found.high - found.low < 0.1
    assert found.value == pytest.approx(reliability(votes_of(judgements), ordinal).value)  # without ties
    same = agreement(votes_of(judgements))
    assert same.value == pytest.approx((1 + found.value) / 2, abs=0.001)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, expected, runs = np.random.default_rng(11), true_alpha(0.5), 250
    held = dict.fromkeys(("alpha", "agreement"), 0)
    for _ in range(runs):
        votes = votes_of(crowd(generator, 30, answers=4, temperature=0.5))
        found, same = reliability(votes, nominal), agreement(votes)
        held["alpha"] += found.low <= expected <= found.high
        held["agreement"] += same.low <= (1 + expected) / 2 <= same.high
    for count in held.values():
        assert 0.90 <= count / runs <= 0.98


def test_without_overlap_or_without_a_difference_nothing_is_known() -> None:
    alone = votes_of([judged(0, "ann", (1, 2)), judged(1, "bob", (1, 2))])
    for found in (reliability(alone, nominal), agreement(alone), agreement(alone, 0)):
        assert math.isnan(found.value)
        assert found.n == 0
    ties = votes_of([judged(n, name, (1, 1)) for n in range(3) for name in ("ann", "bob")])
    assert math.isnan(reliability(ties, nominal).value)
    assert agreement(ties).value == 1
    assert math.isnan(agreement(ties.decided()).value)
    one = votes_of([judged(0, "ann", (1, 2)), judged(0, "bob", (1, 2))])
    assert reliability(one, nominal).value == 1
    assert math.isnan(reliability(one, nominal).low)
    mixed = votes_of([judged(n, name, (1, 1) if n else (1, 2)) for n in range(2) for name in ("ann", "bob")])
    assert reliability(mixed, nominal).low == 1  # a resample of ties alone has no alpha and breaks nothing


def test_place_bias_has_the_variance_of_all_orders() -> None:
    """Of two aspects of one item, with ties, against all 24 orders."""
    ranks = {"helpfulness": (1, 2, 2, 3), "safety": (2, 1, 3, 2)}
    shares, errors = [], set()
    for shown in permutations(range(4)):
        found = first_wins([judged(0, "ann", said, shown=shown, aspect=aspect) for aspect, said in ranks.items()])
        shares.append(found.value)
        errors.add(round(found.se, 12))
        assert found.n == 1
    assert np.mean(shares) == pytest.approx(0.5)
    assert errors == {round(float(np.std(shares)), 12)}


def test_place_bias_of_two_answers_is_a_binomial_share() -> None:
    shown = [(0, 1)] * 9 + [(1, 0)] * 3
    found = first_wins([judged(n, "ann", (1, 2), shown=order) for n, order in enumerate(shown)])
    unknown = [judged(20 + n, "ann", (1, 2), shown=()) for n in range(5)]
    assert first_wins([*[judged(n, "ann", (1, 2), shown=order) for n, order in enumerate(shown)], *unknown]) == found
    expected = stats.binomtest(9, 12).proportion_ci(0.95, "exact")
    assert (found.value, found.low, found.high) == pytest.approx((0.75, expected.low, expected.high))
    assert not is_biased(found)
    always = first_wins([judged(n, "ann", (1, 2)) for n in range(5)])
    assert always.high == 1
    assert not is_biased(always)  # five of five happen by chance once in sixteen times
    assert is_biased(first_wins([judged(n, "ann", (2, 1)) for n in range(6)]))
    assert math.isnan(first_wins([judged(0, "ann", (1, 1))]).value)


@pytest.mark.parametrize("answers", [2, 5])
def test_place_bias_is_found_where_it_is_and_hardly_where_it_is_not(answers: int) -> None:
    generator, runs = np.random.default_rng(5), 300
    false = sum(is_biased(first_wins(crowd(generator, 30, answers=answers, annotators=1))) for _ in range(runs))
    assert false / runs < 0.07
    truth = first_wins(crowd(generator, 8_000, answers=answers, annotators=1, place=0.8)).value
    found = [first_wins(crowd(generator, 60, answers=answers, annotators=1, place=0.8)) for _ in range(200)]
    assert truth > 0.6
    assert np.mean([share.low > 0.5 for share in found]) > 0.8
    assert np.mean([share.low <= truth <= share.high for share in found]) > 0.92
    last = first_wins(crowd(generator, 200, answers=answers, annotators=1, place=-0.8))
    assert last.high < 0.5


def test_the_table_says_what_each_one_did() -> None:
    judgements = [
        judged(0, "ann", (1, 2), seconds=3.0, unsafe=(1,)),
        judged(1, "ann", (1, 1), seconds=9.0),
        judged(2, "ann", (), skipped="unclear", num_answers=2, seconds=90.0),
        judged(3, "ann", (2, 1), seconds=4.0),
        judged(0, "bob", (1, 2)),
        judged(1, "bob", (2, 1)),
        judged(2, "cat", (), skipped="unclear", num_answers=2),
    ]
    found = panel(judgements)
    assert (found.items, found.pairs) == (2, 2)
    assert list(found.annotators) == ["ann", "bob", "cat"]
    ann, bob, cat = found.annotators.values()
    assert (ann.judgements, ann.skipped, ann.ties, ann.unsafe, ann.seconds) == (3, 1, 1 / 3, 1 / 6, 4.0)
    assert ann.agreement.value == bob.agreement.value == found.agreement.value == 0.5
    assert (found.agreement_decided.value, found.agreement_decided.n) == (1.0, 1)
    assert ann.first_wins.value == 0.5
    assert found.first_wins.value == 0.5
    assert math.isnan(bob.seconds)
    assert (cat.judgements, cat.skipped) == (0, 1)
    assert math.isnan(cat.ties)
    assert math.isnan(cat.agreement.value)
    assert not by_aspect(judgements)
    plain = as_dict(found)
    assert plain["annotators"]["cat"]["agreement"] == {"value": None, "ci": [None, None], "n": 0, "se": None}


def test_one_who_disagrees_is_seen_in_the_table() -> None:
    generator = np.random.default_rng(2)
    judgements = [
        judged(j.item.id, j.annotator, dense([-rank for rank in j.verdict.ranks]), shown=j.shown)
        if j.annotator == "cat"
        else j
        for j in crowd(generator, 200, answers=3, annotators=3, temperature=0.3)
    ]
    table = panel(judgements).annotators
    assert table["cat"].agreement.high < 0.3
    assert table["ann"].agreement.low > table["cat"].agreement.high


def test_aspects_are_told_apart() -> None:
    judgements = [
        judged(number, name, (1, 2) if aspect == "safety" or name == "ann" else (2, 1), aspect=aspect)
        for number in range(4)
        for name in ("ann", "bob")
        for aspect in ("helpfulness", "safety")
    ]
    apart = by_aspect(judgements)
    assert {aspect: found.agreement.value for aspect, found in apart.items()} == {"helpfulness": 0.0, "safety": 1.0}
    assert panel(judgements).agreement.value == 0.5
    assert panel(judgements).pairs == 8
    assert panel(judgements).items == 4
