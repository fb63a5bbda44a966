"""The picture of the claims: each effect with its interval, on a scale of its own."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.lab.claims import NOT_MEASURED, Result, headline
from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, style
from lightning_align.lab.findings import number

# a mark each, for those who see no colours
VERDICTS = {"supported": ("#1d7a5f", "o"), "contradicted": ("#9c3d7c", "X"), "undecided": (COLOURS["muted"], "D")}
HEIGHT, BELOW_TEXT = -0.3, 0.68  # of the bars, from −1 to 1, and of what may stand under the words, from 0 to 1
COLUMNS = 62  # letters of a hypothesis in a line
NOTE = (
    "Bars: 95 % intervals over seeds (Student), each on a scale of its own; the upright line is no effect, grey is "
    "what counts as equal. Of twenty true null effects one is expected to look like a finding."
)


def draw_claims(results: Sequence[Result]) -> Figure:
    """A row for each claim: what it says, the effect as a bar, and the verdict."""
    with mpl.rc_context(style(WIDE.font)):
        texts = ["\n".join(textwrap.wrap(result.claim.hypothesis, COLUMNS)) for result in results]
        heights = [0.34 + 0.17 * (text.count("\n") + 1) for text in texts]
        figure = Figure(figsize=(WIDE.width, 1.0 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1.55, 1), height_ratios=heights)
        for result, text, (left, right) in zip(results, texts, axes, strict=True):
            left.axis("off")
            left.text(0, 0.5, text, va="center", ha="left", size=WIDE.font * 0.88, transform=left.transAxes)
            _bar(right, result)
        figure.suptitle(
            "\n".join(textwrap.wrap(headline(results), TITLE_COLUMNS)), x=0.012, ha="left", weight="bold",
            size=WIDE.font * 1.28,
        )  # fmt: skip
        figure.supxlabel(
            textwrap.fill(NOTE, SOURCE_COLUMNS), x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"]
        )
    return figure


def _bar(ax: Axes, result: Result) -> None:
    effect, margin = result.effect, result.claim.margin
    colour, mark = VERDICTS[result.verdict]
    ends = [abs(value) for value in (effect.value, effect.low, effect.high, margin) if math.isfinite(value)]
    reach = max(ends, default=0.0) * 1.25 or 1.0
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-1, 1)
    ax.axis("off")
    if margin:
        ax.axvspan(-margin, margin, ymax=BELOW_TEXT, color=COLOURS["shade"], linewidth=0)
    ax.axvline(0, ymax=BELOW_TEXT, color=COLOURS["muted"], linewidth=0.9)
    if math.isfinite(effect.low):
        ax.plot([effect.low, effect.high], [HEIGHT, HEIGHT], color=colour, linewidth=2.2, solid_capstyle="butt")
    if math.isfinite(effect.value):
        ax.plot(effect.value, HEIGHT, mark, color=colour, markersize=6.5, markeredgecolor=COLOURS["paper"])
    ax.text(
        0, 0.98, told(result), transform=ax.transAxes, va="top", ha="left", size=WIDE.font * 0.8,
        color=colour,
    )  # fmt: skip


def told(result: Result) -> str:
    """The outcome with the effect, in words."""
    return result.outcome if result.outcome == NOT_MEASURED else f"{result.verdict} ({effect_of(result)})"


def effect_of(result: Result) -> str:
    """The effect in words."""
    effect = result.effect
    if not math.isfinite(effect.value):
        return "–"
    digits = 0 if abs(effect.value) >= 100 else 2 if abs(effect.value) >= 0.1 else 3
    ends = "" if math.isnan(effect.low) else f" ({number(effect.low, digits)} to {number(effect.high, digits)})"
    return f"{number(effect.value, digits)}{ends}, n = {effect.n}"
