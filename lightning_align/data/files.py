"""Rows of data files: JSON Lines, JSON, Parquet, CSV and plain text, as they are or under gzip or Zstandard.

What is wrong with a whole file (cut off, not UTF-8, not what its name says) is a :class:`UserError`; what is wrong with
one row comes out in its place, so that it can be skipped.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning_align.data.records import RecordError
from lightning_align.errors import UserError

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
COMPRESSIONS = (".gz", ".zst")
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
DOCUMENT_END = "<|endoftext|>"
# A longer text becomes several documents: it could be neither shuffled nor split otherwise.
DOCUMENT_CHARACTERS = 1 << 16
WRAPPERS = ("data", "records", "examples", "rows")  # whose list is what was meant
_BREAKS = (re.compile(r"\n[ \t]*\n+"), re.compile(r"\n"), re.compile(r"\s"))


class Row(NamedTuple):
    """A row of data.

    Attributes:
        place: Where it stands.
        fields: Its fields, or what is wrong with it.
        is_cells: Whether the values are CSV cells, which ``cells.typed`` understands.
    """

    place: str
    fields: dict[str, Any] | RecordError
    is_cells: bool = False


def format_of(path: Path) -> str | None:
    """The format that a file's name promises, without its compression; None for a name that promises none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def accepted() -> str:
    """The names of files that can be read, for messages."""
    return f"{', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}"


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: The file.
        name: What places call it.

    Raises:
        UserError: If the file cannot be read, or is not what its name says.
    """
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".txt": _documents}
    kind = format_of(path)
    if kind is None:
        raise UserError(f"{path}: files of this name are not read; accepted are {accepted()}")
    with _one_line(path), _open(path) as stream:
        yield from readers[kind](stream, name)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Errors of the libraries below as one line that names the file."""
    from pyarrow import ArrowException
    from zstandard import ZstdError

    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} is cut off: fetch or write it again") from error
    except (gzip.BadGzipFile, zlib.error, ZstdError) as error:
        raise UserError(f"{path} is damaged, or not compressed as its name says: {error}") from error
    except ArrowException as error:
        raise UserError(f"{path} is damaged, or no Parquet file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BytesIO(_unpack_zstd(path.read_bytes()))
    stream = path.open("rb")
    start = stream.peek(4)[:4]
    for magic, method in ((GZIP_MAGIC, ".gz"), (ZSTD_MAGIC, ".zst")):
        if start.startswith(magic):
            stream.close()
            raise UserError(f"{path} is compressed: call it {path.name}{method}")
    return stream


def _unpack_zstd(data: bytes) -> bytes:
    """Every frame, each to its end: the library's own readers take a file that was cut off for a complete one."""
    import zstandard

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError
        data = frame.unused_data
    return b"".join(parts)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} line {line}: the file is not UTF-8 text: convert it") from error


# -------------------------------------------------------------------------------------------------------- formats
def _json_lines(stream: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield Row(f"{name} line {number}", _json_line(line))


def _json_line(line: bytes) -> dict[str, Any] | RecordError:
    try:
        return _object(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return RecordError(None, "the line is not UTF-8 text", "convert the file", found=f"byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return RecordError(
            None, "the line is not valid JSON", "write one object a line", found=f"{error.msg}, column {error.colno}"
        )
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting thousands deep
        return RecordError(None, "the line is not valid JSON", "write one object a line", found=str(error))


def _object(value: Any) -> dict[str, Any] | RecordError:
    if isinstance(value, dict):
        name, content = next(iter(value.items()), ("", None))
        if len(value) > 1 or name not in WRAPPERS or not _are_records(content):
            return value
        return RecordError(name, "holds the records", "write them alone: a list, or one a line")
    if _are_records(value) and "role" in value[0]:
        return RecordError(None, "is a bare list of turns", 'write {"messages": […]}')
    if _are_records(value) and "from" in value[0]:
        return RecordError(None, "is a bare list of turns", 'write {"conversations": […]}')
    return RecordError(None, "is no object", 'a record is written {"field": …}', found=type(value).__name__)


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _json(stream: BinaryIO, name: str) -> Iterator[Row]:
    """A list of objects, or one object; or JSON Lines, which people call .json too."""
    text = _decode(stream.read(), name)
    if text.lstrip()[:1] != "[":
        try:
            only = json.loads(text)
        except (ValueError, RecursionError):
            yield from _json_lines(io.BytesIO(text.encode()), name)
        else:
            yield Row(f"{name} record 1", _object(only))
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} line {error.lineno}: not valid JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON: {error}") from error
    for number, value in enumerate(values, 1):
        yield Row(f"{name} record {number}", _object(value))


def _parquet(stream: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(io.BytesIO(stream.read())).iter_batches():
        for fields in batch.to_pylist():
            number += 1
            yield Row(f"{name} row {number}", fields)


def _csv(stream: BinaryIO, name: str) -> Iterator[Row]:
    """A header and rows of cells, all texts; see ``cells.typed`` for what becomes of them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 kB is less than a long document
    lines = csv.reader(io.StringIO(_decode(stream.read(), name), newline=""), strict=True)
    try:
        header = next(lines, [])
        _check_header(header, name)
        start = lines.line_num + 1
        for cells in lines:
            if cells:
                yield Row(f"{name} line {start}", _cells(header, cells), is_cells=True)
            start = lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name} line {lines.line_num}: not valid CSV: {error}") from error


def _cells(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | RecordError:
    if len(cells) != len(header):
        found = f"{len(cells)} cells under {len(header)} columns"
        return RecordError(None, "the row does not fit the header", "put texts with commas in quotes", found=found)
    return dict(zip(header, cells, strict=True))


def _check_header(header: Sequence[str], name: str) -> None:
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise UserError(f"{name}: the columns are not separated by commas: write it with commas, or as JSON Lines")
    if twice := next((column for column in header if header.count(column) > 1), None):
        raise UserError(f"{name}: two columns are called {twice!r}")


def _documents(stream: BinaryIO, name: str) -> Iterator[Row]:
    """A file is one document, or several with ``<|endoftext|>`` between them; a very long one is cut, see above."""
    line = 1
    for document in _decode(stream.read(), name).split(DOCUMENT_END):
        for piece in cut_document(document):
            if piece.strip():
                yield Row(f"{name} line {line}", {"text": piece})
            line += piece.count("\n")


def cut_document(text: str, size: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Pieces of at most ``size`` characters that make up the text, each cut after its last blank line, line or word."""
    start = 0
    while len(text) - start > size:
        window = text[start : start + size]
        ends = ([match.end() for match in pattern.finditer(window)] for pattern in _BREAKS)
        length = next((found[-1] for found in ends if found), size)
        yield window[:length]
        start += length
    yield text[start:]
