"""Argilla's exports: each form, each kind of question, and what cannot be used.

The forms are those of argilla-io/argilla: ``to_list`` and ``to_json`` of argilla/src/argilla/records/_io/_generic.py
with ``Record.to_dict`` of argilla/src/argilla/records/_resource.py (2.8.0); the server's and 1.x's ``responses`` of
argilla-server/src/argilla_server/api/schemas/v1/{records,responses}.py and argilla-v1's ``FeedbackRecord``.
"""

import time
from typing import Any

import pytest

from lightning_align.data.files import Row
from lightning_align.data.records import RecordError
from lightning_align.errors import UserError
from lightning_align.feedback.human.argilla import Argilla
from lightning_align.feedback.human.fields import Wish
from lightning_align.feedback.human.imported import Found

ANN, BOB, CAT = (f"0000000{n}-1111-4222-8333-444444444444" for n in (1, 2, 3))
WISH = Wish("records.json")


def raw(fields: dict[str, Any], *responses: dict[str, Any]) -> dict[str, Any]:
    """A record as GET /api/v1/datasets/{id}/records?include=responses gives it."""
    stamps = {"inserted_at": "2025-01-31T12:00:00", "updated_at": "2025-01-31T12:00:30.500000"}
    return {
        "id": "b2c3",
        "status": "completed",
        "fields": fields,
        "metadata": None,
        "external_id": "7",
        "responses": list(responses),
        "suggestions": [],
        "dataset_id": "d4",
        **stamps,
    }


def response(user: str, status: str = "submitted", **values: Any) -> dict[str, Any]:
    said = {name: {"value": value} for name, value in values.items()}
    stamps = {"inserted_at": "2025-01-31T12:00:00", "updated_at": "2025-01-31T12:00:30.500000"}
    return {"id": "r1", "values": said or None, "status": status, "record_id": "b2c3", "user_id": user, **stamps}


def ranking(**ranks: int | None) -> list[dict[str, Any]]:
    """A ranking as the page sends it: every option in the order of the settings, with its rank."""
    return [{"value": name, "rank": rank} for name, rank in ranks.items()]


