"""Label Studio's exports: each tag that compares answers, JSON and JSON_MIN, and what cannot be used.

The forms are those of HumanSignal/label-studio: a task of docs/source/guide/export.md; results of
web/libs/editor/src/regions/Result.js with the values of …/src/tags/control/{Pairwise,Ranker,Rating,Choices};
data of the templates docs/source/templates/generative-{pairwise-human-preference,llm-ranker}.md. JSON_MIN is
``convert_to_json_min`` of label_studio_sdk/converter/converter.py in HumanSignal/label-studio-sdk (1.0.20).
"""

import math
from typing import Any

import pytest

from lightning_align.data.files import Row
from lightning_align.data.records import RecordError
from lightning_align.errors import UserError
from lightning_align.feedback.human.fields import Wish
from lightning_align.feedback.human.imported import Found
from lightning_align.feedback.human.label_studio import LabelStudio

WISH = Wish("project.json")
PAIR = {"prompt": "say yes", "answer1": "yes", "answer2": "no"}
ITEMS = [
    {"id": "llm_1", "title": "LLM 1", "body": "wars"},
    {"id": "llm_2", "title": "LLM 2", "body": "fire"},
    {"id": 3, "title": "thieves"},  # ids may be numbers, and an item need not have a body
]
LIST = {"prompt": "what became of the library?", "items": ITEMS}


def result(tag: str, value: dict[str, Any], name: str = "comparison", of: str = "comparison") -> dict[str, Any]:
    return {"id": "vb3", "type": tag, "value": value, "origin": "manual", "to_name": of, "from_name": name}


def annotation(by: Any, *results: dict[str, Any], cancelled: bool = False, lead: float | None = 4.25) -> dict[str, Any]:
    return {
        "id": 12,
        "completed_by": by,
        "result": list(results),
        "was_cancelled": cancelled,
        "ground_truth": False,
        "created_at": "2023-05-06T07:08:09.250000Z",
        "updated_at": "2023-05-06T07:08:10.000000Z",
        "lead_time": lead,
        "result_count": len(results),
        "task": 1,
    }


def task(data: dict[str, Any], *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": 1, "data": data, "annotations": list(annotations), "drafts": [], "predictions": [], "project": 83}


def left_is_better(by: Any = 1) -> dict[str, Any]:
    return annotation(by, result("pairwise", {"selected": "left"}))


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(f"record {number}", record) for number, record in enumerate(records, 1)]


def read(tasks: list[dict[str, Any]], wish: Wish = WISH) -> tuple[list[Found | None], LabelStudio]:
    reader = LabelStudio(rows(*tasks), wish)
    return [reader.read(one) for one in tasks], reader


def said(found: Found | None) -> list[tuple[str, tuple[int, ...]]]:
    assert found is not None
    return [(opinion.annotator, opinion.verdict.ranks) for opinion in found.opinions]


def left(reader: LabelStudio) -> dict[str, int]:
    return dict(+reader.left_out)


def test_pairs_keep_who_when_and_how_long() -> None:
    user = {"id": 5, "email": "bob@example.org", "first_name": "", "last_name": ""}  # interpolated in Enterprise
    record = task(PAIR, left_is_better(1), annotation(user, result("pairwise", {"selected": "right"}), lead=None))
    (found,), reader = read([record])
    assert found is not None
    assert (found.prompt, found.answers) == ("say yes", ("yes", "no"))
    assert said(found) == [("1", (1, 2)), ("bob@example.org", (2, 1))]
    assert (found.opinions[0].time, found.opinions[0].seconds) == (1683356889.25, 4.25)
    assert math.isnan(found.opinions[1].seconds)
    assert not left(reader)


def test_answers_named_by_the_user_are_left_and_right() -> None:
    data = {"prompt": "p", "b": "on the right", "a": "on the left"}
    (found,), _ = read([task(data, left_is_better())], Wish("x.json", answers=("a", "b")))
    assert found is not None
    assert found.answers == ("on the left", "on the right")
    assert said(found) == [("1", (1, 2))]


