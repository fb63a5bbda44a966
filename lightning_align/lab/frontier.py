"""Methods side by side: gold over KL and over the samples that it took, of several runs of each."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.figures import COLOURS, SOURCE_COLUMNS, TITLE_COLUMNS, WIDE, bare, distance, style, x_axis
from lightning_align.lab.findings import kl_text
from lightning_align.lab.runs import Point, Table, load_curve
from lightning_align.run.directory import METRICS_FILE

Z = 1.96  # of a 95 % interval
TOLERANCE = 1e-3  # in √KL: rounding leaves the start a little above 0
EPISODES = "episode"  # column of an iteration: answers that the policy has given so far
# hues that stay apart in the common forms of colour blindness (Okabe and Ito), with a dash and a mark each
STYLES: tuple[tuple[str, Any, str], ...] = (
    *(("#ad6f00", "solid", "o"), ("#0067a5", (0, (5, 2)), "s"), ("#9c3d7c", (0, (1, 1.5)), "^")),
    *(("#1d7a5f", (0, (5, 1, 1, 1)), "D"), ("#5c6570", (0, (3, 1, 1, 1, 1, 1)), "v"), ("#c4461a", "solid", "P")),
    *(("#3aa0d8", (0, (5, 2)), "X"), ("#7a5b00", (0, (1, 1.5)), "<"), ("#5a4fcf", (0, (5, 1, 1, 1)), ">")),
    *(("#1d2126", (0, (3, 1, 1, 1, 1, 1)), "h"),),
)
FIELDS = ("method", "run", "step", "samples", "kl", "proxy", "gold", "gold_se")


@dataclass(frozen=True)
class Track:
    """One run.

    Attributes:
        method: Name of its folder; runs of one name are seeds of one method.
        run: Its path.
        points: Evaluations with a gold score, by step.
        samples: Answers that the policy had given at each of them; NaN where it is not known.
    """

    method: str
    run: Path
    points: Sequence[Point]
    samples: Sequence[float]

    @property
    def start(self) -> Point:
        """The first evaluation."""
        return self.points[0]

    def at(self, place: Callable[["Track"], Sequence[float]], where: float) -> float:
        """Gold where ``place`` of the points is ``where``, between neighbours; NaN where the run did not go."""
        places = np.array(place(self))
        order = np.argsort(places, kind="stable")
        known = np.isfinite(places[order])
        x, y = places[order][known], np.array([self.points[i].gold for i in order])[known]
        if not len(x) or not x[0] - TOLERANCE <= where <= x[-1] + TOLERANCE:
            return math.nan
        return float(np.interp(where, x, y))


def roots(track: Track) -> list[float]:
    """√KL of the points."""
    return [distance(point) for point in track.points]


def samples(track: Track) -> Sequence[float]:
    """Answers given so far."""
    return track.samples


def load_tracks(runs: Sequence[Path], *, columns: Mapping[str, str] | None = None) -> list[Track]:
    """Read runs, and CSVs with these ``columns`` (see :func:`~lightning_align.lab.runs.load_curve`).

    Raises:
        UserError: A run has no gold score, or is given twice, or there are more methods than can be told apart.
    """
    tracks = []
    for number, run in enumerate(runs):
        if run.resolve() in [other.resolve() for other in runs[:number]]:
            raise UserError(f"{run} is given twice: a run is one seed, give it once")
        curve = load_curve(run, columns=None if run.is_dir() else columns)
        points = [point for point in curve.points if math.isfinite(point.gold)]
        if len(points) < 2:
            raise UserError(
                f"{run} has {len(points)} steps with a gold score: give runs with model.gold, evaluated twice (of a "
                "CSV, name the column: --columns gold=NAME)"
            )
        episodes = _episodes(run)
        tracks.append(Track(run.resolve().name, run, points, [episodes.get(p.step, math.nan) for p in points]))
    names = {track.method for track in tracks}
    if len(names) > len(STYLES):
        raise UserError(f"{len(names)} methods in one picture: give at most {len(STYLES)}")
    return tracks


def _episodes(run: Path) -> dict[int, float]:
    table = Table.read(run / METRICS_FILE if run.is_dir() else run)
    found = {0: 0.0}
    if table.count(EPISODES) and "step" in table.header:
        for index, row in enumerate(table.rows):
            if row[EPISODES]:
                found[int(table.number(index, "step"))] = table.number(index, EPISODES)
    return found


def by_method(tracks: Sequence[Track]) -> dict[str, list[Track]]:
    """Runs of one name together, in the order in which they were given."""
    groups: dict[str, list[Track]] = {}
    for track in tracks:
        groups.setdefault(track.method, []).append(track)
    return groups


def common_kl(tracks: Sequence[Track]) -> float:
    """The largest KL that every run reaches."""
    return min(max(roots(track)) for track in tracks) ** 2


def gain(tracks: Sequence[Track], place: Callable[[Track], Sequence[float]], where: float) -> Estimate:
    """Mean gain of gold over the start, of runs that came that far, with Student's interval over them.

    Of one run the interval is over its prompts, as if the two samples of a prompt were independent; it says nothing of
    other seeds.
    """
    gains = np.array([track.at(place, where) - track.start.gold for track in tracks])
    gains = gains[np.isfinite(gains)]
    if len(gains) != 1 or len(tracks) > 1:
        return student(gains)
    (track,) = tracks
    places = place(track)
    nearest = track.points[int(np.nanargmin(np.abs(np.array(places) - where)))]
    se = math.hypot(track.start.gold_se, nearest.gold_se)
    return Estimate(float(gains[0]), float(gains[0] - Z * se), float(gains[0] + Z * se), 1, se)


def best(tracks: Sequence[Track]) -> dict[str, Any]:
    """The highest gold of each run on average, the KL it was at, and the gain; the highest of many is flattered."""
    tops = [max(track.points, key=lambda point: point.gold) for track in tracks]
    gains = student(np.array([top.gold - track.start.gold for top, track in zip(tops, tracks, strict=True)]))
    at = [
        dict(zip((p.step for p in t.points), t.samples, strict=True))[top.step]
        for top, t in zip(tops, tracks, strict=True)
    ]
    return {
        "gold": float(np.mean([top.gold for top in tops])),
        "kl": float(np.mean([top.kl for top in tops])),
        "samples": float(np.mean(at)),
        "gain": gains.as_dict(),
    }


def summarise(tracks: Sequence[Track], kl: float, budget: float | None) -> dict[str, Any]:
    """Every method's gain at a KL, at a number of samples where one is given, and at its best."""
    rows = {}
    for method, own in by_method(tracks).items():
        row: dict[str, Any] = {"runs": len(own), "start": float(np.mean([track.start.gold for track in own]))}
        row["at_kl"] = gain(own, roots, math.sqrt(kl)).as_dict()
        if budget is not None:
            row["at_samples"] = gain(own, samples, budget).as_dict()
        row["best"] = best(own)
        rows[method] = row
    return {"kl": kl, "samples": budget, "methods": rows}


