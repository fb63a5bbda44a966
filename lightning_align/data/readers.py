"""Records from wherever they lie: files, folders, saved datasets, the hub, the playground."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning_align.data.cells import typed
from lightning_align.data.convert import detect_kind, missing, read_record, source_kind
from lightning_align.data.derive import Item, derivable, derive
from lightning_align.data.files import Row
from lightning_align.data.misspelt import check_left_sides
from lightning_align.data.records import KINDS, Kind, Record, RecordError
from lightning_align.data.report import Report, count
from lightning_align.data.sources import available_splits, open_source
from lightning_align.errors import UserError, nearest

__all__ = [
    "Loaded",
    "available_splits",
    "detect_kind",
    "detect_source_kind",
    "fields_of",
    "first_fields",
    "load_records",
]
OnBadRecord = Literal["error", "skip"]


class Loaded(NamedTuple):
    """What was read.

    Attributes:
        records: Records with canonical fields (see docs/data.md).
        places: Where each comes from: ``"pairs.jsonl line 7"``, ``"dataset row 3"``, ``"playground record 5"``.
        report: What was found, converted and dropped.
    """

    records: list[Record]
    places: list[str]
    report: Report


def load_records(
    path: str,
    kind: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_record: OnBadRecord = "error",
    playground: Mapping[str, Any] | None = None,
) -> Loaded:
    """Records of a kind, checked and normalised.

    Args:
        path: A file (``.jsonl`` ``.json`` ``.parquet`` ``.csv`` ``.txt``, also ``.gz`` and ``.zst``), a folder of them,
            a dataset saved by ``datasets``, a hub id (``owner/name`` or ``owner/name:config``), or ``playground``.
        kind: What is wanted. Records of another kind are converted where there is only one way to do it.
        split: ``train``, ``val`` or ``test``; ignored by a source that does not tell them apart itself
            (see :func:`available_splits`).
        columns: Our field to their column.
        on_bad_record: ``error`` stops at the first one, ``skip`` drops and counts them.
        playground: Options of ``lightning_align.playground.records``.

    Raises:
        UserError: The source cannot be read, a record is bad, or nothing is left.
    """
    wanted = check_kind(kind)
    if on_bad_record not in ("error", "skip"):
        raise UserError(f"on_bad_record is {on_bad_record!r}: it is error or skip")
    source = open_source(path, wanted, split, playground)
    report = Report(source=path, kind=wanted, files=source.files, ignored=list(source.ignored))
    check_left_sides(columns or {}, wanted)
    rows = list(source.rows)
    _check_columns(columns or {}, rows, path)
    items = _Reader(wanted, columns or {}, on_bad_record, report).read(rows)
    if not items:
        raise UserError(_nothing_left(report))
    report.kept = len(items)
    return Loaded([item.record for item in items], [item.place for item in items], report)


def detect_source_kind(
    path: str, *, split: str = "train", columns: Mapping[str, str] | None = None, wanted: Kind = "text"
) -> Kind | None:
    """The kind of the first record of a source, by its fields; None for the playground, which has every kind.

    Args:
        path, split, columns: See :func:`load_records`.
        wanted: What is going to be asked for; plain text files are read for ``text`` only.
    """
    if path == "playground":
        return None
    return detect_kind(first_fields(path, split=split, columns=columns, wanted=wanted))


def first_fields(
    path: str, *, split: str = "train", columns: Mapping[str, str] | None = None, wanted: Kind = "text"
) -> Record:
    """The fields of the first record of a source that can be read, under our names; none if there is no record.

    Args:
        path, split, columns, wanted: See :func:`detect_source_kind`.
    """
    check_left_sides(columns or {}, None)
    bad: Row | None = None
    for row in open_source(path, wanted, split, None).rows:
        if not isinstance(row.fields, RecordError):
            return fields_of(row, columns or {})
        bad = bad or row
    if bad is not None:
        raise UserError(f"{bad.place}: {bad.fields}; no other record can be read either")
    return {}


def check_kind(kind: str) -> Kind:
    """A kind by its name."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of records {kind!r}{nearest(kind, KINDS)} (there are {', '.join(KINDS)})")
    return kind


def _nothing_left(report: Report) -> str:
    if not report.read:
        return f"{report.source} holds no records"
    reasons = [f"{number:,}: {reason} (first: {report.examples[reason]})" for reason, number in report.dropped.items()]
    return f"{report.source}: nothing is left of {count(report.read, 'record')}; dropped {'; '.join(reasons)}"


def _check_columns(columns: Mapping[str, str], rows: Sequence[Row], path: str) -> None:
    """Every column that is to be renamed is in some record."""
    if not columns:
        return
    there = dict.fromkeys(name for row in rows if not isinstance(row.fields, RecordError) for name in row.fields)
    for ours, theirs in columns.items():
        if theirs not in there:
            hint = f"{nearest(theirs, there)} (there is {', '.join(there)})"
            raise UserError(f"{path} has no column {theirs!r} for {ours}{hint}")


def fields_of(row: Row, columns: Mapping[str, str]) -> Record:
    """The fields of a row under our names; a null is no value, because tables fill up with nulls."""
    assert not isinstance(row.fields, RecordError)
    renamed = {name: value for name, value in row.fields.items() if name not in columns.values()}
    renamed |= {ours: row.fields[theirs] for ours, theirs in columns.items() if theirs in row.fields}
    values = typed(renamed) if row.is_cells else renamed
    return {name: value for name, value in values.items() if value is not None}


class _Reader:
    """Rows to records of one kind, with every step counted."""

    def __init__(self, wanted: Kind, columns: Mapping[str, str], on_bad_record: OnBadRecord, report: Report) -> None:
        self.wanted = wanted
        self.columns = columns
        self.skips = on_bad_record == "skip"
        self.report = report

    def read(self, rows: Sequence[Row]) -> list[Item]:
        """The records, in order; those of another kind after those of the wanted one."""
        by_kind: dict[Kind, list[Item]] = {}
        for row in rows:
            self.report.read += 1
            try:
                found, items = self._row(row)
            except RecordError as error:
                self._bad(row.place, error)
            else:
                by_kind.setdefault(found, []).extend(items)
        result = by_kind.pop(self.wanted, [])
        for found, items in by_kind.items():
            result += self._derive(found, items)
        return result

    def _row(self, row: Row) -> tuple[Kind, list[Item]]:
        if isinstance(row.fields, RecordError):
            raise row.fields
        fields = fields_of(row, self.columns)
        found = source_kind(self.wanted, fields)
        if found is None or (found != self.wanted and not derivable(found, self.wanted)):
            raise missing(self.wanted, fields)
        records, conversion, left_out = read_record(found, fields)
        if conversion:
            self.report.converted(conversion)
        extras = {name: fields[name] for name in left_out} if self.wanted == "prompt" != found else {}
        self.report.unused.update(name for name in left_out if name not in extras)
        return found, [Item(row.place, record, extras) for record in records]

    def _derive(self, found: Kind, items: Sequence[Item]) -> list[Item]:
        made, dropped, lost = derive(found, self.wanted, items, self._bad)
        self.report.unused += lost
        self.report.converted(f"{found} → {self.wanted}", len(items))
        for reason, place in dropped:
            self.report.drop(reason, place)
        return made

    def _bad(self, place: str, error: RecordError) -> None:
        if not self.skips:
            raise UserError(f"{place}: {error} (on_bad_record: skip drops such records)") from error
        self.report.bad += 1
        self.report.drop(error.category, f"{place}: {error.cure}" if error.cure else place)
