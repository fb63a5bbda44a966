"""Folders, saved datasets and the hub, and the splits that they tell apart."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_align import playground
from lightning_align.data import sources
from lightning_align.data.readers import load_records
from lightning_align.data.sources import available_splits
from lightning_align.data.writers import write_records
from lightning_align.errors import UserError

RECORDS = [{"prompt": f"p{number}", "completion": f" c{number}"} for number in range(1, 5)]


def write(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def fault(path: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_records(str(path), "sft", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- folders and splits
def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", RECORDS[2])
    write_records(RECORDS[:2], tmp_path / "a.csv")
    write_records(RECORDS[3:], tmp_path / "sub" / "c.parquet")
    for name in ("README.md", "notes.txt", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    loaded = load_records(str(tmp_path), "sft")
    assert loaded.records == RECORDS
    assert loaded.places == ["a.csv line 2", "a.csv line 3", "b.jsonl line 1", "sub/c.parquet row 1"]
    assert loaded.report.files == 3
    assert loaded.report.ignored == ["README.md", "dataset_info.json", "notes.txt"]
    assert available_splits(str(tmp_path), "sft") == ()


def test_a_folder_of_texts(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"text {name}")
    assert load_records(str(tmp_path), "text").records == [{"text": "text a.txt"}, {"text": "text b.txt"}]


def test_a_folder_whose_files_are_named_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", RECORDS[0])
    write(tmp_path / "train-00001-of-00002.jsonl", RECORDS[1])
    write(tmp_path / "validation.jsonl", RECORDS[2])
    write(tmp_path / "test" / "0.jsonl", RECORDS[3])
    assert available_splits(str(tmp_path), "sft") == ("train", "val", "test")
    assert load_records(str(tmp_path), "sft").records == RECORDS[:2]
    assert load_records(str(tmp_path), "sft", split="val").records == RECORDS[2:3]
    assert load_records(str(tmp_path), "sft", split="validation").records == RECORDS[2:3]
    assert load_records(str(tmp_path), "sft", split="test").records == RECORDS[3:]
    (tmp_path / "validation.jsonl").unlink()
    assert fault(tmp_path, split="val").endswith("no files of the split val: by their names there is test, train")
    write(tmp_path / "trainer.jsonl", RECORDS[2])  # is no split, so that the others are none either
    assert available_splits(str(tmp_path), "sft") == ()
    assert len(load_records(str(tmp_path), "sft").records) == 4


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([record]) for name, record in zip("abc", RECORDS, strict=False)}
    names = {"a": "train", "b": "validation", "c": "test"}
    datasets.DatasetDict({names[key]: part for key, part in parts.items()}).save_to_disk(tmp_path / "whole")
    path = str(tmp_path / "whole")
    assert available_splits(path, "sft") == ("train", "val", "test")
    for split, record in zip(("train", "val", "test"), RECORDS, strict=False):
        assert load_records(path, "sft", split=split).records == [record]
    datasets.DatasetDict({"train_sft": parts["a"], "train_gen": parts["b"]}).save_to_disk(tmp_path / "several")
    assert fault(tmp_path / "several").endswith(
        "has several splits for train: there is train_sft, train_gen; write the one you want to a file"
    )
    datasets.DatasetDict({"train_sft": parts["a"], "extra": parts["b"]}).save_to_disk(tmp_path / "one")
    assert load_records(str(tmp_path / "one"), "sft").records == RECORDS[:1]
    assert "has no split test" in fault(tmp_path / "one", split="test")


def test_a_saved_dataset_that_is_damaged(tmp_path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.unlink()
    assert "saved is not a whole saved dataset" in fault(tmp_path / "saved")


def test_the_playground_has_every_split() -> None:
    assert available_splits("playground", "sft") == ("train", "val", "test")
    val = load_records("playground", "prompt", split="val", playground={"size": 5}).records
    assert val == playground.records("prompt", split="val", size=5)


# ---------------------------------------------------------------------- the hub
@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and an empty cache."""
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_mistyped_name_fails_at_once(unreachable: Path) -> None:
    message = (
        "there is no such file or folder, and the dataset hub cannot be reached to look for it: check the spelling"
    )
    assert message in fault("owner/pairs")
    assert fault("playgroun").endswith("or the network; did you mean 'playground'?")
    assert fault("data/pairs.jsonl") == "data/pairs.jsonl: there is no such file or folder"
    assert fault("../owner/pairs").startswith("../owner/pairs: there is no such file or folder")


def test_a_dataset_of_the_hub_comes_from_the_cache(unreachable: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", *RECORDS)
    datasets.load_dataset("json", data_files={"train": path}, cache_dir=str(tmp_path / "built"))
    (arrow,) = (tmp_path / "built").rglob("*.arrow")
    target = unreachable / "owner___pairs" / "default" / "0.0.0" / "1234"
    target.mkdir(parents=True)
    (target / "pairs-train.arrow").write_bytes(arrow.read_bytes())
    info = (arrow.parent / "dataset_info.json").read_text()
    (target / "dataset_info.json").write_text(info.replace('"json"', '"pairs"'))
    loaded = load_records("owner/pairs", "sft")
    assert loaded.records == RECORDS
    assert loaded.places[0] == "dataset row 1"
    assert available_splits("owner/pairs", "sft") == ("train",)
    assert not datasets.config.HF_HUB_OFFLINE  # as it was


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, config: str | None) -> None:
        assert (name, config) == ("owner/pairs", "main")
        raise ValueError("Config name is wrong.\nPlease pick one among: …")

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert fault("owner/pairs:main") == "owner/pairs:main: Config name is wrong. (write owner/pairs:CONFIG)"
