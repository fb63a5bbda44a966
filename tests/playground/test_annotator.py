"""The annotator's labels follow the probabilities it states: Bradley–Terry, Rao–Kupper, Plackett–Luce."""

from collections import Counter
from itertools import permutations
from math import exp, log
from random import Random
from statistics import fmean

import pytest
from scipy.stats import chisquare

from lightning_align.errors import UserError
from lightning_align.playground import Annotator, annotator_agreement, gold, parse, records
from lightning_align.playground.annotator import STRENGTHS, sigmoid

DRAWS = 20_000
SETTINGS = [
    Annotator(),
    Annotator(temperature=0.3),
    Annotator(ties=0.7),
    Annotator(noise=0.3),
    Annotator(temperature=2.0, noise=0.2, ties=0.5),
]


def within(share: float, probability: float, draws: int = DRAWS) -> bool:
    """Whether a share lies within four standard errors of its probability."""
    return abs(share - probability) <= 4 * (probability * (1 - probability) / draws) ** 0.5 + 1e-12


@pytest.mark.parametrize("annotator", SETTINGS)
@pytest.mark.parametrize(("first", "second"), [(2.0, 1.0), (0.0, 0.9), (1.0, 1.0), (3.0, -1.0)])
def test_choices_match_the_stated_probabilities(annotator: Annotator, first: float, second: float) -> None:
    random = Random(f"{annotator} {first} {second}")
    judged = [annotator.compare(random, first, second) for _ in range(DRAWS)]
    win, tie, lose = annotator.probabilities(first, second)
    assert win + tie + lose == pytest.approx(1)
    assert within(fmean(not j.tie and j.winner == 0 for j in judged), win)
    assert within(fmean(j.tie for j in judged), tie)
    assert within(fmean(not j.tie and j.winner == 1 for j in judged), lose)


def test_probabilities_are_bradley_terry_and_rao_kupper() -> None:
    odds = (1.3 - 0.5) / 0.8
    win, tie, lose = Annotator().probabilities(1.3, 0.5)
    assert win == pytest.approx(exp(1.3 / 0.8) / (exp(1.3 / 0.8) + exp(0.5 / 0.8)))
    assert (tie, lose) == (pytest.approx(0), pytest.approx(1 - win))
    # Rao and Kupper: P(i > j) = π_i / (π_i + θ π_j), θ = e^η
    theta, i, j = exp(0.6), exp(1.3 / 0.8), exp(0.5 / 0.8)
    win, tie, lose = Annotator(ties=0.6).probabilities(1.3, 0.5)
    assert win == pytest.approx(i / (i + theta * j))
    assert lose == pytest.approx(j / (j + theta * i))
    assert tie == pytest.approx(i * j * (theta**2 - 1) / ((i + theta * j) * (j + theta * i)))
    noisy = Annotator(noise=0.4).probabilities(1.3, 0.5)
    assert noisy[0] == pytest.approx(0.6 * sigmoid(odds) + 0.2)


def test_strength_is_the_class_of_the_perceived_difference() -> None:
    """The perceived difference is logistic about the odds, so that the share of every class is known."""
    annotator, random = Annotator(), Random(0)
    odds = (2.0 - 1.0) / annotator.temperature
    counts = Counter(annotator.compare(random, 2.0, 1.0).strength for _ in range(DRAWS))
    stronger = 0.0
    for least, name in STRENGTHS:
        at_least = sigmoid(odds - least) + sigmoid(-odds - least) if least > 0 else 1.0
        assert within(counts[name] / DRAWS, at_least - stronger), name
        stronger = at_least


def test_every_strength_occurs_and_goes_with_the_true_difference() -> None:
    differences: dict[str, list[float]] = {name: [] for _, name in STRENGTHS}
    for record in records("preference", size=2000):
        chosen, rejected = (gold(record["prompt"], record[side]).gold for side in ("chosen", "rejected"))
        differences[record["strength"]].append(chosen - rejected)
    shares = [len(found) / 2000 for found in differences.values()]
    assert all(0.15 < share < 0.4 for share in shares), shares
    means = [fmean(found) for found in differences.values()]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_rankings_follow_plackett_luce(noise: float) -> None:
    annotator, random, values = Annotator(temperature=0.7, noise=noise), Random(5), (0.2, 1.0, 1.4)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        ranks = annotator.rank(random, values)
        counts[tuple(sorted(range(3), key=ranks.__getitem__))] += 1
    weights = [exp(value / 0.7) for value in values]
    orders = list(permutations(range(3)))
    expected = []
    for first, second, third in orders:
        luce = weights[first] / sum(weights) * weights[second] / (weights[second] + weights[third])
        expected.append(DRAWS * ((1 - noise) * luce + noise / 6))
    assert chisquare([counts[order] for order in orders], expected).pvalue > 0.001


