"""Rows outlive the process that wrote them; half a line does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_align.errors import UserError
from lightning_align.feedback.journal import Journal, key_of

WRITER = """
import os, signal, sys
from pathlib import Path
from lightning_align.feedback.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(3):
    journal.add({f"k{number}": {"value": number, "text": "ä\\n\\u2028"}})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rows_of_a_killed_process_are_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal.jsonl"
    process = subprocess.run([sys.executable, "-c", WRITER, str(path)], check=False)
    assert process.returncode == -9
    journal = Journal(path)
    assert len(journal) == 3
    assert journal["k2"] == {"value": 2, "text": "ä\n\u2028"}
    assert "k3" not in journal


@pytest.mark.parametrize("kept", range(1, 40))
def test_half_a_line_is_cut_off_and_the_next_one_stands_alone(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"first": {"a": 1}})
    whole = path.read_bytes()
    Journal(path).add({"second": {"text": "something long enough to be cut"}})
    path.write_bytes(path.read_bytes()[: len(whole) + kept])
    journal = Journal(path)
    assert journal.rows == {"first": {"a": 1}}
    journal.add({"second": {"a": 2}})
    assert Journal(path).rows == {"first": {"a": 1}, "second": {"a": 2}}


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": 1}', '{"key": [1]}', '"text"', "7"])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"first": {}})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 2"):
        Journal(path)


def test_keys_tell_parts_apart() -> None:
    parts = [("a", "b"), ("ab",), ("a", ["b"]), ("a", None), ("a", 1), ("a", "1"), ("b", "a"), ("a", {"b": 1})]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Journal(tmp_path / "file" / "journal.jsonl").add({"k": {}})
