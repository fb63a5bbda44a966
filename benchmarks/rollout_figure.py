"""The picture of ``benchmarks.rollout``: tokens a second over batch size, and the rollout that PPO does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import Timing, speedup

INK, MUTED, GRID, PAPER = "#1d2126", "#5c6570", "#e4e7eb", "#fffffe"
OURS, THEIRS = "#0067a5", "#9aa3ad"
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
}


def draw(fixed: Mapping[int, Mapping[str, Timing]], ppo: Mapping[str, Timing], path: Path) -> None:
    """Write both panels as a PNG; the title says how many times as fast ours is."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5.6), layout="constrained", facecolor=PAPER)
        parts: Any = figure.subfigures(2, 1, height_ratios=[1.25, 1], facecolor=PAPER)
        upper, lower = (part.subplots() for part in parts)
        _over_batch(upper, fixed)
        _bars(lower, ppo)
        first, *_ = ppo.values()
        figure.suptitle(
            f"Rollouts: {speedup(ppo['ours'], first):.1f} × generate on PPO's work",
            x=0.012, ha="left", weight="bold", size=13,
        )  # fmt: skip
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=200)


def _over_batch(ax: Axes, fixed: Mapping[int, Mapping[str, Timing]]) -> None:
    """A line a variant, with its 10–90 % range."""
    batches = list(fixed)
    for name in next(iter(fixed.values())):
        if name.endswith("alone"):
            continue
        mine, greedy = name.startswith("ours"), name.endswith("greedy")
        colour, line = (OURS if mine else THEIRS), ("dashed" if greedy else "solid")
        if name.endswith("sampling"):
            line = "dotted"
        timings = [fixed[batch][name] for batch in batches]
        low, high = zip(*(timing.spread for timing in timings), strict=True)
        rates = [timing.rate for timing in timings]
        ax.plot(batches, rates, color=colour, linestyle=line, linewidth=1.8, marker="o", markersize=4, label=name)
        ax.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("sequences in the batch")
    ax.set_ylabel("tokens / s")
    ax.set_title("Fixed length, a token more of every sequence", loc="left", size="medium", weight="bold")
    ax.legend(frameon=False, fontsize="small", loc="upper left", handlelength=3.5)
    bare(ax, "y")


def _bars(ax: Axes, ppo: Mapping[str, Timing]) -> None:
    """A bar a variant."""
    names, timings = list(ppo), list(ppo.values())
    rates = [timing.rate for timing in timings]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    ax.barh(names, rates, color=colours, height=0.62)
    for row, timing in enumerate(timings):
        ax.plot(timing.spread, [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
        times = f"{speedup(timing, timings[0]):.1f} ×" if row else "1 ×"
        ax.annotate(times, (timing.spread[1], row), xytext=(5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.set_xlabel("completion tokens / s")
    ax.set_title("Unequal prompts, samples that end at EOS, log-probs", loc="left", size="medium", weight="bold")
    bare(ax, "x")


def bare(ax: Axes, axis: str) -> None:
    ax.grid(axis=axis, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.set_facecolor(PAPER)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="both", length=0)
