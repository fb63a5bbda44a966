"""Kinds from kinds, against brute force."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.derive import Item, derivable, derive
from lightning_align.data.records import KINDS, RecordError, validate

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def run(source: Any, wanted: Any, *records: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    items = [Item(f"line {number}", record, {"id": number}) for number, record in enumerate(records, 1)]

    def fail(place: str, error: RecordError) -> None:
        raise error

    made, dropped = derive(source, wanted, items, fail)
    assert all(validate(wanted, item.record) == item.record for item in made)
    return [item.record for item in made], dropped


def test_what_can_be_made_of_what() -> None:
    possible = {(source, wanted) for source in KINDS for wanted in KINDS if derivable(source, wanted)}
    assert possible == {
        *(("sft", wanted) for wanted in ("prompt", "text")),
        *(("preference", wanted) for wanted in ("prompt", "sft", "unpaired", "ranked")),
        *(("ranked", wanted) for wanted in ("preference", "sft", "scored")),
        *(("scored", wanted) for wanted in ("ranked", "preference")),
        ("unpaired", "sft"),
    }


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.booleans())
def test_a_ranking_gives_every_untied_pair_once(ranks: list[int], as_scores: bool) -> None:
    ranks = [rank - min(ranks) + 1 for rank in ranks]
    answers = [f"answer {index}" for index in range(len(ranks))]
    order: dict[str, Any] = {"scores": [-float(rank) for rank in ranks]} if as_scores else {"ranks": ranks}
    made, dropped = run("ranked", "preference", {"prompt": "p", "completions": answers, **order})
    expected = {
        (answers[better], answers[worse])
        for better, worse in permutations(range(len(ranks)), 2)
        if ranks[better] < ranks[worse]
    }
    assert {(record["chosen"], record["rejected"]) for record in made} == expected
    assert len(made) == len(expected)
    assert dropped == ([] if expected else [("all its answers tie", "line 1")])


def test_equal_texts_of_different_rank_are_no_pair() -> None:
    made, dropped = run("ranked", "preference", {"prompt": "p", "completions": ["a", "a", "b"], "ranks": [1, 2, 3]})
    assert made == [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2
    assert dropped == [("pairs of equal answers", "line 1")]


def test_a_preference_gives_a_good_and_a_bad_one() -> None:
    """TRL's ``unpair_preference_dataset``, side by side."""
    pairs = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tie": True},
    ]
    made, dropped = run("preference", "unpaired", *pairs)
    assert made == [
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        {"prompt": "The sky is", "completion": " green.", "label": False},
    ]
    assert dropped == [("a tie has no better side", "line 2")]


def test_a_preference_is_a_ranking_of_two() -> None:
    made, _ = run(
        "preference",
        "ranked",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tie": True},
    )
    assert [record["ranks"] for record in made] == [[1, 2], [1, 1]]


def test_scored_completions_of_one_prompt_are_a_ranking() -> None:
    scored = [("p", "a", 1.0), ("q", "b", 2.0), ("p", "c", 3.0), ("p", "d", 1.0)]
    records = [{"prompt": prompt, "completion": answer, "score": score} for prompt, answer, score in scored]
    made, dropped = run("scored", "ranked", *records)
    assert made == [{"prompt": "p", "completions": ["a", "c", "d"], "scores": [1.0, 3.0, 1.0]}]
    assert dropped == [("its prompt has no second scored completion", "line 2")]
    pairs, _ = run("scored", "preference", *records)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("c", "a"), ("c", "d")]


def test_conversational_prompts_are_gathered_too() -> None:
    records = [{"prompt": [dict(USER)], "completion": [ASSISTANT], "score": float(score)} for score in (1, 2)]
    made, _ = run("scored", "ranked", *records)
    assert made == [{"prompt": [USER], "completions": [[ASSISTANT], [ASSISTANT]], "scores": [1.0, 2.0]}]


def test_rankings_with_scores_come_apart_again() -> None:
    made, _ = run("ranked", "scored", {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0]})
    assert [record["score"] for record in made] == [1.0, 2.0]
    with pytest.raises(RecordError, match="scores: is missing"):
        run("ranked", "scored", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]})


def test_demonstrations_are_the_chosen_the_best_and_the_approved() -> None:
    assert run("preference", "sft", {"prompt": "p", "chosen": "a", "rejected": "b"})[0] == [
        {"prompt": "p", "completion": "a"}
    ]
    assert run("ranked", "sft", {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]})[0] == [
        {"prompt": "p", "completion": "b"}
    ]
    made, dropped = run(
        "unpaired",
        "sft",
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
    )
    assert made == [{"prompt": "p", "completion": "a"}]
    assert dropped == [("its label is false", "line 2")]


def test_prompts_of_conversations_end_before_the_last_answer_and_keep_further_columns() -> None:
    messages = [USER, ASSISTANT, USER, ASSISTANT]
    assert run("sft", "prompt", {"messages": messages})[0] == [{"prompt": messages[:3], "id": 1}]
    assert run("sft", "prompt", {"messages": messages[:3]})[0] == [{"prompt": messages[:3], "id": 1}]
    with pytest.raises(RecordError, match="no turn before the assistant's"):
        run("sft", "prompt", {"messages": [ASSISTANT]})


def test_texts_of_demonstrations() -> None:
    assert run("sft", "text", {"prompt": "p", "completion": " c"})[0] == [{"text": "p c"}]
    for record in ({"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}):
        with pytest.raises(RecordError, match="is a conversation, not a text"):
            run("sft", "text", record)
