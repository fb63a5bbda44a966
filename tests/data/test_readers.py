"""Every source gives the same records, and every damaged one gives one line that says where."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_align import playground
from lightning_align.data.files import cut_document, format_of
from lightning_align.data.readers import available_splits, detect_source_kind, load_records
from lightning_align.data.records import KINDS
from lightning_align.data.writers import write_records
from lightning_align.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RECORDS = [{"prompt": f"p{number}", "completion": f" c{number}"} for number in range(1, 5)]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def write(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def fault(path: Any, kind: str = "sft", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_records(str(path), kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- round trips
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz", ".jsonl.zst", ".parquet.gz", ".csv.zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_playground_comes_back_from_a_file(kind: str, suffix: str, tmp_path: Path) -> None:
    options = {"size": 30, **({"ties": 0.8} if kind in ("preference", "ranked") else {})}
    made = load_records("playground", kind, playground=options)
    assert made.records == playground.records(kind, **options)  # type: ignore[arg-type]
    assert made.places[4] == "playground record 5"
    write_records(made.records, tmp_path / f"file{suffix}")
    assert load_records(str(tmp_path / f"file{suffix}"), kind).records == made.records


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
message_lists = st.lists(st.builds(lambda text: {"role": "user", "content": text}, texts), min_size=1, max_size=3)
answers = st.builds(lambda text: [{"role": "assistant", "content": text}], texts)
optional = st.fixed_dictionaries(
    {},
    optional={
        "strength": st.sampled_from(["better", "negligibly"]),
        "margin": st.floats(-1e6, 1e6),
        "weight": st.floats(0, 10),
        "aspect": st.sampled_from(["helpfulness", "safety"]),
    },
)
distinct = st.tuples(texts, texts).filter(lambda pair: pair[0] != pair[1])
plain_pairs = st.builds(
    lambda prompt, pair, more: {"prompt": prompt, "chosen": pair[0], "rejected": pair[1], **more},
    texts.filter(lambda text: not text.lstrip().startswith("[")),
    distinct.filter(lambda pair: not any(side.lstrip().startswith("[") for side in pair)),
    optional,
)
chats = st.builds(lambda prompt, completion: {"prompt": prompt, "completion": completion}, message_lists, answers)


@settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(plain_pairs, min_size=1, max_size=4) | st.lists(chats, min_size=1, max_size=4))
def test_formats_agree(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    kind = "preference" if "chosen" in records[0] else "sft"
    for suffix in SUFFIXES:
        write_records(records, tmp_path / f"file{suffix}", overwrite=True)
        assert load_records(str(tmp_path / f"file{suffix}"), kind).records == records


def test_a_saved_dataset_gives_the_same_records(tmp_path: Path) -> None:
    records = playground.records("preference", size=20, ties=0.5)
    rows = [
        {name: record.get(name) for name in ("prompt", "chosen", "rejected", "tie", "strength")} for record in records
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    loaded = load_records(str(tmp_path / "saved"), "preference")
    assert loaded.records == records
    assert loaded.places[2] == "dataset row 3"
    assert available_splits(str(tmp_path / "saved"), "preference") == ()


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_gsm8k_through_columns(name: str, count: int) -> None:
    path = str(SHARED / f"{name}.jsonl.gz")
    prompts = load_records(path, "prompt", columns={"prompt": "question", "reference": "answer"})
    assert (len(prompts.records), prompts.report.bad) == (count, 0)
    assert all(set(record) == {"prompt", "reference"} and "####" in record["reference"] for record in prompts.records)
    pairs = load_records(path, "sft", columns={"prompt": "question", "completion": "answer"})
    assert [record["completion"] for record in pairs.records] == [record["reference"] for record in prompts.records]


# ---------------------------------------------------------------------- plain text
@needs_shared
def test_tinyshakespeare_is_text_in_documents_that_make_up_the_file() -> None:
    loaded = load_records(str(SHARED / "tinyshakespeare.txt.gz"), "text")
    whole = gzip.decompress((SHARED / "tinyshakespeare.txt.gz").read_bytes()).decode()
    assert "".join(record["text"] for record in loaded.records) == whole
    assert len(loaded.records) == 18
    assert all(record["text"].endswith("\n\n") for record in loaded.records[:-1])  # between two speeches
    for record, place in zip(loaded.records, loaded.places, strict=True):
        line = int(place.rpartition(" ")[2])
        assert whole.split("\n")[line - 1] == record["text"].split("\n")[0]


@settings(derandomize=True, deadline=None)
@given(st.text("ab \n", max_size=60), st.integers(1, 12))
def test_cut_documents_lose_nothing(text: str, size: int) -> None:
    pieces = list(cut_document(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces[:-1])
    assert len(pieces[-1]) <= size


def test_where_documents_are_cut() -> None:
    assert list(cut_document("aa\nb\n\nccc d\nee", 9)) == ["aa\nb\n\n", "ccc d\nee"]
    assert list(cut_document("aa\nbb cc", 7)) == ["aa\n", "bb cc"]
    assert list(cut_document("aa bb cc", 7)) == ["aa bb ", "cc"]
    assert list(cut_document("aabbcc", 4)) == ["aabb", "cc"]


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\ufeffone\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    loaded = load_records(str(tmp_path / "stories.txt"), "text")
    assert [record["text"] for record in loaded.records] == ["one\n\nstill one\n", "\ntwo\n"]
    assert loaded.places == ["stories.txt line 1", "stories.txt line 4"]
    assert fault(tmp_path / "stories.txt") == (
        f"{tmp_path / 'stories.txt'} holds plain text: it can be read as records of kind text only, not sft"
    )


# ---------------------------------------------------------------------- damaged files
def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n\n{"prompt": "p", "comp\n[1]\n')
    assert fault(path).startswith(
        "a.jsonl line 3: the line is not valid JSON (Invalid control character at, column 22)"
    )
    loaded = load_records(str(path), "sft", on_bad_record="skip")
    assert loaded.records == RECORDS[:1]
    assert loaded.report.dropped == {"the line is not valid JSON": 1, "is no object": 1}
    assert loaded.report.examples["is no object"].startswith("a.jsonl line 4: list; a record is written ")
    path.write_text("[" * 100_000)
    assert "is not valid JSON" in fault(path)
    path.write_text('{"prompt": ' + "9" * 5000 + "}")
    assert "is not valid JSON" in fault(path)


def test_json_files_hold_a_list_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*RECORDS, "x"], indent=1))
    assert fault(path).startswith("a.json record 5: is no object (str)")
    assert load_records(str(path), "sft", on_bad_record="skip").records == RECORDS
    path.write_text('[{"prompt": "p"},\n{"prompt" "q"}]')
    assert fault(path).startswith("a.json line 2: not valid JSON: Expecting ':' delimiter, column 11")
    assert load_records(write(path, *RECORDS), "sft").places[1] == "a.json line 2"


def test_what_stands_around_records_or_is_missing_around_turns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps({"data": RECORDS}, indent=indent))
        assert fault(path).startswith("a.json record 1: field data: holds the records; write them alone: a list, or")
        with pytest.raises(UserError, match=r"a\.json record 1: field data: holds the records; .* no other record"):
            detect_source_kind(str(path))
    path.write_text(json.dumps(RECORDS[0], indent=1))
    assert load_records(str(path), "sft").records == RECORDS[:1]
    turns = tmp_path / "turns.jsonl"
    turns.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) + "\n")
    assert fault(turns).startswith('turns.jsonl line 1: is a bare list of turns; write {"messages": […]}')
    turns.write_text(json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) + "\n")
    assert fault(turns).startswith('turns.jsonl line 1: is a bare list of turns; write {"conversations": […]}')


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_was_cut_off(suffix: str, tmp_path: Path) -> None:
    write_records(RECORDS * 2000, tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    for length in (len(content) - 1, len(content) - 9, len(content) // 2):
        (tmp_path / f"a{suffix}").write_bytes(content[:length])
        for on_bad_record in ("error", "skip"):
            assert fault(tmp_path / f"a{suffix}", on_bad_record=on_bad_record).endswith(
                "is cut off: fetch or write it again"
            )


def test_zst_of_several_frames(tmp_path: Path) -> None:
    frames = [zstandard.compress((json.dumps(record) + "\n").encode()) for record in RECORDS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert load_records(str(tmp_path / "a.jsonl.zst"), "sft").records == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, *RECORDS)
    assert fault(path).startswith(f"{path} is damaged, or no")


@pytest.mark.parametrize(("suffix", "method"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_without_saying_so(suffix: str, method: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(method(b"{}"))
    assert fault(tmp_path / "a.jsonl").endswith(f"is compressed: call it a.jsonl{suffix}")


def test_files_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(RECORDS[0]).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert fault(tmp_path / "a.jsonl").startswith("a.jsonl line 2: the line is not UTF-8 text (byte 16)")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\xfe")
    assert fault(tmp_path / "a.txt", "text").startswith("a.txt line 3: the file is not UTF-8 text")
    (tmp_path / "a.csv").write_bytes(b"text\ncaf\xe9\n")
    assert fault(tmp_path / "a.csv", "text").startswith("a.csv line 2: the file is not UTF-8 text")


def test_names_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("")
    assert "files of this name are not read; accepted are .jsonl, .json" in fault(tmp_path / "a.xlsx")
    (tmp_path / "run").mkdir()
    assert "has no file of sft records in it: accepted are .jsonl" in fault(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "is a run directory" in fault(tmp_path / "run")
    write(tmp_path / "pairs.jsonl", *RECORDS)
    assert fault(tmp_path / "pairz.jsonl").endswith("there is no such file or folder; did you mean 'pairs.jsonl'?")


def test_files_without_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.txt", "a.json"):
        (tmp_path / name).write_text("")
        assert fault(tmp_path / name, "text") == f"{tmp_path / name} holds no records"


# ---------------------------------------------------------------------- CSV
def test_cells_are_what_their_fields_need(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,chosen,rejected,margin,tie,weight,soft_label\n"several\nlines, and ""quotes""",a,b,1.5,TRUE,,\n'
        "007,[1],true,,,2,0.75\n",
    )
    loaded = load_records(str(path), "preference")
    assert loaded.records == [
        {"prompt": 'several\nlines, and "quotes"', "chosen": "a", "rejected": "b", "margin": 1.5, "tie": True},
        {"prompt": "007", "chosen": "[1]", "rejected": "true", "weight": 2.0, "soft_label": 0.75},
    ]
    assert loaded.places == ["a.csv line 2", "a.csv line 4"]
    path.write_text("q,is_safety,reference\nwhy,false,042\n")
    assert load_records(str(path), "prompt", columns={"prompt": "q"}).records == [
        {"prompt": "why", "is_safety": False, "reference": "042"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\np,\n", "a.csv line 2: field completion: is empty"),
        ("prompt,completion\np,c\np,c,d\n", "a.csv line 3: the row does not fit the header (3 cells under 2 columns)"),
        ("prompt;completion\np;c\n", "a.csv: the columns are not separated by commas"),
        ("prompt,prompt\np,c\n", "a.csv: two columns are called 'prompt'"),
        ('prompt,completion\n"p"x,c\n', "a.csv line 2: not valid CSV"),
        ('prompt,completion\n"p,c\n', "a.csv line 2: not valid CSV: unexpected end of data"),
        ("prompt,completion,weight\np,c,high\n", "a.csv line 2: field weight: is not a number ('high', a text)"),
    ],
)
def test_bad_csv(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert fault(tmp_path / "a.csv").startswith(message)


def test_long_cells(tmp_path: Path) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["text"], ["x" * 200_000]])
    (tmp_path / "a.csv").write_text(out.getvalue())
    assert len(load_records(str(tmp_path / "a.csv"), "text").records[0]["text"]) == 200_000


