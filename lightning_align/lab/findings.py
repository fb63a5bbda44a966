"""The result in words: one headline for the picture, and the sentences under it."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_align.lab.analysis import Analysis
from lightning_align.lab.extrapolation import FORMS, Foresight
from lightning_align.lab.overopt import FEWEST_POINTS, FORMULAS, SMALLEST_D, FormName, Interval

Kind = Literal[
    "peaks",
    "levels off",
    "rising",
    "risen",
    "falls",
    "falls later",
    "falls from the start",
    "flat",
    "too few",
    "no gold",
]
FORM_NAMES: dict[FormName, str] = {"rl": "RL", "bon": "best-of-n"}
FEWEST_FREEDOM = 2.0  # degrees of freedom of the noise: six checkpoints, unless their errors were measured
TOO_FEW = (
    f"That takes at least six checkpoints with a true score, {FEWEST_POINTS} of them at a KL of {SMALLEST_D**2:g} or "
    f"more ({FEWEST_POINTS + 1} where none lies at KL 0): evaluate more often (model.eval_every)."
)
ONE_RUN = (
    "Intervals are 95 %, from this run's checkpoints alone (for the fit by a block bootstrap); they understate the "
    "spread between seeds."
)


@dataclass(frozen=True)
class Finding:
    """What kind of curve it is, in a word, a headline and sentences."""

    kind: Kind
    headline: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it as one paragraph."""
        return " ".join((self.headline + ".", *self.sentences))


def conclude(analysis: Analysis) -> Finding:
    """Put an analysis into words."""
    kind = kind_of(analysis)
    sentences = (
        *_about_peak(kind, analysis),
        *_about_end(kind, analysis),
        *(about_foresight(found, analysis.form) for found in analysis.foresight[:1] if kind != "too few"),
        about_choice(analysis),
        *_caveats(analysis),
    )
    return Finding(kind, _headline(kind, analysis), sentences)


def kind_of(analysis: Analysis) -> Kind:
    """A peak needs the fit, a measured rise before it and a measured fall behind it; none alone is enough."""
    if not analysis.curve.has_gold:
        return "no gold"
    if analysis.result is None or analysis.gold_noise.freedom < FEWEST_FREEDOM:
        return "too few"
    if analysis.fitted_peak is not None:
        return "peaks" if analysis.falls else "levels off"
    if analysis.rises and analysis.falls:
        return "falls"
    if analysis.falls and analysis.rise is not None and analysis.rise.estimate > 0:
        return "falls later"  # a rise may be there: that it is within noise does not say that there is none
    if analysis.falls or (analysis.change is not None and analysis.change.high < 0):
        return "falls from the start"
    if analysis.change is not None and analysis.change.low > 0:
        peak = analysis.result.fit.peak_d
        return "rising" if peak is None or peak > max(point.d for point in analysis.fitted) else "risen"
    return "flat"


