"""Every field of every kind is checked, and the fault names the field."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.records import KINDS, RecordError, is_conversational, is_messages, validate

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
GOOD: dict[str, dict[str, Any]] = {
    "text": {"text": "once upon a time"},
    "sft": {"prompt": "p", "completion": " c", "weight": 2.0},
    "prompt": {"prompt": [USER], "is_safety": True, "reference": "42", "level": 3},
    "preference": {
        **{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "no"}]},
        **{"strength": "slightly", "margin": 0.5, "tie": False, "weight": 1.0, "aspect": "safety", "soft_label": 0.7},
    },
    "ranked": {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 3, 1], "scores": [0.5, -1.0, 0.5]},
    "unpaired": {"prompt": "p", "completion": "c", "label": False},
    "scored": {"prompt": "p", "completion": "c", "score": -0.25},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_record_is_kept_as_it_is(kind: Any) -> None:
    assert validate(kind, GOOD[kind]) == GOOD[kind]


def test_messages_are_a_record_of_kind_sft() -> None:
    record = {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT], "weight": 0.0}
    assert validate("sft", record) == record


def test_only_prompts_keep_further_columns() -> None:
    assert "level" in validate("prompt", GOOD["prompt"])
    assert validate("scored", {**GOOD["scored"], "id": 7}) == GOOD["scored"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_required_field_is_missed(kind: Any) -> None:
    optional = {"weight", "is_safety", "reference", "level", "strength", "margin", "tie", "aspect", "ranks", "scores"}
    optional |= {"soft_label"}
    for name in set(GOOD[kind]) - optional:
        with pytest.raises(RecordError) as caught:
            validate(kind, {key: value for key, value in GOOD[kind].items() if key != name})
        assert caught.value.category == f"field {name}: is missing"


BAD = [
    ("text", "text", 7, "is not a text"),
    ("text", "text", " \n", "is empty"),
    ("text", "text", "half \ud83d", "holds half a Unicode character"),
    ("sft", "prompt", None, "is not a text"),
    ("sft", "completion", "", "is empty"),
    ("sft", "completion", ["hi"], "holds something that is no message"),
    ("sft", "weight", "1", "is not a number"),
    ("sft", "weight", -1, "is negative"),
    ("sft", "weight", True, "is not a number"),
    ("prompt", "prompt", [], "is empty"),
    ("prompt", "prompt", {"role": "user"}, "is not a text"),
    ("prompt", "prompt", [{"content": "hi"}], "has a message without a role"),
    ("prompt", "prompt", [{"role": "human", "content": "hi"}], "has an unknown role"),
    ("prompt", "prompt", [{"role": "user"}], "has a message whose content is not a text"),
    (
        "prompt",
        "prompt",
        [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}],
        "has a message with a part that is no text",
    ),
    ("prompt", "is_safety", 1, "is neither true nor false"),
    ("preference", "chosen", [], "is empty"),
    ("preference", "chosen", [USER, ASSISTANT], "does not start with the assistant"),
    ("preference", "chosen", [ASSISTANT, USER], "does not end with the assistant"),
    ("preference", "rejected", [{"role": "assistant", "content": " "}], "is empty"),
    ("preference", "rejected", [ASSISTANT], "equals chosen"),
    ("preference", "rejected", "no", "is not of the prompt's form"),
    ("preference", "strength", "huge", "is unknown"),
    ("preference", "strength", 3, "is unknown"),
    ("preference", "margin", math.nan, "is not finite"),
    ("preference", "margin", math.inf, "is not finite"),
    ("preference", "margin", 10**400, "is not finite"),
    ("preference", "tie", "no", "is neither true nor false"),
    ("preference", "aspect", "gold", "is unknown"),
    ("preference", "soft_label", "0.7", "is not a number"),
    ("preference", "soft_label", 1.2, "is no probability"),
    ("preference", "soft_label", 0.3, "is below ½"),
    ("ranked", "completions", "abc", "is not a list"),
    ("ranked", "completions", ["a"], "has fewer than two answers"),
    ("ranked", "completions", ["a", "", "c"], "is empty"),
    ("ranked", "completions", ["a", [ASSISTANT], "c"], "is not of the prompt's form"),
    ("ranked", "ranks", [1, 2], "has the wrong length"),
    ("ranked", "ranks", [2, 3, 4], "does not start at 1"),
    ("ranked", "ranks", [1, 2.5, 3], "holds something that is no whole number"),
    ("ranked", "ranks", [1, True, 3], "holds something that is no whole number"),
    ("ranked", "scores", [1, 2, math.nan], "is not finite"),
    ("ranked", "scores", [1, 2], "has the wrong length"),
    ("unpaired", "label", 1, "is neither true nor false"),
    ("unpaired", "label", "true", "is neither true nor false"),
    ("scored", "score", "9", "is not a number"),
    ("scored", "score", -math.inf, "is not finite"),
]


@pytest.mark.parametrize(("kind", "field", "value", "reason"), BAD)
def test_a_bad_field_is_named(kind: Any, field: str, value: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        validate(kind, {**GOOD[kind], field: value})
    assert caught.value.category == f"field {field}: {reason}"
    assert str(caught.value).startswith(caught.value.category)
    assert "; " in str(caught.value)  # and what to do


def test_a_conversation_without_an_answer_teaches_nothing() -> None:
    for messages, reason in (([USER], "has no assistant turn"), ([USER, {**ASSISTANT, "content": ""}], "is empty")):
        with pytest.raises(RecordError, match=reason):
            validate("sft", {"messages": messages})


def test_a_ranking_needs_ranks_or_scores() -> None:
    with pytest.raises(RecordError, match="ranks: is missing"):
        validate("ranked", {"prompt": "p", "completions": ["a", "b"]})


def test_an_assistant_that_calls_a_tool_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    record = validate("sft", {"messages": [USER, call, {"role": "tool", "content": "3"}, ASSISTANT]})
    assert record["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}


def test_a_tie_has_no_soft_label_but_a_half() -> None:
    tie = {"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}
    assert validate("preference", {**tie, "soft_label": 0.5})["soft_label"] == 0.5
    with pytest.raises(RecordError, match="field soft_label: contradicts tie: true"):
        validate("preference", {**tie, "soft_label": 0.8})


def test_equal_answers_may_tie() -> None:
    assert validate("preference", {"prompt": "p", "chosen": "a", "rejected": "a", "tie": True})["tie"]


def test_numbers_become_floats() -> None:
    assert type(validate("scored", {"prompt": "p", "completion": "c", "score": 1})["score"]) is float


def test_nulls_in_messages_are_no_values() -> None:
    assert validate("prompt", {"prompt": [{**USER, "tool_calls": None}]})["prompt"] == [USER]


def test_what_is_conversational() -> None:
    assert is_messages([USER])
    assert not is_messages([])
    assert not is_messages(["hi"])
    assert is_conversational({"prompt": [USER], "completion": [ASSISTANT]})
    assert not is_conversational({"prompt": "p", "completion": "c"})


values = st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.text(max_size=3) | st.sampled_from([[], {}])
nested = values | st.lists(values, max_size=3) | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), values))
fields = st.dictionaries(st.sampled_from(sorted({name for record in GOOD.values() for name in record})), nested)


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), fields)
def test_whatever_comes_is_a_record_or_a_record_error(kind: Any, whole: bool, changes: dict[str, Any]) -> None:
    """Nothing but RecordError is raised, and checking a checked record changes nothing."""
    try:
        record = validate(kind, {**(GOOD[kind] if whole else {}), **changes})
    except RecordError:
        return
    assert repr(validate(kind, record)) == repr(record)  # NaN may stand in a further column


def test_texts_in_parts_become_one() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a dog.", "image": None}]
    asked = {"role": "user", "content": parts}
    assert validate("prompt", {"prompt": [asked]})["prompt"] == [{"role": "user", "content": "Name a dog."}]
