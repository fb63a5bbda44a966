"""The picture of ``benchmarks.training``: samples a second, seconds to the first step and memory, ours beside TRL's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.rollout_figure import INK, OURS, STYLE, THEIRS, bare

Case = tuple[str, str]
# key of a summary, what the axis says
PANELS = (
    ("samples_per_second", "samples / s"),
    ("first_step_seconds", "s to the first step's end"),
    ("peak_mib", "peak memory, MiB"),
)
HEIGHT = 0.38  # of a bar; a case has two


def draw(found: Mapping[Case, Mapping[str, Mapping[str, Any]]], speeds: Mapping[Case, float], path: Path) -> None:
    """Write the panels as a PNG.

    Args:
        found: Summaries by case and side, ours first.
        speeds: Samples a second by those of TRL.
        path: Where to.
    """
    low, high = min(speeds.values()), max(speeds.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 1.4 + 0.52 * len(found)), layout="constrained", facecolor="#fffffe")
        axes = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
        for ax, (key, label) in zip(axes, PANELS, strict=True):
            _bars(ax, found, key)
            ax.set_xlabel(label)
        for row, speed in enumerate(speeds.values()):
            (ours, *_) = list(found.values())[row].values()
            axes[0].annotate(
                f"{speed:.1f} ×", (ours["samples_per_second_max"], row - HEIGHT / 2),
                xytext=(4, 0), textcoords="offset points", va="center", size="small",
            )  # fmt: skip
        axes[0].set_yticks(range(len(found)), [", ".join(case) for case in found])
        axes[0].invert_yaxis()
        axes[0].margins(x=0.22)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"Training: {low:.1f} to {high:.1f} × TRL's speed", x=0.012, ha="left", weight="bold", size=13)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=200)


def _bars(ax: Axes, found: Mapping[Case, Mapping[str, Mapping[str, Any]]], key: str) -> None:
    """Medians, with lines over the ranges."""
    for number, (name, colour) in enumerate(zip(next(iter(found.values())), (OURS, THEIRS), strict=True)):
        rows = [row + (number - 0.5) * HEIGHT for row in range(len(found))]
        values = [sides[name] for sides in found.values()]
        ax.barh(rows, [value[key] for value in values], height=HEIGHT, color=colour, label=name)
        for row, value in zip(rows, values, strict=True):
            ax.plot((value[f"{key}_min"], value[f"{key}_max"]), (row, row), color=INK, linewidth=1.1)
    bare(ax, "x")
