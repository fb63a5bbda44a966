"""The forms in which people keep records, TRL's examples and semantics, and the real files."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_align.data.convert import detect_kind, read_record, source_kind
from lightning_align.data.readers import load_records
from lightning_align.data.records import RecordError
from lightning_align.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def convert(kind: Any, **fields: Any) -> dict[str, Any]:
    (record,) = read_record(kind, fields)[0]
    return record


def fault(kind: Any, **fields: Any) -> str:
    with pytest.raises(RecordError) as caught:
        read_record(kind, fields)
    return caught.value.category


# ---------------------------------------------------------------------- implicit prompts
def test_trl_examples_of_extract_prompt() -> None:
    sides = {"chosen": [user("What color is the sky?"), assistant("It is blue.")]}
    sides["rejected"] = [user("What color is the sky?"), assistant("It is green.")]
    assert convert("preference", **sides) == {
        "prompt": [user("What color is the sky?")],
        "chosen": [assistant("It is blue.")],
        "rejected": [assistant("It is green.")],
    }
    assert convert("preference", chosen="The sky is blue.", rejected="The sky is green.") == {
        "prompt": "The sky is",
        "chosen": " blue.",
        "rejected": " green.",
    }


def trl_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """``trl.data_utils.extract_prompt``, for sides that differ."""
    for idx in range(min(len(example["chosen"]), len(example["rejected"]))):
        if example["chosen"][idx] != example["rejected"][idx]:
            if example["chosen"][idx - 1] == " ":  # remove space before the prompt
                idx -= 1
            break
    return {
        "prompt": example["chosen"][:idx],
        "chosen": example["chosen"][idx:],
        "rejected": example["rejected"][idx:],
    }


@settings(derandomize=True, deadline=None)
@given(st.text("ab .\n", min_size=1), st.text("abc ", min_size=1), st.text("abd ", min_size=1))
def test_texts_are_split_as_trl_does(prompt: str, chosen: str, rejected: str) -> None:
    example = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    shared = min(len(example["chosen"]), len(example["rejected"]))
    assume(example["chosen"][:shared] != example["rejected"][:shared])  # there TRL cuts a character off the prompt
    expected = trl_extract_prompt(example)
    assume(all(side.strip() for side in expected.values()))
    assert convert("preference", **example) == expected


def test_sides_without_a_prompt() -> None:
    assert fault("preference", chosen="yes", rejected="no") == "chosen and rejected share no beginning"
    apart = "chosen and rejected share no turn that both answer"
    assert fault("preference", chosen=[assistant("a")], rejected=[assistant("b")]) == apart
    assert fault("preference", chosen=[user("a"), assistant("c")], rejected=[user("b"), assistant("c")]) == apart
    assert fault("preference", chosen="The sky", rejected="The sky is") == "field chosen: is empty"
    assert fault("preference", chosen="same", rejected="same") == "field rejected: equals chosen"
    assert fault("preference", chosen="", rejected="same") == "field chosen: is empty"
    assert fault("preference", chosen=3, rejected="same") == "field chosen: is not a text"
    assert fault("preference", chosen="a", rejected=[assistant("b")]) == "field rejected: is not of chosen's form"
    assert fault("preference", chosen=[{"role": "bot"}], rejected=[user("b")]) == ("field chosen: has an unknown role")


def test_conversations_that_part_at_the_user_go_back_to_the_answer_before() -> None:
    chosen = [user("a"), assistant("b"), user("c"), assistant("d")]
    rejected = [user("a"), assistant("b"), user("e"), assistant("f")]
    record = convert("preference", chosen=chosen, rejected=rejected)
    assert record == {"prompt": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]}


def test_the_whole_conversation_in_both_sides_beside_a_prompt_of_text() -> None:
    """TRL's ``maybe_extract_prompt``: as in UltraFeedback."""
    sides = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
    expected = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert convert("preference", prompt="q", messages=sides["chosen"], **sides) == expected
    assert convert("preference", prompt=[user("q")], **sides) == expected


# ---------------------------------------------------------------------- hh transcripts
def test_hh_transcripts() -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is\n\nit?\n\nAssistant: "
    records, conversion, left_out = read_record("preference", {"chosen": start + "good ", "rejected": start + " bad"})
    assert records == [
        {
            "prompt": [user("hi"), assistant("hello"), user("what is\n\nit?")],
            "chosen": [assistant("good")],
            "rejected": [assistant("bad")],
        }
    ]
    assert conversion == "hh transcripts → prompt and answers"
    assert left_out == []


