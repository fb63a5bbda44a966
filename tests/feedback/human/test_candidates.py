"""Files of answers in every form, without duplicates."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_align.errors import UserError
from lightning_align.feedback.human.candidates import Candidates, add_candidates, read_responses, said_of
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Plan


def written(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.sqlite", Plan())


FORMS = {
    "completions": [{"prompt": "p", "completions": ["a", "b"]}, {"prompt": "q", "completions": ["c", "d"]}],
    "ranked": [
        {"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]},
        {"prompt": "q", "completions": ["c", "d"], "scores": [0.5, 0.1]},
    ],
    "preferences": [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    ],
    "rows": [
        {"prompt": "p", "completion": "a", "finish_reason": "stop"},
        {"prompt": "q", "completion": "c", "finish_reason": "stop"},
        {"prompt": "p", "completion": "b", "finish_reason": "length"},
        {"prompt": "q", "completion": "d", "finish_reason": "stop"},
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, tmp_path: Path) -> None:
    found = read_responses(written(tmp_path / "f.jsonl", FORMS[form]))
    assert [(prompt, answers) for prompt, answers, _ in found] == [("p", ["a", "b"]), ("q", ["c", "d"])]
    assert found[0].place.endswith("f.jsonl line 1")


def test_conversations_columns_and_csv(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in "ab"]
    rows = [{"question": prompt, "replies": answers}]
    columns = {"prompt": "question", "completions": "replies"}
    found = read_responses(written(tmp_path / "f.jsonl", rows), columns=columns)
    assert [(entry.prompt, entry.answers) for entry in found] == [(prompt, answers)]
    table = tmp_path / "f.csv"
    table.write_text('prompt,completions\np,"[""a"", ""b""]"\n')
    assert read_responses(str(table))[0].answers == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completions": ["a"]}, "line 2: field completions: has fewer than two"),
        ({"prompt": "p", "completions": ["a", 3]}, "line 2: field completions: is not a text"),
        ({"prompt": "p", "completions": "a"}, "line 2: field completions: is not a list"),
        ({"prompt": "", "completions": ["a", "b"]}, "line 2: field prompt: is empty"),
        ({"completions": ["a", "b"]}, "line 2: field prompt: is missing"),
    ],
)
def test_a_bad_record_is_named(row: dict, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [{"prompt": "p", "completions": ["a", "b"]}, row])
    with pytest.raises(UserError, match=message):
        read_responses(path)


def test_duplicates_empty_ones_and_prompts_without_a_choice_are_counted(store: Store) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("yes", " yes\n", "no")]
    found = [
        Candidates("p", ["a", " a ", "b", "", "  "], "1"),
        Candidates("q", ["a", "a\n"], "2"),
        Candidates([{"role": "user", "content": "Hi"}], said, "3"),
    ]
    counts = add_candidates(store, found)
    assert counts == {"added": 2, "duplicates": 3, "empty": 2, "too_few": 1}
    assert [item.answers for item in store.items().values()] == [("a", "b"), (said[0], said[2])]
    assert list(said_of(counts)) == [
        "2 prompts are new",
        "3 answers equal another one to their prompt and are left out",
        "2 answers are empty and are left out",
        "1 prompts have fewer than two different answers and are left out",
    ]
    assert add_candidates(store, found[:1])["there"] == 1


def test_more_than_nine_answers_are_refused_or_drawn_from(store: Store) -> None:
    many = Candidates("p", [f"answer {n}" for n in range(12)], "f.jsonl line 4")
    with pytest.raises(UserError, match=r"f\.jsonl line 4: 12 different answers.*--num_answers 9"):
        add_candidates(store, [many])
    drawn = set()
    for seed in range(20):
        other = Store(store.path.with_name(f"{seed}.sqlite"), Plan())
        assert add_candidates(other, [many], most=3, seed=seed)["surplus"] == 9
        (item,) = other.items().values()
        drawn.add(item.answers)
        assert len(set(item.answers)) == 3
    assert len(drawn) > 10
