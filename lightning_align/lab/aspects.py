"""Aspects of the true score over KL, of several policies beside each other: what one gains and another gives up."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.errors import UserError
from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, bare, distance, style, x_axis
from lightning_align.lab.findings import kl_text
from lightning_align.lab.runs import Point, Table, curve_file, load_curve

ASPECTS = ("helpfulness", "safety")
PREFIXES = {"eval": "eval/lab/", "train": "lab/"}  # of a curve's columns, by its source; others have none
Z = 1.96  # of a 95 % interval
# hues that stay apart in the common forms of colour blindness, and a dash and a mark each for those who see none
STYLES: tuple[tuple[str, Any, str], ...] = (
    *((COLOURS["gold"], "solid", "o"), (COLOURS["proxy"], (0, (5, 2)), "s"), ("#9c3d7c", (0, (1, 1.5)), "^")),
    *(("#1d7a5f", (0, (5, 1, 1, 1)), "D"), (COLOURS["muted"], (0, (3, 1, 1, 1, 1, 1)), "v")),
)


@dataclass(frozen=True)
class Policy:
    """A run, and each aspect as points over KL (``gold`` is the aspect's score)."""

    name: str
    aspects: Mapping[str, Sequence[Point]]

    @property
    def farthest(self) -> float:
        """The largest KL."""
        return max(point.kl for points in self.aspects.values() for point in points)

    def at(self, aspect: str, kl: float) -> tuple[float, float]:
        """Score and its standard error at a KL, between the neighbouring points; the error is NaN if unknown."""
        points = sorted(self.aspects[aspect], key=distance)
        d = [distance(point) for point in points]
        place = math.sqrt(max(kl, 0.0))
        value = np.interp(place, d, [point.gold for point in points])
        return float(value), float(np.interp(place, d, [point.gold_se for point in points]))


def load_policies(runs: Sequence[Path]) -> list[Policy]:
    """The aspects of every run; :class:`UserError` for one that has not measured them."""
    if len(runs) > len(STYLES):
        raise UserError(f"{len(runs)} runs in one picture: give at most {len(STYLES)}")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.resolve().parts[-2:]) for run in runs]
    return [Policy(name, _read(run)) for name, run in zip(names, runs, strict=True)]


def _read(run: Path) -> dict[str, list[Point]]:
    source = load_curve(run).source
    header = Table.read(curve_file(run)).header
    prefix = PREFIXES.get(source, "")
    found = {}
    for aspect in ASPECTS:
        column = f"{prefix}gold_{aspect}"
        if column not in header:
            raise UserError(f"{run} has no {column}: aspects are measured with model.gold playground")
        columns = {"gold": column, **({"gold_se": f"{column}_se"} if f"{column}_se" in header else {})}
        points = load_curve(run, columns=columns).points
        found[aspect] = [point for point in points if math.isfinite(point.gold)]
    return found


def common_kl(policies: Sequence[Policy]) -> float:
    """The largest KL that all of them reach."""
    return min(policy.farthest for policy in policies)


def headline(policies: Sequence[Policy]) -> str:
    """Which policy leads in what, where all of them can be compared."""
    kl = common_kl(policies)
    if len(policies) == 1:
        (policy,) = policies
        changes = [f"{aspect} {_change(policy, aspect, kl)}" for aspect in ASPECTS]
        return f"Up to KL {kl_text(kl)}, {' and '.join(changes)}"
    leads = {aspect: _lead(policies, aspect) for aspect in ASPECTS}
    (first, near), (second, near_too) = leads["helpfulness"], leads["safety"]
    whose = "" if second == first else f"{second} "
    return f"At KL {kl_text(kl)} {first} has the highest helpfulness{near} and {whose}the highest safety{near_too}"


