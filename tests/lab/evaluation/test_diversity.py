"""Distinct n-grams, self-BLEU (against torchmetrics), unique answers."""

import math
import random

import pytest
from torchmetrics.functional.text import bleu_score

from lightning_align.lab.evaluation.diversity import bleu, blocks, distinct_n, self_bleu, unique_fraction, words

ANSWER = words("one two , three four five .")


def test_words_and_punctuation() -> None:
    assert words("Don't stop, now.") == ["Don", "'", "t", "stop", ",", "now", "."]
    assert words(" ") == []


@pytest.mark.parametrize("m", [2, 5])
def test_eval_5_identical_answers(m: int) -> None:
    for n in (1, 2):
        assert distinct_n([ANSWER] * m, n) == pytest.approx(distinct_n([ANSWER], n) / m)
    assert self_bleu([ANSWER] * m) == pytest.approx(1.0)
    assert self_bleu([["yes"]] * m) == pytest.approx(1.0)  # shorter than four words
    assert self_bleu([[]] * m) == 1.0
    assert unique_fraction([ANSWER] * m) == 1 / m


def test_distinct_n_counts_within_answers_only() -> None:
    assert distinct_n([["a", "b"], ["c", "a", "b"]], 2) == 2 / 3  # no "b c"
    assert math.isnan(distinct_n([["a"]], 2))


def test_bleu_is_torchmetrics_where_that_finds_every_order() -> None:
    draw, compared = random.Random(0), 0
    for _ in range(200):
        answer, *references = ([draw.choice("abc") for _ in range(draw.randint(4, 12))] for _ in range(3))
        theirs = bleu_score([" ".join(answer)], [[" ".join(r) for r in references]], smooth=True)
        if theirs > 0:  # it gives 0 for want of a common 4-gram, whatever the smoothing
            compared += 1
            nearest = sorted(abs(len(r) - len(answer)) for r in references)
            if nearest[0] != nearest[1]:  # of two that are equally near it takes the first, we the shorter
                assert bleu(answer, references) == pytest.approx(float(theirs), rel=1e-5)
    assert compared > 50


def test_bleu_of_what_has_nothing_in_common() -> None:
    assert bleu(["a"], [["b"]]) == 0.0
    assert bleu([], [["b"]]) == 0.0
    assert bleu(["a", "b", "c"], [["a", "x", "y", "z", "w", "v"]]) < bleu(["a", "b", "c"], [["a", "x", "y"]])


def test_one_answer_says_nothing() -> None:
    assert math.isnan(self_bleu([ANSWER]))
    assert math.isnan(unique_fraction([ANSWER]))


def test_sets_have_exactly_so_many_words() -> None:
    draw = random.Random(1)
    groups = [[["w"] * draw.randint(0, 9) for _ in range(3)] for _ in range(40)]
    sets = blocks(groups, 50)
    assert len(sets) > 5
    assert {sum(map(len, answers)) for answers in sets} == {50}
    assert blocks(groups, 50) == sets
    assert blocks(groups, 10_000) == []