def headline(summary: Mapping[str, Any]) -> str:
    """Which methods gain at the common KL, and which of them the most."""
    known = {name: row["at_kl"] for name, row in summary["methods"].items() if row["at_kl"]["n"]}
    if not known:
        return f"No method reaches KL {kl_text(summary['kl'])}"
    first = max(known, key=lambda name: known[name]["value"])
    if len(known) == 1:
        return f"At KL {kl_text(summary['kl'])} {first} is {known[first]['value']:+.2f} from its start"
    sure = sum(row["ci"][0] > 0 for row in known.values())
    return (
        f"At KL {kl_text(summary['kl'])} {first} gains most, {known[first]['value']:+.2f}; the 95 % interval of "
        f"{sure} of {len(known)} methods is above 0"
    )


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each method."""
    told = []
    for name, row in summary["methods"].items():
        at_kl, top = row["at_kl"], row["best"]
        text = f"  {name} ({row['runs']} runs): at KL {kl_text(summary['kl'])} {_told(at_kl)}"
        if "at_samples" in row:
            text += f"; at {summary['samples']:,.0f} samples {_told(row['at_samples'])}"
        drawn = "" if math.isnan(top["samples"]) else f" after {top['samples']:,.0f} samples"
        told.append(f"{text}; at best {top['gain']['value']:+.3f} at KL {top['kl']:.2f}{drawn}")
    return told


def _told(estimate: Mapping[str, Any]) -> str:
    if not estimate["n"]:
        return "not reached"
    low, high = estimate["ci"]
    return f"{estimate['value']:+.3f}" + ("" if low != low else f" ({low:+.3f} to {high:+.3f})")


def to_csv(tracks: Sequence[Track]) -> str:
    """Every point."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(FIELDS)
    for track in tracks:
        for point, drawn in zip(track.points, track.samples, strict=True):
            cells = (point.step, drawn, point.kl, point.proxy, point.gold, point.gold_se)
            writer.writerow([track.method, track.run, *("" if cell != cell else cell for cell in cells)])
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------- the picture
def draw_frontier(tracks: Sequence[Track], summary: Mapping[str, Any]) -> Figure:
    """Gold over √KL, and over samples where they are known: a line for each method, faint ones for its runs."""
    counted = all(math.isfinite(value) for track in tracks for value in track.samples)
    with mpl.rc_context(style(WIDE.font)):
        figure = Figure(figsize=(WIDE.width, 7.4 if counted else 4.6), layout="constrained")
        axes = figure.subplots(1 + counted, 1, squeeze=False)[:, 0].tolist()
        x_axis(axes[0], [point for track in tracks for point in track.points], WIDE)
        _panel(axes[0], tracks, roots, "True score (gold) over KL")
        axes[0].axvline(math.sqrt(summary["kl"]), color=COLOURS["muted"], linewidth=0.9, zorder=0)
        if counted:
            _panel(axes[1], tracks, samples, "True score (gold) over samples drawn")
            axes[1].set_xlabel("answers that the policy has given in training")
            axes[1].set_xscale("symlog", linthresh=_smallest(tracks))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
        title = "\n".join(textwrap.wrap(headline(summary), TITLE_COLUMNS - 14))  # the legend stands beside it
        figure.suptitle(title, x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28)
        note = "Lines: mean over runs, as far as all of a method's go; faint: each run. Upright: compared there."
        figure.supxlabel(
            textwrap.fill(note, SOURCE_COLUMNS), x=0.012, ha="left", size=WIDE.font * 0.8, color=COLOURS["muted"]
        )
    return figure