def test_turns_of_one_speaker_in_a_row_become_one() -> None:
    """Chat templates refuse two of them; the file has 13 such transcripts."""
    start = "Human: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\n"
    record = convert("preference", chosen=start + "Assistant: e\n\nAssistant:  f", rejected=start + "Assistant: g")
    assert record["prompt"] == [user("a"), assistant("b\n\nc"), user("d")]
    assert record["chosen"] == [assistant("e\n\nf")]


def test_hh_transcripts_that_cannot_be_used() -> None:
    good = "\n\nHuman: a\n\nAssistant: b"
    assert fault("preference", chosen="\n\nHuman: a\n\nAssistant: ", rejected=good) == "field chosen: is empty"
    assert fault("preference", chosen=good, rejected="\n\nHuman: a") == "field rejected: ends with the human's turn"
    assert fault("preference", chosen=good, rejected="\n\nHuman: b\n\nAssistant: b") == (
        "chosen and rejected share no turn that both answer"
    )
    assert fault("preference", chosen="", rejected=good) == "field chosen: is empty"


@needs_shared
def test_the_hh_file() -> None:
    path = str(SHARED / "hh_harmless.jsonl.gz")
    with pytest.raises(UserError, match=r"^hh_harmless\.jsonl\.gz line 87: field chosen: is empty"):
        load_records(path, "preference")
    records, places, report = load_records(path, "preference", on_bad_record="skip")
    assert (report.read, report.kept, report.bad, len(records), len(places)) == (2312, 2308, 4, 2308, 2308)
    assert report.dropped == {"field chosen: is empty": 4}
    assert report.conversions == {"hh transcripts → prompt and answers": 2308}
    assert places[86] == "hh_harmless.jsonl.gz line 88"
    for record in records:
        roles = [message["role"] for message in record["prompt"]]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert roles[-1] == "user"
        assert [len(record[side]) for side in ("chosen", "rejected")] == [1, 1]


# ---------------------------------------------------------------------- instructions
def test_alpaca() -> None:
    assert convert("sft", instruction="Add.", input="1 2", output="3") == {
        "prompt": [user("Add.\n\n1 2")],
        "completion": [assistant("3")],
    }
    assert convert("sft", instruction="Add.", input="", output="3")["prompt"] == [user("Add.")]
    assert convert("sft", instruction="Add.", output="3")["prompt"] == [user("Add.")]
    assert fault("sft", instruction="Add.", output=" ") == "field output: is empty"
    assert fault("sft", instruction="", output="3") == "field instruction: is empty"
    assert fault("sft", instruction="Add.", input=["1"], output="3") == "field input: is not a text"


def test_instances_are_one_record_each() -> None:
    instances = [{"input": "1", "output": "one"}, {"input": "", "output": "none"}]
    records, _, left_out = read_record("sft", {"instruction": "Say it.", "instances": instances, "id": 7})
    assert [record["prompt"][0]["content"] for record in records] == ["Say it.\n\n1", "Say it."]
    assert [record["completion"][0]["content"] for record in records] == ["one", "none"]
    assert left_out == ["id"]
    blank = [*instances, {"input": "2", "output": ""}]
    assert fault("sft", instruction="Say it.", instances=blank) == "field instances[].output: is empty"
    assert fault("sft", instruction="Say it.", instances=[]) == "field instances: is not a list of {input, output}"


def test_instructions_are_prompts_whether_or_not_they_have_outputs() -> None:
    assert convert("prompt", instruction="Add.", input="1 2", id=7) == {"prompt": [user("Add.\n\n1 2")], "id": 7}
    records, _, _ = read_record("prompt", {"instruction": "Say it.", "instances": [{"output": "a"}, {"input": "2"}]})
    assert records == [{"prompt": [user("Say it.")], "output": "a"}, {"prompt": [user("Say it.\n\n2")]}]


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("self_instruct_seed", 175), ("self_instruct_user", 252)])
def test_the_self_instruct_files(name: str, count: int) -> None:
    path = str(SHARED / f"{name}.jsonl.gz")
    records, _, report = load_records(path, "sft")
    assert (report.read, report.kept, len(records), report.bad) == (count, count, count, 0)
    assert all(record["completion"][0]["content"].strip() for record in records)
    assert [record["prompt"] for record in load_records(path, "prompt").records] == [r["prompt"] for r in records]


