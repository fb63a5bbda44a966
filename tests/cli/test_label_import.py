"""``label import`` from the command line: files of both formats, twice, beside own judgements, and up to an export."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lightning_align.cli.main import run
from lightning_align.data.readers import load_records
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import OVERALL, Judgement, Plan, Verdict

ANN, BOB = "00000001-1111-4222-8333-444444444444", "00000002-1111-4222-8333-444444444444"


def ranked(number: int, *responses: tuple[str, str, tuple[int | None, ...]]) -> dict[str, Any]:
    """A record of Argilla as its server gives it; see tests/feedback/human/test_import_argilla.py for the source."""
    names = ("response1", "response2")
    fields = {"instruction": f"say {number}", "response1": f"yes {number}", "response2": f"no {number}"}
    said = [
        {
            "user_id": user,
            "status": status,
            "values": {"rank": {"value": [{"value": n, "rank": r} for n, r in zip(names, ranks, strict=True)]}},
            "updated_at": "2025-01-31T12:00:30",
        }
        for user, status, ranks in responses
    ]
    return {"id": f"r{number}", "status": "completed", "fields": fields, "responses": said, "suggestions": []}


def task(number: int, *annotations: tuple[int, str]) -> dict[str, Any]:
    """A task of Label Studio; see tests/feedback/human/test_import_label_studio.py for the source."""
    said = [
        {
            "id": number,
            "completed_by": by,
            "was_cancelled": side == "skip",
            "lead_time": 3.5,
            "created_at": "2023-05-06T07:08:09Z",
            "result": []
            if side == "skip"
            else [{"type": "pairwise", "value": {"selected": side}, "from_name": "pw", "to_name": "pw", "id": "x"}],
        }
        for by, side in annotations
    ]
    data = {"prompt": f"say {number}", "answer1": f"yes {number}", "answer2": f"no {number}"}
    return {"id": number, "data": data, "annotations": said, "predictions": []}


RECORDS = [
    ranked(0, (ANN, "submitted", (2, 1)), (BOB, "submitted", (2, 1))),
    ranked(1, (ANN, "submitted", (1, 1)), (BOB, "discarded", (None, None))),
    ranked(2, (ANN, "draft", (1, 2)), (BOB, "submitted", (1, 2))),
    ranked(3),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judgements(path: Path) -> list[Judgement]:
    store = Store(path)
    try:
        return store.judgements()
    finally:
        store.close()


def test_imported_judgements_are_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "records.json").write_text(json.dumps(RECORDS))
    assert run(["label", "import", "records.json", "--format", "argilla"]) == 0
    said = capsys.readouterr().out
    assert "3 records, 3 of them new prompts with answers\n4 judgements and 1 skips added, 0 there before\n" in said
    assert "left out: drafts: 1\n" in said
    assert "left out: records without a response: 1\n" in said
    first = judgements(here / "labels.sqlite")[0]
    assert (first.item.place, first.annotator, first.shown) == (
        "records.json record 1",
        ANN,
        (),
    )  # nobody says in which order they were shown
    assert first.time == 1738324830.0
    assert run(["label", "export", "labels.sqlite", "--out", "out.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "skipped: discarded in Argilla: 1" in said
    records = load_records("out.jsonl", "preference").records
    chosen = [(record["chosen"], record["rejected"]) for record in records if not record.get("tie")]
    assert chosen == [("no 0", "yes 0"), ("no 0", "yes 0"), ("yes 2", "no 2")]
    measures = json.loads((here / "out.agreement.json").read_text())
    assert measures["annotators"]


def test_importing_twice_adds_nothing_and_a_grown_export_adds_what_is_new(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / "tasks.json"
    command = ["label", "import", "tasks.json", "--format", "label_studio", "--store", "ls.db"]
    path.write_text(json.dumps([task(0, (1, "left"), (2, "right")), task(1, (1, "skip"))]))
    assert run(command) == 0
    before = judgements(here / "ls.db")
    assert [(j.annotator, j.verdict.ranks, j.seconds) for j in before] == [
        ("1", (1, 2), 3.5),
        ("2", (2, 1), 3.5),
        ("1", (), 3.5),
    ]
    capsys.readouterr()
    assert run(command) == 0
    assert "0 judgements and 0 skips added, 3 there before" in capsys.readouterr().out
    assert judgements(here / "ls.db") == before
    path.write_text(
        json.dumps([task(2, (1, "left")), task(0, (1, "left"), (2, "right"), (3, "left")), task(1, (1, "skip"))])
    )
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "3 records, 1 of them new" in said
    assert "2 judgements and 0 skips added, 3 there before" in said
    assert judgements(here / "ls.db")[:3] == before


def test_one_may_not_judge_the_same_twice(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first counts; the second is counted as left out, in one file or in two."""
    (here / "tasks.json").write_text(json.dumps([task(0, (1, "left"), (1, "right")), task(0, (2, "left"))]))
    assert run(["label", "import", "tasks.json", "--format", "label_studio"]) == 0
    said = capsys.readouterr().out
    assert "2 records, 1 of them new" in said
    assert "left out: second judgements by the same annotator of the same answers: 1" in said
    assert [(j.annotator, j.verdict.ranks) for j in judgements(here / "labels.sqlite")] == [
        ("1", (1, 2)),
        ("2", (1, 2)),
    ]


