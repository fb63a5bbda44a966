"""What each selection policy costs: gold of the best checkpoint minus gold of the one it chose, over several runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lightning_align.errors import UserError
from lightning_align.lab.analysis import analyse
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.figures import COLOURS, bare, style
from lightning_align.lab.overopt import Interval
from lightning_align.lab.runs import Curve
from lightning_align.lab.select import POLICIES, KnownPeak, select
from lightning_align.run.directory import is_run

OWN_FIT = "only this run's own fit, which has seen its true score: give --fit with the overopt.json of another run"
LAST = "last"  # the baseline: the checkpoint that training ended with


@dataclass(frozen=True)
class Regret:
    """Of one policy: a value for each run in which it could choose.

    Attributes:
        policy: One of the policies, or :data:`LAST`.
        values: By the number of the run.
        mean: With Student's interval over the runs.
        of_files: The same of the file that is named, which may be of another step; only where its gold is known.
    """

    policy: str
    values: Mapping[int, float]
    mean: Estimate
    of_files: Mapping[int, float]

    @property
    def mean_of_files(self) -> Estimate:
        """With Student's interval over the runs that have such a file."""
        return student(np.array(list(self.of_files.values())))


def read_peaks(files: Sequence[Path]) -> tuple[list[KnownPeak], list[Path]]:
    """Peaks of ``overopt.json`` files, and the files in which no peak was claimed."""
    peaks, without = [], []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--fit {file} is not an overopt.json ({error}): lab overopt RUN writes one") from error
        if not isinstance(content, dict) or "d_peak" not in content:
            raise UserError(f"--fit {file} is not an overopt.json: lab overopt RUN writes one")
        if content["d_peak"] is None:
            without.append(file)
            continue
        d, gain = (_interval(content[key], *content["intervals"][key]) for key in ("d_peak", "R_peak"))
        run = content.get("run", file)
        fitted = frozenset(_fitted_run(Path(one), file) for one in content.get("runs", [run]))
        peaks.append(KnownPeak(d, gain, f"fitted to {run}", fitted))
    return peaks, without


def place_of(run: Path) -> Path:
    """A run, however it is named: by its directory, or by a table in it."""
    return (run.parent if run.is_file() and is_run(run.parent) else run).resolve()


def _fitted_run(run: Path, file: Path) -> Path:
    """What a fit names as its run; one that has moved since is where the fit is."""
    if run.exists():
        return place_of(run)
    return place_of(file.parent if is_run(file.parent) else file.parent / run.name)


def _interval(value: float, low: float | None, high: float | None) -> Interval:
    """JSON has null where an end has no bound."""
    return Interval(value, -math.inf if low is None else low, math.inf if high is None else high)


def own_peak(curve: Curve) -> KnownPeak | None:
    """The peak of a run's own gold scores; None where none may be claimed."""
    peak = analyse(curve).fitted_peak if curve.has_gold else None
    runs = frozenset() if curve.path is None else frozenset({place_of(curve.path)})
    return None if peak is None else KnownPeak(peak.d, peak.reward, f"fitted to {curve.name}", runs)


def pooled(peaks: Sequence[KnownPeak]) -> KnownPeak | None:
    """Of several runs the mean, of d on a log scale, with Student's interval; of one its own."""
    if len(peaks) < 2:
        return peaks[0] if peaks else None
    d = student(np.log([peak.d.estimate for peak in peaks]))
    gain = student(np.array([peak.gain.estimate for peak in peaks]))
    place = Interval(*(math.exp(value) for value in (d.value, d.low, min(d.high, 700.0))))
    return KnownPeak(place, Interval(gain.value, gain.low, gain.high), f"the mean of {len(peaks)} fits")


def blind(curve: Curve) -> Curve:
    """The run as one sees it who has no gold score."""
    hidden = [replace(point, gold=math.nan, gold_se=math.nan) for point in curve.points]
    return replace(curve, points=hidden)


