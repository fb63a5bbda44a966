"""Several runs of one method together: one law, its peak over the runs, and whether it predicts."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lightning_align.errors import UserError
from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.extrapolation import SHARES, Foresight, foresee
from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, bare, style, x_axis
from lightning_align.lab.findings import kl_interval, kl_text, number
from lightning_align.lab.frontier_figures import STYLES
from lightning_align.lab.joint import FEWEST_RUNS, JointResult, analyse_jointly
from lightning_align.lab.overopt import FORMULAS, FormName, Interval, Peak
from lightning_align.lab.runs import Curve

FORMAT = 1


@dataclass(frozen=True)
class Seeds:
    """Runs of one method, each with its own start.

    Attributes:
        form: Of the law.
        analyses: Of the runs that take part.
        left_out: Names of those with too few true scores for a law.
        joint: The law of all of them.
        foresight: How well it predicts the farthest half and third of all points from the nearer ones.
        peaks: ln d* of the runs whose own fit peaks among their checkpoints, with Student's interval over them.
        falls: Of each run, true score at the end minus that at its best place, averaged, with Student's interval.
    """

    form: FormName
    analyses: Sequence[Analysis]
    left_out: Sequence[str]
    joint: JointResult
    foresight: Sequence[Foresight]
    peaks: Estimate
    falls: Estimate

    @property
    def peak(self) -> Peak | None:
        """The peak of the joint law, where it may be claimed; its interval is over the runs from three runs on."""
        return self.joint.peak if self.joint.status == "in range" else None

    @property
    def collapse(self) -> Interval | None:
        """KL at which the law is back at the start, where checkpoints lie that far; None elsewhere."""
        found = self.joint.collapse_d
        if self.peak is None or found is None or found.estimate > float(self.joint.band_d[-1]):
            return None
        return Interval(found.estimate**2, found.low**2, found.high**2)


def analyse_seeds(curves: Sequence[Curve], *, form: FormName = "rl", free_start: bool = False) -> Seeds:
    """Fit one law to several runs.

    Raises:
        UserError: No two runs have enough true scores.
    """
    analyses = [analyse(curve, form=form, free_start=free_start) for curve in curves]
    used = [analysis for analysis in analyses if analysis.series is not None]
    left_out = [analysis.curve.name for analysis in analyses if analysis.series is None]
    series = [analysis.series for analysis in used if analysis.series is not None]
    if len(series) < 2:
        raise UserError(
            f"{len(series)} of {len(curves)} runs have enough true scores for a law: two take part at least"
        )
    own = [
        math.log(result.fit.peak_d)
        for analysis in used
        if (result := analysis.result) is not None and result.status == "in range" and result.fit.peak_d
    ]
    falls = [analysis.fall.estimate for analysis in used if analysis.fall is not None]
    foresight = tuple(found for share in SHARES if (found := foresee(series, share)) is not None)
    joint = analyse_jointly(series, form)
    return Seeds(form, used, left_out, joint, foresight, student(np.array(own)), student(np.array(falls)))


def headline(seeds: Seeds) -> str:
    """What the runs say together."""
    count = len(seeds.analyses)
    peak = seeds.peak
    if peak is not None:
        back = f", and is back at its start at KL {kl_text(seeds.collapse.estimate)}" if seeds.collapse else ""
        return f"Over {count} runs the true score peaks at KL {kl_text(peak.kl.estimate)}{back}"
    reasons = {
        "none": "the law does not bend down",
        "uncertain": "whether the law bends is not sure",
        "beyond": "its fitted peak lies beyond the farthest checkpoint",
        "before": "its fitted peak lies before the first checkpoint",
    }
    return f"Over {count} runs no peak of the true score can be claimed: {reasons.get(seeds.joint.status, '')}"


def sentences(seeds: Seeds) -> list[str]:
    """The figures behind it."""
    told = []
    peak = seeds.peak
    if peak is not None:
        told.append(
            f"{FORMULAS[seeds.form]}, each run minus its own start: peak at KL {kl_text(peak.kl.estimate)} (interval "
            f"{kl_interval(peak.kl)}), {number(peak.reward.estimate)} above the start (interval "
            f"{number(peak.reward.low)} to {number(peak.reward.high)})."
        )
    if seeds.peaks.n > 1:
        ends = (math.exp(2 * value) for value in (seeds.peaks.value, seeds.peaks.low, seeds.peaks.high))
        middle, low, high = ends
        told.append(
            f"The {seeds.peaks.n} runs with a peak of their own have it at KL {kl_text(middle)} on average (interval "
            f"{kl_interval(Interval(middle, low, high))})."
        )
    if seeds.falls.n > 1:
        told.append(
            f"At the end the true score is {number(seeds.falls.value)} from its best (interval "
            f"{number(seeds.falls.low)} to {number(seeds.falls.high)} over runs; the best of several is flattered)."
        )
    for found in seeds.foresight:
        best = "better" if found.beats_baselines(seeds.form) else "no better"
        told.append(
            f"Fitted to the nearer points, the law misses the farthest {found.far} by "
            f"{number(found.predicted[seeds.form])}: {best} than no change ({number(found.constant)}) and a straight "
            f"line ({number(found.linear)}); fitted to all, by {number(found.hindsight[seeds.form])}."
        )
    if not seeds.joint.over_runs:
        told.append(
            f"Fewer than {FEWEST_RUNS} runs: intervals are from their points alone and say nothing of other seeds."
        )
    if seeds.left_out:
        told.append(f"Left out for too few true scores: {', '.join(seeds.left_out)}.")
    return told


def summarise(seeds: Seeds, runs: Sequence[Path]) -> dict[str, Any]:
    """Content of ``overopt.json`` for several runs; ``lab select --fit`` reads its peak."""
    joint, peak = seeds.joint, seeds.peak
    known = {"alpha": joint.alpha, "beta": joint.beta}
    if peak is not None:
        known |= {"d_peak": peak.d, "kl_peak": peak.kl, "R_peak": peak.reward}
    if seeds.collapse is not None:
        known["kl_collapse"] = seeds.collapse
    names = ("alpha", "beta", "d_peak", "kl_peak", "R_peak", "kl_collapse")
    return {
        "format": FORMAT,
        "run": ", ".join(map(str, runs)),
        "runs": [str(run) for run in runs],
        "left_out": list(seeds.left_out),
        "form": seeds.form,
        "formula": FORMULAS[seeds.form],
        **{name: known[name].estimate if name in known else None for name in names},
        "intervals": {name: [interval.low, interval.high] for name, interval in known.items()},
        "over_runs": joint.over_runs,
        "peak_status": joint.status,
        "rmse": joint.rmse,
        "ln_d_peak_of_runs": seeds.peaks.as_dict(),
        "end_minus_best": seeds.falls.as_dict(),
        "extrapolation": [asdict(found) for found in seeds.foresight],
        "per_run": [
            {
                "run": analysis.curve.name,
                "seed": analysis.curve.seed,
                "d_peak": analysis.result.fit.peak_d if analysis.result else None,
                "peak_status": analysis.result.status if analysis.result else None,
                "measured_collapse_kl": analysis.measured_collapse,
                "start_gold": analysis.start_gold,
            }
            for analysis in seeds.analyses
        ],
        "headline": headline(seeds),
        "verdict_text": " ".join(sentences(seeds)),
    }


def draw_seeds(seeds: Seeds, *, with_title: bool = True) -> Figure:
    """Gain over the start of every run, the joint law with its band, and its peak."""
    with mpl.rc_context(style(WIDE.font)):
        figure = Figure(figsize=(WIDE.width, 4.6), layout="constrained")
        ax = figure.subplots()
        x_axis(ax, [point for analysis in seeds.analyses for point in analysis.curve.points], WIDE)
        bare(ax)
        ax.axhline(0, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (1, 2.5)))
        for analysis, (colour, _, mark) in zip(seeds.analyses, STYLES, strict=False):
            points = [p for p in analysis.curve.points if math.isfinite(p.gold) and math.isfinite(p.d)]
            gain = [point.gold - analysis.start_gold for point in points]
            name = analysis.curve.name if analysis.curve.seed is None else f"seed {analysis.curve.seed}"
            ax.plot([p.d for p in points], gain, mark, color=colour, markersize=4.5, alpha=0.75, label=name)
        joint = seeds.joint
        ax.plot(joint.band_d, joint.fit(joint.band_d), color=COLOURS["ink"], linewidth=2.2, zorder=3)
        ax.fill_between(joint.band_d, joint.band_low, joint.band_high, color=COLOURS["ink"], alpha=0.12, linewidth=0)
        low, high = ax.get_ylim()
        if seeds.peak is not None:
            d, gain_there = seeds.peak.d, seeds.peak.reward.estimate
            ends = [max(d.low, 0.0), min(d.high, float(joint.band_d[-1]))]
            ax.plot(ends, [gain_there, gain_there], color=COLOURS["ink"], linewidth=1.1)
            ax.plot(
                d.estimate,
                gain_there,
                "D",
                color=COLOURS["paper"],
                markeredgecolor=COLOURS["ink"],
                markersize=9,
                zorder=5,
            )
        ax.set_ylim(max(low, -3.0), high)
        ax.set_ylabel("true score minus its start")
        ax.legend(frameon=False, fontsize="small", loc="lower left")
        if with_title:
            wrapped = "\n".join(textwrap.wrap(headline(seeds), TITLE_COLUMNS))
            figure.suptitle(wrapped, x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28)
        over = "over runs" if joint.over_runs else "from the points alone"
        note = f"Dots: checkpoints. Line: {FORMULAS[seeds.form]}, d = √KL, fitted to all; band: 95 % interval {over}."
        figure.supxlabel(
            textwrap.fill(note, SOURCE_COLUMNS), x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"]
        )
    return figure