def test_skipped_drafts_and_empty_ones() -> None:
    record = task(PAIR, annotation(1, cancelled=True), annotation(2), left_is_better(3), left_is_better(None))
    record["drafts"] = [{"id": 4, "result": [], "lead_time": 1.0}]
    (found, nobody), reader = read([record, task(PAIR)])
    assert said(found) == [("1", ()), ("3", (1, 2))]
    assert nobody is None
    assert found is not None
    assert found.opinions[0].verdict.skipped == "skipped in Label Studio"
    assert left(reader) == {
        "annotations that say nothing of the answers": 1,
        "annotations that do not say whose they are": 1,
        "drafts": 1,
        "tasks without an annotation": 1,
    }


@pytest.mark.parametrize("value", [{"rank": ["3", "llm_1", "llm_2"]}, ["3", "llm_1", "llm_2"]])
def test_a_ranker_without_buckets_orders_its_items(value: Any) -> None:
    (found,), _ = read([task(LIST, annotation(1, result("ranker", {"ranker": value}, "rank", "answers")))])
    assert found is not None
    assert found.answers == ("wars", "fire", "thieves")
    assert said(found) == [("1", (2, 3, 1))]


def test_buckets_follow_each_other_as_the_user_says() -> None:
    first = {"_": ["llm_1"], "biased_results": ["3"], "relevant_results": ["llm_2"]}
    second = {"_": ["llm_2", "llm_1"], "biased_results": [], "relevant_results": ["3"]}
    untouched = {"_": ["llm_1", "llm_2", "3"], "biased_results": [], "relevant_results": []}
    missing = {"_": ["llm_1"], "biased_results": [], "relevant_results": ["3"]}
    given = [first, second, untouched, missing]
    annotations = [
        annotation(n, result("ranker", {"ranker": value}, "rank", "answers")) for n, value in enumerate(given)
    ]
    with pytest.raises(
        UserError, match="buckets _, biased_results, relevant_results: give --buckets from best to worst"
    ):
        read([task(LIST, *annotations)])
    (found,), reader = read(
        [task(LIST, *annotations)], Wish("x.json", buckets=("relevant_results", "_", "biased_results"))
    )
    assert said(found) == [("0", (2, 1, 3)), ("1", (2, 2, 1))]
    assert left(reader) == {"rankings that do not rank every item once": 2}
    (found,), reader = read([task(LIST, *annotations)], Wish("x.json", buckets=("relevant_results", "_")))
    assert said(found) == [("1", (2, 2, 1))]
    assert left(reader) == {"rankings that do not rank every item once": 3}
    with pytest.raises(UserError, match="--buckets: nothing lies in best"):
        read([task(LIST, *annotations)], Wish("x.json", buckets=("best", "_")))


@pytest.mark.parametrize(
    ("choice", "ranks"), [("answer2", (2, 1)), ("Answer 1", (1, 2)), ("left", (1, 2)), ("Tie", (1, 1))]
)
def test_choices(choice: str, ranks: tuple[int, ...]) -> None:
    wide = annotation(1, result("choices", {"choices": [choice]}, "best", "prompt"))
    (found,), _ = read([task(PAIR, wide)])
    assert said(found) == [("1", ranks)]


@pytest.mark.parametrize(
    "names",
    [
        (("first", "answer1"), ("other", "answer2")),
        (("quality1", "t"), ("quality2", "t")),
        (("answer1_r", "t"), ("answer2_r", "t")),
    ],
)
def test_ratings_are_of_what_they_are_attached_to_or_called_after(names: tuple[tuple[str, str], ...]) -> None:
    rated = [result("rating", {"rating": rating}, *name) for rating, name in zip((2, 4), names, strict=True)]
    (found,), reader = read([task(PAIR, annotation(1, *rated), annotation(2, *rated[:1]))])
    assert said(found) == [("1", (2, 1))]
    assert left(reader) == {"ratings of some alone": 1}


def test_other_tags_beside_the_comparison_do_not_matter() -> None:
    """Boxes, texts and choices about something else, as in the templates with comments."""
    more = [
        result("textarea", {"text": ["nice"]}, "why", "prompt"),
        result("choices", {"choices": ["spam"]}, "kind", "prompt"),
    ]
    both = annotation(1, result("pairwise", {"selected": "right"}), *more)
    (found,), _ = read([task(PAIR, both)])
    assert said(found) == [("1", (2, 1))]


