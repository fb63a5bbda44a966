"""The result in words: one headline for the picture, and the sentences under it."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_align.lab.analysis import Analysis, Z
from lightning_align.lab.overopt import FORMULAS, Interval

Kind = Literal["peaks", "levels off", "rising", "risen", "falls", "falls from the start", "flat", "too few", "no gold"]
ONE_RUN = (
    "Intervals are 95 %, from a block bootstrap over this run's checkpoints; they understate the spread between seeds."
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
    sentences = (*_about_peak(analysis), *_about_end(analysis), about_choice(analysis), *_caveats(analysis))
    return Finding(kind, _headline(kind, analysis), sentences)


def kind_of(analysis: Analysis) -> Kind:
    """A peak needs both the fit and a measured fall; neither alone is enough."""
    if not analysis.curve.has_gold:
        return "no gold"
    if analysis.result is None:
        return "too few"
    if analysis.peak_in_range:
        return "peaks" if analysis.falls else "levels off"
    if analysis.falls and _rose_before(analysis):
        return "falls"
    if analysis.falls or (analysis.rise is not None and analysis.rise.high < 0):
        return "falls from the start"
    if analysis.rise is None or analysis.rise.low > 0:
        peak = analysis.result.fit.peak_d
        return "rising" if peak is None or peak > max(point.d for point in analysis.fitted) else "risen"
    return "flat"


def _rose_before(analysis: Analysis) -> bool:
    """Whether the best place lies above the start by more than noise."""
    start, peak = analysis.start, analysis.peak
    if start is None or peak is None:
        return True
    return peak.gold - start.gold > Z * math.hypot(peak.gold_se, start.gold_se)


def number(value: float, digits: int = 2) -> str:
    """Fixed digits with a real minus sign; a dash for what is not known, a sign for what has no bound."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def kl_text(kl: float) -> str:
    """KL with as many digits as a reader can use."""
    return number(kl, 0 if abs(kl) >= 9.95 else 1 if abs(kl) >= 0.95 else 2)


def kl_interval(peak_d: Interval) -> tuple[str, str]:
    """Ends of the interval of d* as KL; an end far beyond any run counts as no bound."""
    return tuple(kl_text(end**2) if end < 1e3 else "∞" for end in (peak_d.low, peak_d.high))  # type: ignore[return-value]


def _headline(kind: Kind, analysis: Analysis) -> str:
    rises = analysis.proxy_gain is not None and analysis.proxy_gain.low > 0
    while_rising = ", while the optimised reward keeps rising" if rises else ""
    last = kl_text(max(point.kl for point in analysis.curve.points))
    place = analysis.result.peak_d if analysis.result is not None and analysis.peak_in_range else None
    peak = kl_text(place.estimate**2) if place is not None else ""
    headlines: dict[Kind, str] = {
        "peaks": f"The true score peaks at KL {peak} and then falls{while_rising}",
        "levels off": f"The true score levels off near KL {peak}: no fall beyond noise up to KL {last}",
        "rising": f"The true score is still rising at KL {last}: no peak in range",
        "risen": f"The true score has risen; no peak is established up to KL {last}",
        "falls": f"The true score rises and then falls{while_rising}",
        "falls from the start": f"The true score falls from the start{while_rising}",
        "flat": f"The true score does not change beyond noise up to KL {last}{while_rising}",
        "too few": "Too few checkpoints to tell whether the true score peaks",
        "no gold": "No true score was measured: the optimised reward alone cannot show when to stop",
    }
    return headlines[kind]


def _about_peak(analysis: Analysis) -> list[str]:
    result = analysis.result
    if result is None:
        return []
    formula = FORMULAS[analysis.form]
    if result.status == "in range" and result.peak_d is not None and result.peak_reward is not None:
        low, high = kl_interval(result.peak_d)
        gain = result.peak_reward.estimate - result.fit.intercept
        return [
            f"The fitted curve {formula} has its peak at KL {kl_text(result.peak_d.estimate**2)} "
            f"(interval {low} to {high}), {number(gain)} above the start."
        ]
    far = kl_text(max(point.kl for point in analysis.fitted))
    near = kl_text(min(point.kl for point in analysis.fitted))
    reasons = {
        "none": f"The curve {formula} bends upwards (β ≤ 0): no peak in range.",
        "uncertain": "The interval of β reaches 0: no peak in range can be claimed.",
        "beyond": f"The fit puts its peak beyond KL {far}, the farthest that was trained: no peak in range.",
        "before": f"The fit puts its peak before KL {near}, the first checkpoint after the start: no peak in range.",
    }
    return [reasons[result.status]]


def _about_end(analysis: Analysis) -> list[str]:
    fall, gain = analysis.fall, analysis.proxy_gain
    if fall is None or analysis.result is None:
        return []
    if not analysis.falls:
        sign = "−" if fall.estimate < 0 else "+"
        return [f"At the end the true score is within noise of its best ({sign}{number(abs(fall.estimate))})."]
    top = "peak" if analysis.peak_in_range else "best"
    low, high = number(-fall.high), number(-fall.low)
    sentence = f"At the end of training the true score is {number(-fall.estimate)} below its {top}"
    sentence += f" (interval {low} to {high})"
    if gain is not None and gain.low > 0:
        return [f"{sentence}, though the optimised reward has gained {number(gain.estimate)} since: over-optimisation."]
    return [sentence + "."]


def about_choice(analysis: Analysis) -> str:
    """Why this checkpoint is the one to keep."""
    choice = analysis.choice
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


def _caveats(analysis: Analysis) -> list[str]:
    notes = []
    if analysis.start_fitted:
        notes.append("No checkpoint lies at KL 0, so the score at the start is fitted too.")
    if analysis.forms:
        notes.append(ONE_RUN)
    return notes
