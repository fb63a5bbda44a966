"""``data``: inspect, convert, export; every mistake is one line, and nothing is left half-written."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_align import playground
from lightning_align.cli.main import run
from lightning_align.data.readers import detect_kind, load_records
from lightning_align.data.records import KINDS, validate
from lightning_align.models.tokenizer_training import train_tokenizer

RECORDS = [
    {"prompt": f"p{number}", "chosen": f" good {number}", "rejected": f" bad {number}", "strength": "better"}
    for number in range(3)
]
BAD = {"prompt": "p", "chosen": " good", "rejected": ""}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (*RECORDS, BAD)))
    return path


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in ("inspect", "convert", "export"))


# ---------------------------------------------------------------------- inspect
def test_inspect_says_what_a_reader_finds(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", str(pairs), "--record", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:9] == [
        f"{pairs}: 4 records read from 1 file, 3 of kind preference kept",
        "  dropped: 1 field rejected: is empty (first: pairs.jsonl line 4)",
        "  bad records: 1; the first would stop a run without on_bad_record: skip",
        "fields:",
        "  prompt    characters: 2",
        "  chosen    characters: 7",
        "  rejected  characters: 6",
        "  strength  better 100%",
        "record 2 (pairs.jsonl line 2):",
    ]
    assert json.loads("\n".join(out[9:])) == RECORDS[1]


def test_inspect_as_another_kind_with_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert run(["data", "inspect", str(tmp_path / "a.jsonl"), "--columns", "prompt=question", "completion=answer"]) == 0
    assert "1 of kind sft kept" in capsys.readouterr().out
    assert run(["data", "inspect", str(tmp_path / "a.jsonl")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'a.jsonl'}: give --kind, because the fields of its first record do not tell it: it looks "
        "like sft, but `prompt` and `completion` are missing; are they `question` and `answer`? (--columns "
        "prompt=question completion=answer)\n"
    )


def test_inspect_doubts_a_kind_that_a_misspelt_field_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejcted": "b"}\n')
    doubt = "  looks like preference, but `rejected` is missing; is `rejcted` it? (--columns rejected=rejcted)"
    assert run(["data", "inspect", str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("1 of kind prompt kept")
    assert doubt in out
    for further in (["--kind", "prompt"], ["--columns", "rejected=rejcted"]):
        assert run(["data", "inspect", str(file), *further]) == 0
        assert doubt not in capsys.readouterr().out
    assert run(["data", "inspect", str(file), "--columns", "rejectd=rejcted"]) == 2
    assert capsys.readouterr().err.endswith("which is no field; did you mean 'rejected'?\n")


def test_inspect_says_value_and_cure_of_bad_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    bad = '{"prompt": "q", "completion": "a", "label": "good"}\n'
    reason = "field label: is neither true nor false (first: a.jsonl line 1: 'good', a text; write true or false)"
    file.write_text(bad + bad)
    assert run(["data", "inspect", str(file)]) == 2
    assert capsys.readouterr().err.endswith(f"nothing is left of 2 records; dropped 2: {reason}\n")
    file.write_text(bad + bad.replace('"good"', "true"))
    assert run(["data", "inspect", str(file)]) == 0
    assert f"  dropped: 1 {reason}" in capsys.readouterr().out


def test_inspect_the_playground(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", "playground", "--kind", "unpaired", "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert "500 of kind unpaired kept" in out
    assert "label       true in " in out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder as far as a tokenizer needs one."""
    folder = tmp_path_factory.mktemp("model")
    texts = [record["text"] for record in playground.records("text", size=500)]
    train_tokenizer(texts, vocab_size=400, algorithm="words").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_inspect_with_a_model_counts_tokens_and_shows_one_record_in_them(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "inspect", "playground", "--kind", "sft", "--split", "val", "--model", model]
    assert run([*command, "--max_length", "12", "--record", "3"]) == 0
    out = capsys.readouterr().out
    records = playground.records("sft", split="val")
    lengths = [len((record["prompt"] + record["completion"]).split()) + 1 for record in records]  # and EOS
    assert f"  tokens: {sum(min(12, length) for length in lengths):,}\n" in out
    assert f"  records truncated: {sum(length > 12 for length in lengths)}\n" in out
    table = out.partition("record 3 (playground record 3):\n")[2]
    assert f"{lengths[2]} tokens" in table
    rows = [line.split() for line in table.rstrip().splitlines()[2:]]
    assert rows[-1] == [str(lengths[2] - 1), "1", "<eos>", "yes", "completion,", "added", "EOS"]
    assert sum(row[-1] == "cut" for row in rows) == lengths[2] - 12