def nested(fields: dict[str, Any], **responses: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record as to_json() writes it."""
    said = {name: [{"value": v, "user_id": user} for user, v in given] for name, given in responses.items()}
    rest = {"metadata": {}, "suggestions": {}, "vectors": {}, "status": "completed", "_server_id": "b2c3"}
    return {"id": "7", "fields": fields, "responses": said, **rest}


def flat(fields: dict[str, Any], **responses: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """A record as to_list(flatten=True) gives it."""
    record: dict[str, Any] = {"id": "7", "status": "completed", "_server_id": "b2c3", **fields}
    for name, given in responses.items():
        record[f"{name}.responses"] = [value for _, _, value in given]
        record[f"{name}.responses.users"] = [user for user, _, _ in given]
        record[f"{name}.responses.status"] = [status for _, status, _ in given]
        record |= {f"{name}.suggestion": None, f"{name}.suggestion.score": None, f"{name}.suggestion.agent": None}
    return record


PAIR = {"instruction": "say yes", "response1": "yes", "response2": "no"}  # Settings.for_ranking of 2.x
THREE = PAIR | {"response3": "perhaps"}


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(f"record {number}", record) for number, record in enumerate(records, 1)]


def read(records: list[dict[str, Any]], wish: Wish = WISH) -> tuple[list[Found | None], Argilla]:
    reader = Argilla(rows(*records), wish)
    return [reader.read(record) for record in records], reader


def said(found: Found | None) -> list[tuple[str, tuple[int, ...]]]:
    assert found is not None
    return [(opinion.annotator, opinion.verdict.ranks) for opinion in found.opinions]


def left(reader: Argilla) -> dict[str, int]:
    return dict(+reader.left_out)


def test_ranks_count_whatever_the_order_of_the_options_and_ties_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")  # the server writes UTC without saying so
    time.tzset()
    record = raw(
        THREE,
        response(ANN, rank=ranking(response1=3, response2=1, response3=2)),
        response(BOB, rank=ranking(response1=1, response2=1, response3=8)),
    )
    (found,), reader = read([record])
    assert found is not None
    assert (found.prompt, found.answers) == ("say yes", ("yes", "no", "perhaps"))
    assert said(found) == [(ANN, (3, 1, 2)), (BOB, (1, 1, 2))]
    assert found.opinions[0].time == 1738324830.5  # 2025-01-31T12:00:30.5 in UTC
    assert not left(reader)
    assert not reader.notes
    monkeypatch.undo()
    time.tzset()


def test_discarded_is_a_skip_and_drafts_and_partial_rankings_are_left_out() -> None:
    record = raw(
        PAIR,
        response(ANN, "discarded"),
        response(BOB, "draft", rank=ranking(response1=1, response2=None)),
        response(CAT, rank=ranking(response1=1, response2=None)),
    )
    whole = raw(PAIR | {"instruction": "again"}, response(ANN, rank=ranking(response1=2, response2=1)))
    (found, other), reader = read([record, whole])
    assert said(found) == [(ANN, ())]
    assert found is not None
    assert found.opinions[0].verdict.skipped == "discarded in Argilla"
    assert said(other) == [(ANN, (2, 1))]
    assert left(reader) == {"drafts": 1, "rankings that do not rank every answer once": 1}


def test_lists_without_ranks_are_believed_where_their_orders_differ() -> None:
    first = nested(THREE, rank=[(ANN, ["response3", "response1", "response2"])])
    second = nested(
        THREE | {"instruction": "again"},
        rank=[
            (ANN, ["response2", "response1", "response3"]),
            (BOB, ["response2", "response1", "response2", "response3"]),
        ],
    )
    found, reader = read([first, second])
    assert [said(one) for one in found] == [[(ANN, (2, 3, 1))], [(ANN, (2, 1, 3))]]
    assert left(reader) == {"rankings that do not rank every answer once": 1}
    assert reader.notes == [
        "responses have no status: drafts and discarded ones count as submitted (see docs/human.md)"
    ]


def test_one_response_without_a_status_is_enough_for_the_note() -> None:
    record = flat(PAIR, better=[(ANN, "submitted", "A"), (BOB, "submitted", "B")])
    record["better.responses.status"] = [None, "submitted"]
    _, reader = read([record])
    assert len(reader.notes) == 1


def test_rankings_that_lost_their_ranks_are_refused() -> None:
    """Argilla 2's client: ``[v["value"] for v in value]`` of options in the settings' order (issue 5712)."""
    records = [nested(PAIR | {"instruction": f"{n}"}, rank=[(ANN, ["response1", "response2"])]) for n in range(5)]
    with pytest.raises(UserError, match="all 5 rankings of 'rank' have no ranks and the same order"):
        read(records)


def test_flat_columns_tell_the_status() -> None:
    record = flat(
        PAIR, better=[(ANN, "submitted", "response2"), (BOB, "discarded", "response1"), (CAT, "draft", "tie")]
    )
    other = flat(PAIR | {"instruction": "again"}, better=[(BOB, "submitted", "tie")])
    other["better.responses.users"], other["extra.responses"] = [BOB], None  # to_list fills up with nulls
    (found, tied), reader = read([record, other])
    assert said(found) == [(ANN, (2, 1)), (BOB, ())]
    assert said(tied) == [(BOB, (1, 1))]
    assert left(reader) == {"drafts": 1}
    assert not reader.notes


@pytest.mark.parametrize(
    ("option", "ranks"),
    [("response1", (1, 2)), ("Response 2", (2, 1)), ("B", (2, 1)), ("1", (1, 2)), ("Both good", (1, 1))],
)
def test_a_label_names_one_of_two_answers(option: str, ranks: tuple[int, ...]) -> None:
    records = [raw(PAIR, response(ANN, better=option, why="because it is nice 2")), raw(PAIR, response(ANN, why="A"))]
    (found, nothing), reader = read(records, Wish("x.json", question=("better",)))
    assert said(found) == [(ANN, ranks)]
    assert nothing is None
    assert left(reader) == {"responses to other questions alone": 1}


def test_the_question_is_found_beside_free_texts() -> None:
    records = [raw(PAIR | {"instruction": str(n)}, response(ANN, why="no 2", better="A")) for n in range(3)]
    records.append(raw(PAIR, response(ANN, why="both", better="cannot say")))
    found, reader = read(records)
    assert reader.questions == ("better",)
    assert [said(one) for one in found[:3]] == [[(ANN, (1, 2))]] * 3
    assert found[3] is None
    assert left(reader) == {"choices that name no answer: cannot say": 1}


def test_ratings_of_each_answer_make_a_ranking() -> None:
    rated = {"rating_response1": 2, "rating_response2": 5, "rating_response3": 2}
    part = {name: rated[name] for name in ("rating_response1", "rating_response2")}
    record = raw(THREE, response(ANN, "submitted", **rated), response(BOB, "submitted", **part))
    (found,), reader = read([record])
    assert said(found) == [(ANN, (2, 1, 2))]
    assert left(reader) == {"ratings of some answers alone": 1}


def test_chats_stay_messages_and_texts_beside_them_become_some() -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    record = raw({"chat": chat, "answer-1": "a", "answer-2": "b"}, response(ANN, best="2"))
    (found,), _ = read([record])
    assert found is not None
    assert found.prompt == chat
    assert found.answers == tuple([{"role": "assistant", "content": text}] for text in "ab")
    assert said(found) == [(ANN, (2, 1))]


def test_records_that_cannot_be_ranked_are_counted() -> None:
    good = raw(PAIR, response(ANN, better="A"))
    same = raw(PAIR | {"response2": "yes"}, response(ANN, better="A"))
    gone = raw({"instruction": "x", "response1": "a"}, response(ANN, better="A"))
    nobody = raw(PAIR)
    found, reader = read([good, same, gone, nobody])
    assert found[1:] == [None] * 3
    assert left(reader) == {
        "records in which two answers are the same": 1,
        "records without a text for every answer": 1,
        "records without a response": 1,
    }


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fields": ["a"]}, "field fields: is no mapping"),
        ({"fields": {"response1": "a", "response2": "b"}}, "field instruction: is missing"),
        ({"fields": PAIR | {"response2": 5}}, "field response2: is not a text"),
        ({"responses": "all"}, "field responses: is no list"),
        ({"responses": [{"status": "submitted", "values": {}}]}, "without a user_id"),
        ({"responses": [{"user_id": ANN, "status": "submitted", "values": ["a"]}]}, "field responses.values"),
        (
            {"responses": [{"user_id": ANN, "values": {}, "updated_at": "noon"}]},
            "field responses.updated_at: is no time",
        ),
    ],
)
def test_malformed_records_say_which_field(change: dict[str, Any], fault: str) -> None:
    good = raw(PAIR, response(ANN, better="A"))
    reader = Argilla(rows(good, good | change), WISH)
    with pytest.raises(RecordError, match=fault):
        reader.read(good | change)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"one": "a", "two": "b", "prompt": "c"},
            "cannot tell the answers: none of the fields .* are one, two, prompt",
        ),
        ({"response1": "a", "response2": "b", "topic": "c"}, "cannot tell the prompt: none"),
        (
            {"response1": "a", "response2": "b", "query": "c", "input": "d"},
            "cannot tell the prompt: query, input could be",
        ),
        (
            {"text_1": "a", "text_2": "b", "reply_1": "d", "reply_2": "e", "prompt": "c"},
            "cannot tell the answers: text_1",
        ),
    ],
)
def test_unclear_fields_are_asked_for(fields: dict[str, str], fault: str) -> None:
    with pytest.raises(UserError, match=fault) as error:
        read([raw(fields, response(ANN, better="A"))])
    assert "give --prompt FIELD and --answers FIELD FIELD" in str(error.value)


def test_named_fields_are_taken_in_their_order() -> None:
    wish = Wish("x.json", prompt="two", answers=("three", "one"))
    (found,), _ = read([raw({"one": "a", "two": "b", "three": "c"}, response(ANN, better="A"))], wish)
    assert found is not None
    assert (found.prompt, found.answers) == ("b", ("c", "a"))
    assert said(found) == [(ANN, (1, 2))]
    with pytest.raises(UserError, match=r"--answers: x.json has no field 'thre'; did you mean 'three'\?"):
        read([raw({"one": "a", "three": "c"}, response(ANN, better="A"))], Wish("x.json", answers=("one", "thre")))


def test_questions_that_are_unclear_are_asked_for() -> None:
    ranked = ranking(response1=1, response2=2)
    record = raw(PAIR, response(ANN, helpful=ranked, safe=ranked))
    with pytest.raises(UserError, match="helpful, safe all compare the answers: name one by --question"):
        read([record])
    (found,), _ = read([record], Wish("x.json", question=("safe",)))
    assert said(found) == [(ANN, (1, 2))]
    with pytest.raises(UserError, match="--question: no response to 'saf'; did you mean 'safe'"):
        read([record], Wish("x.json", question=("saf",)))
    with pytest.raises(UserError, match="none of the questions why ranks, chooses or rates response1, response2"):
        read([raw(PAIR, response(ANN, why="it was nice"))])
    with pytest.raises(UserError, match="has no responses"):
        read([raw(PAIR)])
