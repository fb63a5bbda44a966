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

    made, dropped, _ = derive(source, wanted, items, fail)
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


def test_a_soft_label_of_a_half_is_a_tie_for_other_kinds_too() -> None:
    half = {"prompt": "p", "chosen": "a", "rejected": "b", "soft_label": 0.5}
    assert run("preference", "unpaired", half) == ([], [("a tie has no better side", "line 1")])
    assert run("preference", "ranked", half)[0][0]["ranks"] == [1, 1]


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


def lost(source: Any, wanted: Any, *records: dict[str, Any]) -> dict[str, int]:
    items = [Item(f"line {number}", record, {}) for number, record in enumerate(records, 1)]
    return dict(derive(source, wanted, items, lambda place, error: None).lost)


def test_weight_and_aspect_are_carried_and_what_has_no_place_is_said() -> None:
    judged = {"weight": 2.0, "aspect": "safety"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "strength": "better", "margin": 1.0, **judged}
    scored = {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0], **judged}
    thumb = {"prompt": "p", "completion": "a", "label": True, **judged}
    for source, wanted, record in (
        *(("preference", wanted, pair) for wanted in ("unpaired", "ranked")),
        *(("ranked", wanted, scored) for wanted in ("preference", "scored")),
    ):
        made, _ = run(source, wanted, record)
        assert all(judged.items() <= new.items() for new in made)
    for source, record in (("preference", pair), ("ranked", scored), ("unpaired", thumb)):
        ((made, *_), _) = run(source, "sft", record)
        assert made["weight"] == 2.0
        assert "aspect" in lost(source, "sft", record)
    assert lost("preference", "unpaired", pair, pair) == {"strength": 2, "margin": 2}
    assert lost("preference", "ranked", pair) == {"strength": 1, "margin": 1}
    assert lost("ranked", "preference", scored) == {}


@pytest.mark.parametrize("wanted", ["unpaired", "ranked", "sft", "prompt"])
def test_a_record_of_weight_0_leaves(wanted: str) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    made, dropped = run("preference", wanted, {**pair, "weight": 0.0}, {**pair, "prompt": "q"})
    assert made
    assert {record["prompt"] for record in made} == {"q"}
    assert dropped == [("its weight is 0", "line 1")]


def test_scores_of_two_aspects_of_one_prompt_stay_apart() -> None:
    records = [
        {"prompt": "p", "completion": answer, "score": score, "aspect": aspect}
        for answer, score, aspect in (
            *(("a", 1.0, "helpfulness"), ("a", 9.0, "safety"), ("b", 2.0, "helpfulness"), ("b", 3.0, "safety")),
        )
    ]
    made, _ = run("scored", "ranked", *records)
    assert [(row["aspect"], row["scores"]) for row in made] == [("helpfulness", [1.0, 2.0]), ("safety", [9.0, 3.0])]
    pairs, _ = run("scored", "preference", *records)
    assert [(row["aspect"], row["chosen"]) for row in pairs] == [("helpfulness", "b"), ("safety", "a")]


def test_scores_of_one_weight_are_a_ranking_of_that_weight() -> None:
    def weighted(*weights: float) -> list[dict[str, Any]]:
        return [
            {"prompt": "p", "completion": f"answer {number}", "score": float(number), "weight": weight}
            for number, weight in enumerate(weights)
        ]

    ((made,), _) = run("scored", "ranked", *weighted(2.0, 2.0))
    assert made["weight"] == 2.0
    ((made,), dropped) = run("scored", "ranked", *weighted(0.0, 3.0, 1.0))
    assert made["completions"] == ["answer 1", "answer 2"]
    assert "weight" not in made
    assert dropped == [("its weight is 0", "line 1")]
    assert lost("scored", "ranked", *weighted(3.0, 1.0)) == {"weight": 2}


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
