"""A file of answers that took long to get: one JSON line each, kept the moment it is known."""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError


class Journal:
    """Rows by key, in a JSON Lines file that only grows.

    Whoever is killed while a line is written loses that line alone: on opening, what lies behind the last whole line is
    cut off. Rows are plain JSON objects; the key is their first field, ``key``.

    Args:
        path: The file; made with its folder on the first row.

    Raises:
        UserError: A line of the file is not such a row, or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise UserError(f"cannot read and mend {path}: {error.strerror}") from error
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(number, line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            self.rows[row.pop("key")] = row
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{self.path}, line {number} is none of the lines written there before: take it out, or move the file"
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write rows by key and wait until they are on the disk."""
        lines = "".join(json.dumps({"key": key, **row}, ensure_ascii=False) + "\n" for key, row in rows.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.rows.update({key: dict(row) for key, row in rows.items()})


def key_of(*parts: Any) -> str:
    """A key from plain values: equal values, and no others, have equal keys."""
    return sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
