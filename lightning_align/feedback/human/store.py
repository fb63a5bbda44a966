"""Prompts, answers and judgements in one SQLite file, in which every judgement is on disk before it is answered for.

Nothing is ever deleted: who takes a judgement back marks it as undone. Several threads and several servers may use a
file at once.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning_align.data.templates import Completion, Prompt
from lightning_align.feedback.human.database import Database
from lightning_align.feedback.human.tasks import Item, Judgement, Plan, Verdict
from lightning_align.feedback.journal import key_of

LEASE = 30 * 60.0  # seconds after which what somebody began and left is handed to others


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
        self._database = Database(path, plan)
        self.plan = self._database.plan

    def close(self) -> None:
        """Close the file; whoever is killed instead loses nothing."""
        self._database.close()

    def together(self) -> AbstractContextManager[None]:
        """What is added within it is saved at once at its end, or not at all."""
        return self._database.writing()

    # ------------------------------------------------------------------------------------------------------- items
    def add(self, prompt: Prompt, answers: Sequence[Completion], place: str) -> bool:
        """Add an item; False if the same one, with the same answers in any order, is there."""
        key = item_key(prompt, answers)
        with self._database.writing():
            (number,) = self._database.row("SELECT count(*) FROM prompts")
            row = (key, _dump(prompt), _dump(list(answers)), place, self.plan.wanted(number), self.plan.turn(key))
            added = self._database.write(
                "INSERT INTO prompts (key, prompt, answers, place, wanted, turn) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO NOTHING",
                row,
            )
        return added == 1

    def items(self) -> dict[int, Item]:
        """All items by id, in the order in which they came."""
        return {row[0]: _item(row) for row in self._database.rows(f"{_ITEM} ORDER BY id")}

    def item(self, number: int) -> Item:
        """An item; raises :class:`KeyError` if there is none of this number."""
        row = self._database.row(f"{_ITEM} WHERE id = ?", (number,))
        if row is None:
            raise KeyError(number)
        return _item(row)

    def find(self, prompt: Prompt, answers: Sequence[Completion]) -> Item | None:
        """The item with this prompt and these answers, in any order; None if there is none."""
        row = self._database.row(f"{_ITEM} WHERE key = ?", (item_key(prompt, answers),))
        return None if row is None else _item(row)

    # ------------------------------------------------------------------------------------------------------ handing out
    def next_task(self, annotator: str, *, now: float | None = None) -> tuple[Item, str] | None:
        """The item and the aspect that an annotator is to judge now; None if nothing is left for this one.

        What the annotator has begun comes first, and again until it is judged. A prompt is handed to no more annotators
        than its plan wants; one that was begun and left for :data:`LEASE` seconds, or skipped, goes to somebody else.
        """
        now = time.time() if now is None else now
        with self._database.writing():
            row = self._database.row(
                "SELECT prompt FROM assignments WHERE annotator = ? AND state = 'open' ORDER BY time DESC LIMIT 1",
                (annotator,),
            ) or self._database.row(
                "SELECT id FROM prompts AS p WHERE "
                "NOT EXISTS (SELECT 1 FROM assignments WHERE prompt = p.id AND annotator = :me) AND "
                "(SELECT count(*) FROM assignments WHERE prompt = p.id AND "
                "(state = 'done' OR (state = 'open' AND time > :stale))) < wanted ORDER BY turn LIMIT 1",
                {"me": annotator, "stale": now - LEASE},
            )
            if row is None:
                return None
            self._database.write(
                "INSERT INTO assignments VALUES (?, ?, ?, 'open') "
                "ON CONFLICT (prompt, annotator) DO UPDATE SET time = excluded.time",
                (row[0], annotator, now),
            )
            judged = self._judged(row[0], annotator)
        return self.item(row[0]), next(aspect for aspect in self.plan.aspects if aspect not in judged)

    def is_handed_out(self, item: int, annotator: str) -> bool:
        """Whether an item was given to an annotator."""
        found = self._database.row("SELECT 1 FROM assignments WHERE prompt = ? AND annotator = ?", (item, annotator))
        return found is not None

    def _judged(self, prompt: int, annotator: str) -> dict[str, str | None]:
        """Aspects that an annotator has judged, with the reason where it was skipped."""
        return dict(
            self._database.rows(
                "SELECT aspect, skipped FROM judgements WHERE prompt = ? AND annotator = ? AND undone IS NULL",
                (prompt, annotator),
            )
        )

    def _settle_assignment(self, prompt: int, annotator: str, now: float) -> None:
        judged = self._judged(prompt, annotator)
        state = "open" if set(self.plan.aspects) - set(judged) else "done"
        if any(reason is not None for reason in judged.values()):
            state = "skipped"
        self._database.write(
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
        with self._database.writing():
            known = self._database.row("SELECT prompt, annotator, aspect FROM judgements WHERE key = ?", (key,))
            if known == (item.id, annotator, aspect):
                return False
            if known is not None:
                raise ValueError("this key is that of another judgement")
            if aspect in self._judged(item.id, annotator):
                raise Conflict("you have judged this before, perhaps in another tab: undo it first")
            self._database.write(
                "INSERT INTO judgements (key, prompt, annotator, aspect, time, seconds, shown, ranks, strength, "
                "unsafe, skipped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            self._settle_assignment(item.id, annotator, now)
        return True

    def undo(self, annotator: str, *, last: int | None = None, now: float | None = None) -> Judgement | None:
        """Take back the annotator's last judgement that stands, which becomes the next task again; None without one.

        Args:
            annotator: Name.
            last: ``last`` of :meth:`progress`; who is not sure that it arrived sends it again, and it counts once.
            now: Time to note (default: now).

        Raises:
            Conflict: Another judgement is the last one by now.
        """
        now = time.time() if now is None else now
        with self._database.writing():
            found = self._database.row(
                f"{_JUDGEMENT} WHERE annotator = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", (annotator,)
            )
            if last is not None and (found is None or found[0] != last):
                raise Conflict("this is undone already")
            if found is None:
                return None
            self._database.write("UPDATE judgements SET undone = ? WHERE id = ?", (now, found[0]))
            self._settle_assignment(found[1], annotator, now)
        return _judgement(found, {found[1]: self.item(found[1])})

    def judgements(self) -> list[Judgement]:
        """All that stand, in the order in which they were made."""
        rows = self._database.rows(f"{_JUDGEMENT} WHERE undone IS NULL ORDER BY id")
        items = self.items()
        return [_judgement(row, items) for row in rows]

    def progress(self, annotator: str) -> dict[str, Any]:
        """How far the work is.

        Returns:
            ``items``; ``wanted`` judgements of them and how many are ``done``; ``judged`` and ``skipped`` items of this
            annotator; ``pace``, the median seconds of this one's last 20 judgements, and ``last``, the number of the
            last one (None before the first).
        """
        items, wanted = self._database.row("SELECT count(*), coalesce(sum(wanted), 0) FROM prompts")
        (done,) = self._database.row("SELECT count(*) FROM assignments WHERE state = 'done'")
        mine: Mapping[str, int] = dict(
            self._database.rows(
                "SELECT state, count(*) FROM assignments WHERE annotator = ? GROUP BY state", (annotator,)
            )
        )
        paces = [
            seconds
            for (seconds,) in self._database.rows(
                "SELECT seconds FROM judgements WHERE annotator = ? AND undone IS NULL AND seconds IS NOT NULL "
                "ORDER BY id DESC LIMIT 20",
                (annotator,),
            )
        ]
        pace = sorted(paces)[len(paces) // 2] if paces else None
        (last,) = self._database.row(
            "SELECT max(id) FROM judgements WHERE annotator = ? AND undone IS NULL", (annotator,)
        )
        own = {"last": last, "judged": mine.get("done", 0), "skipped": mine.get("skipped", 0)}
        return {"items": items, "wanted": wanted, "done": done, **own, "pace": pace}


_ITEM = "SELECT id, key, prompt, answers, place FROM prompts"
_JUDGEMENT = (
    "SELECT id, prompt, annotator, aspect, time, seconds, shown, ranks, strength, unsafe, skipped FROM judgements"
)


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
