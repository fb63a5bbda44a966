"""The picture of several methods: true score over KL, samples and reward, other measures over KL, the Pareto front."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.lab.evaluation.intervals import SEEDS, over_runs
from lightning_align.lab.figures import (
    COLOURS,
    NARROW,
    SOURCE_COLUMNS,
    TITLE_COLUMNS,
    WIDE,
    Layout,
    bare,
    distance,
    style,
    x_axis,
)
from lightning_align.lab.frontier import SCORES, by_method, front
from lightning_align.lab.frontier_tracks import TOLERANCE, Track, mean_gain, roots, samples, together
from lightning_align.lab.frontier_words import headline
from lightning_align.lab.overopt import Array

Place = Callable[[Track], Sequence[float]]
# hues that stay apart in the common forms of colour blindness (Okabe and Ito), with a dash and a mark each
STYLES: tuple[tuple[str, Any, str], ...] = (
    *(("#ad6f00", "solid", "o"), ("#0067a5", (0, (5, 2)), "s"), ("#9c3d7c", (0, (1, 1.5)), "^")),
    *(("#1d7a5f", (0, (5, 1, 1, 1)), "D"), ("#5c6570", (0, (3, 1, 1, 1, 1, 1)), "v"), ("#c4461a", "solid", "P")),
    *(("#3aa0d8", (0, (5, 2)), "X"), ("#7a5b00", (0, (1, 1.5)), "<"), ("#5a4fcf", (0, (5, 1, 1, 1)), ">")),
    *(("#1d2126", (0, (3, 1, 1, 1, 1, 1)), "h"),),
)
FIRST, OTHER, LEGEND_LINE = 3.1, 2.5, 0.24  # inches: heights of the first panel, of the others, of a line of the legend
EVEN = 0.5  # win rate of the start against itself


@dataclass(frozen=True)
class Panel:
    """What a panel shows: a field of the points over a place."""

    score: str
    place: Place
    over: str
    title: str


def proxies(track: Track) -> list[float]:
    """Reward that training maximises."""
    return [point.proxy for point in track.points]


def panels(tracks: Sequence[Track]) -> list[Panel]:
    """Those for which a run has two points, the score over KL always."""
    score = tracks[0].score
    name = SCORES[score][0].upper() + SCORES[score][1:]
    wanted = [
        Panel(score, samples, "samples", f"{name} over samples drawn"),
        Panel(score, proxies, "proxy", f"{name} over reward"),
        Panel("win_rate", roots, "kl", "Win rate over the start"),
        Panel("heldout", roots, "kl", "Held-out judge"),
    ]
    there = [
        panel
        for panel in wanted
        if any(len(_known(track, panel)[0]) > 1 for track in tracks)
        and not (panel.over == "kl" and panel.score == score)
        and not (panel.over == "proxy" and score == "proxy")
    ]
    return [Panel(score, roots, "kl", f"{name} over KL"), *there]


def _known(track: Track, panel: Panel) -> tuple[Array, Array]:
    """Places and values of the points that have both, by place."""
    x = np.array(panel.place(track), dtype=np.float64)
    y = np.array([getattr(point, panel.score) for point in track.points], dtype=np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[known], kind="stable")
    return x[known][order], y[known][order]


def mean_curve(own: Sequence[Track], panel: Panel) -> tuple[Array, Array, Array, Array]:
    """Places, mean over runs and both ends of its interval ``[n]``, as far as all runs of a method go.

    The interval is that of :func:`~lightning_align.lab.evaluation.intervals.over_runs`; its ends are NaN where no error
    is known. Of the score that methods are compared by it is the interval of the gain over the start, drawn about the
    mean: how much better some starts, or some prompts, are than others is not what is asked.
    """
    known = [(track, *_known(track, panel)) for track in own]
    known = [(track, x, y) for track, x, y in known if len(x)]
    if not known:
        return (np.empty(0),) * 4
    begin, reach = max(x[0] for _, x, _ in known), min(x[-1] for _, x, _ in known)
    places = np.unique([x for x in known[0][1] if begin - TOLERANCE <= x <= reach + TOLERANCE])
    estimates = []
    for place in places:
        where = min(max(place, begin), reach)
        mixtures = [(track, track.shares(panel.place, where, panel.score)) for track, _, _ in known]
        if all(panel.score == track.score and len(track.points) > 1 for track, _, _ in known):
            start = float(np.mean([track.value(track.start) for track, _, _ in known]))
            found = mean_gain(mixtures)
        else:
            start = 0.0
            found = over_runs(
                [track.mixed(shares, panel.score) for track, shares in mixtures],
                [track.at(panel.place, where, f"{panel.score}_se") for track, _, _ in known],
                together(
                    [track.by_prompt(shares, panel.score) for track, shares in mixtures], [t for t, _ in mixtures]
                ),
            )
        estimates.append([end + start for end in (found.value, found.low, found.high)])
    return places, *np.array(estimates, dtype=np.float64).reshape(-1, 3).T


# ---------------------------------------------------------------------------------------------------------- drawing
def draw_frontier(
    tracks: Sequence[Track], summary: Mapping[str, Any], layout: Layout = WIDE, *, with_title: bool = True
) -> Figure:
    """The score over √KL with the Pareto front, and the other panels in two columns (in one, if it is narrow)."""
    shown = panels(tracks)
    methods = list(by_method(tracks))
    columns = 1 if layout.width < WIDE.width else 2
    legend_columns = max(1, int(layout.width / (0.8 + 0.07 * max(map(len, methods)))))
    rows = math.ceil((len(shown) - 1) / columns)
    heights = [LEGEND_LINE * math.ceil(len(methods) / legend_columns), FIRST, *[OTHER] * rows]
    with mpl.rc_context(style(layout.font)):
        figure = Figure(figsize=(layout.width, sum(heights) + 0.7 * with_title + 0.3), layout="constrained")
        grid = figure.add_gridspec(2 + rows, columns, height_ratios=heights)
        legend = figure.add_subplot(grid[0, :])
        legend.axis("off")
        first = figure.add_subplot(grid[1, :])
        _panel(first, shown[0], tracks, layout)
        first.axvline(math.sqrt(max(summary["kl"], 0.0)), color=COLOURS["muted"], linewidth=0.9, zorder=0)
        _front(first, tracks)
        small = replace(NARROW, width=layout.width / columns, font=layout.font)
        for index, panel in enumerate(shown[1:]):
            # an odd one at the end has the whole row
            last = index == len(shown) - 2 and index % columns == 0
            cell = grid[2 + index // columns, :] if last else grid[2 + index // columns, index % columns]
            _panel(figure.add_subplot(cell), panel, tracks, layout if last and columns > 1 else small)
        handles, labels = first.get_legend_handles_labels()
        legend.legend(
            handles, labels, loc="upper left", ncols=legend_columns, frameon=False, fontsize="small",
            borderaxespad=0, handlelength=2.6,
        )  # fmt: skip
        if with_title:
            wide = max(20, int(TITLE_COLUMNS * layout.width / WIDE.width))
            title = "\n".join(textwrap.wrap(headline(summary), wide))
            figure.suptitle(title, x=0.012, ha="left", weight="bold", size=layout.font * 1.28)
            text = textwrap.fill(note(tracks), int(SOURCE_COLUMNS * layout.width / WIDE.width))
            figure.supxlabel(text, x=0.012, ha="left", size=layout.font * 0.8, color=COLOURS["muted"])
    return figure


def note(tracks: Sequence[Track]) -> str:
    """What lines, bands and steps are."""
    counts = [len(own) for own in by_method(tracks).values()]
    over = "over runs" if min(counts) >= SEEDS else "over prompts" if max(counts) < SEEDS else ""
    mixed = f"over runs where a method has {SEEDS}, else over prompts"
    seeds = " Lines: mean over runs, as far as all of a method's go; faint: each run." if max(counts) > 1 else ""
    shared = ""
    if max(counts) >= SEEDS and any(track.prompts.get(track.score) for track in tracks):
        shared = (
            " Over runs: the prompts and the start's answers are the same for all; their error is in the interval of "
            "the gain, and not in that of other measures."
        )
    elif max(counts) >= SEEDS:
        shared = " Over runs: the prompts and the start's answers are the same for all, and their error is not in it."
    return (
        f"Bands: 95 % interval {over or mixed}, of the score that of its gain over the start.{shared}{seeds} "
        "Steps: Pareto front, the checkpoints that no other beats. "
        "The grey upright line is the KL at which methods are compared."
    )


def _panel(ax: Axes, panel: Panel, tracks: Sequence[Track], layout: Layout) -> None:
    ax.set_title(panel.title, loc="left", size="medium", weight="bold", pad=7)
    ax.set_ylabel("win rate" if panel.score == "win_rate" else "mean score")
    bare(ax)
    for (_, own), drawn in zip(by_method(tracks).items(), STYLES, strict=False):
        _method(ax, panel, own, drawn)
    if panel.score == "win_rate":
        ax.axhline(EVEN, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=0)
    if panel.over == "kl":
        x_axis(ax, [point for track in tracks for point in track.points if math.isfinite(point.kl)], layout)
    elif panel.over == "proxy":
        ax.set_xlabel("mean reward (proxy)")
    else:
        ax.set_xlabel("answers that the policy has given in training")
        ax.set_xscale("symlog", linthresh=_smallest(tracks))
    ax.margins(y=0.08)


def _method(ax: Axes, panel: Panel, own: Sequence[Track], drawn: tuple[str, Any, str]) -> None:
    colour, dash, mark = drawn
    if len(own) > 1:
        for track in own:
            ax.plot(*_known(track, panel), color=colour, alpha=0.2, linewidth=0.8, zorder=1)
    x, mean, low, high = mean_curve(own, panel)
    if len(x) == 1 and np.isfinite(low[0]):
        ax.plot([x[0], x[0]], [low[0], high[0]], color=colour, alpha=0.4, linewidth=2, zorder=2)
    elif np.isfinite(low).any():
        ax.fill_between(x, low, high, color=colour, alpha=0.09, linewidth=0, zorder=1)
    ax.plot(
        x, mean, color=colour, linestyle=dash, linewidth=1.7, marker=mark, markersize=4.0,
        markeredgecolor=COLOURS["paper"], markeredgewidth=0.4, label=own[0].method, zorder=3,
    )  # fmt: skip


def _front(ax: Axes, tracks: Sequence[Track]) -> None:
    """A step line from each checkpoint that no other beats to the next, and on to the edge."""
    best = front(tracks)
    x = [distance(point) for _, point in best]
    y = [track.value(point) for track, point in best]
    edge = float(ax.get_xlim()[1])
    ax.step(
        [*x, edge], [*y, y[-1]], where="post", color=COLOURS["muted"], linewidth=1.0, alpha=0.6, zorder=0.5,
        gid="pareto",
    )  # fmt: skip


def _smallest(tracks: Sequence[Track]) -> float:
    """Samples up to which the axis is linear: the first checkpoint after the start."""
    return max(1.0, min((value for track in tracks for value in track.samples if value > 0), default=1.0))
