"""Axes of a pipeline file: a stage that uses them stands for one run of every combination of their values."""

import json
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from lightning_align.errors import UserError, nearest

AXES = "axes"
REFERENCE = re.compile(r"\$\{([\w-]+)\.(\w+)\}")
LISTS = ("models", "runs")  # what refers to all runs of a stage, and so to no single value of its axes
LABEL = re.compile(r"[\w.+-]+")  # it becomes part of a folder's name

Axes = Mapping[str, Mapping[str, Any]]  # axis → label → value


def read_axes(path: Any, content: Any, changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``axes:`` of a file, each a list of values or a mapping of names to values; labels are names, or the values.

    Args:
        path: Of the file, for messages.
        content: What it says.
        changes: Axes of the command line instead of those of the file. Where an axis has names, a list is of these.

    Raises:
        UserError: They are not that, or a label cannot be part of a folder's name.
    """
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: '{AXES}' is {content!r}: give a mapping, such as seed: [0, 1, 2]")
    changed = {name: _narrowed(name, values, content.get(name)) for name, values in changes.items()}
    axes: dict[str, dict[str, Any]] = {}
    for name, values in {**content, **changed}.items():
        where = f"{path}: axis '{name}'"
        if not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"{where}: a name has letters, digits and _ only")
        if not isinstance(values, list | dict) or not values:
            raise UserError(f"{where} is {values!r}: give a list of values, or a mapping of names to values")
        labelled = values if isinstance(values, dict) else {str(value): value for value in values}
        if len(labelled) < len(values):
            raise UserError(f"{where} has a value twice: {values}")
        for label in labelled:
            if not LABEL.fullmatch(str(label)):
                raise UserError(f"{where}: '{label}' cannot be part of a folder's name: give names, {{small: …}}")
        axes[str(name)] = {str(label): value for label, value in labelled.items()}
    return axes


def _narrowed(name: str, values: Any, named: Any) -> Any:
    """The ``values`` of an axis that the command line gives; those of ``named`` in the file that it names."""
    if not (isinstance(named, dict) and isinstance(values, list)):
        return values
    known = {str(label): value for label, value in named.items()}
    for label in map(str, values):
        if label not in known:
            raise UserError(
                f"--set {AXES}.{name}: there is no '{label}'{nearest(label, list(known))} (names: {', '.join(known)}); "
                f"other values have names too: {AXES}.{name}={{NAME: VALUE}}"
            )
    return {label: known[label] for label in map(str, values)}


def axes_of(where: str, spec: Any, axes: Axes, stages: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The axes that a stage depends on: those it names, and those of the single runs it refers to.

    Args:
        where: Of the stage, for messages.
        spec: Its options.
        axes: Of the file.
        stages: Axes of the earlier stages, by name.
    """
    found: set[str] = set()
    for stage, what in REFERENCE.findall(json.dumps(spec, default=str)):
        if stage == AXES:
            if what not in axes:
                raise UserError(f"{where} refers to axis '{what}', which is not in '{AXES}'{nearest(what, list(axes))}")
            found |= {what, *axes_of(where, axes[what], axes, stages)}
        elif what not in LISTS:
            found |= stages.get(stage, frozenset())
    return frozenset(found)


def combinations(names: frozenset[str], axes: Axes) -> list[dict[str, str]]:
    """Every combination of labels, in the order of the file; one that is empty without axes."""
    own = [name for name in axes if name in names]
    return [dict(zip(own, labels, strict=True)) for labels in product(*(axes[name] for name in own))]


def cell_name(stage: str, labels: Mapping[str, str]) -> str:
    """``ppo/size=small,seed=0``; the stage's own name without axes."""
    return f"{stage}/{','.join(f'{axis}={label}' for axis, label in labels.items())}" if labels else stage


def substitute(node: Any, axes: Axes, labels: Mapping[str, str]) -> Any:
    """Values for ``${axes.NAME}``; alone in a text the value keeps its type."""
    if isinstance(node, dict):
        return {key: substitute(value, axes, labels) for key, value in node.items()}
    if isinstance(node, list):
        return [substitute(value, axes, labels) for value in node]
    if not isinstance(node, str):
        return node
    whole = REFERENCE.fullmatch(node)
    if whole and whole[1] == AXES:
        return axes[whole[2]][labels[whole[2]]]
    return REFERENCE.sub(lambda m: str(axes[m[2]][labels[m[2]]]) if m[1] == AXES else m[0], node)


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two combinations have the same labels on the axes that both have."""
    return all(other[axis] == label for axis, label in one.items() if axis in other)
