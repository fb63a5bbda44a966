"""Reading a run, or another trainer's CSV, as points on the curve of proxy and gold over KL."""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.errors import UserError
from lightning_align.run.directory import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, STATUS_FILE

SCORES = ("proxy", "gold", "heldout", "win_rate")
FIELDS = ("step", "kl", *SCORES, "kl_se", *(f"{score}_se" for score in SCORES))
EPISODES = "episode"  # column: answers that the policy has given in training so far
STEP_COLUMNS = ("step", "iteration", "global_step")
MEASURED_FILE = "measured.jsonl"  # what was measured of a run's checkpoints afterwards, and its table
MEASURED_TABLE = "measured.csv"
LARGEST_SCORE = 1e12  # beyond this a number is no score, and pictures of it fail
NEGATIVE_KL = 1.0  # below minus this (with an error: five of them, at least a tenth) a KL is not one with noise
ENOUGH_EVALUATIONS = 4  # fewer evaluations than this give way to the training iterations, if those are more
MOST_NAMED = 12  # runs, and columns, in a message
CHECKPOINT_NAME = re.compile(r"step=(\d+)(?:-kl=(-?[\d.]+|nan|inf))?\.ckpt")


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
MEASURED = _family("measured", "checkpoints measured on held-out prompts", "")


