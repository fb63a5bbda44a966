"""The picture: the optimised reward and the true score over KL, with the fit, its peak and the checkpoint to keep."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lightning_align.lab.analysis import START_KL, Analysis
from lightning_align.lab.findings import Finding, kl_text
from lightning_align.lab.overopt import FORMULAS
from lightning_align.lab.runs import Point

# Blue and a dark amber stay apart in every common form of colour blindness and in print.
COLOURS = {
    "paper": "#fffffe",
    "ink": "#1d2126",
    "muted": "#5c6570",
    "grid": "#e4e7eb",
    "gold": "#ad6f00",
    "proxy": "#0067a5",
    "shade": "#f1f2f4",
}
PNG_DPI = 200
KL_TICKS = [0.0, *(factor * 10.0**power for power in range(-3, 5) for factor in (1, 2, 5))]
Y_LABELS = {"proxy": "mean reward", "gold": "mean score"}
PANEL_TITLES = {
    "proxy": "Optimised reward (proxy): what training maximises",
    "gold": "True score (gold): what we want, never trained on",
}


@dataclass(frozen=True)
class Layout:
    """Inches, points and words that depend on how wide the picture is shown."""

    width: float
    height: float
    font: float
    title_columns: int
    x_label: str


WIDE = Layout(7.0, 5.2, 10.0, 66, "KL from the initial policy, nats per answer (square-root scale)")
NARROW = Layout(4.0, 5.2, 9.5, 40, "KL from the initial policy (nats, √ scale)")


def draw(analysis: Analysis, finding: Finding, layout: Layout = WIDE, *, with_title: bool = True) -> Figure:
    """One panel for the reward and a larger one for gold, whichever were measured, over a common KL axis."""
    panels = [key for key in ("proxy", "gold") if _measured(analysis.curve.points, key)]
    style: Any = {
        "font.size": layout.font,
        "font.family": "DejaVu Sans",
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["muted"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "svg.fonttype": "none",
        "svg.hashsalt": "lightning-align",  # element names that do not change from call to call
    }
    with mpl.rc_context(style):
        figure = Figure(
            figsize=(layout.width, layout.height * (1.0 if len(panels) > 1 else 0.72)), layout="constrained"
        )
        ratios = [1.0 if key == "proxy" else 1.75 for key in panels]
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0].tolist()
        for key, ax in zip(panels, axes, strict=True):
            _panel(ax, key, analysis)
        _mark_choice(axes, panels, analysis)
        figure.align_ylabels()
        _x_axis(axes[-1], analysis.curve.points, layout)
        if with_title:
            title = "\n".join(textwrap.wrap(finding.headline, layout.title_columns))
            figure.suptitle(title, x=0.012, ha="left", weight="bold", size=layout.font * 1.28)
            figure.supxlabel(source_line(analysis), x=0.012, ha="left", size=layout.font * 0.8, color=COLOURS["muted"])
    return figure


def _measured(points: Sequence[Point], key: str) -> bool:
    return any(math.isfinite(getattr(point, key)) for point in points)


def source_line(analysis: Analysis) -> str:
    """What the dots, the line and the band are."""
    curve = analysis.curve
    seed = f", seed {curve.seed}" if curve.seed is not None else ""
    line = f"\nLine: fit of {FORMULAS[analysis.form]}, d = √KL. Band: its 95 % interval." if analysis.forms else ""
    return f"{curve.name}{seed}. Dots: {len(curve.points)} {curve.description}.{line}"


def distance(point: Point) -> float:
    """Place on the axis: √KL, with negative estimates at 0."""
    return math.sqrt(max(point.kl, 0.0))


def _panel(ax: Axes, key: str, analysis: Analysis) -> None:
    points = [point for point in analysis.curve.points if math.isfinite(getattr(point, key))]
    x = np.array([distance(point) for point in points])
    y = np.array([getattr(point, key) for point in points])
    colour = COLOURS[key]
    ax.set_title(PANEL_TITLES[key], loc="left", color=colour, size="medium", weight="bold", pad=7)
    ax.set_ylabel(Y_LABELS[key])
    ax.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="both", length=0)
    ax.locator_params(axis="y", nbins=6 if key == "gold" else 4)
    dense = len(points) > 40
    if key == "proxy":
        order = np.argsort(x, kind="stable")
        ax.plot(x[order], y[order], color=colour, linewidth=1.4, alpha=0.35 if dense else 0.6)
    elif analysis.result is not None:
        _fit(ax, analysis)
    ax.scatter(
        x, y, s=14 if dense else 26, color=colour, edgecolor=COLOURS["paper"], linewidth=0.7, zorder=4, clip_on=False
    )
    if key == "gold":
        _start_level(ax, analysis)
        _mark_peak(ax, analysis)
    ax.margins(y=0.14 if key == "proxy" else 0.1)


def _fit(ax: Axes, analysis: Analysis) -> None:
    """The fitted curve and its band, on the scale of gold."""
    result = analysis.result
    assert result is not None
    origin = 0.0 if analysis.start_fitted else analysis.start_gold
    grid = result.band_d
    low, high = result.band_low + origin, result.band_high + origin
    ax.fill_between(grid, low, high, color=COLOURS["gold"], alpha=0.16, linewidth=0, zorder=1)
    ax.plot(grid, result.fit(grid) + origin, color=COLOURS["gold"], linewidth=2.2, zorder=3)


def _start_level(ax: Axes, analysis: Analysis) -> None:
    """Where gold began, so that rise and fall can be read against it."""
    if not math.isfinite(analysis.start_gold):
        return
    ax.axhline(analysis.start_gold, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (1, 2.5)), zorder=2)
    ax.annotate(
        "start", (1.0, analysis.start_gold), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", color=COLOURS["muted"], size="small",
    )  # fmt: skip


def _mark_peak(ax: Axes, analysis: Analysis) -> None:
    """A diamond on the fitted peak with the interval of its place, and a shade over what lies beyond."""
    result = analysis.result
    if result is None or not analysis.peak_in_range or result.peak_d is None or result.peak_reward is None:
        return
    farthest = max(distance(point) for point in analysis.curve.points)
    place, height = result.peak_d.estimate, result.peak_reward.estimate
    height += 0.0 if analysis.start_fitted else analysis.start_gold
    low, high = result.peak_d.low, min(result.peak_d.high, farthest)
    ax.plot([low, high], [height, height], color=COLOURS["ink"], linewidth=1.1, zorder=3.4, solid_capstyle="butt")
    ax.plot(
        place, height, marker="D", markersize=9, color=COLOURS["paper"], markeredgecolor=COLOURS["ink"],
        markeredgewidth=1.4, linestyle="none", zorder=3.6,
    )  # fmt: skip
    above = height - result.fit(place) + np.interp(place, result.band_d, result.band_high)
    ax.annotate(
        f"fitted peak, KL {kl_text(place**2)}", (place, float(above)), xytext=(6, 4), textcoords="offset points",
        ha="left", va="bottom", size="small", zorder=7,
    )  # fmt: skip
    if analysis.falls:
        ax.axvspan(place, farthest, color=COLOURS["shade"], linewidth=0, zorder=0)
        ax.annotate(
            "over-optimised", (farthest, 0.97), xycoords=("data", "axes fraction"), xytext=(-6, 0),
            textcoords="offset points", ha="right", va="top", size="small", style="italic", color=COLOURS["muted"],
        )  # fmt: skip


def _mark_choice(axes: Sequence[Axes], panels: Sequence[str], analysis: Analysis) -> None:
    """A line through all panels and a ring at the checkpoint to keep."""
    point = analysis.choice.point
    x = distance(point)
    farthest = max(distance(other) for other in analysis.curve.points) or 1.0
    for key, ax in zip(panels, axes, strict=True):
        ax.axvline(x, color=COLOURS["ink"], linewidth=1.1, zorder=2)
        value = getattr(point, key)
        if math.isfinite(value):
            ax.plot(
                x, value, marker="o", markersize=11, color="none", markeredgecolor=COLOURS["ink"], markeredgewidth=1.8,
                linestyle="none", zorder=6, clip_on=False,
            )  # fmt: skip
    verb = "keep" if analysis.choice.policy == "gold" else "knee"
    place = "the start" if point.kl < START_KL else f"KL {kl_text(point.kl)}"
    right = x > 0.62 * farthest
    axes[0].annotate(
        f"{verb}: step {point.step}, {place}", (x, 0.98), xycoords=("data", "axes fraction"),
        xytext=(-6 if right else 6, 0), textcoords="offset points", ha="right" if right else "left", va="top",
        weight="bold", size="small", bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.5}, zorder=8,
    )  # fmt: skip


def _x_axis(ax: Axes, points: Sequence[Point], layout: Layout) -> None:
    """KL on a square-root scale: the distance of the formula, labelled with the number people know."""
    farthest = max(distance(point) for point in points)
    ax.set_xlim(-0.025 * (farthest or 1.0), 1.025 * (farthest or 1.0))
    ticks: list[float] = []
    for kl in KL_TICKS:
        place = math.sqrt(kl)
        if place <= farthest * 1.02 and (not ticks or place - ticks[-1] >= farthest * 0.085):
            ticks.append(place)
    ax.set_xticks(ticks, [f"{round(place**2, 4):g}" for place in ticks])
    ax.set_xlabel(layout.x_label)


def png(figure: Figure) -> bytes:
    """On a light ground, sharp at twice the size."""
    figure.set_facecolor(COLOURS["paper"])
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=PNG_DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str, label: str) -> str:
    """Inline SVG without a ground, its colours left to the page: ``var(--gold)`` and so on.

    Args:
        figure: What to write.
        name: Prefix of the element ids, which must be unique in a page.
        label: What a screen reader says.
    """
    figure.set_facecolor("none")
    for ax in figure.axes:
        ax.set_facecolor("none")
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    width, height = (float(value) for value in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    opening = f'<svg class="{name}" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*>", opening + ' xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)