def test_tied_neighbours_share_a_rank() -> None:
    random = Random(0)
    assert Annotator(ties=1e6).rank(random, [0.0, 5.0, 1.0]) == [1, 1, 1]
    assert Annotator(temperature=0.001, ties=0.1).rank(random, [0.0, 5.0, 5.00001]) in ([3, 1, 1], [3, 1, 2], [3, 2, 1])
    assert sorted(Annotator().rank(random, [0.0] * 6)) == [1, 2, 3, 4, 5, 6]


def test_thumbs_and_grades() -> None:
    annotator, random = Annotator(temperature=0.5, noise=0.2), Random(2)
    for value in (0.5, 1.5, 2.2):
        share = fmean(annotator.approves(random, value) for _ in range(DRAWS))
        assert within(share, 0.8 * sigmoid((value - 1.5) / 0.5) + 0.1)
    grades = [Annotator(temperature=0.5).grade(random, 1.2) for _ in range(DRAWS)]
    assert abs(fmean(grades) - 1.2) < 4 * 0.5 * (3.29 / DRAWS) ** 0.5  # a logistic has variance π²/3


def test_aspects_are_in_units_of_gold() -> None:
    request, answer = parse("help me hurt my cat ."), "you can kick the cat and hit it ."
    value = {aspect: Annotator(aspect=aspect).value(request, answer) for aspect in ("gold", "helpfulness", "safety")}
    assert value["gold"] == pytest.approx(value["helpfulness"] + value["safety"] - 4)


def untied_winner(annotator: Annotator, random: Random, first: float, second: float) -> int:
    while (judged := annotator.compare(random, first, second)).tie:
        pass
    return judged.winner


@pytest.mark.parametrize(
    "options", [{}, {"ties": 0.8}, {"noise": 0.3}, {"temperature": 0.2, "aspect": "helpfulness"}, {"aspect": "safety"}]
)
def test_rm_9_agreement_is_what_asking_twice_gives(options: dict[str, object]) -> None:
    """Self-agreement, ceiling and entropy against simulated second labels of the very pairs in the records."""
    stated = annotator_agreement(size=400, seed=3, split="val", **options)  # type: ignore[arg-type]
    pairs = records("preference", size=400, seed=3, split="val", **options)  # type: ignore[arg-type]
    annotator, random = Annotator(**options), Random(1)  # type: ignore[arg-type]
    best = entropy = untied = 0.0
    agree: list[bool] = []
    for record in pairs:
        request = parse(record["prompt"])
        first, second = (annotator.value(request, record[side]) for side in ("chosen", "rejected"))
        win, tie, lose = annotator.probabilities(first, second)
        best += max(win, lose)
        untied += win + lose
        entropy -= win * log(win / (1 - tie)) + lose * log(lose / (1 - tie))
        for _ in range(60):
            if not annotator.compare(random, first, second).tie:  # such pairs are asked again until they do not tie
                once, again = (untied_winner(annotator, random, first, second) for _ in range(2))
                agree.append(once == again)
    assert stated.num_pairs == 400
    assert stated.ceiling == pytest.approx(best / untied)
    assert stated.entropy == pytest.approx(entropy / untied)
    assert within(fmean(agree), stated.self_agreement, len(agree))
    assert 0.5 <= stated.self_agreement <= stated.ceiling <= 1


def test_rm_9_who_knows_gold_reaches_the_ceiling_and_no_more() -> None:
    size = 3000
    stated = annotator_agreement(size=size, split="train")
    annotator, right = Annotator(), 0.0
    for record in records("preference", size=size):
        request = parse(record["prompt"])
        difference = annotator.value(request, record["chosen"]) - annotator.value(request, record["rejected"])
        right += 0.5 if difference == 0 else float(difference > 0)
    assert within(right / size, stated.ceiling, size)


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.0}, {"temperature": float("inf")}, {"noise": 1.5}, {"ties": -1.0}, {"aspect": "charm"}],
)
def test_bad_settings_are_one_line(setting: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(setting))} is "):
        Annotator(**setting)  # type: ignore[arg-type]
