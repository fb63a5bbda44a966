"""Reading a run, or another trainer's CSV, as points on the curve of proxy and gold over KL."""

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.errors import UserError
from lightning_align.run.directory import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, STATUS_FILE

FIELDS = ("step", "kl", "proxy", "gold", "kl_se", "proxy_se", "gold_se")
STEP_COLUMNS = ("step", "iteration", "global_step")
ENOUGH_EVALUATIONS = 4  # fewer evaluations than this give way to the training iterations, if those are more
CHECKPOINT_NAME = re.compile(r"step=(\d+)-kl=(-?[\d.]+|nan)\.ckpt")


@dataclass(frozen=True)
class Family:
    """Columns that belong together: ``{prefix}kl``, ``{prefix}proxy``, ``{prefix}gold`` and their ``_se``."""

    name: str
    description: str
    columns: Mapping[str, str]


def _family(name: str, description: str, prefix: str) -> Family:
    return Family(name, description, {key: prefix + key for key in FIELDS if key != "step"})


FAMILIES = (
    _family("eval", "evaluations on held-out prompts", "eval/lab/"),
    _family("train", "training iterations", "lab/"),
    _family("plain", "rows", ""),
    Family("trl", "training iterations", {"kl": "objective/kl", "proxy": "objective/scores"}),
)


@dataclass(frozen=True)
class Point:
    """One checkpoint: scores are means over samples; ``nan`` is what was not measured. KL in nats per answer."""

    step: int
    kl: float
    proxy: float = math.nan
    gold: float = math.nan
    gold_se: float = math.nan
    proxy_se: float = math.nan

    @property
    def d(self) -> float:
        """√KL; ``nan`` for a negative estimate."""
        return math.sqrt(self.kl) if self.kl >= 0 else math.nan


@dataclass
class Curve:
    """A run as the lab sees it.

    Attributes:
        name: How to call it in a picture.
        points: By step, one per step, every KL a number.
        source: Which columns the points come from.
        description: The same in words, such as "evaluations on held-out prompts".
        without_kl: Rows that had a score but no KL, left out.
        seed: Seed of the run, if it is known.
        checkpoints: Saved checkpoints by step.
        samples: Rows of ``samples.jsonl``.
        config: The resolved configuration.
        status: ``run.json``.
    """

    name: str
    points: list[Point]
    source: str = "plain"
    description: str = "rows"
    without_kl: int = 0
    seed: int | None = None
    checkpoints: dict[int, Path] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def has_gold(self) -> bool:
        """Whether any point has a gold score."""
        return any(math.isfinite(point.gold) for point in self.points)


def load_curve(path: Path, *, source: str = "auto", columns: Mapping[str, str] | None = None) -> Curve:
    """Read a run directory, or a CSV with a row per checkpoint; :class:`UserError` if there is no curve in it.

    Args:
        path: Run directory or CSV file.
        source: ``eval``, ``train``, ``plain``, ``trl``, or ``auto`` for the first of them that the file has.
        columns: Own column names for ``step``, ``kl``, ``proxy``, ``gold`` and ``kl_se``, ``proxy_se``, ``gold_se``.
    """
    if path.is_dir():
        table = path / METRICS_FILE
        if not table.is_file():
            raise UserError(_no_metrics(path))
    elif path.is_file():
        table = path
    else:
        raise UserError(f"{path} does not exist: give a run directory, or a CSV with columns step, kl, proxy, gold")
    header, rows = read_rows(table)
    family = choose_family(table, header, rows, source, columns or {})
    points, without_kl = read_points(table, header, rows, family, (columns or {}).get("step"))
    if not points:
        raise UserError(f"{table}: no row has a number in '{family.columns['kl']}' and in a score column")
    curve = Curve(_name(path), points, family.name, family.description, without_kl)
    if path.is_dir():
        curve.checkpoints = find_checkpoints(path)
        curve.samples = read_samples(path / SAMPLES_FILE)
        curve.config = _read_mapping(path / CONFIG_FILE)
        curve.status = _read_mapping(path / STATUS_FILE)
        seed = curve.status.get("seed")
        curve.seed = seed if isinstance(seed, int) else None
    return curve


def _no_metrics(path: Path) -> str:
    inside = sorted(found.parent.name for found in path.glob(f"*/{METRICS_FILE}"))
    hint = f"; it holds the runs {', '.join(inside)}: give one of them" if inside else ": has it been trained?"
    return f"{path} has no {METRICS_FILE}{hint}"


