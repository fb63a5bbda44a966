"""CSV cells to values: a cell is a text, and the field that it stands in says what it means."""

import json
from collections.abc import Mapping
from typing import Any

from lightning_align.data.records import is_messages

TRUTH = ("label", "tie", "is_safety")
NUMBERS = ("margin", "soft_label", "weight", "score")
LISTS = ("messages", "conversations", "completions", "ranks", "scores", "instances")
SIDES = ("prompt", "completion", "chosen", "rejected")  # texts, or conversations written as JSON


def typed(cells: Mapping[str, str]) -> dict[str, Any]:
    """Values of the cells of a row; an empty cell is no value, except for a side, where it is an empty text.

    A cell that cannot be what its field needs stays a text, for the check of the record to refuse. Columns that are
    no fields stay texts too: ``reference`` may well be ``"007"``.
    """
    return {name: _value(name, cell) for name, cell in cells.items() if cell or name in SIDES}


def _value(name: str, cell: str) -> Any:
    if name in TRUTH and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    if name in NUMBERS:
        return _number(cell)
    if name in LISTS:
        return _parsed(cell)
    if name in SIDES and cell.lstrip().startswith("[") and is_messages(parsed := _parsed(cell)):
        return parsed
    return cell


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