def test_answers_that_are_there_in_another_order_are_the_same(here: Path) -> None:
    store = Store(here / "own.db", Plan(overlap=0.5, seed=3))
    store.add("say 0", ["no 0", "perhaps", "yes 0"], "own line 1")
    store.add("say 0", ["no 0", "yes 0"], "own line 2")
    store.judge("own", store.item(2), "me", OVERALL, Verdict((1, 2), strength="better"), now=5.0)
    store.close()
    (here / "tasks.json").write_text(json.dumps([task(0, (1, "left"))]))
    assert run(["label", "import", "tasks.json", "--format", "label_studio", "--store", "own.db"]) == 0
    own, other = judgements(here / "own.db")
    assert own.verdict.strength == "better"
    assert own.item == other.item
    assert other.item.place == "own line 2"
    assert other.verdict.ranks == (2, 1)  # "yes 0" is the second answer here, and was the first there
    store = Store(here / "own.db")
    assert len(store.items()) == 2
    task_left = store.next_task("other")
    store.close()
    assert task_left is not None  # the prompt that nobody has judged
    assert task_left[0].place == "own line 1"


def test_ranks_follow_answers_that_are_there_in_another_order(here: Path) -> None:
    store = Store(here / "own.db", Plan())
    store.add("say 0", ["no 0", "perhaps", "yes 0"], "own")
    store.close()
    record = ranked(0)
    record["fields"]["response3"] = "perhaps"
    said = [{"value": f"response{n}", "rank": rank} for n, rank in ((1, 1), (2, 2), (3, 3))]
    record["responses"] = [{"user_id": ANN, "status": "submitted", "values": {"rank": {"value": said}}}]
    (here / "records.json").write_text(json.dumps([record]))
    assert run(["label", "import", "records.json", "--format", "argilla", "--store", "own.db"]) == 0
    (judgement,) = judgements(here / "own.db")
    assert dict(zip(judgement.item.answers, judgement.verdict.ranks, strict=True)) == {
        "yes 0": 1,
        "no 0": 2,
        "perhaps": 3,
    }


def test_what_was_taken_back_stays_taken_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tasks.json").write_text(json.dumps([task(0, (1, "left"), (2, "left"))]))
    assert run(["label", "import", "tasks.json", "--format", "label_studio"]) == 0
    store = Store(here / "labels.sqlite")
    assert store.undo("1") is not None
    store.close()
    assert run(["label", "import", "tasks.json", "--format", "label_studio"]) == 0
    assert "0 judgements and 0 skips added, 2 there before" in capsys.readouterr().out
    assert [j.annotator for j in judgements(here / "labels.sqlite")] == ["2"]


def test_lines_and_packed_files_read_alike(here: Path) -> None:
    text = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    (here / "a.jsonl").write_bytes(text)
    (here / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (here / "c.json.zst").write_bytes(zstandard.compress(json.dumps(RECORDS).encode()))
    said = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.zst"):
        store = f"{name}.db"
        assert run(["label", "import", name, "--format", "argilla", "--store", store]) == 0
        said.append([(j.annotator, j.item.key, j.verdict) for j in judgements(here / store)])
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 5


def test_malformed_records_stop_before_anything_is_written_or_are_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ranked(7, (ANN, "submitted", (1, 2)))
    bad["responses"][0]["user_id"] = None
    (here / "bad.json").write_text(json.dumps([*RECORDS, bad, "no record"]))
    command = ["label", "import", "bad.json", "--format", "argilla"]
    assert run(command) == 2
    assert capsys.readouterr().err == (
        "error: bad.json record 5: field responses: has a response without a user_id; export the records again "
        "(--on_bad_record skip leaves such records out)\n"
    )
    assert not (here / "labels.sqlite").exists()
    assert run([*command, "--on_bad_record", "skip"]) == 0
    said = capsys.readouterr().out
    assert "left out: malformed records: field responses: has a response without a user_id: 1\n" in said
    assert "left out: malformed records: is no object: 1\n" in said
    assert len(judgements(here / "labels.sqlite")) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.json", "--format", "argilla"], "gone.json cannot be read: No such file"),
        (["records.csv", "--format", "argilla"], "records.csv: exports are read from .json and .jsonl"),
        (["records.json"], "the following arguments are required: --format"),
        (["records.json", "--format", "prodigy"], "invalid choice: 'prodigy'"),
        (["records.json", "--format", "argilla", "--buckets", "a"], "--buckets are those of Label Studio's ranker"),
        (["records.json", "--format", "argilla", "--answers", "a", "a"], "--answers a a: give each once"),
        (["records.json", "--format", "argilla", "--prompt", "a", "--answers", "a", "b"], "both name a"),
        (["records.json", "--format", "label_studio"], "records.json record 1: field data: is missing"),
        (["drafts.json", "--format", "argilla"], "holds no judgement that can be used (drafts: 1)"),
        (
            ["records.json", "--format", "argilla", "--store", "records.json"],
            "cannot use records.json as a store of judgements",
        ),
        (["records.json", "--format", "argilla", "--store", "two.db"], "two.db judges helpfulness, safety apart"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    (here / "records.json").write_text(json.dumps(RECORDS))
    (here / "drafts.json").write_text(json.dumps([ranked(1, (ANN, "draft", (1, 2)))]))
    Store(here / "two.db", Plan(aspects=("helpfulness", "safety"))).close()
    assert run(["label", "import", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (here / "labels.sqlite").exists()
