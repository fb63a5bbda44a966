"""A sweep as the scaling laws see it: sizes, data and curves, read from the runs or from another trainer's CSV."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_align.data.sources import PLAYGROUND
from lightning_align.errors import UserError
from lightning_align.lab.analysis import START_KL, start_points
from lightning_align.lab.grid import SEED, Cell, load_grid
from lightning_align.lab.overopt import SMALLEST_D, Array
from lightning_align.lab.runs import Curve, Point, Table, load_curve
from lightning_align.lab.scaling import Measured
from lightning_align.playground import annotator_agreement
from lightning_align.run.directory import CONFIG_FILE, METRICS_FILE, MODEL, is_run, read_status

EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")  # what is not counted: Gao et al. leave embeddings out
REWARD_LOSS, REWARD_ACCURACY = "eval/loss", "eval/accuracy"
COLUMNS = ("reward_parameters", "comparisons", "policy_parameters", "seed", "step", "kl", "gold")
LOSS_COLUMN = "reward_loss"  # of another trainer's CSV, if it has it
WITHOUT_REWARD = "did not train against a reward model's run: the size of its reward and its comparisons are not known"
LABELS = ("seed", "temperature", "noise", "ties", "aspect", "quality", "unsafe", "families")  # what labels depend on


def read_sweep(place: Path) -> tuple[list[Measured], list[str]]:
    """Runs with a true score, and why others were left out.

    Raises:
        UserError: Nothing takes part.
    """
    runs, left_out = _read_table(place) if place.is_file() else _read_folder(place)
    if not runs:
        raise UserError(f"{place} has no run that takes part: {'; '.join(left_out[:3]) or 'it is empty'}")
    return runs, left_out


def _read_folder(folder: Path) -> tuple[list[Measured], list[str]]:
    runs, left_out = [], []
    cells = load_grid(folder)
    if not any(cell.axes for cell in cells):
        raise UserError(
            f"{folder} is of a pipeline without axes: laws of scaling take sizes and seeds on axes (docs/scaling.md)"
        )
    for cell in cells:
        parents = _parents(cell, folder)
        if "reward" not in parents:
            left_out += [f"{cell.run} {WITHOUT_REWARD}"] if _has_gold(cell.run) else []
            continue  # without a true score over KL: pre-training, SFT, reward models, no part of what is compared
        try:
            if not is_run(parents["reward"]):
                raise UserError(f"{cell.run}: its reward model's run is gone: {parents['reward']}")
            if "model" not in parents:
                raise UserError(f"{cell.run} did not start from a run: the size of its policy is not known")
            curve = load_curve(cell.run)
            runs.append(_measured(cell, curve, parents))
        except UserError as error:
            left_out.append(str(error))
    if not runs and not left_out:
        left_out = [f"none of its {len(cells)} finished runs trained against a reward model's run, or has a true score"]
    return runs, left_out


def _has_gold(run: Path) -> bool:
    try:
        return load_curve(run).has_gold
    except UserError:
        return False  # no curve over KL at all


def _parents(cell: Cell, folder: Path) -> dict[str, Path]:
    """The runs that it reads, by the last word of the option; a sweep that was moved still finds its own."""
    found = {}
    for parent in read_status(cell.run).get("parents", []):
        place = Path(parent["run"])
        if not is_run(place) and folder.name in place.parts:
            place = folder.joinpath(*place.parts[place.parts.index(folder.name) + 1 :])
        found[str(parent["option"]).rsplit(".", 1)[-1]] = place
    return found


def _measured(cell: Cell, curve: Curve, parents: Mapping[str, Path]) -> Measured:
    reward = parents["reward"]
    start, start_se, far = split(cell.run, curve.points)
    return Measured(
        reward_parameters=parameters(reward / MODEL),
        comparisons=_comparisons(reward),
        policy_parameters=parameters(parents["model"] / MODEL),
        seed=cell.axes.get(SEED, "0"),
        d=far[:, 0],
        gold=far[:, 1],
        start=start,
        gold_se=far[:, 2],
        start_se=start_se,
        reward_loss=_last(reward, REWARD_LOSS),
        reward_accuracy=_last(reward, REWARD_ACCURACY),
        label_entropy=_label_entropy(reward),
        seconds=cell.seconds,
        run=cell.run,
    )


def split(where: object, points: Sequence[Point]) -> tuple[float, float, Array]:
    """The score at the start, its standard error, and the points far enough from it for the law ``[n, 3]``.

    The start is that of :func:`~.analysis.start_points`; a point is its d, gold and the standard error of that.

    Raises:
        UserError: There is no score at KL 0.
    """
    known = [point for point in points if math.isfinite(point.kl) and math.isfinite(point.gold)]
    near = start_points(known) if known else []
    if not near:
        raise UserError(f"{where} has no true score at the start (KL below {START_KL:g}): evaluate at step 0")
    far = [(point.d, point.gold, point.gold_se) for point in known if point.d >= SMALLEST_D]
    start_se = math.hypot(*(point.gold_se for point in near)) / len(near)
    return float(np.mean([point.gold for point in near])), start_se, np.array(far, dtype=np.float64).reshape(-1, 3)


def _comparisons(reward: Path) -> int:
    data = read_status(reward).get("data") or {}
    if data.get("kind") not in ("preference", "ranked") or not isinstance(data.get("kept"), int):
        raise UserError(f"{reward} does not say how many comparisons it learnt from: is it a reward model's run?")
    pairs = (data.get("notes") or {}).get("pairs")  # those of the training split; of rankings, all that they hold
    return pairs if isinstance(pairs, int) else int(data["kept"])


def _label_entropy(reward: Path) -> float:
    """The lowest loss that the playground's annotator allows on the held-out comparisons; 0 for other data."""
    path = reward / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it") from error
    data = ((content or {}).get("data") or {}).get("init_args") or {}
    if data.get("path") != PLAYGROUND or data.get("val_path") not in (None, PLAYGROUND):
        return 0.0
    options = {name: value for name, value in (data.get("playground") or {}).items() if name in LABELS}
    return _entropy(json.dumps(options, sort_keys=True))


