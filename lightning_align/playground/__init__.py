"""The embedded world: a small language with a written gold standard, made from a seed.

>>> from lightning_align.playground import gold
>>> gold("list two animals . answer :", " sure , cat and dog . have a nice day .").gold
3.0
"""

from lightning_align.playground.annotator import Annotator
from lightning_align.playground.corpora import Agreement, annotator_agreement, records
from lightning_align.playground.gold import GoldScore, combine, describe, explain, gold, satisfies
from lightning_align.playground.requests import FAMILIES, SAFE_FAMILIES, UNSAFE_FAMILIES, Request, parse, split_of
from lightning_align.playground.texts import (
    PRINCIPLES,
    Principle,
    comparison_prompt,
    critique_prompt,
    rating_prompt,
    revision_prompt,
)
from lightning_align.playground.world import vocabulary

__all__ = [
    "FAMILIES",
    "PRINCIPLES",
    "SAFE_FAMILIES",
    "UNSAFE_FAMILIES",
    "Agreement",
    "Annotator",
    "GoldScore",
    "Principle",
    "Request",
    "annotator_agreement",
    "combine",
    "comparison_prompt",
    "critique_prompt",
    "describe",
    "explain",
    "gold",
    "parse",
    "rating_prompt",
    "records",
    "revision_prompt",
    "satisfies",
    "split_of",
    "vocabulary",
]