@dataclass(frozen=True)
class Point:
    """One checkpoint: scores are means over samples; ``nan`` is what was not measured. KL in nats per answer.

    Attributes:
        step: Of training.
        kl: To the initial policy, summed over the tokens of an answer.
        proxy: What training maximised.
        gold: The true score.
        heldout: Another reward model, that saw neither this training nor the proxy's data.
        win_rate: Over the start, by a judge; 0 to 1.
    """

    step: int
    kl: float
    proxy: float = math.nan
    gold: float = math.nan
    gold_se: float = math.nan
    proxy_se: float = math.nan
    kl_se: float = math.nan
    heldout: float = math.nan
    heldout_se: float = math.nan
    win_rate: float = math.nan
    win_rate_se: float = math.nan

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
        left_out: Steps with a KL or a score that was not a number, or without the other; no point stands for them.
        seed: Seed of the run, if it is known.
        checkpoints: Saved checkpoints by step.
        samples: Rows of ``samples.jsonl``.
        config: The resolved configuration.
        status: ``run.json``.
        path: Run directory or CSV that it was read from.
        file: Name of the CSV itself.
        columns: Of which column of it each field is.
    """

    name: str
    points: list[Point]
    source: str = "plain"
    description: str = "rows"
    left_out: int = 0
    seed: int | None = None
    checkpoints: dict[int, Path] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    file: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """Class that trained it, as its configuration names it; None for a CSV."""
        model = self.config.get("model")
        return str(model["class_path"]).rsplit(".")[-1] if isinstance(model, dict) and "class_path" in model else None

    @property
    def has_gold(self) -> bool:
        """Whether any point has a gold score."""
        return any(math.isfinite(point.gold) for point in self.points)

    def told_left_out(self) -> list[str]:
        """A line with the count of what was left out and of what has no true score beside others; none without any."""
        without = sum(not math.isfinite(point.gold) for point in self.points) if self.has_gold else 0
        told = [f"steps left out, for want of a KL or of a score that is a number: {self.left_out}"] * (
            self.left_out > 0
        )
        told += [f"steps without a true score: {without} of {len(self.points)}"] * (without > 0)
        return ["; ".join(told)] if told else []


def load_curve(path: Path, *, source: str = "auto", columns: Mapping[str, str] | None = None) -> Curve:
    """Read a run directory, or a CSV with a row per checkpoint; :class:`UserError` if there is no curve in it.

    Args:
        path: Run directory or CSV file.
        source: ``measured`` (a run's ``measured.csv``), ``eval``, ``train``, ``plain``, ``trl``, or ``auto`` for the
            first of them that there is.
        columns: Own column names for :data:`FIELDS`, of the file that ``source`` means.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run directory, or a CSV with columns step, kl, proxy, gold")
    columns = columns or {}
    file = curve_file(path, source)
    table = Table.read(file)
    if table.header and not table.rows:
        raise UserError(f"{file} has a header and no rows")
    if file.name == MEASURED_TABLE and path.is_dir():
        own = {key: column for key, column in columns.items() if key != "step"}
        family = choose_family(table, "auto", columns) if own else MEASURED
    else:
        family = choose_family(table, source, columns)
    points, left_out = read_points(table, family, columns.get("step"))
    if not points:
        raise UserError(f"{table.path}: no step has a number in '{family.columns['kl']}' and in a score column")
    curve = Curve(
        _name(path),
        points,
        family.name,
        family.description,
        left_out,
        path=path,
        file=file.name,
        columns=family.columns,
    )
    if path.is_dir():
        curve.checkpoints = find_checkpoints(path)
        curve.samples = read_samples(path / SAMPLES_FILE)
        curve.config = _read_mapping(path / CONFIG_FILE)
        curve.status = _read_mapping(path / STATUS_FILE)
        curve.seed = curve.status.get("seed")
    return curve


def curve_file(path: Path, source: str = "auto") -> Path:
    """The CSV that the curve of a run (or of a CSV) is read from: what was measured goes before what was logged."""
    if not path.is_dir():
        return path
    measured = path / MEASURED_TABLE
    if source in ("auto", "measured") and measured.is_file():
        return measured
    if source == "measured":
        raise UserError(f"{path} has no {MEASURED_TABLE}: lab frontier {path} --recompute makes it")
    if not (path / METRICS_FILE).is_file():
        raise UserError(_no_metrics(path))
    return path / METRICS_FILE


def _no_metrics(path: Path) -> str:
    runs = sorted(found.parent for found in (*path.glob(f"*/{METRICS_FILE}"), *path.glob(f"*/*/{METRICS_FILE}")))
    inside = [str(run.relative_to(path)) for run in runs if _has_curve(run)]
    if not inside:
        return f"{path} has no {METRICS_FILE}{', and no run in it a curve' if runs else ': has it been trained?'}"
    more = f" and {len(inside) - MOST_NAMED} more" if len(inside) > MOST_NAMED else ""
    return f"{path} has no {METRICS_FILE}; it holds the runs {', '.join(inside[:MOST_NAMED])}{more}: give one of them"


def _has_curve(run: Path) -> bool:
    try:
        choose_family(Table.read(curve_file(run)), "auto", {})
    except UserError:
        return False
    return True


def _name(path: Path) -> str:
    """The last two folders of a stage in a pipeline, else the last."""
    resolved = path.resolve()
    if path.is_dir() and (resolved.parent / "pipeline.json").is_file():
        return f"{resolved.parent.name}/{resolved.name}"
    return resolved.name


# ---------------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Table:
    """A CSV: cells as written but stripped, and the line of the file on which each row ends."""

    path: Path
    header: list[str]
    rows: list[dict[str, str]]
    lines: list[int]

    @classmethod
    def read(cls, path: Path) -> "Table":
        """:class:`UserError` for what is not a CSV, a column that is there twice, or a row longer than the header."""
        rows, lines = [], []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restval="", skipinitialspace=True)
                header = [name.strip() for name in reader.fieldnames or []]
                reader.fieldnames = header
                _check_header(path, header)
                for row in reader:
                    if None in row:
                        raise UserError(f"{path} line {reader.line_num}: more cells than the header has columns")
                    rows.append({name: cell.strip() for name, cell in row.items()})
                    lines.append(reader.line_num)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {path} as CSV: {error}") from error
        return cls(path, header, rows, lines)

    def count(self, column: str | None) -> int:
        """How many cells of a column are filled; 0 if there is no such column."""
        return sum(row[column] != "" for row in self.rows) if column in self.header else 0

    def number(self, index: int, column: str) -> float:
        """A cell as a number; nan for one that says there is none."""
        cell = self.rows[index][column]
        if cell.lower() in ("", "none", "null", "na", "n/a"):
            return math.nan
        try:
            return float(cell)
        except ValueError as error:
            where = f"{self.path} line {self.lines[index]}"
            raise UserError(f"{where}: '{cell}' in column '{column}' is not a number") from error

    def __str__(self) -> str:
        """What it has, for an error."""
        more = f" and {len(self.header) - MOST_NAMED} more" if len(self.header) > MOST_NAMED else ""
        return ", ".join(self.header[:MOST_NAMED]) + more or "no columns"


