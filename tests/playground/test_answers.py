"""Answers of a tier are as good as its name says, and differ."""

from random import Random
from statistics import fmean

import pytest

from lightning_align.errors import UserError
from lightning_align.playground import FAMILIES, UNSAFE_FAMILIES, Request, explain, vocabulary
from lightning_align.playground.answers import LONGEST, TIERS, check_mix, draw_tier, sample_answer
from lightning_align.playground.bodies import complying_body, declining_body

ORDERED_TIERS = ("excellent", "good", "fair", "poor", "broken")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiers_are_ordered_in_mean_gold(family: str, requests_of: dict[str, list[Request]]) -> None:
    random = Random(family)
    means = [
        fmean(explain(request, sample_answer(random, request, tier)).score.gold for request in requests_of[family] * 3)
        for tier in ORDERED_TIERS
    ]
    assert means == sorted(means, reverse=True), means
    assert means[0] - means[-1] > 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "words"])
def test_gushing_lies_between_excellent_and_poor(family: str, requests_of: dict[str, list[Request]]) -> None:
    random = Random(family)
    mean = {
        tier: fmean(
            explain(request, sample_answer(random, request, tier)).score.gold for request in requests_of[family]
        )
        for tier in ("excellent", "gushing", "poor")
    }
    assert mean["poor"] < mean["gushing"] < mean["excellent"] - 0.5


@pytest.mark.parametrize("tier", TIERS)
def test_answers_start_with_a_space_and_stay_short(tier: str, requests_of: dict[str, list[Request]]) -> None:
    random, known = Random(tier), set(vocabulary())
    for requests in requests_of.values():
        for request in requests[:30]:
            answer = sample_answer(random, request, tier)
            assert answer.startswith(" ")
            assert answer == " " + " ".join(answer.split())
            assert 1 <= len(answer.split()) <= LONGEST
            assert known.issuperset(answer.split())


def test_politeness_goes_with_quality(requests_of: dict[str, list[Request]]) -> None:
    """The bait of over-optimisation: in what annotators compare, better answers are politer ones."""
    random = Random(0)
    requests = [request for family in FAMILIES if family != "words" for request in requests_of[family]]
    polite = [
        fmean(explain(request, sample_answer(random, request, tier)).polite for request in requests)
        for tier in ORDERED_TIERS
    ]
    assert polite == sorted(polite, reverse=True)


@pytest.mark.parametrize("family", UNSAFE_FAMILIES)
def test_complying_is_harmful_and_declining_is_not(family: str, requests_of: dict[str, list[Request]]) -> None:
    random = Random(family)
    for request in requests_of[family]:
        done = explain(request, " ".join(complying_body(random, request)))
        assert done.complied
        assert done.harmful + done.rude == 2
        for offer in (False, True):
            declined = explain(request, " ".join(declining_body(random, request, offer=offer)))
            assert declined.declined
            assert declined.score.safety == 1
            assert declined.grade.constraints["offers"] == offer


def test_draw_tier_follows_the_weights() -> None:
    random = Random(3)
    drawn = [draw_tier(random, {"excellent": 3, "poor": 1}) for _ in range(4000)]
    assert abs(drawn.count("excellent") / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


@pytest.mark.parametrize("mix", [{"superb": 1.0}, {"good": -1.0, "poor": 2.0}, {"good": 0.0}, {}])
def test_bad_mixes_are_one_line(mix: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^quality "):
        check_mix(mix)
