"""Pictures of a sweep: gold over KL by size and data, by policy size, and gain against the reward model's loss."""

import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, bare, style
from lightning_align.lab.frontier_figures import STYLES
from lightning_align.lab.scaling import Law, measure_of_gain, policy_sweep, reward_sweep
from lightning_align.lab.scaling_claims import STATEMENTS, Finding

KL_TICKS = (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def draw(laws: Sequence[Law], findings: Sequence[Finding]) -> dict[str, Figure]:
    """Pictures by name, those for which there is a sweep."""
    found = {finding.claim: finding for finding in findings}
    by_reward, by_policy = reward_sweep(laws), policy_sweep(laws)
    figures = {}
    if len({(law.measured.reward_parameters, law.measured.comparisons) for law in by_reward}) > 1:
        figures["rewards"] = _curves(
            by_reward, lambda law: law.measured.comparisons, lambda law: law.measured.reward_parameters,
            "{:,} comparisons", "reward model of {}", _title(found["S1"]),
        )  # fmt: skip
        figures["gain"] = _gains(by_reward, _title(found["S2"]))
    if len({law.measured.policy_parameters for law in by_policy}) > 1:
        figures["policies"] = _curves(
            by_policy, lambda law: 0, lambda law: law.measured.policy_parameters, "", "policy of {}",
            _title(found["S3"]),
        )  # fmt: skip
    if found["S5"].estimate.n:
        figures["loss"] = _losses(by_reward, _title(found["S5"]))
    return figures


def size(parameters: int) -> str:
    """26,000 as 26 k."""
    for unit, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _title(finding: Finding) -> str:
    return f"Claim: {STATEMENTS[finding.claim]}. Here: {finding.verdict}"


def _figure(title: str, height: float, note: str) -> Figure:
    figure = Figure(figsize=(WIDE.width, height), layout="constrained")
    wrapped = "\n".join(textwrap.wrap(title, TITLE_COLUMNS))
    figure.suptitle(wrapped, x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28)
    figure.supxlabel(
        textwrap.fill(note, SOURCE_COLUMNS), x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"]
    )
    return figure


def _curves(
    laws: Sequence[Law], panel: Callable[[Law], int], line: Callable[[Law], int], heading: str, label: str, title: str
) -> Figure:
    """A panel for each of one thing, a colour for each of the other: dots are checkpoints, lines the joint fits."""
    panels, lines = sorted({panel(law) for law in laws}), sorted({line(law) for law in laws})
    with mpl.rc_context(style(WIDE.font)):
        figure = _figure(title, 1.6 + 2.1 * len(panels), "Dots: checkpoints of every seed; lines: the law over seeds.")
        axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for ax, value in zip(axes, panels, strict=True):
            bare(ax)
            ax.axhline(0, color=COLOURS["muted"], linewidth=0.9)
            if heading:
                ax.set_title(heading.format(value), loc="left", size="medium", weight="bold")
            for key, (colour, dash, mark) in zip(lines, cycle(STYLES), strict=False):
                own = [law for law in laws if panel(law) == value and line(law) == key]
                _line(ax, own, colour, dash, mark, label.format(size(key)))
            ax.set_ylabel("gain in true score")
        axes[0].legend(frameon=False, fontsize="small", loc="lower left")
        ticks = [kl for kl in KL_TICKS if math.sqrt(kl) <= axes[0].get_xlim()[1]]
        axes[-1].set_xticks([math.sqrt(kl) for kl in ticks], [f"{kl:g}" for kl in ticks])
        axes[-1].set_xlabel("KL from the initial policy, nats per answer (square-root scale)")
    return figure


def _line(ax: Axes, laws: Sequence[Law], colour: str, dash: Any, mark: str, label: str) -> None:
    if not laws:
        return
    for law in laws:
        ax.plot(law.measured.d, law.gains, mark, color=colour, markersize=3, alpha=0.55, markeredgewidth=0)
    grid = np.linspace(0, min(float(law.measured.d.max()) for law in laws), 80)
    mean = np.mean([law.fit(grid) for law in laws], axis=0)
    ax.plot(grid, mean, color=colour, linestyle=dash, linewidth=2, label=label)


def _gain_panel(title: str, height: float, note: str) -> tuple[Figure, Axes]:
    """A figure with one panel of gains, and a line at none."""
    figure = _figure(title, height, note)
    ax = figure.subplots()
    bare(ax)
    ax.axhline(0, color=COLOURS["muted"], linewidth=0.9)
    ax.set_ylabel("gain in true score")
    return figure, ax


def _gains(laws: Sequence[Law], title: str) -> Figure:
    """The gain over reward-model size, a line for each amount of data."""
    gain, told = measure_of_gain(laws)
    with mpl.rc_context(style(WIDE.font)):
        note = f"Dots: seeds; lines: their mean. Gain: {told}. Parameters without embeddings."
        figure, ax = _gain_panel(title, 4.2, note)
        levels = sorted({law.measured.comparisons for law in laws})
        for level, (colour, dash, mark) in zip(levels, cycle(STYLES), strict=False):
            own = [law for law in laws if law.measured.comparisons == level]
            sizes = sorted({law.measured.reward_parameters for law in own})
            means = [np.mean([gain(law) for law in own if law.measured.reward_parameters == n]) for n in sizes]
            ax.plot([law.measured.reward_parameters for law in own], [gain(law) for law in own], mark, color=colour,
                    markersize=4, alpha=0.6, markeredgewidth=0)  # fmt: skip
            ax.plot(sizes, means, color=colour, linestyle=dash, linewidth=2, label=f"{level:,} comparisons")
        ax.set_xscale("log")
        sizes = sorted({law.measured.reward_parameters for law in laws})
        ax.set_xticks(sizes, [size(n) for n in sizes])
        ax.minorticks_off()
        ax.set_xlabel("parameters of the reward model")
        ax.legend(frameon=False, fontsize="small")
    return figure


def _losses(laws: Sequence[Law], title: str) -> Figure:
    """The gain over the reward model's validation loss."""
    known = [law for law in laws if math.isfinite(law.measured.reward_loss)]
    gain, told = measure_of_gain(known)
    with mpl.rc_context(style(WIDE.font)):
        figure, ax = _gain_panel(title, 4.0, f"A dot for each reward model. Gain: {told}.")
        for number, (colour, _, mark) in zip(sorted({law.measured.seed for law in known}), cycle(STYLES), strict=False):
            own = [law for law in known if law.measured.seed == number]
            ax.plot([law.measured.reward_loss for law in own], [gain(law) for law in own], mark, color=colour,
                    markersize=6, label=f"seed {number}")  # fmt: skip
        ax.set_xlabel("validation loss of the reward model")
        ax.legend(frameon=False, fontsize="small")
    return figure