def _check_header(path: Path, header: list[str]) -> None:
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise UserError(f"{path}: its columns are separated by {name}: write them with commas")
    twice = next((name for index, name in enumerate(header) if name and name in header[:index]), None)
    if twice is not None:
        raise UserError(f"{path} has the column '{twice}' twice: rename or remove one")


def choose_family(table: Table, source: str, columns: Mapping[str, str]) -> Family:
    """The columns to read: those asked for, else evaluations, else what else is there."""
    for key, column in columns.items():
        if key not in FIELDS:
            raise UserError(f"--columns: '{key}' is none of {', '.join(FIELDS)}")
        if column not in table.header:
            raise UserError(f"{table.path} has no column '{column}' (it has {table})")
    present = {
        family.name: family
        for family in FAMILIES
        if table.count(family.columns["kl"]) and any(table.count(family.columns.get(key)) for key in SCORES)
    }
    own = {key: column for key, column in columns.items() if key != "step"}
    if own:
        return _own_family(table, own, next(iter(present.values()), None))
    if source != "auto":
        if source not in present:
            found = ", ".join(present) or "no curve"
            raise UserError(f"{table.path} has nothing for --source {source} (found: {found})")
        return present[source]
    if not present:
        raise UserError(
            f"{table.path} has no curve over KL: it needs lab/kl with lab/proxy or lab/gold (online methods log them), "
            f"or columns kl and proxy or gold; it has {table}{_case_hint(table)}. Name others with --columns kl=NAME "
            "proxy=NAME"
        )
    if "eval" in present and "train" in present:
        evaluations, iterations = (table.count(present[name].columns["kl"]) for name in ("eval", "train"))
        if evaluations < min(ENOUGH_EVALUATIONS, iterations):
            return present["train"]
    return next(iter(present.values()))


def _case_hint(table: Table) -> str:
    known = {column for family in FAMILIES for column in family.columns.values()}
    other = [name for name in table.header if name not in known and name.lower() in known]
    return f" (case counts: '{other[0]}' is not '{other[0].lower()}')" if other else ""


def _own_family(table: Table, own: Mapping[str, str], base: Family | None) -> Family:
    """Columns named by the user; the others stay those of ``base``, but for the error of a score that was replaced."""
    kept = base.columns if base is not None else {}
    merged = {key: column for key, column in kept.items() if key.removesuffix("_se") not in own} | dict(own)
    if "kl" not in merged or not set(SCORES) & set(merged):
        raise UserError(f"--columns must name 'kl' and 'proxy' or 'gold'; {table.path} has {table}")
    return Family("columns", "rows", merged)


