"""What was measured of a run's checkpoints: ``measured.jsonl``, a row for each, and ``measured.csv``, its table."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError
from lightning_align.lab.runs import FIELDS, MEASURED_FILE, MEASURED_TABLE
from lightning_align.run.files import sync, write_atomically, writing

REMEDY = "make room or mend this; the same command goes on where it was"
CHOOSE = "say which: --data for prompts, else that option"
MEASURE_ALIKE = "measure both alike (--recompute --overwrite) to see them in one picture"
# settings by which the numbers of two runs can be told beside each other, and what they are called; a run's own
# reward and start are its own
COMMON = {
    "prompts_hash": "prompts",
    "num_samples": "--num_samples",
    "seed": "--seed",
    "max_new_tokens": "--max_new_tokens",
    "stop_strings": "--stop_strings",
    "dtype": "--dtype",
    "gold": "--gold",
    "heldout": "--heldout",
    "judge": "--judge",
}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash of everything that a row's numbers follow from beside its checkpoint."""
    return _hash(settings)


def prompts_hash(records: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the prompts with their further columns, in order."""
    return _hash(records)


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_measured(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, one a step, in the order in which they were measured; none if there are none.

    A last row that was cut off or damaged is not one: it is measured again. Of several of one step the last counts.
    """
    return list({row["step"]: row for row in _read(run / MEASURED_FILE)[0]}.values())


def drop_damaged(run: Path) -> None:
    """Cut a last row that is not whole off the file."""
    path = run / MEASURED_FILE
    if path.is_file():
        size = _read(path)[1]
        if size < path.stat().st_size:
            with writing(path, REMEDY):
                os.truncate(path, size)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole rows, and the bytes that they take."""
    if not path.is_file():
        return [], 0
    rows: list[dict[str, Any]] = []
    size = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if not (isinstance(row, dict) and {"step", "fingerprint", "settings", "metrics"} <= set(row)):
            if number < len(lines):
                raise UserError(f"{path} line {number} is damaged: remove the line, or measure again with --overwrite")
            break
        rows.append(row)
        size += len(line)
    return rows, size


def append_row(run: Path, row: Mapping[str, Any]) -> None:
    """Add a row; it is on disk when this returns."""
    path = run / MEASURED_FILE
    line = json.dumps(finite(row), ensure_ascii=True, allow_nan=False) + "\n"
    with writing(path, REMEDY):
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        sync(run)


def remove(run: Path) -> None:
    """Forget what was measured."""
    for name in (MEASURED_TABLE, MEASURED_FILE):
        with writing(run / name, REMEDY):
            (run / name).unlink(missing_ok=True)


def write_table(run: Path, rows: Sequence[Mapping[str, Any]], episodes: Mapping[int, float]) -> None:
    """``measured.csv``: a line a checkpoint, in the order of steps.

    Args:
        run: Whose.
        rows: Of ``measured.jsonl``.
        episodes: Answers that the policy had drawn in training, by step, as far as that is known.
    """
    write_atomically(run / MEASURED_TABLE, table(rows, episodes), REMEDY)


def table(rows: Sequence[Mapping[str, Any]], episodes: Mapping[int, float]) -> str:
    """The text of ``measured.csv``."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    known = [name for name in FIELDS if name in names]
    columns = [*known, *(name for name in names if name not in known)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "episode", *(cell for name in columns for cell in (name, f"{name}_se")), "checkpoint"])
    for row in sorted(rows, key=lambda row: row["step"]):
        estimates = [row["metrics"].get(name, {}) for name in columns]
        cells = [estimate.get(part) for estimate in estimates for part in ("value", "se")]
        first = (row["step"], episodes.get(row["step"]))
        writer.writerow(["" if cell is None else cell for cell in (*first, *cells, row["checkpoint"])])
    return out.getvalue()


def check_alike(settings: Mapping[str, Mapping[str, Any]], *, planned: bool = False) -> None:
    """Raise :class:`UserError` unless runs (by their names) were measured alike, in one line that says what differs.

    Args:
        settings: Of every run.
        planned: They are not measured yet, but about to be.
    """
    told, remedy = ("would be", CHOOSE) if planned else ("were", MEASURE_ALIKE)
    first = next(iter(settings), None)
    for name, other in settings.items():
        assert first is not None
        for key, called in COMMON.items():
            one, two = settings[first].get(key), other.get(key)
            if one != two:
                values = "" if key == "prompts_hash" else f": {_told(one)} and {_told(two)}"
                where = _prompts(settings[first], other) if key == "prompts_hash" else ""
                raise UserError(f"{first} and {name} {told} measured with different {called}{where}{values}; {remedy}")


def _prompts(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    told = [f"{each.get('prompts')} of {each.get('data')}, {each.get('split')}" for each in (one, two)]
    return f" ({told[0]}; {told[1]})"


def _told(value: Any) -> str:
    return "none" if value in (None, [], "") else value if isinstance(value, str) else json.dumps(value)


def finite(value: Any) -> Any:
    """What JSON can say: numbers that are none become null, tuples lists."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
