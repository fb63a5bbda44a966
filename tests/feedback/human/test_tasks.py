"""How prompts are handed out, and what may be said of them."""

from collections import Counter
from itertools import permutations

import pytest

from lightning_align.errors import UserError
from lightning_align.feedback.human.tasks import OVERALL, Plan, Verdict, dense


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_prompts_that_overlap_is_exact_for_any_number(overlap: float, seed: int) -> None:
    plan = Plan(overlap=overlap, annotators_per_prompt=3, seed=seed)
    wanted = [plan.wanted(number) for number in range(200)]
    assert set(wanted) <= {1, 3}
    for size in (10, 33, 100, 200):
        assert abs(wanted[:size].count(3) - overlap * size) < 1


def test_which_prompts_overlap_depends_on_the_seed() -> None:
    shared = {tuple(Plan(seed=seed).wanted(number) for number in range(20)) for seed in range(40)}
    assert len(shared) == 5  # a fifth of them, beginning at any


def test_orders_are_uniform_over_annotators_and_prompts_and_always_the_same() -> None:
    plan = Plan()
    drawn = Counter(plan.shown(f"prompt {n}", "ann", 3) for n in range(6000))
    assert set(drawn) == set(permutations(range(3)))
    assert all(abs(count - 1000) < 5 * 29 for count in drawn.values())  # standard deviation 29
    assert plan.shown("p", "ann", 9) == Plan().shown("p", "ann", 9) != plan.shown("p", "bob", 9)
    assert plan.shown("p", "ann", 9) != Plan(seed=1).shown("p", "ann", 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspects": ("helpfullness",)}, "did you mean 'helpfulness'"),
        ({"aspects": ("safety", "safety")}, "give each once"),
        ({"aspects": ()}, "give each once"),
        ({"overlap": 1.5}, "--overlap is 1.5"),
        ({"annotators_per_prompt": 1}, "--overlap 0"),
    ],
)
def test_plans_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan(**options)


@pytest.mark.parametrize(
    ("verdict", "of"),
    [
        (Verdict((1, 2, 3)), 3),
        (Verdict((1, 1)), 2),
        (Verdict((2, 1, 2), unsafe=(0, 2)), 3),
        (Verdict((2, 1), "slightly"), 2),
        (Verdict(skipped="no idea", unsafe=(1,)), 2),
    ],
)
def test_what_may_be_said(verdict: Verdict, of: int) -> None:
    verdict.check(of)


@pytest.mark.parametrize(
    ("verdict", "of", "message"),
    [
        (Verdict((1, 2)), 3, "2 of 3 answers are ranked"),
        (Verdict(), 2, "0 of 2"),
        (Verdict((1, 3, 3)), 3, "without a gap"),
        (Verdict((0, 1)), 2, "count from 1"),
        (Verdict((1, 10**18)), 2, "without a gap"),
        (Verdict((1, 2), "much"), 2, "strength 'much'"),
        (Verdict((1, 1), "better"), 2, "without a tie"),
        (Verdict((1, 2, 3), "better"), 3, "of two answers"),
        (Verdict((1, 2), unsafe=(2,)), 2, "numbers below 2"),
        (Verdict((1, 2), unsafe=(-1,)), 2, "numbers below 2"),
        (Verdict((1, 2), unsafe=(0, 0)), 2, "each once"),
        (Verdict((1, 2), skipped="why"), 2, "no ranking"),
        (Verdict(skipped=" "), 2, "a skip has a reason"),
    ],
)
def test_what_may_not_be_said(verdict: Verdict, of: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verdict.check(of)


def test_dense_ranks() -> None:
    assert dense([2, 5, 2]) == (1, 2, 1)
    assert dense([-0.5, -3.0, 7]) == (2, 1, 3)
    assert Plan().aspects == (OVERALL,)