# ---------------------------------------------------------------------- records
def test_a_bad_record_stops_or_is_counted(tmp_path: Path) -> None:
    bad = [{"prompt": "p", "completion": ""}, {"prompt": "p"}, {"prompt": 3, "completion": "c"}]
    path = write(tmp_path / "a.jsonl", RECORDS[0], *bad, bad[0], RECORDS[1])
    assert fault(path) == (
        "a.jsonl line 2: field completion: is empty; write a text, or leave the record out "
        "(on_bad_record: skip drops such records)"
    )
    loaded = load_records(path, "sft", on_bad_record="skip")
    assert loaded.records == RECORDS[:2]
    assert loaded.places == ["a.jsonl line 1", "a.jsonl line 6"]
    assert (loaded.report.read, loaded.report.kept, loaded.report.bad) == (6, 2, 4)
    assert loaded.report.dropped == {
        "field completion: is empty": 2,
        "field completion: is missing": 1,
        "field prompt: is not a text": 1,
    }
    assert loaded.report.examples["field completion: is missing"].startswith("a.jsonl line 3: there is prompt; ")
    assert loaded.report.examples["field completion: is empty"] == "a.jsonl line 2"
    path = write(tmp_path / "b.jsonl", *bad)
    assert fault(path, on_bad_record="skip") == (
        f"{path}: nothing is left of 3 records; dropped 1: field completion: is empty (first: b.jsonl line 1); "
        "1: field completion: is missing (first: b.jsonl line 2: there is prompt; "
        "a record of kind sft needs prompt and completion, which `columns` can rename); "
        "1: field prompt: is not a text (first: b.jsonl line 3: 3, int; write a text in quotes)"
    )


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", {"q": "p", "good": "a", "bad": "b"}, {"q": "p", "good": "c", "bad": "d", "id": 1}
    )
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    loaded = load_records(path, "preference", columns=columns)
    assert loaded.records[1] == {"prompt": "p", "chosen": "c", "rejected": "d"}
    assert loaded.report.unused == {"id": 1}
    swapped = write(tmp_path / "b.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert load_records(swapped, "preference", columns={"chosen": "rejected", "rejected": "chosen"}).records == [
        {"prompt": "p", "chosen": "b", "rejected": "a"}
    ]
    assert fault(path, "preference", columns={**columns, "prompt": "qq"}) == (
        f"{path} has no column 'qq' for prompt; did you mean 'q'? (there is q, good, bad, id)"
    )