# ---------------------------------------------------------------------- conversations
def test_sharegpt() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = [{"role": "system", "content": "s"}, user("q"), assistant("a")]
    assert convert("sft", conversations=turns) == {"messages": expected}
    assert convert("sft", conversations=expected) == {"messages": expected}
    assert fault("sft", conversations=[{"from": "bing", "value": "q"}]) == "field conversations: has an unknown role"
    assert fault("sft", conversations="q") == "field messages: is not a conversation"


def test_text_beside_messages_becomes_messages() -> None:
    expected = {"prompt": [user("q")], "completion": [assistant("a")]}
    assert convert("sft", prompt="q", completion=[assistant("a")]) == expected
    assert convert("sft", prompt=[user("q")], completion="a") == expected
    record = convert("ranked", prompt="q", completions=["a", [assistant("b")]], ranks=[1, 2])
    assert record == {"prompt": [user("q")], "completions": [[assistant("a")], [assistant("b")]], "ranks": [1, 2]}
    record = convert("preference", prompt=[user("q")], chosen="a", rejected=[assistant("b")])
    assert record == {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def test_prompt_and_completion_go_before_messages() -> None:
    messages = [user("x"), assistant("y")]
    records, _, left_out = read_record("sft", {"prompt": "q", "completion": "a", "messages": messages})
    assert records == [{"prompt": "q", "completion": "a"}]
    assert left_out == ["messages"]
    assert convert("sft", prompt="x", messages=messages) == {"messages": messages}


def test_prompts_do_not_carry_what_reward_functions_get_under_the_same_name() -> None:
    records, _, left_out = read_record("prompt", {"prompt": "q", "completions": ["a"], "reference": "r"})
    assert records == [{"prompt": "q", "reference": "r"}]
    assert left_out == ["completions"]


# ---------------------------------------------------------------------- which kind
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ("text", "text"),
        ("prompt completion", "sft"),
        ("messages", "sft"),
        ("conversations id", "sft"),
        ("instruction output", "sft"),
        ("instruction instances", "sft"),
        ("instruction", "prompt"),
        ("prompt reference", "prompt"),
        ("chosen rejected", "preference"),
        ("prompt chosen rejected messages", "preference"),
        ("prompt completions ranks", "ranked"),
        ("prompt completions scores", "ranked"),
        ("prompt completion label", "unpaired"),
        ("prompt completion score", "scored"),
        ("question answer", None),
        ("", None),
    ],
)
def test_kinds_are_told_by_their_fields(fields: str, kind: str | None) -> None:
    assert detect_kind(dict.fromkeys(fields.split(), "x")) == kind


def test_a_null_is_no_field() -> None:
    assert detect_kind({"prompt": "p", "completion": "c", "label": None}) == "sft"


def test_disapproved_completions_are_not_taken_for_demonstrations() -> None:
    fields = {"prompt": "p", "completion": "c"}
    assert source_kind("sft", {**fields, "label": False}) == "unpaired"
    assert source_kind("sft", {**fields, "label": "maths"}) == "sft"  # some other label
    assert source_kind("sft", {**fields, "score": 1.0}) == "sft"


# ---------------------------------------------------------------------- errors
def test_a_missing_field_is_named_with_what_may_be_meant() -> None:
    with pytest.raises(RecordError) as caught:
        read_record("sft", {"question": "q", "answer": "a"})
    assert str(caught.value) == (
        "field prompt: is missing (there is question, answer); a record of kind sft needs prompt and completion; "
        "did you mean columns: {prompt: question, completion: answer}?"
    )
    with pytest.raises(RecordError, match=r"field rejected: is missing .* columns: \{rejected: rejectd\}"):
        read_record("preference", {"prompt": "p", "chosen": "c", "rejectd": "r"})
    with pytest.raises(RecordError, match=r"field output: is missing .* needs instruction and output"):
        read_record("sft", {"instruction": "i"})
    with pytest.raises(RecordError, match="the record is empty"):
        read_record("text", {})