def test_inspect_counts_as_fit_does_where_the_model_takes_less(
    scratch: Any, make_model: Any, make_tokenizer: Any, chatml: str
) -> None:
    make_model(scratch.root / "small", tokenizer=make_tokenizer(template=chatml))  # 128 positions
    scratch.write("long.jsonl", [{"prompt": "a " * 80 * number, "completion": " b"} for number in (1, 1, 2, 2, 2, 2)])
    looked = scratch.done("data", "inspect", "long.jsonl", "--model", "small").out
    words = [*scratch.fit_words_on("long.jsonl", "sft"), "--model.model=small", "--data.max_length=1024"]
    planned = scratch.done(*words, "--data.val_fraction=0", "--dry-run").out
    counts = [
        re.findall(r"longest sequence: \d+ tokens, as the model takes no more|tokens: .*|records truncated: \d+", out)
        for out in (looked, planned)
    ]
    assert counts[0] == counts[1]
    assert counts[0][0].startswith("longest sequence: 128 tokens")
    assert "records truncated: 6" in counts[0]


def test_inspect_shows_the_first_record_that_the_template_takes(
    scratch: Any, make_model: Any, make_tokenizer: Any, chatml: str
) -> None:
    strict = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}" + chatml
    make_model(scratch.root / "strict", tokenizer=make_tokenizer(template=strict))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    refused = {"messages": [{"role": "system", "content": "s"}, *turns]}
    scratch.write("chats.jsonl", [refused, {"messages": turns}])
    look = ["data", "inspect", "chats.jsonl", "--model", "strict"]
    out = scratch.done(*look).out
    assert re.search(r"dropped: 1 .*no system.* \(first: chats\.jsonl line 1\)", out)
    assert "record 2 (chats.jsonl line 2):\n" in out
    assert re.match(r"chats\.jsonl line 1: .*no system", scratch.refused(*look, "--record", "1"))
    scratch.write("chats.jsonl", [refused, refused])
    assert re.match(r"chats\.jsonl line 1: .*no system.*, and no other record can", scratch.refused(*look))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_shown_in_tokens(kind: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "inspect", "playground", "--kind", kind, "--split", "test", "--model", model]) == 0
    out = capsys.readouterr().out
    assert "  tokens: " in out
    assert "part" in out.partition("record 1 (playground record 1):\n")[2].splitlines()[1]


# ---------------------------------------------------------------------- convert
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv.gz", ".json.zst"])
def test_convert_by_suffix(suffix: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / f"unpaired{suffix}"
    assert run(["data", "convert", str(pairs), str(out), "--kind", "unpaired", "--on_bad_record", "skip"]) == 0
    text = capsys.readouterr().out
    assert "converted: 3 preference → unpaired" in text
    assert text.endswith(f"wrote {out}\n")
    assert load_records(str(out), "unpaired").records == [
        {"prompt": record["prompt"], "completion": record[side], "label": label}
        for record in RECORDS
        for side, label in (("chosen", True), ("rejected", False))
    ]


def test_convert_in_place_needs_overwrite(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "convert", str(pairs), str(pairs), "--kind", "preference", "--on_bad_record", "skip"]
    assert run(command) == 2
    assert capsys.readouterr().err == f"error: {pairs} exists: give another name, or --overwrite\n"
    assert run([*command, "--overwrite"]) == 0
    assert load_records(str(pairs), "preference").records == RECORDS


def test_a_bad_record_stops_a_conversion_before_anything_is_written(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "convert", str(pairs), str(tmp_path / "out" / "a.jsonl"), "--kind", "preference"]) == 2
    assert capsys.readouterr().err.startswith("error: pairs.jsonl line 4: field rejected: is empty; ")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


