"""Prompts, answers and judgements in one SQLite file, in which every judgement is on disk before it is answered for.

Nothing is ever deleted: who takes a judgement back marks it as undone. Several threads and several servers may use a
file at once.
"""

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_align.data.templates import Completion, Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.human.tasks import Item, Judgement, Plan, Verdict
from lightning_align.feedback.journal import key_of

VERSION = 1
LEASE = 30 * 60.0  # seconds after which what somebody began and left is handed to others
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


class Conflict(ValueError):
    """Somebody, or the same person in another tab, has said something about this before."""


class Store:
    """A file of items and judgements.

    Args:
        path: Of the file.
        plan: Makes the file if there is none; None only reads one that is there.

    Raises:
        UserError: There is no such file and no plan to make one, it is none of ours, or it was made under another plan.
    """

    def __init__(self, path: Path, plan: Plan | None = None) -> None:
        self.path = path
        self._lock = threading.RLock()
        if plan is None and not path.is_file():
            raise UserError(f"there is no store of judgements at {path}: `label human` or `label import` makes one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")  # a judgement that was answered for survives a power cut
            self.plan = self._settle(plan)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"cannot use {path} as a store of judgements: {error}; name another file") from error

    def _settle(self, plan: Plan | None) -> Plan:
        with self._writing() as database:
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
        self._database.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one thread and one process at a time."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    # ------------------------------------------------------------------------------------------------------- items
    def add(self, prompt: Prompt, answers: Sequence[Completion], place: str) -> bool:
        """Add an item; False if the same one, with the same answers in any order, is there."""
        key = item_key(prompt, answers)
        with self._writing() as database:
            wanted = self.plan.wanted(database.execute("SELECT count(*) FROM prompts").fetchone()[0])
            row = (key, _dump(prompt), _dump(list(answers)), place, wanted, self.plan.turn(key))
            cursor = database.execute(
                "INSERT INTO prompts (key, prompt, answers, place, wanted, turn) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO NOTHING",
                row,
            )
            return cursor.rowcount == 1

    def items(self) -> dict[int, Item]:
        """All items by id, in the order in which they came."""
        with self._lock:
            rows = self._database.execute("SELECT id, key, prompt, answers, place FROM prompts ORDER BY id").fetchall()
        return {row[0]: _item(row) for row in rows}

    def item(self, number: int) -> Item:
        """An item; raises :class:`KeyError` if there is none of this number."""
        with self._lock:
            row = self._database.execute(
                "SELECT id, key, prompt, answers, place FROM prompts WHERE id = ?", (number,)
            ).fetchone()
        if row is None:
            raise KeyError(number)
        return _item(row)

    def find(self, prompt: Prompt, answers: Sequence[Completion]) -> Item | None:
        """The item with this prompt and these answers, in any order; None if there is none."""
        with self._lock:
            row = self._database.execute(
                "SELECT id, key, prompt, answers, place FROM prompts WHERE key = ?", (item_key(prompt, answers),)
            ).fetchone()
        return None if row is None else _item(row)

    # ------------------------------------------------------------------------------------------------------ handing out
    def next_task(self, annotator: str, *, now: float | None = None) -> tuple[Item, str] | None:
        """The item and the aspect that an annotator is to judge now; None if nothing is left for this one.

        What the annotator has begun comes first, and again until it is judged. A prompt is handed to no more annotators
        than its plan wants; one that was begun and left for :data:`LEASE` seconds, or skipped, goes to somebody else.
        """
        now = time.time() if now is None else now
        with self._writing() as database:
            row = database.execute(
                "SELECT prompt FROM assignments WHERE annotator = ? AND state = 'open' ORDER BY time DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            row = (
                row
                or database.execute(
                    "SELECT id FROM prompts AS p WHERE "
                    "NOT EXISTS (SELECT 1 FROM assignments WHERE prompt = p.id AND annotator = :me) AND "
                    "(SELECT count(*) FROM assignments WHERE prompt = p.id AND "
                    "(state = 'done' OR (state = 'open' AND time > :stale))) < wanted ORDER BY turn LIMIT 1",
                    {"me": annotator, "stale": now - LEASE},
                ).fetchone()
            )
            if row is None:
                return None
            database.execute(
                "INSERT INTO assignments VALUES (?, ?, ?, 'open') "
                "ON CONFLICT (prompt, annotator) DO UPDATE SET time = excluded.time",
                (row[0], annotator, now),
            )
            judged = self._judged(row[0], annotator)
        return self.item(row[0]), next(aspect for aspect in self.plan.aspects if aspect not in judged)

    def is_handed_out(self, item: int, annotator: str) -> bool:
        """Whether an item was given to an annotator."""
        with self._lock:
            found = self._database.execute(
                "SELECT 1 FROM assignments WHERE prompt = ? AND annotator = ?", (item, annotator)
            ).fetchone()
        return found is not None

    def _judged(self, prompt: int, annotator: str) -> dict[str, str | None]:
        """Aspects that an annotator has judged, with the reason where it was skipped."""
        return dict(
            self._database.execute(
                "SELECT aspect, skipped FROM judgements WHERE prompt = ? AND annotator = ? AND undone IS NULL",
                (prompt, annotator),
            ).fetchall()
        )

    def _settle_assignment(self, prompt: int, annotator: str, now: float) -> None:
        judged = self._judged(prompt, annotator)
        state = "open" if set(self.plan.aspects) - set(judged) else "done"
        if any(reason is not None for reason in judged.values()):
            state = "skipped"
        self._database.execute(
            "INSERT INTO assignments VALUES (?, ?, ?, ?) "
            "ON CONFLICT (prompt, annotator) DO UPDATE SET state = excluded.state, time = excluded.time",
            (prompt, annotator, now, state),
        )

    # ------------------------------------------------------------------------------------------------------- judgements
    def judge(
        self,
        key: str,
        item: Item,
        annotator: str,
        aspect: str,
        verdict: Verdict,
        *,
        seconds: float = math.nan,
        shown: Sequence[int] | None = None,
        now: float | None = None,
    ) -> bool:
        """Save a judgement; on return it is on disk. False if it was there under this key, taken back or not.

        Args:
            key: Of this judgement alone: who is not sure that it arrived sends it again, and it counts once.
            item, annotator, aspect, verdict: See :class:`Judgement`. A skip of one aspect skips those that are left.
            seconds: See :class:`Judgement`.
            shown: The order in which the answers were shown (default: the plan's).
            now: Time to note (default: now).

        Raises:
            ValueError: The verdict cannot be said of this item, or the aspect is none of the plan's.
            Conflict: The annotator has judged this before, under another key.
        """
        verdict.check(len(item.answers))
        if aspect not in self.plan.aspects:
            raise ValueError(f"aspect {aspect!r}: here it is one of {', '.join(self.plan.aspects)}")
        now = time.time() if now is None else now
        shown = self.plan.shown(item.key, annotator, len(item.answers)) if shown is None else tuple(shown)
        said = (_dump(verdict.ranks), verdict.strength, _dump(sorted(verdict.unsafe)), verdict.skipped)
        row = (key, item.id, annotator, aspect, now, None if math.isnan(seconds) else seconds, _dump(shown), *said)
        with self._writing() as database:
            known = database.execute(
                "SELECT prompt, annotator, aspect FROM judgements WHERE key = ?", (key,)
            ).fetchone()
            if known == (item.id, annotator, aspect):
                return False
            if known is not None:
                raise ValueError("this key is that of another judgement")
            if aspect in self._judged(item.id, annotator):
                raise Conflict("you have judged this before, perhaps in another tab: undo it first")
            database.execute(
                "INSERT INTO judgements (key, prompt, annotator, aspect, time, seconds, shown, ranks, strength, "
                "unsafe, skipped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            self._settle_assignment(item.id, annotator, now)
        return True

    def undo(self, annotator: str, *, now: float | None = None) -> Judgement | None:
        """Take back the annotator's last judgement that stands, which becomes the next task again; None without one."""
        now = time.time() if now is None else now
        with self._writing() as database:
            last = database.execute(
                f"SELECT {_COLUMNS} FROM judgements WHERE annotator = ? AND undone IS NULL ORDER BY id DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                return None
            database.execute("UPDATE judgements SET undone = ? WHERE id = ?", (now, last[0]))
            self._settle_assignment(last[1], annotator, now)
        return _judgement(last, {last[1]: self.item(last[1])})

    def judgements(self) -> list[Judgement]:
        """All that stand, in the order in which they were made."""
        with self._lock:
            rows = self._database.execute(
                f"SELECT {_COLUMNS} FROM judgements WHERE undone IS NULL ORDER BY id"
            ).fetchall()
        items = self.items()
        return [_judgement(row, items) for row in rows]

    def progress(self, annotator: str) -> dict[str, Any]:
        """How far the work is.

        Returns:
            ``items``; ``wanted`` judgements of them and how many are ``done``; ``judged`` and ``skipped`` items of this
            annotator; ``pace``, the median seconds of this one's last 20 judgements (None before the first).
        """
        with self._lock:
            items, wanted = self._database.execute("SELECT count(*), coalesce(sum(wanted), 0) FROM prompts").fetchone()
            done = self._database.execute("SELECT count(*) FROM assignments WHERE state = 'done'").fetchone()[0]
            mine: Mapping[str, int] = dict(
                self._database.execute(
                    "SELECT state, count(*) FROM assignments WHERE annotator = ? GROUP BY state", (annotator,)
                ).fetchall()
            )
            paces = [
                seconds
                for (seconds,) in self._database.execute(
                    "SELECT seconds FROM judgements WHERE annotator = ? AND undone IS NULL AND seconds IS NOT NULL "
                    "ORDER BY id DESC LIMIT 20",
                    (annotator,),
                )
            ]
        pace = sorted(paces)[len(paces) // 2] if paces else None
        own = {"judged": mine.get("done", 0), "skipped": mine.get("skipped", 0)}
        return {"items": items, "wanted": wanted, "done": done, **own, "pace": pace}


_COLUMNS = "id, prompt, annotator, aspect, time, seconds, shown, ranks, strength, unsafe, skipped"


def item_key(prompt: Prompt, answers: Sequence[Completion]) -> str:
    """What tells an item from others: the prompt and its answers in any order."""
    return key_of(prompt, sorted(map(key_of, answers)))


def _item(row: Sequence[Any]) -> Item:
    number, key, prompt, answers, place = row
    return Item(number, key, json.loads(prompt), tuple(json.loads(answers)), place)


def _judgement(row: Sequence[Any], items: Mapping[int, Item]) -> Judgement:
    _, prompt, annotator, aspect, when, seconds, shown, ranks, strength, unsafe, skipped = row
    verdict = Verdict(tuple(json.loads(ranks)), strength, tuple(json.loads(unsafe)), skipped)
    took = math.nan if seconds is None else seconds
    return Judgement(items[prompt], annotator, aspect, verdict, tuple(json.loads(shown)), when, took)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
