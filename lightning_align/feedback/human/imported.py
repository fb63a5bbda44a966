"""What people said of answers elsewhere, and the way into a store."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from lightning_align.data.files import Row
from lightning_align.data.records import RecordError, check_side, validate
from lightning_align.data.templates import Completion, Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.human.store import Conflict, Store
from lightning_align.feedback.human.tasks import MOST_ANSWERS, OVERALL, Verdict
from lightning_align.feedback.journal import key_of


class Opinion(NamedTuple):
    """What one person said of the answers of one record; their numbers are those of the record."""

    annotator: str
    verdict: Verdict
    time: float | None = None
    seconds: float = math.nan


class Found(NamedTuple):
    """A prompt, its answers in the order of their fields, and what was said of them."""

    prompt: Prompt
    answers: tuple[Completion, ...]
    opinions: list[Opinion]


class Reader(Protocol):
    """Of one format.

    Attributes:
        left_out: How many judgements were left out, by reason.
        notes: What is to be known of the file.
    """

    left_out: Counter[str]
    notes: list[str]

    def read(self, record: Mapping[str, Any]) -> Found | None:
        """What a record says; None if it has no answers to compare. Raises :class:`RecordError` if it is malformed."""


class Imported(NamedTuple):
    """What came into a store.

    Attributes:
        counts: ``records``; ``items`` that are new; ``judgements`` and ``skips`` added; judgements that were ``there``.
        left_out: Judgements or records that were left out, by reason.
    """

    counts: Counter[str]
    left_out: Counter[str]


# ------------------------------------------------------------------------------------------------------- the way in
def collect(rows: Iterable[Row], reader: Reader, *, skips_bad: bool) -> list[tuple[str, Found]]:
    """What all records say, each with its place.

    Raises:
        UserError: A record is malformed, and ``skips_bad`` is false.
    """
    found = []
    for row in rows:
        try:
            if isinstance(row.fields, RecordError):
                raise row.fields
            said = reader.read(row.fields)
        except RecordError as error:
            if not skips_bad:
                raise UserError(f"{row.place}: {error} (--on_bad_record skip leaves such records out)") from error
            reader.left_out[f"malformed records: {error.category}"] += 1
        else:
            if said is not None:
                found.append((row.place, said))
    return found


def put(store: Store, found: Iterable[tuple[str, Found]], source: str) -> Imported:
    """Put items and what was said of them into a store; what is there is left as it is.

    A judgement's key is made of what it says, so that it counts once however often it is read, also from an export that
    has grown since. An item that is there, with its answers in any order, is not added again.
    """
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for place, (prompt, answers, opinions) in found:
        counts["records"] += 1
        counts["items"] += store.add(prompt, answers, place)
        item = store.find(prompt, answers)
        assert item is not None  # it was just added, or there
        numbers = [item.answers.index(answer) for answer in answers]  # where the record's answers are in the item
        for annotator, verdict, time, seconds in opinions:
            ranks = tuple(verdict.ranks[numbers.index(n)] for n in range(len(numbers))) if verdict.ranks else ()
            moved = Verdict(ranks, skipped=verdict.skipped)
            said = sorted(zip(map(key_of, item.answers), ranks, strict=True)) if ranks else verdict.skipped
            key = key_of("import", source, item.key, annotator, said)
            try:
                is_new = store.judge(key, item, annotator, OVERALL, moved, seconds=seconds, shown=(), now=time)
            except Conflict:
                left_out["second judgements by the same annotator of the same answers"] += 1
            else:
                counts[("skips" if moved.skipped else "judgements") if is_new else "there"] += 1
    return Imported(counts, left_out)


# ------------------------------------------------------------------------------------------------- values of records
def item_of(prompt: tuple[str, Any], answers: Sequence[tuple[str, Any]], left_out: Counter[str]) -> tuple[Any, Any]:
    """Prompt and answers as the store keeps them, all texts or all messages; without answers if they cannot be ranked.

    Args:
        prompt, answers: Names of fields with their values.
        left_out: Where it is counted why they cannot be ranked.
    """
    said = check_side(*prompt)
    if any(value is None or (isinstance(value, str) and not value.strip()) for _, value in answers):
        left_out["records without a text for every answer"] += 1
        return said, ()
    sides = [check_side(*answer) for answer in answers]
    if isinstance(said, list) or any(isinstance(side, list) for side in sides):
        said = [{"role": "user", "content": said}] if isinstance(said, str) else said
        sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
    if len(set(map(key_of, sides))) < len(sides):
        left_out["records in which two answers are the same"] += 1
        return said, ()
    if not 2 <= len(sides) <= MOST_ANSWERS:
        left_out[f"records with fewer than 2 or more than {MOST_ANSWERS} answers"] += 1
        return said, ()
    record = validate("ranked", {"prompt": said, "completions": sides, "ranks": [1] * len(sides)})
    return record["prompt"], tuple(record["completions"])


def seconds_since_1970(name: str, value: Any) -> float | None:
    """A time as ISO 8601 writes it, in UTC where it names no zone; None stays None."""
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise RecordError(name, "is no time", "write it as 2025-01-31T12:00:00Z", found=repr(value)) from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