def test_kinds_are_derived_and_it_is_said(tmp_path: Path) -> None:
    ranking = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]}
    loaded = load_records(write(tmp_path / "a.jsonl", ranking, {**ranking, "ranks": [1, 1, 1]}), "preference")
    assert [(record["chosen"], record["rejected"]) for record in loaded.records] == [("a", "b"), ("a", "c")]
    assert loaded.places == ["a.jsonl line 1"] * 2
    assert loaded.report.conversions == {"ranked → preference": 2}
    assert loaded.report.dropped == {"all its answers tie": 1}
    assert loaded.report.bad == 0  # which is why it did not stop
    pair = {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "b"}], "id": 5}
    loaded = load_records(write(tmp_path / "b.jsonl", pair), "prompt")
    assert loaded.records == [{"prompt": [USER], "id": 5}]
    assert list(loaded.report.conversions) == ["shared messages → prompt", "preference → prompt"]
    assert loaded.report.unused == {}
    assert fault(write(tmp_path / "c.jsonl", {"prompt": "p", "completion": "c", "score": 1}), "unpaired").startswith(
        "c.jsonl line 1: field label: is missing (there is prompt, completion, score)"
    )


def test_mixed_forms_are_counted_apart(tmp_path: Path) -> None:
    records = [RECORDS[0], {"messages": [USER, ASSISTANT]}, {"instruction": "i", "output": "o"}]
    loaded = load_records(write(tmp_path / "a.jsonl", *records), "sft")
    assert len(loaded.records) == 3
    assert loaded.report.conversions == {"instruction and output → messages": 1}


