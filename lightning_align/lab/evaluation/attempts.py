"""Several attempts at a task that can be checked: pass@k and maj@k."""

from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k attempts is right, of n of which c were (Chen 2021, 2107.03374).

        1 − C(n − c, k) / C(n, k) = 1 − Π_{i = n−c+1}^{n} (1 − k/i)

    Args:
        n: Attempts that were made.
        c: Those that were right.
        k: Attempts allowed; at most n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} attempts are right: give 0 to {n}")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, of {n} attempts: give 1 to {n}")
    if n - c < k:
        return 1.0
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= 1 - k / i
    return 1 - missed


def majority_at_k(answers: Sequence[Hashable], right: Hashable) -> float:
    """1 if the commonest answer is the right one, ½ if it shares that place with others, else 0."""
    if not answers:
        raise ValueError("there is no answer to take the majority of")
    counts = Counter(answers)
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    if right not in leaders:
        return 0.0
    return 1.0 if len(leaders) == 1 else 0.5