def _name(path: Path) -> str:
    """The last two folders of a stage in a pipeline, else the last."""
    resolved = path.resolve()
    if path.is_dir() and (resolved.parent / "pipeline.json").is_file():
        return f"{resolved.parent.name}/{resolved.name}"
    return resolved.name


# ---------------------------------------------------------------------------------------------------------- the table
def read_rows(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV, cells as written and stripped."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            return header, [{name: row[name].strip() for name in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table} as CSV: {error}") from error


def choose_family(
    table: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]], source: str, columns: Mapping[str, str]
) -> Family:
    """The columns to read: those asked for, else evaluations, else what else is there."""
    for key, column in columns.items():
        if key not in FIELDS:
            raise UserError(f"--columns: '{key}' is none of {', '.join(FIELDS)}")
        if column not in header:
            raise UserError(f"{table} has no column '{column}' (it has {_listed(header)})")
    present = [
        family
        for family in FAMILIES
        if _count(rows, header, family.columns["kl"])
        and any(_count(rows, header, family.columns.get(key, "")) for key in ("proxy", "gold"))
    ]
    named = {family.name: family for family in present}
    own = {key: column for key, column in columns.items() if key != "step"}
    if own:
        base = present[0].columns if present else {}
        merged = {**base, **own}
        if "kl" not in merged or not {"proxy", "gold"} & set(merged):
            raise UserError(f"--columns must name 'kl' and 'proxy' or 'gold'; {table} has {_listed(header)}")
        return Family("columns", "rows", merged)
    if source != "auto":
        if source not in named:
            raise UserError(f"{table} has nothing for --source {source} (found: {', '.join(named) or 'no curve'})")
        return named[source]
    if not present:
        raise UserError(
            f"{table} has no curve over KL: it needs lab/kl with lab/proxy or lab/gold (online methods log them), or "
            f"columns kl and proxy or gold; it has {_listed(header)}. Name others with --columns kl=NAME proxy=NAME"
        )
    if "eval" in named and "train" in named:
        evaluations, iterations = (_count(rows, header, named[name].columns["kl"]) for name in ("eval", "train"))
        if evaluations < ENOUGH_EVALUATIONS and evaluations < iterations:
            return named["train"]
    return present[0]


def _count(rows: Sequence[Mapping[str, str]], header: Sequence[str], column: str) -> int:
    return sum(row[column] != "" for row in rows) if column in header else 0


def _listed(header: Sequence[str]) -> str:
    return ", ".join(header[:12]) + (f" and {len(header) - 12} more" if len(header) > 12 else "") or "no columns"


def read_points(
    table: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]], family: Family, step_column: str | None
) -> tuple[list[Point], int]:
    """Points by step. Cells of one step may stand in several rows (a row per logging call); the last one counts.

    Returns:
        The points, and how many steps had a score but no KL.
    """
    steps = step_column or next((name for name in STEP_COLUMNS if name in header), None)
    merged: dict[int, dict[str, float]] = {}
    for index, row in enumerate(rows):
        line = index + 2
        cells = {
            key: _number(table, line, column, row[column])
            for key, column in family.columns.items()
            if column in header and row[column] != ""
        }
        if not cells:
            continue
        step = index
        if steps is not None:
            number = _number(table, line, steps, row[steps])
            if not math.isfinite(number):
                raise UserError(f"{table} line {line}: '{steps}' is empty, but the row has scores")
            step = int(number)
        merged.setdefault(step, {}).update(cells)
    points, without_kl = [], 0
    for step, cells in sorted(merged.items()):
        values = {key: value for key, value in cells.items() if key != "kl_se" and math.isfinite(value)}
        if not {"proxy", "gold"} & set(values):
            continue
        if "kl" in values:
            points.append(Point(step, **values))
        else:
            without_kl += 1
    return points, without_kl


def _number(table: Path, line: int, column: str, cell: str) -> float:
    if cell.lower() in ("", "none", "null", "na", "n/a"):
        return math.nan
    try:
        return float(cell)
    except ValueError as error:
        raise UserError(f"{table} line {line}: '{cell}' in column '{column}' is not a number") from error


# ---------------------------------------------------------------------------------------------------------- beside it
def find_checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints kept for the lab, ``step=…-kl=….ckpt``, by step."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in sorted((run / CHECKPOINTS).glob("step=*.ckpt")))
    return {int(match[1]): path for match, path in found if match}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows with ``step``, ``prompt`` and ``completion``; a line cut off by a crash is passed over."""
    if not path.is_file():
        return []
    return [row for row in _json_lines(path) if {"step", "prompt", "completion"} <= set(row)]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # text may hold other line breaks
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping for the summary; empty if it is missing or damaged, for the curve does not need it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
