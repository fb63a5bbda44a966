"""Several runs of one method together: one law, its peak over the runs, and whether it predicts."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lightning_align.errors import UserError
from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.extrapolation import FORMS, SHARES, Foresight, foresee
from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, bare, style, x_axis
from lightning_align.lab.findings import about_foresight, kl_interval, kl_text, number
from lightning_align.lab.frontier_figures import STYLES
from lightning_align.lab.joint import FEWEST_RUNS, JointResult, analyse_jointly
from lightning_align.lab.overopt import FORMULAS, FormName, Interval, Peak
from lightning_align.lab.places import Places
from lightning_align.lab.runs import Curve


@dataclass(frozen=True)
class Seeds:
    """Runs of one method, each with its own start.

    Attributes:
        form: Of the law.
        analyses: Of the runs that take part.
        left_out: Names of those with too few true scores for a law.
        forms: The law of all of them in both forms.
        foresight: How well both predict the farthest half and third of all points from the nearer ones.
        peaks: ln d* of the runs whose own fit peaks among their checkpoints, with Student's interval over them.
        rises: Of each run, true score at the peak of the common law minus that at the start, averaged, with Student's
            interval. Where that peak is not among the checkpoints, the best place of each run stands for it.
        falls: The same, true score at the end minus that at the peak; NaN where ``at_top`` is above 0.
        at_top: Runs in which the end is at the peak, or at the best place.
    """

    form: FormName
    analyses: Sequence[Analysis]
    left_out: Sequence[str]
    forms: Mapping[FormName, JointResult]
    foresight: Sequence[Foresight]
    peaks: Estimate
    rises: Estimate
    falls: Estimate
    at_top: int

    @property
    def joint(self) -> JointResult:
        """The form that fits the method."""
        return self.forms[self.form]

    @property
    def peak(self) -> Peak | None:
        """The peak of the joint law, where it may be claimed; its interval is over the runs from three runs on.

        The measured scores must rise to it and come down from it on average over the runs, if not by more than these
        differ.
        """
        measured = self.rises.value > 0 > self.falls.value
        return self.joint.peak if self.joint.status == "in range" and measured else None

    @property
    def collapse(self) -> Interval | None:
        """KL at which the law is back at the start, where checkpoints lie that far; None elsewhere."""
        found = self.joint.collapse_d
        if self.peak is None or found is None or found.estimate > float(self.joint.band_d[-1]):
            return None
        return Interval(found.estimate**2, found.low**2, found.high**2)


def unlike(curves: Sequence[Curve]) -> list[str]:
    """Warnings of options of the method in which runs differ, apart from seeds and from what they start from.

    Raises:
        UserError: The configurations name several methods.
    """
    methods = {curve.method: curve for curve in curves if curve.method is not None}
    if len(methods) > 1:
        named = ", ".join(f"{curve.path} is of {name}" for name, curve in methods.items())
        raise UserError(f"the runs are of several methods, not seeds of one: {named}; lab frontier compares methods")
    options = [curve.config["model"].get("init_args") or {} for curve in curves if curve.method is not None]
    told = []
    for name in sorted(set().union(*options) - {"seed"}):
        values = [option.get(name) for option in options]
        paths = any(not isinstance(value, int | float | str | None) or "/" in str(value) for value in values)
        if not paths and len(set(values)) > 1:
            told.append(f"{name} ({', '.join(map(str, dict.fromkeys(values)))})")
    return [f"the runs differ in {', '.join(told)}: are they seeds of one method?"] if told else []


def labels(curves: Sequence[Curve]) -> list[str]:
    """Their seeds, where these tell the runs apart, else their names or where they lie."""
    seeds = [curve.name if curve.seed is None else f"seed {curve.seed}" for curve in curves]
    names = [curve.name for curve in curves]
    told_apart = (found for found in (seeds, names) if len(set(found)) == len(curves))
    return next(told_apart, [str(curve.path or curve.name) for curve in curves])


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
    try:
        forms = {name: analyse_jointly(series, name) for name in FORMS}
    except ValueError as error:
        farthest = max(float(run.d.max()) ** 2 for run in series)
        raise UserError(
            f"no law fits the runs together ({error}): is their largest KL, {farthest:.3g}, right?"
        ) from error
    joint = forms[form]
    changes = [_changes(analysis, joint.fit.peak_d if joint.status == "in range" else None) for analysis in used]
    return Seeds(
        form=form,
        analyses=used,
        left_out=left_out,
        forms=forms,
        foresight=tuple(found for share in SHARES if (found := foresee(series, share)) is not None),
        peaks=student(np.array(own)),
        rises=student(np.array([rise for rise, _ in changes])),
        falls=student(np.array([fall for _, fall in changes])),
        at_top=sum(math.isnan(fall) for _, fall in changes),
    )


def _changes(analysis: Analysis, d: float | None) -> tuple[float, float]:
    """True score at a distance (None: at the best place) minus at the start, and at the end minus there.

    The second is NaN where the end is that place.
    """
    places = Places(analysis.curve.points)
    start = analysis.start.points if analysis.start is not None else ()
    place = analysis.peak if d is None else places.nearest(d, start)
    assert place is not None  # a run with a law has true scores
    fall = places.gold_change(place, analysis.end)
    return place.gold - analysis.start_gold, fall.estimate if fall is not None else math.nan


def headline(seeds: Seeds) -> str:
    """What the runs say together."""
    over = f"Over {len(seeds.analyses)} runs"
    peak = seeds.peak
    if peak is not None and seeds.falls.high < 0:
        return f"{over} the true score peaks at KL {kl_text(peak.kl.estimate)} and then falls"
    if peak is not None:
        return f"{over} the true score peaks near KL {kl_text(peak.kl.estimate)}; how far it falls differs between runs"
    reasons = {
        "in range": "the measured scores do not rise to that of the law and come down from it",
        "none": "the law does not bend down",
        "uncertain": "whether the law bends is not sure",
        "beyond": "its fitted peak lies beyond the farthest checkpoint",
        "before": "its fitted peak lies before the first checkpoint",
    }
    return f"{over} no peak of the true score can be claimed: {reasons[seeds.joint.status]}"


def sentences(seeds: Seeds) -> list[str]:
    """The figures behind it."""
    told = [*_about_law(seeds), *_about_runs(seeds)]
    told += [about_foresight(found, seeds.form) for found in seeds.foresight]
    if not seeds.joint.over_runs:
        told.append(
            f"Fewer than {FEWEST_RUNS} runs: the intervals of the law are from its points alone and understate the "
            "spread between seeds."
        )
    if seeds.left_out:
        told.append(f"Left out for too few true scores: {', '.join(seeds.left_out)}.")
    return told


def _about_law(seeds: Seeds) -> list[str]:
    peak, collapse = seeds.peak, seeds.collapse
    if peak is None:
        return []
    start = "fitted start" if all(analysis.start_fitted for analysis in seeds.analyses) else "start"
    told = [
        f"{FORMULAS[seeds.form]}, each run minus its own {start}: peak at KL {kl_text(peak.kl.estimate)} (interval "
        f"{kl_interval(peak.kl)}), {number(peak.reward.estimate)} above the {start} (interval "
        f"{number(peak.reward.low)} to {number(peak.reward.high)})."
    ]
    if collapse is not None:
        back = sum(analysis.measured_collapse is not None for analysis in seeds.analyses)
        told.append(
            f"The law is back at the start at KL {kl_text(collapse.estimate)} (interval {kl_interval(collapse)}); "
            f"{back} of {len(seeds.analyses)} runs were measured back there."
        )
    other = next(name for name in FORMS if name != seeds.form)
    law = seeds.forms[other]
    where = f"peaks at KL {kl_text(law.peak.kl.estimate)}" if law.peak is not None else "has no peak"
    told.append(
        f"The other form, {FORMULAS[other]}, {where}, and misses the points by {number(law.rmse, 3)} (this one by "
        f"{number(seeds.joint.rmse, 3)})."
    )
    return told


def _about_runs(seeds: Seeds) -> list[str]:
    told = []
    count = len(seeds.analyses)
    if seeds.peaks.n > 1:
        middle, low, high = (math.exp(2 * value) for value in (seeds.peaks.value, seeds.peaks.low, seeds.peaks.high))
        others = "; the others do not" if seeds.peaks.n < count else ""
        told.append(
            f"Fitted alone, {seeds.peaks.n} of {count} runs peak among their checkpoints{others}: at KL "
            f"{kl_text(middle)} on average (interval {kl_interval(Interval(middle, low, high))})."
        )
    if seeds.at_top:
        told.append(
            f"In {seeds.at_top} of {count} runs the last checkpoints are the highest: no fall is measured over runs."
        )
    elif seeds.falls.n > 1:
        top = "peak" if seeds.peak is not None else "best, which is flattered as the best of several"
        side = "below" if seeds.falls.value < 0 else "above"
        told.append(
            f"At the end the true score is {number(abs(seeds.falls.value))} {side} its {top} (end minus that: "
            f"{number(seeds.falls.low)} to {number(seeds.falls.high)} over runs)."
        )
    return told


def draw_seeds(seeds: Seeds, *, with_title: bool = True) -> Figure:
    """Gain over the start of every run, the joint law with its band, its peak and where it is back at the start."""
    joint = seeds.joint
    with mpl.rc_context(style(WIDE.font)):
        figure = Figure(figsize=(WIDE.width, 4.6), layout="constrained")
        ax = figure.subplots()
        x_axis(ax, [point for analysis in seeds.analyses for point in analysis.curve.points], WIDE)
        bare(ax)
        ax.axhline(0, color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (1, 2.5)))
        names = labels([analysis.curve for analysis in seeds.analyses])
        for analysis, name, (colour, _, mark) in zip(seeds.analyses, names, itertools.cycle(STYLES), strict=False):
            points = [p for p in analysis.curve.points if math.isfinite(p.gold) and math.isfinite(p.d)]
            gain = [point.gold - analysis.start_gold for point in points]
            ax.plot([p.d for p in points], gain, mark, color=colour, markersize=4.5, alpha=0.75, label=name)
        ax.plot(joint.band_d, joint.fit(joint.band_d), color=COLOURS["ink"], linewidth=2.2, zorder=3)
        ax.margins(y=0.12)
        limits = ax.get_ylim()  # of dots and line: a wide band may leave the picture
        ax.fill_between(joint.band_d, joint.band_low, joint.band_high, color=COLOURS["ink"], alpha=0.12, linewidth=0)
        ax.set_ylim(limits)
        _mark(ax, seeds)
        ax.set_ylabel("true score minus its start")
        ax.legend(frameon=False, fontsize="small", loc="lower left")
        if with_title:
            wrapped = "\n".join(textwrap.wrap(headline(seeds), TITLE_COLUMNS))
            figure.suptitle(wrapped, x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28)
        over = "over runs" if joint.over_runs else "from the points alone"
        line = f"Line: {FORMULAS[seeds.form]}, d = √KL, fitted to all"
        note = f"Dots: checkpoints. {line}; band and bars: 95 % interval {over}."
        figure.supxlabel(
            textwrap.fill(note, SOURCE_COLUMNS), x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"]
        )
    return figure


def _mark(ax: Axes, seeds: Seeds) -> None:
    """Peak and collapse of the law with their intervals, as far as checkpoints lie."""
    farthest = float(seeds.joint.band_d[-1])
    ink, paper = COLOURS["ink"], COLOURS["paper"]
    peak, collapse = seeds.peak, seeds.collapse
    marks = []
    if peak is not None:
        marks.append((peak.d, peak.reward.estimate, "D", 9, f"peak: KL {kl_text(peak.kl.estimate)}", (0, 10), "left"))
    if collapse is not None and seeds.joint.collapse_d is not None:
        back = f"back at the start: KL {kl_text(collapse.estimate)}"  # beneath the falling line, where no dot should be
        marks.append((seeds.joint.collapse_d, 0.0, "o", 7, back, (-4, -15), "right"))
    for d, gain, mark, size, text, beside, side in marks:
        ax.plot([d.low, min(d.high, farthest)], [gain, gain], color=ink, linewidth=1.1, zorder=4)
        ax.plot(d.estimate, gain, mark, color=paper, markeredgecolor=ink, markersize=size, zorder=5)
        ax.annotate(
            text, (d.estimate, gain), xytext=beside, textcoords="offset points", ha=side, weight="bold", size="small",
            zorder=1.5, path_effects=[withStroke(linewidth=3, foreground=paper)],
        )  # fmt: skip