def number(value: float, digits: int = 2) -> str:
    """Fixed digits with a real minus sign; a dash for what is not known, a sign for what has no bound."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def kl_text(kl: float) -> str:
    """KL with as many digits as a reader can use."""
    return number(kl, 0 if abs(kl) >= 9.95 else 1 if abs(kl) >= 0.95 else 2)


def kl_interval(kl: Interval) -> str:
    """Ends of an interval of KL; an end far beyond any run counts as no bound."""
    return f"{kl_text(kl.low)} to {kl_text(kl.high) if kl.high < 1e6 else '∞'}"


def _headline(kind: Kind, analysis: Analysis) -> str:
    rises = analysis.proxy_gain is not None and analysis.proxy_gain.low > 0
    while_rising = ", while the optimised reward keeps rising" if rises else ""
    last = kl_text(max(point.kl for point in analysis.curve.points))
    peak = kl_text(analysis.fitted_peak.kl.estimate) if analysis.fitted_peak is not None else ""
    best = kl_text(analysis.peak.kl) if analysis.peak is not None else ""
    from_where = "from the start" if analysis.start is not None else "over the whole range that was measured"
    headlines: dict[Kind, str] = {
        "peaks": f"The true score peaks at KL {peak} and then falls{while_rising}",
        "levels off": f"The true score levels off near KL {peak}: no fall beyond noise up to KL {last}",
        "rising": f"The true score is still rising at KL {last}: no peak in range",
        "risen": f"The true score has risen; no peak is established up to KL {last}",
        "falls": f"The true score rises and then falls{while_rising}",
        "falls later": f"The true score falls beyond KL {best}{while_rising}",
        "falls from the start": f"The true score falls {from_where}{while_rising}",
        "flat": f"The true score does not change beyond noise up to KL {last}{while_rising}",
        "too few": "Too few checkpoints to tell whether the true score peaks",
        "no gold": "No true score was measured: the optimised reward alone cannot show when to stop",
    }
    return headlines[kind]


def _about_peak(kind: Kind, analysis: Analysis) -> list[str]:
    result = analysis.result
    if kind == "too few" or result is None:
        return [TOO_FEW] if kind == "too few" else []
    formula = FORMULAS[analysis.form]
    peak = analysis.fitted_peak
    if peak is not None:
        return [
            f"The fitted curve {formula} has its peak at KL {kl_text(peak.kl.estimate)} "
            f"(interval {kl_interval(peak.kl)}), {number(peak.reward.estimate)} above the {_start(analysis)}."
        ]
    if analysis.misfit and analysis.peak is not None:
        return [
            f"The curve {formula} does not fit this run: at its peak the measured score is clearly below the best, "
            f"which is near KL {kl_text(analysis.peak.kl)}. No peak is claimed."
        ]
    if kind == "falls later" and analysis.rise is not None:
        rise = analysis.rise
        return [
            f"Before that it lies above the start, but not beyond noise (+{number(rise.estimate)}, interval "
            f"{number(rise.low)} to {number(rise.high)}); the fitted curve names no peak."
        ]
    far = kl_text(max(point.kl for point in analysis.fitted))
    near = kl_text(min(point.kl for point in analysis.fitted))
    reasons = {
        "in range": f"The fitted curve {formula} has a peak, but the measured scores do not rise to it and come down "
        "from it: no peak is claimed.",
        "none": f"The curve {formula} bends upwards (β ≤ 0): no peak in range.",
        "uncertain": "The interval of β reaches 0: no peak in range can be claimed.",
        "beyond": f"The fit puts its peak beyond KL {far}, the farthest that was trained: no peak in range.",
        "before": f"The fit puts its peak before KL {near}, the first checkpoint after the start: no peak in range.",
    }
    return [reasons[result.status]]


def _start(analysis: Analysis) -> str:
    """What the gain of the fit is over."""
    if not analysis.start_fitted:
        return "start"
    if analysis.start is None:
        return "fitted start"
    apart = analysis.start.gold - analysis.start_gold
    return f"fitted start, which is {number(abs(apart))} {'below' if apart > 0 else 'above'} the measured one"


def _about_end(kind: Kind, analysis: Analysis) -> list[str]:
    fall, gain = analysis.fall, analysis.proxy_gain
    if fall is None or kind == "too few":
        return []
    if not analysis.falls:
        sign = "−" if fall.estimate < 0 else "+"
        return [f"At the end the true score is within noise of its best ({sign}{number(abs(fall.estimate))})."]
    top = "peak" if analysis.fitted_peak is not None else "best"
    low, high = number(-fall.high), number(-fall.low)
    sentence = f"At the end of training the true score is {number(-fall.estimate)} below its {top}"
    sentence += f" (interval {low} to {high})"
    if gain is not None and gain.low > 0:
        return [f"{sentence}, though the optimised reward has gained {number(gain.estimate)} since: over-optimisation."]
    return [sentence + "."]


def about_choice(analysis: Analysis) -> str:
    """Why this checkpoint is the one to keep."""
    choice = analysis.choice
    if choice is None:
        return "The reward has no knee over √KL either: nothing here says which checkpoint to keep."
    where = f"step {choice.point.step} (KL {kl_text(choice.point.kl)})"
    if choice.policy == "knee":
        return f"A weak hint: {where}, the knee of the reward over √KL, beyond which it gains less for the KL it costs."
    assert choice.best is not None
    if choice.point == choice.best and analysis.start is not None and choice.point in analysis.start.points:
        return f"Keep {where}, the model before training: no later checkpoint has a better true score."
    if choice.point == choice.best:
        return f"Keep {where}: it has the best true score, and no smaller KL comes within one standard error of it."
    return (
        f"Keep {where}: the smallest KL whose true score lies within one standard error ({number(choice.se)}) "
        f"of the best, which is step {choice.best.step} (KL {kl_text(choice.best.kl)})."
    )


def about_foresight(found: Foresight, form: FormName) -> str:
    """Whether the law predicts: what both forms miss the far points by, beside no change and a straight line."""
    other = next(name for name in FORMS if name != form)
    here, there = number(found.predicted[form], 3), number(found.predicted[other], 3)
    verdict = "nearer than both" if found.beats_baselines(form) else "no nearer than the better of them"
    return (
        f"Fitted to the nearest {found.near} points, the law misses the other {found.far} by {here} (in its "
        f"{FORM_NAMES[other]} form by {there}), no change by {number(found.constant, 3)}, a straight line by "
        f"{number(found.linear, 3)}: {verdict}. Fitted to all, it misses them by "
        f"{number(found.hindsight[form], 3)} ({number(found.hindsight[other], 3)})."
    )


def _caveats(analysis: Analysis) -> list[str]:
    notes = []
    if analysis.start_fitted:
        why = "No checkpoint lies at KL 0, so the" if analysis.start is None else "The"
        notes.append(f"{why} score at the start is fitted too.")
    if analysis.forms:
        notes.append(ONE_RUN)
    return notes
