"""The picture of a reward model's calibration: how often it is right where it is so sure."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lightning_align.lab.figures import COLOURS, bare, png, style
from lightning_align.losses.reward_metrics import ReliabilityBin

Z = 1.96  # of a 95 % interval
SURE = 0.05  # mean gap between confidence and accuracy that is worth a word


def draw_reliability(bins: Sequence[ReliabilityBin], name: str) -> bytes:
    """PNG of observed accuracy against the score difference, beside σ(Δ), which a calibrated model follows.

    Args:
        bins: In bins of equal count.
        name: Of the run.
    """
    with mpl.rc_context(style(10.0)):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        _panel(figure, bins)
        figure.suptitle(headline(bins), x=0.012, ha="left", weight="bold", size=12.8)
        total = sum(point.count for point in bins)
        note = f"{name}. {total:,} held-out comparisons in {len(bins)} bins of equal count; bars: 95 % intervals."
        figure.supxlabel(note, x=0.012, ha="left", size=8, color=COLOURS["muted"])
    return png(figure)


def headline(bins: Sequence[ReliabilityBin]) -> str:
    """What the picture shows: the gap between confidence and accuracy, and whether it is more than chance."""
    total = sum(point.count for point in bins)
    sure = sum(point.predicted * point.count for point in bins) / total
    right = sum(point.accuracy * point.count for point in bins) / total
    error = Z * (right * (1 - right) / total) ** 0.5
    numbers = f"{100 * sure:.0f} % sure, {100 * right:.0f} % right"
    if abs(sure - right) <= max(error, SURE):
        return f"As sure as it is right, on average: {numbers}"
    return f"{'More' if sure > right else 'Less'} sure than it is right: {numbers}"


def _panel(figure: Figure, bins: Sequence[ReliabilityBin]) -> None:
    ax = figure.subplots()
    delta = np.array([point.delta for point in bins])
    right = np.array([point.accuracy for point in bins])
    grid = np.linspace(0, 1.06 * max(float(delta.max()), 1e-3), 200)
    ax.plot(
        grid, 1 / (1 + np.exp(-grid)), color=COLOURS["muted"], linewidth=1.4, linestyle=(0, (4, 3)), zorder=2,
        label="calibrated: σ(difference)",
    )  # fmt: skip
    low, high = np.array([_interval(point) for point in bins]).T
    ax.vlines(delta, low, high, color=COLOURS["proxy"], linewidth=1.4, alpha=0.55, zorder=3)
    ax.plot(delta, right, color=COLOURS["proxy"], linewidth=1.2, alpha=0.5, zorder=3)
    ax.scatter(
        delta, right, s=30, color=COLOURS["proxy"], edgecolor=COLOURS["paper"], linewidth=0.7, zorder=4, clip_on=False,
        label="this reward model",
    )  # fmt: skip
    ax.axhline(0.5, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (1, 2.5)), zorder=1, label="a coin")
    ax.legend(loc="lower right", frameon=False, fontsize="small", labelcolor=COLOURS["muted"])
    ax.set_xlim(0, float(grid[-1]))
    ax.set_ylim(min(0.3, float(low.min()) - 0.02), 1.02)  # room for the legend below the coin
    ax.set_xlabel("difference of the two scores (log-odds that the model gives)")
    ax.set_ylabel("share ranked as labelled")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bare(ax)


def _interval(point: ReliabilityBin) -> tuple[float, float]:
    """Wilson's interval of a share: it stays within 0 and 1."""
    n, share = point.count, point.accuracy
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return centre - half, centre + half
