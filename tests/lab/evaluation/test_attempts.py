"""pass@k against golden vectors and enumeration; majority votes."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from lightning_align.lab.evaluation.attempts import majority_at_k, pass_at_k

CASES = json.loads((Path(__file__).parents[2] / "golden" / "golden.json").read_text())["cases"]


def test_golden_pass_at_k() -> None:
    case = CASES["pass_at_k"]
    found = [pass_at_k(*row) for row in case["inputs"]["n_c_k"]]
    assert found == pytest.approx(case["outputs"]["pass"], rel=1e-12)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_eval_1_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for c in range(n + 1):
        right = [index < c for index in range(n)]
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
        assert pass_at_k(n, c, 1) == pytest.approx(c / n)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="give"):
        pass_at_k(n, c, k)


def test_majorities() -> None:
    assert majority_at_k(["4", "4", "5"], "4") == 1.0
    assert majority_at_k(["4", "5"], "4") == 0.5
    assert majority_at_k(["4", "5", "5"], "4") == 0.0
    with pytest.raises(ValueError, match="no answer"):
        majority_at_k([], "4")