# ---------------------------------------------------------------------- export
def test_export_is_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    options = ["--size", "40", "--seed", "3", "--split", "test", "--ties", "0.5", "--temperature", "2", "--no-strength"]
    mix = [
        "--quality",
        "good=1",
        "poor=0.5",
        "--unsafe",
        "0.5",
        "--families",
        "list",
        "count",
        "theft",
        "--noise",
        "0.1",
    ]
    assert run(["data", "export", "playground", "--kind", "preference", "--out", str(out), *options, *mix]) == 0
    assert "40 of kind preference kept" in capsys.readouterr().out
    assert load_records(str(out), "preference").records == playground.records(
        "preference",
        **{"split": "test", "size": 40, "seed": 3, "ties": 0.5, "temperature": 2.0, "strength": False, "noise": 0.1},
        **{"quality": {"good": 1.0, "poor": 0.5}, "unsafe": 0.5, "families": ["list", "count", "theft"]},
    )


EXPORT = ["export", "playground", "--kind", "sft", "--out", "OUT/a.jsonl"]
LOOK = ["inspect", "playground", "--kind", "sft"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspct"], "unknown data command 'inspct'; did you mean 'inspect'? (there are: inspect, convert, export)"),
        (["inspect", "none.jsonl"], "none.jsonl: there is no such file or folder"),
        (["inspect", "playground"], "playground: give --kind, because it has every kind"),
        ([*LOOK, "--kind", "pairs"], "unknown kind of records 'pairs'; did you mean 'unpaired'? (there are text,"),
        ([*LOOK, "--record", "9999"], "--record is 9999: there are records 1 to 3000"),
        ([*LOOK, "--max_length", "9"], "--max_length and --loss_on are about tokens: give --model too"),
        ([*LOOK, "--model", "OUT"], "OUT: there is no such folder, and it cannot be a hub id (owner/name)"),
        ([*LOOK, "--columns", "prompt"], "argument --columns: give FIELD=NAME, such as prompt=question, not 'prompt'"),
        (["convert", "playground", "OUT/a.txt", "--kind", "sft"], "OUT/a.txt: records are written as .jsonl, .json"),
        (["convert", "playground", "OUT/a.jsonl"], "the following arguments are required: --kind"),
        (["export", "playgrond", *EXPORT[2:]], "argument source: invalid choice: 'playgrond'"),
        ([*EXPORT, "--k", "3"], "playground option k has no meaning for records of kind sft"),
        ([*EXPORT, "--quality", "good"], "argument --quality: give TIER=WEIGHT, such as good=0.5, not 'good'"),
        ([*EXPORT, "--size", "-1"], "size is -1: give a number of records"),
        ([*EXPORT, "--size", "0"], "playground holds no records"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", *(word.replace("OUT", str(tmp_path / "out")) for word in argv)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: " + message.replace("OUT", str(tmp_path / "out")))
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the guide
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_of_the_guide_are_records() -> None:
    examples = [json.loads(line) for line in DOCS.read_text().splitlines() if line.startswith('{"')]
    kinds = [detect_kind(example) for example in examples]
    assert kinds == ["text", "sft", "sft", "prompt", "preference", "preference", "ranked", "unpaired", "scored"]
    for kind, example in zip(kinds, examples, strict=True):
        assert kind is not None
        assert validate(kind, example) == example


def test_the_commands_of_the_guide_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with gzip.open("gsm8k_train.jsonl.gz", "wt") as file:
        file.write('{"question": "What is 6 · 7?", "answer": "#### 42"}\n')
    prefix = "python -m lightning_align "
    commands = [line.removeprefix(prefix) for line in DOCS.read_text().splitlines() if line.startswith(prefix + "data")]
    assert len(commands) == 8
    for command in commands:
        assert run(command.replace("runs/sft", model).split()) == 0, capsys.readouterr().err