def test_the_kind_of_a_source_is_its_first_records(tmp_path: Path) -> None:
    ranking = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
    assert detect_source_kind(write(tmp_path / "a.jsonl", ranking)) == "ranked"
    assert detect_source_kind(write(tmp_path / "b.jsonl", {"q": "p", "a": "c"})) is None
    columns = {"prompt": "q", "completion": "a"}
    assert detect_source_kind(str(tmp_path / "b.jsonl"), columns=columns) == "sft"
    assert detect_source_kind("playground") is None


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *RECORDS)
    assert fault(path, "preferences").startswith("unknown kind of records 'preferences'; did you mean 'preference'?")
    assert fault("") == "the path of the data is empty"
    assert fault(path, on_bad_record="ignore") == "on_bad_record is 'ignore': it is error or skip"
    assert fault(path, split="trian").startswith("unknown split 'trian'; did you mean 'train'?")
    assert fault(path, playground={"size": 3}) == f"playground options (size) have no meaning for {path}"
    assert fault("playground", playground={"sise": 3}).startswith(
        "the playground has no option 'sise'; did you mean 'size'?"
    )
    assert fault("playground", playground={"size": "many"}).startswith("playground: an option has a value of the wrong")
    assert fault("playground", playground={"k": 3}) == "playground option k has no meaning for records of kind sft"


# ---------------------------------------------------------------------- writing
def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    write_records(RECORDS, out)
    with pytest.raises(UserError, match="exists: give another name, or --overwrite"):
        write_records(RECORDS[:1], out)
    mixed = [{"prompt": "p", "completion": "c"}, {"prompt": [USER], "completion": [ASSISTANT]}]
    with pytest.raises(UserError, match=r"column prompt has values of several types .* write \.jsonl"):
        write_records(mixed, out.with_suffix(".parquet"))
    with pytest.raises(UserError, match="cannot hold these records"):
        write_records([{"prompt": "p", "when": object()}], out, overwrite=True)
    with pytest.raises(UserError, match="records are written as"):
        write_records(RECORDS, tmp_path / "a.txt")
    folder = tmp_path / "b.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_records(RECORDS, folder, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["a.jsonl"]
    assert load_records(str(out), "sft").records == RECORDS


def test_equal_records_make_equal_files(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_records(RECORDS, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_parquet_keeps_columns_that_the_first_record_lacks(tmp_path: Path) -> None:
    records = [RECORDS[0], {**RECORDS[1], "weight": 2.0}]
    write_records(records, tmp_path / "a.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").column_names == ["prompt", "completion", "weight"]
    assert load_records(str(tmp_path / "a.parquet"), "sft").records == records
    assert format_of(Path("A.JSONL.GZ")) == ".jsonl"
