"""The SQLite file under a store of judgements: made, recognised, and written all or nothing."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError
from lightning_align.feedback.human.tasks import Plan

VERSION = 1
WAIT = 30.0  # seconds to wait for another process that writes

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, answers TEXT NOT NULL,
    place TEXT NOT NULL, wanted INTEGER NOT NULL, turn TEXT NOT NULL
) STRICT;
CREATE INDEX turns ON prompts (turn);
CREATE TABLE assignments (
    prompt INTEGER NOT NULL REFERENCES prompts, annotator TEXT NOT NULL, time REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'done', 'skipped')), PRIMARY KEY (prompt, annotator)
) STRICT;
CREATE INDEX open_assignments ON assignments (annotator, state);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, prompt INTEGER NOT NULL REFERENCES prompts,
    annotator TEXT NOT NULL, aspect TEXT NOT NULL, time REAL NOT NULL, seconds REAL, shown TEXT NOT NULL,
    ranks TEXT NOT NULL, strength TEXT, unsafe TEXT NOT NULL, skipped TEXT, undone REAL
) STRICT;
CREATE UNIQUE INDEX standing ON judgements (prompt, annotator, aspect) WHERE undone IS NULL;
CREATE INDEX by_annotator ON judgements (annotator, id) WHERE undone IS NULL;
"""


class Database:
    """A file that several threads and processes may use at once.

    Args:
        path: Of the file.
        plan: Makes the file if there is none; None only reads one that is there.

    Attributes:
        plan: Under which it was made.

    Raises:
        UserError: There is no such file and no plan to make one, it is none of ours, or it was made under another plan.
    """

    def __init__(self, path: Path, plan: Plan | None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        if plan is None and not path.is_file():
            raise UserError(f"there is no store of judgements at {path}: `label human` or `label import` makes one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")  # what was answered for survives a power cut
            self.plan = self._settle(plan)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"cannot use {path} as a store of judgements: {error}; name another file") from error

    def _settle(self, plan: Plan | None) -> Plan:
        database = self._connection
        with self.writing():
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables and plan is not None:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                rows = {"version": VERSION, "plan": asdict(plan)}
                database.executemany(
                    "INSERT INTO settings VALUES (?, ?)", [(k, json.dumps(v)) for k, v in rows.items()]
                )
                return plan
            if "settings" not in tables or "judgements" not in tables:
                raise UserError(f"{self.path} is no store of judgements: name another file")
            found = {name: json.loads(value) for name, value in database.execute("SELECT * FROM settings")}
        if found["version"] != VERSION:
            raise UserError(f"{self.path} was made by another version ({found['version']}, here {VERSION})")
        there = Plan(**{**found["plan"], "aspects": tuple(found["plan"]["aspects"])})
        for name, value in asdict(there).items():
            if plan is not None and (wanted := getattr(plan, name)) != value:
                raise UserError(
                    f"{self.path} was made with {name} {_said(value)}, not {_said(wanted)}: name another file"
                )
        return there

    def close(self) -> None:
        """Close the file; whoever is killed instead loses nothing."""
        self._connection.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All or nothing, one thread and one process at a time; within another one it is a part of that.

        Raises:
            UserError: The file cannot be written, for instance because the disk is full.
        """
        with self._lock:
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
            except BaseException as error:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise UserError(f"not saved in {self.path}: {error}; make room or mend this, then again") from error
                raise
            finally:
                self._depth -= 1

    def write(self, statement: str, values: Any = ()) -> int:
        """Within :meth:`writing`; how many rows it changed."""
        return self._connection.execute(statement, values).rowcount

    def rows(self, statement: str, values: Any = ()) -> list[Any]:
        """What a query finds."""
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    def row(self, statement: str, values: Any = ()) -> Any:
        """The first row that a query finds, or None."""
        with self._lock:
            return self._connection.execute(statement, values).fetchone()


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