def _lead(policies: Sequence[Policy], aspect: str) -> tuple[str, str]:
    """The policy that scores highest, and in words those whose intervals overlap its own, or are not known."""
    rows = {name: row[aspect] for name, row in table(policies).items()}
    first = max(rows, key=lambda name: rows[name]["score"] or 0.0)
    low = rows[first]["low"]
    near = [
        name
        for name, row in rows.items()
        if name != first and (low is None or row["high"] is None or row["high"] >= low)
    ]
    return first, f" (not clear of {' and '.join(near)})" if near else ""


def _change(policy: Policy, aspect: str, kl: float) -> str:
    before, after = policy.at(aspect, 0.0)[0], policy.at(aspect, kl)[0]
    return f"{'rises' if after > before else 'falls'} from {before:.2f} to {after:.2f}"


def table(policies: Sequence[Policy]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Every policy's aspects at :func:`common_kl`, with the ends of their 95 % intervals where errors are known."""
    kl = common_kl(policies)
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    for policy in policies:
        rows[policy.name] = {}
        for aspect in ASPECTS:
            value, error = policy.at(aspect, kl)
            known = math.isfinite(error)
            ends = {"low": value - Z * error if known else None, "high": value + Z * error if known else None}
            rows[policy.name][aspect] = {"score": value, **ends}
    return rows


def draw_aspects(policies: Sequence[Policy]) -> Figure:
    """A panel for each aspect over a common KL axis, a line for each policy."""
    with mpl.rc_context(style(WIDE.font)):
        figure = Figure(figsize=(WIDE.width, WIDE.height), layout="constrained")
        axes = figure.subplots(len(ASPECTS), 1, sharex=True)
        x_axis(axes[-1], [point for policy in policies for points in policy.aspects.values() for point in points], WIDE)
        for ax, aspect in zip(axes, ASPECTS, strict=True):
            _panel(ax, aspect, policies)
        if len(policies) > 1:
            axes[-1].legend(loc="best", frameon=False, fontsize="small")
            _mark_comparison(axes, policies)
        figure.align_ylabels()
        title = "\n".join(textwrap.wrap(headline(policies), TITLE_COLUMNS))
        figure.suptitle(title, x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28)
        note = textwrap.fill("Dots: evaluations; bands: 95 % intervals over prompts of one seed each.", SOURCE_COLUMNS)
        figure.supxlabel(note, x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"])
    return figure


def _panel(ax: Axes, aspect: str, policies: Sequence[Policy]) -> None:
    ax.set_title(f"True {aspect}", loc="left", size="medium", weight="bold", pad=7)
    ax.set_ylabel("mean score")
    bare(ax)
    for policy, (colour, dash, mark) in zip(policies, STYLES, strict=False):
        points = sorted(policy.aspects[aspect], key=distance)
        d = np.array([distance(point) for point in points])
        score = np.array([point.gold for point in points])
        error = Z * np.nan_to_num(np.array([point.gold_se for point in points]))
        ax.fill_between(d, score - error, score + error, color=colour, alpha=0.14, linewidth=0, zorder=1)
        ax.plot(
            d, score, color=colour, linestyle=dash, linewidth=1.6, marker=mark, markersize=4.2,
            markeredgecolor=COLOURS["paper"], markeredgewidth=0.5, label=policy.name, zorder=3,
        )  # fmt: skip
    ax.margins(y=0.12)


def _mark_comparison(axes: Sequence[Axes], policies: Sequence[Policy]) -> None:
    """A line where the title compares."""
    x = math.sqrt(max(common_kl(policies), 0.0))
    for ax in axes:
        ax.axvline(x, color=COLOURS["muted"], linewidth=0.9, zorder=0)
    right = x > 0.7 * axes[0].get_xlim()[1]
    axes[0].annotate(
        "compared here", (x, 0.02), xycoords=("data", "axes fraction"), xytext=(-5 if right else 5, 0),
        textcoords="offset points", ha="right" if right else "left", va="bottom", size="small", color=COLOURS["muted"],
    )  # fmt: skip
