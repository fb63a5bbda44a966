"""Which records train and which are held out."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning_align.data.readers import Loaded, available_splits, load_records
from lightning_align.data.records import Kind
from lightning_align.data.report import Report, count
from lightning_align.data.sources import PLAYGROUND
from lightning_align.data.templates import ASSISTANT

SplitName = Literal["train", "val", "test"]
TEXT_FIELDS = ("text", "prompt", "messages", "completion", "chosen", "rejected", "completions")


class Split(NamedTuple):
    """Records and where each comes from."""

    records: list[dict[str, Any]]
    places: list[str]


class Splits:
    """The splits of a source, each read when it is first asked for.

    Validation records are those of ``val_path``; else the source's own validation split; else a fraction of the
    training records. Test records are the source's own test split, else the validation records.

    Args:
        path, columns, on_bad_record, playground: See ``load_records``.
        kind: Kind of the records.
        val_path: Another source, for validation.
        val_fraction: Share of the records to hold out.
        leave_out: (k, K): nobody sees the k-th, from 1, of K parts of the training records.
    """

    def __init__(
        self,
        path: str,
        kind: Kind,
        *,
        val_path: str | None,
        val_fraction: float,
        leave_out: tuple[int, int] | None,
        columns: Mapping[str, str] | None,
        on_bad_record: Literal["error", "skip"],
        playground: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.kind = kind
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.leave_out = leave_out
        self.columns = columns
        self.on_bad_record = on_bad_record
        self.playground = playground
        self.report: Report | None = None
        self._splits: dict[SplitName, Split] = {}

    def read(self, split: SplitName) -> Split:
        """The records of a split; none where nothing is held out."""
        if split not in self._splits:
            self._read(split)
        return self._splits[split]

    def _read(self, split: SplitName) -> None:
        own = available_splits(self.path, self.kind)
        if split == "test" and "test" not in own:
            self._splits["test"] = self.read("val")
        elif split == "val" and self.val_path is not None:
            self._splits["val"] = self._load(self.val_path, "val")
        elif split != "train" and split in own:
            self._splits[split] = self._load(self.path, split)
        else:
            loaded = self._load(self.path, "train")
            if self.val_path is not None or "val" in own:
                self._splits["train"] = loaded
            else:
                self._hold_out(loaded)
            if self.leave_out is not None:
                self._splits["train"] = self._without_fold(self._splits["train"], *self.leave_out)

    def _load(self, path: str, split: SplitName) -> Split:
        options = dict(self.playground) if path == PLAYGROUND else None
        if options is not None and split != "train":
            options.pop("size", None)  # of the training records; held-out ones keep theirs
        columns = self.columns if path == self.path or path != PLAYGROUND else None
        loaded = load_records(
            path, self.kind, split=split, columns=columns, on_bad_record=self.on_bad_record, playground=options
        )
        self._note(loaded, path, split)
        return Split(loaded.records, loaded.places)

    def _note(self, loaded: Loaded, path: str, split: SplitName) -> None:
        if self.report is None:
            self.report = loaded.report
            return
        self.report.note(
            split,
            f"{count(len(loaded.records), 'record')} of {path}" + ("" if path != self.path else f", {split} split"),
        )
        for reason, number in loaded.report.dropped.items():
            self.report.drop(f"{split}: {reason}", loaded.report.examples[reason], number)

    def _hold_out(self, loaded: Split) -> None:
        held = hold_out(loaded.records, self.val_fraction)
        self._splits["train"] = _select(loaded, [index for index, is_held in enumerate(held) if not is_held])
        self._splits["val"] = _select(loaded, [index for index, is_held in enumerate(held) if is_held])
        assert self.report is not None
        share = f"{self.val_fraction:.1%} of the prompts, by data.val_fraction"
        said = f"{count(sum(held), 'record')} held out ({share})" if any(held) else "no records are held out"
        self.report.note("val", said)

    def _without_fold(self, split: Split, fold: int, folds: int) -> Split:
        kept = [index for index, record in enumerate(split.records) if _hash(record) % folds != fold - 1]
        assert self.report is not None
        missing = count(len(split.records) - len(kept), "record")
        self.report.note("left out", f"{missing}, part {fold} of {folds} by the prompts (data.leave_out)")
        return _select(split, kept)


def _select(split: Split, indices: Sequence[int]) -> Split:
    return Split([split.records[index] for index in indices], [split.places[index] for index in indices])


def hold_out(records: Sequence[Mapping[str, Any]], fraction: float) -> list[bool]:
    """Which records belong to the validation set, by a hash of their prompt: neither order nor added records move any.

    All records of one prompt (or text, or what a conversation begins with before its first answer) are on the same
    side. There is at least one on each side, as long as there are two different prompts; a fraction of 0 holds out
    nothing.
    """
    numbers = [_number(record) for record in records]
    different = sorted(set(numbers))
    if fraction == 0 or len(different) < 2:
        return [False] * len(records)
    limit = min(max(fraction, different[0]), different[-2])
    return [number <= limit for number in numbers]


def _number(record: Mapping[str, Any]) -> float:
    """Evenly distributed on [0, 1), the same for the same prompt."""
    return _hash(record) / 2**64


def _hash(record: Mapping[str, Any]) -> int:
    """64 bits of the prompt, of which the last say nothing of the first."""
    content = next(record[name] for name in ("text", "prompt", "messages") if name in record)
    if "messages" in record:
        content = _question(content)
    return int.from_bytes(hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest())


def _question(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The turns before the first answer; a greeting, which answers nobody, is none. Without an answer, all turns."""
    asked = False
    for index, message in enumerate(messages):
        if asked and message["role"] == ASSISTANT:
            return messages[:index]
        asked = asked or message["role"] == "user"
    return messages


def texts(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every text in the records, for training a tokenizer."""
    for record in records:
        for name in TEXT_FIELDS:
            yield from _strings(record.get(name, ()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield value["content"]
    else:
        for item in value:
            yield from _strings(item)
