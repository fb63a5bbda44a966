"""Every metric of a run as a small chart, drawn as SVG that takes its colours from the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lightning_align.errors import UserError
from lightning_align.lab.runs import STEP_COLUMNS, Table
from lightning_align.run.directory import METRICS_FILE

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320.0, 150.0, 46.0, 18.0, 8.0
MOST_POINTS = 400  # of a line; longer ones are thinned, their extremes kept
OTHER = "run"  # group of metrics without a slash


@dataclass(frozen=True)
class Series:
    """One column of ``metrics.csv``: the steps at which it is a number, and the numbers."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def read_series(run: Path) -> list[Series]:
    """All metrics of a run that are numbers at some step.

    Raises:
        UserError: It has no metrics, or a cell is not a number.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run} has no {METRICS_FILE}: has it been trained?")
    table = Table.read(path)
    step = next((name for name in STEP_COLUMNS if name in table.header), None)
    found = []
    for name in table.header:
        if name == step:
            continue
        rows = [index for index, row in enumerate(table.rows) if row[name]]
        pairs = [
            (table.number(index, step) if step is not None else float(index), table.number(index, name))
            for index in rows
        ]
        pairs = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if pairs:
            found.append(Series(name, *zip(*sorted(pairs), strict=True)))
    if not found:
        raise UserError(f"{path} has no metric that is a number")
    return found


def grouped(series: Sequence[Series]) -> dict[str, list[Series]]:
    """By what stands before the last slash, in the order of the names."""
    groups: dict[str, list[Series]] = {}
    for one in sorted(series, key=lambda one: one.name):
        groups.setdefault(one.name.rpartition("/")[0] or OTHER, []).append(one)
    return groups


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points of a line: of each stretch the first, the lowest and the highest."""
    pairs = list(zip(xs, ys, strict=True))
    if len(pairs) <= most:
        return pairs
    stretch = math.ceil(3 * len(pairs) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(pairs), stretch):
        part = pairs[start : start + stretch]
        chosen = {0, min(range(len(part)), key=lambda i: part[i][1]), max(range(len(part)), key=lambda i: part[i][1])}
        kept += [part[index] for index in sorted(chosen)]
    return [*kept, pairs[-1]] if kept[-1] != pairs[-1] else kept


def chart(series: Series) -> str:
    """A line over steps with the ends of both axes; one point is a dot."""
    points = thinned(series.steps, series.values)
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - 6), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
        for x, y in (place(*point) for point in (points if len(points) <= 30 else points[-1:]))
    )
    floor = HEIGHT - BOTTOM
    heights = {TOP + 8: high, floor: low} if high > low else {place(first, low)[1] + 4: low}
    sides = (
        f'<text x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{escape(short(v))}</text>' for y, v in heights.items()
    )
    labels = "".join(sides) + (
        f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(short(first))}</text>'
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 4}" text-anchor="end">{escape(short(last))}</text>'
    )
    label = f"{series.name}: from {short(series.values[0])} to {short(series.values[-1])}"
    return (
        f'<figure class="chart"><figcaption><code>{escape(series.name)}</code> '
        f"<strong>{escape(short(series.values[-1]))}</strong></figcaption>"
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{floor}" y2="{floor}"/>'
        f'<polyline points="{line}"/>{dots}{labels}</svg>'
        "</figure>"
    )


def short(value: float) -> str:
    """What fits beside an axis, with a real minus sign."""
    size = abs(value)
    if 999.5 <= size < 1e6:
        text = f"{value:,.0f}"
    elif value and not 1e-3 <= size < 1e6:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def sections(run: Path) -> list[str]:
    """HTML of all charts, a heading and a grid for each group."""
    groups: Mapping[str, Sequence[Series]] = grouped(read_series(run))
    return [
        f'<details open><summary><h3>{escape(group)}</h3></summary><div class="charts">'
        f"{''.join(chart(one) for one in own)}</div></details>"
        for group, own in groups.items()
    ]
