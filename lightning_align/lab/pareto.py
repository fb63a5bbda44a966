"""The points that no other beats."""

import math
from collections.abc import Sequence


def pareto(kl: Sequence[float], score: Sequence[float]) -> list[bool]:
    """Which points no other beats: none has at most their KL and at least their score, one of both strictly better."""
    order = sorted(range(len(kl)), key=lambda index: (kl[index], -score[index]))
    kept = [False] * len(kl)
    height, at = -math.inf, -math.inf
    for index in order:
        equal = score[index] == height and kl[index] == at
        if math.isfinite(kl[index]) and (score[index] > height or equal):
            kept[index] = True
            height, at = score[index], kl[index]
    return kept
