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
from lightning_align.lab.overopt import FORMULAS, FormResult
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
TITLE_COLUMNS = 58
SOURCE_COLUMNS = 95
# in order of preference: each is drawn where there is room beside those before it
KL_TICKS = [0.0, *(factor * 10.0**power for factor in (1, 5, 2) for power in range(4, -4, -1))]
Y_LABELS = {"proxy": "mean reward", "gold": "mean score"}
PANEL_TITLES = {"proxy": "Optimised reward (proxy)", "gold": "True score (gold)"}
EXPLANATIONS = {"proxy": "what training maximises", "gold": "what we want, never trained on"}


@dataclass(frozen=True)
class Layout:
    """Inches, points and words that depend on how wide the picture is shown."""

    width: float
    height: float
    font: float
    x_label: str
    explained: bool


WIDE = Layout(7.0, 5.2, 10.0, "KL from the initial policy, nats per answer (square-root scale)", explained=True)
NARROW = Layout(4.0, 5.2, 9.5, "KL from the initial policy (nats, √ scale)", explained=False)


def style(font: float) -> Any:
    """Matplotlib's settings for all pictures, at a size of the letters in points."""
    return {
        "font.size": font,
        "font.family": "DejaVu Sans",
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["muted"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
    }


def bare(ax: Axes) -> None:
    """Faint lines at heights, an axis below, and no frame or ticks."""
    ax.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="both", length=0)


def draw(analysis: Analysis, finding: Finding, layout: Layout = WIDE, *, with_title: bool = True) -> Figure:
    """One panel for the reward and a larger one for gold, whichever were measured, over a common KL axis."""
    panels = [key for key in ("proxy", "gold") if _measured(analysis.curve.points, key)]
    with mpl.rc_context(style(layout.font)):
        figure = Figure(
            figsize=(layout.width, layout.height * (1.0 if len(panels) > 1 else 0.72)), layout="constrained"
        )
        ratios = [1.0 if key == "proxy" else 1.75 for key in panels]
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0].tolist()
        x_axis(axes[-1], analysis.curve.points, layout)
        for key, ax in zip(panels, axes, strict=True):
            _panel(ax, key, analysis, layout)
        _mark_choice(axes, panels, analysis)
        _shade_beyond(axes, panels, analysis, layout)
        figure.align_ylabels()
        if with_title:
            title = "\n".join(textwrap.wrap(finding.headline, TITLE_COLUMNS))
            figure.suptitle(title, x=0.012, ha="left", weight="bold", size=layout.font * 1.28)
            lines = (textwrap.fill(line, SOURCE_COLUMNS) for line in source_line(analysis).split("\n"))
            size = layout.font * 0.8
            figure.supxlabel("\n".join(lines), x=0.012, ha="left", size=size, color=COLOURS["muted"])
    return figure


def _measured(points: Sequence[Point], key: str) -> bool:
    return any(math.isfinite(getattr(point, key)) for point in points)


def source_line(analysis: Analysis) -> str:
    """What the dots, the line and the band are."""
    curve = analysis.curve
    seed = f", seed {curve.seed}" if curve.seed is not None else ""
    hollow = " Hollow: KL estimated below 0." if any(point.kl < 0 for point in curve.points) else ""
    line = ""
    if analysis.forms:
        formula = f"{FORMULAS[analysis.form]}, d = √KL"
        line = f"\nLine: fit of {formula}. Band: its 95 % interval."
        if analysis.misfit:
            line = f"\nDashed: the nearest that {formula}, comes to this run."
        elif analysis.falls and analysis.fitted_peak is not None:
            line += " Shaded: beyond its peak and what to keep."
    return f"{curve.name}{seed}. Dots: {len(curve.points)} {curve.description}.{hollow}{line}"


def distance(point: Point) -> float:
    """Place on the axis: √KL, with negative estimates at 0."""
    return math.sqrt(max(point.kl, 0.0))


def _panel(ax: Axes, key: str, analysis: Analysis, layout: Layout) -> None:
    points = [point for point in analysis.curve.points if math.isfinite(getattr(point, key))]
    x = np.array([distance(point) for point in points])
    y = np.array([getattr(point, key) for point in points])
    colour = COLOURS[key]
    title = f"{PANEL_TITLES[key]}: {EXPLANATIONS[key]}" if layout.explained else PANEL_TITLES[key]
    ax.set_title(title, loc="left", color=colour, size="medium", weight="bold", pad=7)
    ax.set_ylabel(Y_LABELS[key])
    bare(ax)
    ax.locator_params(axis="y", nbins=6 if key == "gold" else 4)
    dense = len(points) > 40
    if key == "gold" and analysis.result is not None:
        _fit(ax, analysis, analysis.result)
    else:
        order = np.argsort(x, kind="stable")
        ax.plot(x[order], y[order], color=colour, linewidth=1.4, alpha=0.35 if dense else 0.6)
    hollow = np.array([point.kl < 0 for point in points])
    for chosen, face, edge in ((~hollow, colour, COLOURS["paper"]), (hollow, COLOURS["paper"], colour)):
        ax.scatter(
            x[chosen], y[chosen], s=14 if dense else 26, color=face, edgecolor=edge, linewidth=0.7, zorder=4,
            clip_on=False,
        )  # fmt: skip
    if key == "gold":
        _start_level(ax, analysis)
        _mark_peak(ax, analysis)
    ax.margins(y=0.14 if key == "proxy" else 0.1)


