"""What the reader and the encoder did to the data, for the plan that is printed before training."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lightning_align.data.records import Kind

NAMED = 5  # files named one by one


@dataclass
class Report:
    """Counts of one source of data; the readers begin it, the encoder adds its own with :meth:`note`.

    Attributes:
        source: What was asked for, as the user wrote it.
        kind: Kind of the records that came out.
        files: Number of files read (0 for a hub id, a saved dataset or the playground).
        read: Records found.
        kept: Records that came out; a conversion may make several of one, or one of several.
        conversions: Records by what was done to them, for example ``hh transcript → conversation``.
        bad: Records left out because something is wrong with them (``on_bad_record: skip``).
        dropped: Records left out, by reason: the bad ones, and those that rightly gave none.
        examples: Place of the first record left out, by reason, with the value at fault and the cure.
        unused: Records by column that was left out of them.
        ignored: Files of a folder that hold no records of this kind.
        notes: What later stages add, by name, in order.
    """

    source: str
    kind: Kind
    files: int = 0
    read: int = 0
    kept: int = 0
    bad: int = 0
    conversions: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    ignored: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def converted(self, what: str, count: int = 1) -> None:
        """Count records that were converted."""
        self.conversions[what] += count

    def drop(self, reason: str, place: str, count: int = 1) -> None:
        """Count a record that was left out; the first place of each reason is kept."""
        self.dropped[reason] += count
        self.examples.setdefault(reason, place)

    def note(self, name: str, value: Any) -> None:
        """Set a later stage's count or statement (``tokens``, ``truncated records``, …)."""
        self.notes[name] = value

    def lines(self) -> list[str]:
        """The report for people, one statement a line."""
        files = f" from {count(self.files, 'file')}" if self.files else ""
        kept = f"{self.kept:,} of kind {self.kind} kept"
        lines = [f"{self.source}: {count(self.read, 'record')} read{files}, {kept}"]
        lines += [f"  converted: {count:,} {what}" for what, count in self.conversions.items()]
        lines += [
            f"  dropped: {count:,} {reason} (first: {self.examples[reason]})" for reason, count in self.dropped.items()
        ]
        if self.unused:
            lines.append("  columns not used: " + ", ".join(f"{name} ({n:,})" for name, n in self.unused.items()))
        if self.ignored:
            more = f" and {len(self.ignored) - NAMED:,} more" if len(self.ignored) > NAMED else ""
            lines.append(f"  files not read: {', '.join(self.ignored[:NAMED])}{more}")
        lines += [f"  {name}: {_shown(value)}" for name, value in self.notes.items()]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report for ``run.json``: plain dictionaries, texts and numbers."""
        dropped = {reason: {"count": n, "first": self.examples[reason]} for reason, n in self.dropped.items()}
        counts = {"files": self.files, "read": self.read, "kept": self.kept, "bad": self.bad, "dropped": dropped}
        columns = {"conversions": dict(self.conversions), "unused": dict(self.unused)}
        rest = {"ignored": list(self.ignored), "notes": dict(self.notes)}
        return {"source": self.source, "kind": self.kind, **counts, **columns, **rest}


def count(number: int, noun: str) -> str:
    """``3 records``, ``1 record``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
