"""Fields whose name is nearly one of ours."""

from typing import Any

import pytest

from lightning_align.data.misspelt import check_left_sides, edits, what_it_looks_like
from lightning_align.errors import UserError


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "abc", 3),
        ("rejected", "rejected", 0),
        ("rejcted", "rejected", 1),
        ("rejecetd", "rejected", 1),  # two letters that changed places
        ("lable", "label", 1),
        ("source", "score", 3),
        ("level", "label", 2),
    ],
)
def test_edits(one: str, other: str, distance: int) -> None:
    assert edits(one, other) == edits(other, one) == distance


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            ["prompt", "chosen", "rejcted"],
            "looks like preference, but `rejected` is missing; is `rejcted` it? (--columns rejected=rejcted)",
        ),
        (["prompt", "completions", "rank"], "looks like ranked, but `ranks` is missing; is `rank` it?"),
        (["prompt", "completion", "rating"], "looks like scored, but `score` is missing; is `rating` it?"),
        (["prompt", "completion", "lable"], "looks like unpaired, but `label` is missing; is `lable` it?"),
        (["promt", "completion"], "looks like sft, but `prompt` is missing; is `promt` it?"),
        (
            ["question", "answer"],
            "looks like sft, but `prompt` and `completion` are missing; are they `question` and `answer`? "
            "(--columns prompt=question completion=answer)",
        ),
        (["prompt", "completion", "source"], None),
        (["prompt", "chosen", "rejected", "rating"], None),  # the richest kind already
        (["prompt", "reference", "tests"], None),
        (["instruction", "input", "output"], None),
        ([], None),
    ],
)
def test_a_record_that_is_nearly_of_a_richer_kind(fields: list[str], line: str | None) -> None:
    found = what_it_looks_like(fields)
    assert found is None if line is None else found is not None and found.startswith(line)


@pytest.mark.parametrize("kind", ["preference", "prompt", None])
def test_a_mistyped_left_side_of_columns_is_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="renames 'bad' to 'rejectd', which is no field; did you mean 'rejected'"):
        check_left_sides({"prompt": "q", "rejectd": "bad"}, kind)


def test_only_prompts_have_further_columns() -> None:
    check_left_sides({"prompt": "q", "reference": "a", "tests": "t"}, "prompt")
    with pytest.raises(UserError, match="which no record of kind sft has"):
        check_left_sides({"prompt": "q", "reference": "a"}, "sft")