def _fit(ax: Axes, analysis: Analysis, result: FormResult) -> None:
    """The fitted curve on the scale of gold with its band, or dashed and bare where it does not fit."""
    grid, start = result.band_d, analysis.start_gold
    ax.plot(
        grid, start + result.fit(grid), color=COLOURS["gold"], linewidth=1.4 if analysis.misfit else 2.2, zorder=3,
        linestyle=(0, (4, 3)) if analysis.misfit else "solid",
    )  # fmt: skip
    if not analysis.misfit:
        low, high = start + result.band_low, start + result.band_high
        ax.fill_between(grid, low, high, color=COLOURS["gold"], alpha=0.16, linewidth=0, zorder=1)


def _start_level(ax: Axes, analysis: Analysis) -> None:
    """Where gold began, so that rise and fall can be read against it."""
    if not math.isfinite(analysis.start_gold):
        return
    ax.axhline(analysis.start_gold, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (1, 2.5)), zorder=2)
    crossed = analysis.kept_d > 0.88 * _edge(ax)
    ax.annotate(
        "start", (0.87 if crossed else 0.99, analysis.start_gold), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", color=COLOURS["muted"], size="small",
    )  # fmt: skip


def _mark_peak(ax: Axes, analysis: Analysis) -> None:
    """A diamond on the fitted peak with the interval of its place."""
    result, peak = analysis.result, analysis.fitted_peak
    if result is None or peak is None:
        return
    edge = _edge(ax)
    place, height = peak.d.estimate, analysis.start_gold + peak.reward.estimate
    ends = [peak.d.low, min(peak.d.high, edge)]
    ax.plot(ends, [height, height], color=COLOURS["ink"], linewidth=1.1, zorder=3.4, solid_capstyle="butt")
    ax.plot(
        place, height, marker="D", markersize=9, color=COLOURS["paper"], markeredgecolor=COLOURS["ink"],
        markeredgewidth=1.4, linestyle="none", zorder=3.6,
    )  # fmt: skip
    above = analysis.start_gold + np.interp(place, result.band_d, result.band_high)
    line = analysis.kept_d
    left = place > 0.7 * edge or place < line < place + 0.4 * edge  # away from the edge and from the line
    ax.annotate(
        f"fitted peak, KL {kl_text(place**2)}", (place, float(above)), xytext=(-6 if left else 6, 4),
        textcoords="offset points", ha="right" if left else "left", va="bottom", size="small", zorder=7,
    )  # fmt: skip


def _shade_beyond(axes: Sequence[Axes], panels: Sequence[str], analysis: Analysis, layout: Layout) -> None:
    """A shade beyond the peak and the checkpoint to keep; its name stands under the reward, which is high there."""
    peak = analysis.fitted_peak
    if peak is None or not analysis.falls:
        return
    edge, begin = _edge(axes[0]), max(peak.d.estimate, analysis.kept_d)
    for ax in axes:
        ax.axvspan(begin, edge, color=COLOURS["shade"], linewidth=0, zorder=0)
    room = layout.width * (1 - begin / edge)  # inches, about: the axis takes nine tenths of the width
    if panels[0] == "proxy" and room > 1.4:
        axes[0].annotate(
            "over-optimised", (edge, 0.04), xycoords=("data", "axes fraction"), xytext=(-6, 0),
            textcoords="offset points", ha="right", va="bottom", size="small", style="italic", color=COLOURS["muted"],
        )  # fmt: skip


def _edge(ax: Axes) -> float:
    """Right end of the KL axis, as d."""
    return float(ax.get_xlim()[1])


def _mark_choice(axes: Sequence[Axes], panels: Sequence[str], analysis: Analysis) -> None:
    """A line through all panels and a ring at the checkpoint to keep."""
    if analysis.choice is None:
        return
    point = analysis.choice.point
    x = distance(point)
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
    right = x > 0.45 * _edge(axes[0])  # the reward is low to the left of the line
    axes[0].annotate(
        f"{verb}: step {point.step}, {place}", (x, 0.98), xycoords=("data", "axes fraction"),
        xytext=(-6 if right else 6, 0), textcoords="offset points", ha="right" if right else "left", va="top",
        weight="bold", size="small", zorder=8,
    )  # fmt: skip


def x_axis(ax: Axes, points: Sequence[Point], layout: Layout) -> None:
    """KL on a square-root scale: the distance of the formula, labelled with the number people know."""
    farthest = max(distance(point) for point in points)
    ax.set_xlim(-0.025 * (farthest or 1.0), 1.025 * (farthest or 1.0))
    ticks: dict[float, str] = {}
    for kl in KL_TICKS:
        place, label = math.sqrt(kl), f"{kl:g}"
        inches = {tick: 0.2 + 0.07 * max(len(label), len(other)) for tick, other in ticks.items()}
        clear = all(abs(place - tick) * layout.width >= farthest * room for tick, room in inches.items())
        if place <= farthest * 1.02 and clear:
            ticks[place] = label
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xlabel(layout.x_label)


def png(figure: Figure) -> bytes:
    """On a light ground, sharp at twice the size."""
    figure.set_facecolor(COLOURS["paper"])
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=PNG_DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str, label: str, *, prefix: str | None = None) -> str:
    """Inline SVG without a ground, its colours left to the page: ``var(--gold)`` and so on.

    Args:
        figure: What to write.
        name: Class of the picture in the page's styles, such as ``wide``.
        label: What a screen reader says.
        prefix: Of the element ids, which must be unique in a page (default: the name).
    """
    prefix = prefix or name
    figure.set_facecolor("none")
    for ax in figure.axes:
        ax.set_facecolor("none")
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    # text as text; element names that do not change from call to call
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-align"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text.replace('xlink:href="#', f'href="#{prefix}-'))
    width, height = (float(value) for value in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    opening = f'<svg class="{name}" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
    return opening + text[text.index(">") + 1 :]
