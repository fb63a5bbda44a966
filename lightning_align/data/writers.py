"""Canonical records to a file: all of it, or nothing."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_align.data.files import COMPRESSIONS, format_of
from lightning_align.errors import UserError


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise :class:`UserError` if :func:`write_records` could not write there; cheap, to be asked before long work."""
    if format_of(out) not in _WRITERS:
        raise UserError(
            f"{out}: records are written as {', '.join(_WRITERS)}, each also with {' or '.join(COMPRESSIONS)}"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: give another name, or --overwrite")


def write_records(records: Sequence[Mapping[str, Any]], out: Path, *, overwrite: bool = False) -> None:
    """Write records in the format that the name says; they read back equal.

    Args:
        records: Canonical records.
        out: A ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, also with ``.gz`` or ``.zst``.
        overwrite: Whether a file of this name may be replaced.

    Raises:
        UserError: If the file may not or cannot be written, or the format cannot hold the records.
    """
    check_target(out, overwrite=overwrite)
    suffix = format_of(out)
    assert suffix is not None
    try:
        content = _compressed(_WRITERS[suffix](records), out.suffix.lower())
    except (TypeError, ValueError) as error:
        raise UserError(f"{out}: a {suffix} file cannot hold these records: {' '.join(str(error).split())}") from error
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def _compressed(content: bytes, suffix: str) -> bytes:
    import zstandard

    if suffix == ".gz":
        return gzip.compress(content, mtime=0)  # without the time, equal records make equal files
    return zstandard.compress(content) if suffix == ".zst" else content


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _json_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(_dump(record) + "\n" for record in records).encode()


def _json(records: Sequence[Mapping[str, Any]]) -> bytes:
    return (json.dumps(records, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()


def _csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """What ``cells.typed`` reads: texts as they are, everything else as JSON."""
    out = io.StringIO(newline="")
    names = _names(records)
    writer = csv.writer(out)
    writer.writerow(names)
    for record in records:
        writer.writerow([_cell(record.get(name)) for name in names])
    return out.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return _dump(value)


def _parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name in _names(records):
        try:
            columns[name] = pyarrow.array([record.get(name) for record in records])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(f"column {name} has values of several types ({error}); write .jsonl") from error
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{error}; write .jsonl") from error
    return out.getvalue()


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


_WRITERS: dict[str, Callable[[Sequence[Mapping[str, Any]]], bytes]] = {
    **{".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv},
}