@cache
def _entropy(options: str) -> float:
    return annotator_agreement(**json.loads(options)).entropy


def _last(run: Path, column: str) -> float:
    table = Table.read(run / METRICS_FILE)
    if column not in table.header:
        return math.nan
    cells = [table.number(index, column) for index in range(len(table.rows))]
    return next((cell for cell in reversed(cells) if math.isfinite(cell)), math.nan)


def parameters(model: Path) -> int:
    """Weights of a model folder without its embeddings, from the headers of its safetensors files.

    Raises:
        UserError: It has none that can be read.
    """
    total = 0
    files = sorted(model.glob("*.safetensors"))
    try:
        for file in files:
            for name, tensor in _header(file).items():
                if name != "__metadata__" and not any(part in name for part in EMBEDDINGS):
                    total += prod(tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{model} cannot be read: {error}") from error
    if not total:
        raise UserError(f"{model} has no weights in safetensors files: its size is not known")
    return total


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        content: dict[str, Any] = json.loads(opened.read(length))
    return content


def _read_table(path: Path) -> tuple[list[Measured], list[str]]:
    """A row per checkpoint; runs are told apart by sizes, data and seed."""
    table = Table.read(path)
    missing = [name for name in COLUMNS if name not in table.header]
    if missing:
        raise UserError(f"{path} has no column '{missing[0]}' (it needs {', '.join(COLUMNS)}; it has {table})")
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(table.rows):
        rows.setdefault(tuple(row[name] for name in COLUMNS[:4]), []).append(index)
    runs, left_out = [], []
    for (_, _, _, seed), own in rows.items():
        reward, comparisons, policy = (_whole(table, own[0], name) for name in COLUMNS[:3])
        ordered = sorted(own, key=lambda index: table.number(index, "step"))
        points = [
            Point(place, table.number(index, "kl"), gold=table.number(index, "gold"))
            for place, index in enumerate(ordered)
        ]
        where = f"{path}, the run of line {table.lines[own[0]]}"
        try:
            start, _, far = split(where, points)
        except UserError as error:
            left_out.append(str(error))
            continue
        loss = table.number(own[0], LOSS_COLUMN) if LOSS_COLUMN in table.header else math.nan
        runs.append(Measured(reward, comparisons, policy, seed, far[:, 0], far[:, 1], start, reward_loss=loss))
    return runs, left_out


def _whole(table: Table, index: int, column: str) -> int:
    """A size or an amount of data."""
    value = table.number(index, column)
    if not (value > 0 and value.is_integer()):
        where = f"{table.path} line {table.lines[index]}"
        raise UserError(f"{where}: '{table.rows[index][column]}' in column '{column}' is not a whole number above 0")
    return int(value)
