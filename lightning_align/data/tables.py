"""Records as flat arrays of tokens, cut to the longest length allowed, with a count of everything that was changed.

Lists of unequal length are stored end to end with the index where each starts, so that millions of records are a few
arrays, which can be hashed, cached and mapped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.encode import Encoded
from lightning_align.data.report import Report
from lightning_align.data.templates import ConversationError
from lightning_align.errors import UserError

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]
OnOverflow = Literal["error", "drop", "truncate"]


@dataclass
class Counts:
    """What encoding did to the records.

    Attributes:
        records: Records that came out.
        tokens: Tokens that came out.
        loss_tokens: Those that carry loss (of preferences: tokens of completions).
        truncated: Records that lost tokens.
        tokens_cut: Tokens lost.
        ends_lost: Sequences that lost the token that ends them.
        sequences: Completions, documents or conversations.
        ended: Those whose last token ends them, and carries loss.
        split_seams: Those whose completion begins within a token of prompt and completion taken as one text.
        turns_without_loss: Turns of the assistant that should carry loss, but could not be told from the others.
        other_headers: Sequences in which an answer begins with something else than the generation prompt.
        dropped: Number of records left out, and the place of the first, by reason.
    """

    records: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    ends_lost: int = 0
    sequences: int = 0
    ended: int = 0
    split_seams: int = 0
    turns_without_loss: int = 0
    other_headers: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        """Count a record that is left out."""
        number, first = self.dropped.get(reason, (0, place))
        self.dropped[reason] = (number + 1, first)

    def add_record(self, tokens: int, loss_tokens: int, *, tokens_cut: int = 0) -> None:
        """Count a record that came out."""
        self.records += 1
        self.tokens += tokens
        self.loss_tokens += loss_tokens
        self.truncated += tokens_cut > 0
        self.tokens_cut += tokens_cut

    def add_sequence(self, *, had_end: bool, has_end: bool, encoded: Encoded | None = None) -> None:
        """Count a completion, document or conversation."""
        self.sequences += 1
        self.ended += has_end
        self.ends_lost += had_end and not has_end
        if encoded is not None:
            self.split_seams += encoded.split_seam
            self.turns_without_loss += encoded.turns_without_loss
            self.other_headers += encoded.other_header

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Counts":
        """Undo :meth:`to_dict`."""
        dropped = {reason: (number, first) for reason, (number, first) in values["dropped"].items()}
        return cls(**{**values, "dropped": dropped})

    def note(self, report: Report) -> None:
        """Tell the report."""
        report.note("tokens", self.tokens)
        if self.sequences:
            report.note("tokens with loss", self.loss_tokens)
            report.note("samples that end in a learnt EOS", f"{self.ended / self.sequences:.1%}")
        report.note("records truncated", self.truncated)
        self.note_losses(report)

    def note_losses(self, report: Report, prefix: str = "") -> None:
        """Tell the report only what was lost or is unusual."""
        losses = {
            "tokens cut": self.tokens_cut,
            "EOS lost by truncation": self.ends_lost,
            "completions that begin within a token of the prompt": self.split_seams,
            "assistant turns without loss: template writes them differently inside a conversation": (
                self.turns_without_loss
            ),
            "sequences whose answer does not begin with the template's generation prompt": self.other_headers,
        }
        for name, value in losses.items():
            if value:
                report.note(prefix + name, value)
        for reason, (number, first) in self.dropped.items():
            report.drop(prefix + reason, first, number)


@dataclass(frozen=True)
class Limit:
    """The longest sequence, and what happens to longer ones."""

    tokens: int
    on_overflow: OnOverflow

    def admits(self, parts: Mapping[str, int], place: str, counts: Counts) -> bool:
        """False for a record to drop; a record to keep may still be too long, and is to be cut then."""
        length = sum(parts.values())
        if length <= self.tokens or self.on_overflow == "truncate":
            return True
        if self.on_overflow == "error":
            detail = ", ".join(f"{name} {number}" for name, number in parts.items())
            raise UserError(
                f"{place}: {length} tokens ({detail}), but at most {self.tokens} fit: raise data.max_length, shorten "
                "the record, or set data.on_overflow to truncate or drop"
            )
        counts.drop(f"longer than {self.tokens} tokens", place)
        return False

    def split(self, prompt: int, completion: int) -> tuple[int, int]:
        """Tokens to keep: the prompt gives way first, down to half of the room, then the completion loses its end."""
        keep = min(completion, self.tokens - min(prompt, self.tokens // 2))
        return min(prompt, self.tokens - keep), keep


def encode_good(
    encode: Callable[[Sequence[Any], Sequence[str]], Sequence[T]],
    records: Sequence[Any],
    places: Sequence[str],
    counts: Counts,
    skip_bad: bool,
) -> list[T | None]:
    """What ``encode`` makes of the records; None, and counted, for those that it refuses, if these are to be skipped.

    Whoever is refused is found by halving.
    """
    try:
        return list(encode(records, places))
    except ConversationError as error:
        if not skip_bad:
            raise UserError(f"{error} (on_bad_record: skip drops such records)") from error
        if len(records) == 1:
            counts.drop(error.reason, places[0])
            return [None]
    middle = len(records) // 2
    halves = ((records[:middle], places[:middle]), (records[middle:], places[middle:]))
    return [row for half in halves for row in encode_good(encode, *half, counts, skip_bad)]


def keep_last(ids: list[int], number: int, bos_id: int | None) -> list[int]:
    """The last tokens of a prompt; BOS stays in front."""
    if number >= len(ids):
        return ids
    head = ids[:1] if number and ids[:1] == [bos_id] else []
    return head + ids[len(ids) - number + len(head) :]


def flat(rows: Sequence[Sequence[Any]], dtype: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows end to end, and where each starts ``[N + 1]``."""
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    values = np.fromiter((value for row in rows for value in row), dtype=dtype, count=int(starts[-1]))
    return values, starts


def joined(parts: Sequence[Arrays], starts: Mapping[str, str]) -> Arrays:
    """Arrays of chunks end to end. ``starts`` names the arrays of starts, each with the array that it points into."""
    result: Arrays = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if name in starts:
            offsets = np.cumsum([0, *(len(part[starts[name]]) for part in parts)])
            # the last start of a chunk is the first of the next
            columns = [column[:-1] + offset for column, offset in zip(columns, offsets[:-1], strict=True)]
            columns.append(offsets[-1:].astype(np.int64))
        result[name] = np.concatenate(columns)
    return result