def _smallest(tracks: Sequence[Track]) -> float:
    """Samples up to which the axis is linear: the first evaluation after the start."""
    return max(1.0, min((value for track in tracks for value in track.samples if value > 0), default=1.0))


def _panel(ax: Axes, tracks: Sequence[Track], place: Callable[[Track], Sequence[float]], title: str) -> None:
    ax.set_title(title, loc="left", size="medium", weight="bold", pad=7)
    ax.set_ylabel("mean score")
    bare(ax)
    for (method, own), (colour, dash, mark) in zip(by_method(tracks).items(), STYLES, strict=False):
        if len(own) > 1:
            for track in own:
                order = np.argsort(place(track), kind="stable")
                x, y = np.array(place(track))[order], np.array([track.points[i].gold for i in order])
                ax.plot(x, y, color=colour, alpha=0.2, linewidth=0.8, zorder=1)
        reach = min(max(place(track)) for track in own)
        from_all = max(min(place(track)) for track in own)
        first = np.array(sorted(value for value in place(own[0]) if from_all - TOLERANCE <= value <= reach + 1e-9))
        mean = np.mean(
            [[track.at(place, min(max(value, from_all), reach)) for value in first] for track in own], axis=0
        )
        ax.plot(
            first, mean, color=colour, linestyle=dash, linewidth=1.7, marker=mark, markersize=4.0,
            markeredgecolor=COLOURS["paper"], markeredgewidth=0.4, label=method, zorder=3,
        )  # fmt: skip
    ax.margins(y=0.08)
