"""The reward of ``benchmarks.groups``. Both sides call it, so it imports nothing."""

from typing import Any


def share_of_vowels(completions: list[str], **_: Any) -> list[float]:
    """Vowels by characters of each completion: it differs from sample to sample and costs nothing."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
