"""What is in records, field by field, for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FEW, SHORT = 8, 24  # as many different values, of as many characters, are listed one by one


def describe(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a field: in how many records it is, and what values it has."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    width = max(len(name) for name in values)
    return [f"  {name:<{width}}  {_present(column, records)}{_summary(column)}" for name, column in values.items()]


def _present(column: Sequence[Any], records: Sequence[Any]) -> str:
    return "" if len(column) == len(records) else f"in {len(column):,} of {len(records):,}: "


def _summary(column: Sequence[Any]) -> str:
    """The values of a field, by the type of most."""
    kind = Counter(type(value) for value in column).most_common(1)[0][0]
    own = [value for value in column if type(value) is kind]
    others = f"; {len(column) - len(own):,} of another form" if len(own) < len(column) else ""
    if kind is bool:
        return f"true in {sum(own) / len(own):.0%}{others}"
    if kind is str:
        counts = Counter(own)
        if len(counts) <= FEW and len(counts) < len(own) and max(map(len, counts)) <= SHORT:
            return ", ".join(f"{value} {number / len(own):.0%}" for value, number in counts.most_common()) + others
        return f"characters: {_range([len(value) for value in own])}{others}"
    if kind is int or kind is float:
        return f"{_range(own)}{others}"
    if kind is list:
        of = "messages" if any(isinstance(item, dict) for item in own[0]) else "entries"
        return f"{of}: {_range([len(value) for value in own])}{others}"
    return kind.__name__ + others


def _range(numbers: Sequence[float]) -> str:
    low, middle, high = (_shown(number) for number in (min(numbers), median(numbers), max(numbers)))
    return low if low == high else f"{low} to {high} (median {middle})"


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"
