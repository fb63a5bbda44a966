"""Tokenised data are found again only for the very same records, tokenizer and options, and never when damaged."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lightning_align.data import cache
from lightning_align.data.cache import cache_folder, cached, fingerprint
from lightning_align.data.tables import Arrays, Counts

Make = Callable[..., PreTrainedTokenizerBase]
RECORDS: list[dict[str, Any]] = [{"text": "cat dog"}, {"text": "bird"}]
PLACES = ["a line 1", "a line 2"]


@pytest.fixture(autouse=True)
def _even_small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 0)


class Builder:
    """Builds a table and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[Arrays, Counts]:
        self.calls += 1
        counts = Counts(tokens=3, dropped={"too long": (2, "a line 9")})
        arrays = {
            "ids": np.arange(5, dtype=np.int32),
            "mask": np.array([True, False]),
            "none": np.zeros(0, dtype=np.int8),
            "weight": np.array([0.5, np.nan], dtype=np.float32),
        }
        return arrays, counts


def ask(folder: Path | None, tokenizer: PreTrainedTokenizerBase, build: Builder, **changes: Any) -> Any:
    options = {"records": RECORDS, "places": PLACES, "options": {"limit": 8}} | changes
    arrays, counts = cached(folder, tokenizer, build=build, **options)
    expected, expected_counts = Builder()()
    assert counts == expected_counts
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(arrays[name], values)
    return arrays


def test_the_second_time_nothing_is_built(make_tokenizer: Make, tmp_path: Path) -> None:
    build, tokenizer = Builder(), make_tokenizer("bytes")
    for _ in range(3):
        ask(tmp_path / "new", tokenizer, build)
    ask(tmp_path / "new", make_tokenizer("bytes"), build)  # an equal tokenizer
    tokenizer(["cat dog", "cat"], padding=True, truncation=True, max_length=3)  # which leaves traces in the tokenizer
    ask(tmp_path / "new", tokenizer, build)
    assert build.calls == 1
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_whatever_matters_changes_the_key(make_tokenizer: Make, tmp_path: Path) -> None:
    build, tokenizer = Builder(), make_tokenizer("bytes")
    ask(tmp_path, tokenizer, build)
    other_eos = make_tokenizer("bytes")
    other_eos.eos_token = "<|im_end|>"
    variants: list[tuple[PreTrainedTokenizerBase, dict[str, Any]]] = [
        (make_tokenizer("bytes", "chatml"), {}),
        (make_tokenizer("bytes+bos"), {}),
        (other_eos, {}),
        (tokenizer, {"records": [RECORDS[0], {"text": "birds"}]}),
        (tokenizer, {"records": RECORDS[::-1]}),
        (tokenizer, {"places": ["a line 1", "a line 3"]}),
        (tokenizer, {"options": {"limit": 9}}),
    ]
    for number, (changed, options) in enumerate(variants):
        ask(tmp_path, changed, build, **options)
        assert build.calls == number + 2
    assert len(list(tmp_path.iterdir())) == len(variants) + 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header", "text"])
def test_a_damaged_file_is_made_again(
    make_tokenizer: Make, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, tokenizer = Builder(), make_tokenizer("bytes")
    ask(tmp_path, tokenizer, build)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    damaged = {
        "cut": data[:-4],
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "empty": b"",
        "header": data.replace(b'"hash"', b'"hush"'),
        "text": b"not a table at all, but a text of some length",
    }
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        ask(tmp_path, tokenizer, build)
    assert build.calls == 2
    assert "is damaged: the data are tokenised again" in caplog.text
    ask(tmp_path, tokenizer, build)
    assert build.calls == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    make_tokenizer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    build = Builder()
    ask(tmp_path / "file" / "folder", make_tokenizer("bytes"), build)
    assert build.calls == 1
    assert "cannot be kept" in caplog.text


def test_small_data_and_no_folder_are_not_cached(
    make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, tokenizer = Builder(), make_tokenizer("bytes")
    ask(None, tokenizer, build)
    monkeypatch.setattr(cache, "SMALLEST", 10_000)
    ask(tmp_path, tokenizer, build)
    assert build.calls == 2
    assert not list(tmp_path.iterdir())


def test_places_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "lightning_align" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / ".cache" / "lightning_align" / "tokens"
    assert cache_folder("~/here") == tmp_path / "here"
    assert cache_folder(None) is None


def test_fingerprint_is_the_same_after_saving(make_tokenizer: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for base in ("bytes+bos", "words"):
        tokenizer = make_tokenizer(base, "chatml")
        tokenizer.save_pretrained(tmp_path / base)
        assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / base)) == fingerprint(tokenizer)