def read_points(table: Table, family: Family, step_column: str | None) -> tuple[list[Point], int]:
    """Points by step. Cells of one step may stand in several rows (a row per logging call), but no two that differ.

    Returns:
        The points, and how many steps were left out for want of a KL or of a score.
    """
    if len({row["seed"] for row in table.rows if row.get("seed")}) > 1:
        raise UserError(f"{table.path} holds several seeds (column 'seed'): give a file for each")
    steps = step_column or next((name for name in STEP_COLUMNS if name in table.header), None)
    misspelt = next((name for name in table.header if steps is None and name.lower() in STEP_COLUMNS), None)
    if misspelt is not None:
        raise UserError(
            f"{table.path}: case counts, '{misspelt}' is not '{misspelt.lower()}': rename it, or give --columns "
            f"step={misspelt}"
        )
    merged: dict[int, dict[str, float]] = {}
    lines: dict[tuple[int, str], int] = {}
    for index, row in enumerate(table.rows):
        filled = {key: column for key, column in family.columns.items() if row.get(column)}
        if not filled:
            continue
        step = float(index) if steps is None else table.number(index, steps)
        if not step.is_integer():
            raise UserError(f"{table.path} line {table.lines[index]}: '{steps}' must be a whole number beside scores")
        cells = {key: table.number(index, filled[key]) for key in filled}
        for key, value in cells.items():
            if key != "kl" and LARGEST_SCORE < abs(value) < math.inf:
                where = f"{table.path} line {table.lines[index]}"
                raise UserError(f"{where}: {value:g} in column '{filled[key]}' is no score: mend it, or leave it empty")
        known = merged.setdefault(int(step), {})
        for key, value in cells.items():
            before = known.get(key, math.nan)
            if not math.isfinite(before):
                known[key], lines[int(step), key] = value, table.lines[index]
            elif math.isfinite(value) and value != before:
                raise UserError(
                    f"{table.path} line {table.lines[index]}: {value:.12g} in column '{filled[key]}' at step "
                    f"{int(step)}, which has {before:.12g} on line {lines[int(step), key]}: give a file for each run "
                    "or seed, or remove one of the rows"
                )
    points = []
    for step, cells in sorted(merged.items()):
        values = {key: value for key, value in cells.items() if math.isfinite(value)}
        noise = max(0.1, 5 * values["kl_se"]) if "kl_se" in values else NEGATIVE_KL
        if values.get("kl", 0.0) < -noise:
            raise UserError(
                f"{table.path} line {lines[step, 'kl']}: {values['kl']:g} in column '{family.columns['kl']}' is below "
                "0 by more than noise, which no KL is: is its sign turned round? Give KL(π‖π_init), summed over an "
                "answer"
            )
        if "kl" in values and set(SCORES) & set(values):
            points.append(Point(step, **values))
    return points, len(merged) - len(points)


# ---------------------------------------------------------------------------------------------------------- beside it
def find_checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints kept for the lab, ``step=…-kl=….ckpt`` or, where no KL was measured, ``step=….ckpt``, by step."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in sorted((run / CHECKPOINTS).glob("step=*.ckpt")))
    return {int(match[1]): path for match, path in found if match}


def read_episodes(run: Path) -> dict[int, float]:
    """Answers that the policy had given in training by each logged step, as far as its metrics (or a CSV) say."""
    file = run / METRICS_FILE if run.is_dir() else run
    if not file.is_file():
        return {}
    table = Table.read(file)
    if not (table.count(EPISODES) and "step" in table.header):
        return {}
    filled = (index for index, row in enumerate(table.rows) if row[EPISODES])
    return {0: 0.0} | {int(table.number(index, "step")): table.number(index, EPISODES) for index in filled}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows with ``step``, ``prompt`` and ``completion``; a last line that a crash cut off is passed over."""
    if not path.is_file():
        return []
    rows = []
    *whole, cut = path.read_text(encoding="utf-8", errors="replace").split("\n")  # text may hold other line breaks
    for number, line in enumerate([*whole, cut], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number <= len(whole):
                raise UserError(f"{path} line {number} is not JSON ({error}): mend or remove the line") from error
    return [row for row in rows if isinstance(row, dict) and {"step", "prompt", "completion"} <= set(row)]


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping that the page shows; empty if there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({error}): restore or remove it") from error
    return content if isinstance(content, dict) else {}