def regrets(
    curves: Sequence[Curve], *, budget: float | None = None, given: Sequence[KnownPeak] = ()
) -> tuple[list[Regret], dict[str, str]]:
    """Regret of every policy in every run with gold; only ``gold`` sees it.

    The best checkpoint and the last are those of the whole run: what a ``budget`` costs is part of the regret. ``peak``
    uses what was fitted to the other runs and the ``given`` peaks, never one that the run's own gold is in, and none
    twice.

    Returns:
        The policies that could choose somewhere, ``last`` at the end, and why others could not.
    """
    fitted = [own_peak(curve) for curve in curves]
    found: dict[str, dict[int, float]] = {}
    files: dict[str, dict[int, float]] = {}
    silent: dict[str, str] = {}
    for number, curve in enumerate(curves):
        seen = replace(curve, points=[point for point in curve.points if math.isfinite(point.gold)])
        gold = {point.step: point.gold for point in seen.points}
        if not gold:
            continue
        best = max(gold.values())
        others = [peak for index, peak in enumerate(fitted) if index != number and peak is not None]
        peak = pooled(_others(curve, others, given))
        for policy in POLICIES:
            try:
                choice = select(seen if policy == "gold" else blind(seen), policy, budget=budget, peak=peak)
            except ValueError as error:
                own = policy == "peak" and peak is None and fitted[number] is not None
                silent.setdefault(policy, OWN_FIT if own else str(error))
                continue
            found.setdefault(policy, {})[number] = best - gold[choice.point.step]
            if choice.checkpoint_step in gold:
                files.setdefault(policy, {})[number] = best - gold[choice.checkpoint_step]
        found.setdefault(LAST, {})[number] = best - gold[max(gold)]
    table = [
        Regret(policy, found[policy], student(np.array(list(found[policy].values()))), files.get(policy, {}))
        for policy in (*POLICIES, LAST)
        if policy in found
    ]
    return table, {policy: why for policy, why in silent.items() if policy not in found}


def _others(curve: Curve, fitted: Sequence[KnownPeak], given: Sequence[KnownPeak]) -> list[KnownPeak]:
    """The given peaks without those of the run itself, and those fitted to the other runs that no given one covers."""
    foreign = [peak for peak in given if curve.path is None or place_of(curve.path) not in peak.runs]
    covered = frozenset().union(*(peak.runs for peak in foreign))
    return [*(peak for peak in fitted if not peak.runs or not peak.runs <= covered), *foreign]


def lines(table: Sequence[Regret], silent: Mapping[str, str], runs: int) -> list[str]:
    """What is printed."""
    said = []
    for row in table:
        known = math.isfinite(row.mean.low)
        ends = f" ({row.mean.low:.3f} to {row.mean.high:.3f})" if known else ""
        fewer = f", in {len(row.values)} of {runs} runs" if len(row.values) < runs else ""
        flattered = ", flattered: chosen by the same scores" if row.policy == "gold" else ""
        said.append(f"  {row.policy:<8} {row.mean.value:.3f}{ends}{fewer}{flattered}{_told_files(row, runs)}")
    return said + [f"  {policy:<8} none: {why}" for policy, why in silent.items()]


def _told_files(row: Regret, runs: int) -> str:
    """What the files that were kept cost, where some are of another step than the one chosen."""
    if all(row.values[number] == value for number, value in row.of_files.items()):
        return ""
    fewer = f" in {len(row.of_files)} of {runs} runs" if len(row.of_files) < runs else ""
    return f"; of the files kept {row.mean_of_files.value:.3f}{fewer}"


def as_dict(table: Sequence[Regret]) -> dict[str, Any]:
    """For JSON."""
    return {
        row.policy: {
            **row.mean.as_dict(),
            "runs": list(row.values.values()),
            "of_files": {**row.mean_of_files.as_dict(), "runs": list(row.of_files.values())} if row.of_files else None,
        }
        for row in table
    }


def draw_regret(table: Sequence[Regret]) -> Figure:
    """A line for each policy: dots are runs, the bar is Student's interval of the mean."""
    with mpl.rc_context(style(10.0)):
        figure = Figure(figsize=(7.0, 0.9 + 0.42 * len(table)), layout="constrained")
        ax = figure.subplots()
        bare(ax)
        ax.grid(visible=False)
        ax.grid(axis="x", color=COLOURS["grid"], linewidth=0.8)
        for height, row in enumerate(reversed(table)):
            ax.scatter(list(row.values.values()), [height] * len(row.values), s=22, color=COLOURS["gold"], alpha=0.6)
            ax.plot(row.mean.value, height, marker="D", color=COLOURS["ink"], markersize=6)
            if math.isfinite(row.mean.low):
                ax.plot([row.mean.low, row.mean.high], [height, height], color=COLOURS["ink"], linewidth=1.2)
        ax.set_yticks(range(len(table)), [row.policy for row in reversed(table)])
        ax.set_xlabel("regret: gold of the best checkpoint minus gold of the chosen one")
        ax.set_title("Dots: runs. Diamonds: means with 95 % intervals.", loc="left", size="small")
    return figure
