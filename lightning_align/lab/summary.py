"""The result as JSON: numbers with intervals, the choice and the verdict."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_align.lab.analysis import Analysis, Place
from lightning_align.lab.findings import ONE_RUN, Finding, about_choice
from lightning_align.lab.joint import JointResult
from lightning_align.lab.measured import finite
from lightning_align.lab.overopt import FORMULAS, SMALLEST_D, FormResult, Interval
from lightning_align.lab.runs import Point
from lightning_align.lab.seeds import Seeds, headline, sentences

FORMAT = 1
PARAMETERS = ("alpha", "beta", "d_peak", "kl_peak", "R_peak")


def summarise(analysis: Analysis, finding: Finding, run: Path) -> dict[str, Any]:
    """Content of ``overopt.json``. Distances are d = √KL, R is gold minus its start; null is what is not known."""
    curve, result = analysis.curve, analysis.result
    parameters = _parameters(analysis)
    return {
        "format": FORMAT,
        "run": str(run),
        "source": curve.source,
        "n": len(curve.points),
        "n_fitted": len(analysis.fitted),
        "excluded": _excluded(analysis),
        "seeds": [] if curve.seed is None else [curve.seed],
        "form": analysis.form,
        "formula": FORMULAS[analysis.form],
        **{name: parameters[name].estimate if name in parameters else None for name in PARAMETERS},
        "intervals": {name: [interval.low, interval.high] for name, interval in parameters.items()},
        "interval_method": ONE_RUN if result is not None else None,
        "peak_status": result.status if result is not None else None,
        "forms": {name: _form(other) for name, other in analysis.forms.items()},
        "extrapolation": [asdict(found) for found in analysis.foresight],
        "collapse_kl": {"fitted": analysis.fitted_collapse, "measured": analysis.measured_collapse},
        "misfit": analysis.misfit,
        "gold": {
            "start": analysis.start_gold,
            "start_fitted": analysis.start_fitted,
            "peak": analysis.peak.gold if analysis.peak is not None else None,
            "peak_kl": analysis.peak.kl if analysis.peak is not None else None,
            "end": analysis.end.gold,
            "end_kl": analysis.end.kl,
            "se": analysis.gold_noise.se,
            "peak_minus_start": _interval(analysis.rise),
            "end_minus_peak": _interval(analysis.fall),
            "end_minus_start": _interval(analysis.change),
            "falls": analysis.falls,
        },
        "proxy": {
            "start": _proxy(analysis.start),
            "peak": _proxy(analysis.peak),
            "end": _proxy(analysis.end),
            "end_minus_peak": _interval(analysis.proxy_gain),
            "slope": analysis.proxy_slope,
        },
        "chosen": _chosen(analysis),
        "verdict": finding.kind,
        "headline": finding.headline,
        "verdict_text": finding.text,
        "points": [_point(point) for point in curve.points],
    }


def _parameters(analysis: Analysis) -> dict[str, Interval]:
    """What is known of :data:`PARAMETERS`: the peak only where one may be claimed."""
    result, peak = analysis.result, analysis.fitted_peak
    found = {} if result is None else {"alpha": result.alpha, "beta": result.beta}
    return found if peak is None else found | {"d_peak": peak.d, "kl_peak": peak.kl, "R_peak": peak.reward}


def _form(result: FormResult) -> dict[str, Any]:
    return {
        "alpha": result.fit.alpha,
        "beta": result.fit.beta,
        "intercept": result.fit.intercept,
        "rmse": result.rmse,
        "peak_status": result.status,
    }


def _excluded(analysis: Analysis) -> dict[str, int]:
    points = analysis.curve.points
    measured = [point for point in points if math.isfinite(point.gold)]
    return {
        "incomplete": analysis.curve.left_out,
        "without_gold": len(points) - len(measured),
        "negative_kl": sum(point.kl < 0 for point in measured),
        f"d_below_{SMALLEST_D:g}": sum(0 <= point.d < SMALLEST_D for point in measured),
    }


def _chosen(analysis: Analysis) -> dict[str, Any] | None:
    choice = analysis.choice
    if choice is None:
        return None
    return {
        "iteration": choice.point.step,
        "kl": choice.point.kl,
        "gold": choice.point.gold,
        "proxy": choice.point.proxy,
        "checkpoint": str(choice.checkpoint) if choice.checkpoint is not None else None,
        "checkpoint_iteration": choice.checkpoint_step,
        "policy": choice.policy,
        "best_iteration": choice.best.step if choice.best is not None else None,
        "reason": about_choice(analysis),
    }


def _point(point: Point) -> dict[str, float]:
    return {"step": point.step, "kl": point.kl, "proxy": point.proxy, "gold": point.gold}


def _proxy(place: Place | None) -> float | None:
    return place.proxy if place is not None else None


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return asdict(interval) if interval is not None else None


def summarise_seeds(seeds: Seeds, runs: Sequence[Path]) -> dict[str, Any]:
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
        "n": sum(len(analysis.curve.points) for analysis in seeds.analyses),
        "n_fitted": sum(len(analysis.fitted) for analysis in seeds.analyses),
        "seeds": [analysis.curve.seed for analysis in seeds.analyses],
        "left_out": list(seeds.left_out),
        "form": seeds.form,
        "formula": FORMULAS[seeds.form],
        **{name: known[name].estimate if name in known else None for name in names},
        "intervals": {name: [interval.low, interval.high] for name, interval in known.items()},
        "over_runs": joint.over_runs,
        "peak_status": joint.status,
        "forms": {name: _joint_form(law) for name, law in seeds.forms.items()},
        "ln_d_peak_of_runs": seeds.peaks.as_dict(),
        "peak_minus_start": seeds.rises.as_dict(),
        "end_minus_peak": seeds.falls.as_dict(),
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


def _joint_form(law: JointResult) -> dict[str, Any]:
    return {
        "alpha": law.fit.alpha,
        "beta": law.fit.beta,
        "rmse": law.rmse,
        "d_peak": law.fit.peak_d,
        "peak_status": law.status,
    }


def to_json(content: Mapping[str, Any]) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