def test_json_min() -> None:
    rest = {"id": 1, "annotator": 4, "annotation_id": 9, "created_at": "2023-05-06T07:08:09Z", "lead_time": 2.0}
    pair = PAIR | rest | {"updated_at": "2023-05-06T07:08:09Z"}
    (found,), _ = read([pair | {"comparison": [{"selected": "right"}]}])
    assert said(found) == [("4", (2, 1))]
    assert found is not None
    assert found.opinions[0].seconds == 2.0
    (found,), _ = read([LIST | rest | {"rank": [{"ranker": {"rank": ["llm_2", "3", "llm_1"]}}]}])
    assert said(found) == [("4", (3, 1, 2))]
    (found,), _ = read([pair | {"best": "answer2"}], Wish("x.json", question=("best",)))
    assert said(found) == [("4", (2, 1))]
    (found,), _ = read([pair | {"quality1": [{"rating": 1}], "quality2": [{"rating": 1}]}])
    assert said(found) == [("4", (1, 1))]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"data": None}, "field data: is missing"),
        ({"annotations": 3}, "field annotations: is missing"),
        ({"annotations": [12, 13]}, "field annotations: holds numbers alone"),
        ({"annotations": [{"id": 1, "completed_by": 1}]}, "field annotations.result: is no list"),
        ({"annotations": [annotation(1, {"type": "pairwise", "value": {}})]}, "pairwise without value.selected"),
        ({"annotations": [annotation(1, result("rating", {"rating": "5"}))]}, "rating that is no number"),
        ({"annotations": [left_is_better() | {"created_at": "soon"}]}, "field annotations.created_at: is no time"),
        ({"annotations": [left_is_better() | {"lead_time": "2"}]}, "field annotations.lead_time: is no number"),
        ({"data": {"answer1": "a", "answer2": "b"}}, "field prompt: is missing"),
        ({"data": PAIR | {"answer1": {"a": 1}}}, "field answer1: is not a text"),
    ],
)
def test_malformed_tasks_say_which_field(change: dict[str, Any], fault: str) -> None:
    good = task(PAIR, left_is_better())
    reader = LabelStudio(rows(good, good | change), WISH)
    with pytest.raises(RecordError, match=fault):
        reader.read(good | change)


def test_malformed_lists() -> None:
    good = task(LIST, annotation(1, result("ranker", {"ranker": {"rank": ["3", "llm_1", "llm_2"]}}, "rank")))
    reader = LabelStudio(rows(good), WISH)
    with pytest.raises(RecordError, match="field items: is no list of items with an id"):
        reader.read(good | {"data": LIST | {"items": ["a", "b"]}})
    with pytest.raises(RecordError, match="ranker without lists of items"):
        reader.read(task(LIST, annotation(1, result("ranker", {"ranker": {"rank": "3"}}, "rank"))))


def test_where_nothing_can_be_read_the_first_fault_is_told() -> None:
    with pytest.raises(UserError, match="record 1: field annotations: holds numbers alone"):
        read([task(PAIR, 12), task(PAIR, 13)])  # type: ignore[arg-type]


def test_what_is_unclear_is_asked_for() -> None:
    with pytest.raises(UserError, match="no annotations that compare answers"):
        read([task(PAIR, annotation(1, cancelled=True))])
    with pytest.raises(UserError, match=r"cannot tell the answers: none .* its fields are prompt, x, y"):
        read([task({"prompt": "p", "x": "a", "y": "b"}, left_is_better())])
    two = annotation(
        1, result("pairwise", {"selected": "left"}), result("pairwise", {"selected": "right"}, "safer", "safer")
    )
    with pytest.raises(UserError, match="comparison, safer all compare the answers: name one by --question"):
        read([task(PAIR, two)])
    (found,), _ = read([task(PAIR, two)], Wish("x.json", question=("safer",)))
    assert said(found) == [("1", (2, 1))]
    with pytest.raises(UserError, match="compares two of answer1, answer2, answer3: give --answers LEFT RIGHT"):
        read([task(PAIR | {"answer3": "perhaps"}, left_is_better())])
    ranked = annotation(1, result("ranker", {"ranker": {"rank": ["3", "llm_1", "llm_2"]}}, "rank"))
    with pytest.raises(UserError, match=r"give --answers FIELD, the list of items .* prompt, items, more"):
        read([task(LIST | {"more": ITEMS}, ranked)])
    with pytest.raises(UserError, match="none of the controls kind ranks, chooses or rates answer1, answer2"):
        read([task(PAIR, annotation(1, result("choices", {"choices": ["spam"]}, "kind", "prompt")))])
