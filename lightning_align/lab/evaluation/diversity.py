"""How different a policy's answers are: distinct n-grams, self-BLEU, unique answers.

Answers are compared as words and punctuation marks, so that policies with other tokenizers can be compared.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lightning_align.lab.overopt import Array

WORD = re.compile(r"\w+|[^\w\s]")
NGRAMS = 4  # of BLEU
Words = Sequence[str]


def words(text: str) -> list[str]:
    """Words and punctuation marks."""
    return WORD.findall(text)


def ngrams(answer: Words, n: int) -> Counter[tuple[str, ...]]:
    """The n-grams of one answer with their counts."""
    return Counter(tuple(answer[start : start + n]) for start in range(len(answer) - n + 1))


def distinct_n(answers: Sequence[Words], n: int) -> float:
    """Different n-grams / all n-grams of a set of answers (Li 2016, 1510.03055); NaN if there is none.

    It falls as the set grows: only sets of one size compare, see :func:`blocks`.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for answer in answers:
        counts.update(ngrams(answer, n))
    return len(counts) / counts.total() if counts else math.nan


def blocks(groups: Sequence[Sequence[Words]], num_words: int, *, seed: int = 0) -> list[list[Words]]:
    """Sets of answers of exactly ``num_words`` words each, to take :func:`distinct_n` of; prompts in random order.

    The answers of a prompt stay in one set. The last answer of a set is cut, and what then remains of its prompt is
    left out, as are the last prompts, which do not fill a set.
    """
    sets: list[list[Words]] = []
    current: list[Words] = []
    room = num_words
    for index in np.random.default_rng(seed).permutation(len(groups)):
        for answer in groups[index]:
            if answer:
                current.append(answer[:room])
                room -= len(current[-1])
            if room == 0:
                sets.append(current)
                current, room = [], num_words
                break
    return sets


def bleu(answer: Words, references: Sequence[Words]) -> float:
    """BLEU-4 of one answer against references (Papineni 2002), +1 smoothed for n ≥ 2 (Lin & Och 2004).

        min(1, e^{1 − r/c}) · (p₁ Π_{n=2}^{4} (m_n + 1)/(N_n + 1))^{1/4}

    with c the answer's length and r that of the reference whose length is nearest (the shorter of two), m_n of its N_n
    n-grams found in a reference, each at most as often as in one of them. 0 without a common word; of an empty answer 1
    where a reference is empty too, else 0.
    """
    if not answer:
        return float(any(not reference for reference in references))
    logs = []
    for n in range(1, NGRAMS + 1):
        own = ngrams(answer, n)
        known: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            known |= ngrams(reference, n)
        found, smooth = (own & known).total(), int(n > 1)
        if found + smooth == 0:
            return 0.0
        logs.append(math.log((found + smooth) / (own.total() + smooth)))
    nearest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(answer)), size))
    return math.exp(min(0.0, 1 - nearest / len(answer)) + sum(logs) / NGRAMS)


def self_bleu(answers: Sequence[Words]) -> float:
    """Mean :func:`bleu` of each answer to a prompt against the others (Zhu 2018, 1802.01886); NaN of fewer than 2."""
    if len(answers) < 2:
        return math.nan
    scores = [bleu(answer, [*answers[:index], *answers[index + 1 :]]) for index, answer in enumerate(answers)]
    return sum(scores) / len(scores)


def unique_fraction(answers: Sequence[Words]) -> float:
    """Share of the answers to a prompt that are different ones; NaN of fewer than 2."""
    return len({tuple(answer) for answer in answers}) / len(answers) if len(answers) > 1 else math.nan


def prompt_columns(groups: Sequence[Sequence[Words]]) -> dict[str, Array]:
    """``self_bleu`` and ``unique_fraction`` of each prompt ``[P]``."""
    return {
        "self_bleu": np.array([self_bleu(answers) for answers in groups]),
        "unique_fraction": np.array([unique_fraction(answers) for answers in groups]),
    }
