"""All that the lab can say of the runs of pipelines, part by part, for one page.

A part whose measurements are missing says which command makes them; none is left out in silence.
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError
from lightning_align.lab import frontier_page, frontier_words, leaderboard, leaderboard_page
from lightning_align.lab.claims import SCALING_FILE, Result, assess_all, read_scaling
from lightning_align.lab.claims_file import read_claims
from lightning_align.lab.claims_page import sections as claims_sections
from lightning_align.lab.findings import kl_text, number
from lightning_align.lab.frontier import BEST_OF_N, MOST_METHODS, common_kl, load_tracks, summarise
from lightning_align.lab.frontier_tracks import Track
from lightning_align.lab.grid import Cell, load_grid
from lightning_align.lab.page import table
from lightning_align.lab.runs import Curve, load_curve
from lightning_align.lab.study_overopt import overoptimisation
from lightning_align.lab.study_stopping import stopping
from lightning_align.run.directory import read_status

FEWEST_POINTS = 2  # with a true score, of a run that takes part


@dataclass(frozen=True)
class Part:
    """A part of the page: its name in the list of contents, what it found in a line, and its HTML."""

    name: str
    headline: str
    html: Sequence[str]


@dataclass(frozen=True)
class Study:
    """Runs of pipelines.

    Attributes:
        folders: Of the pipelines.
        cells: Their finished runs.
        curves: Those with a true score over KL, with their runs, by method.
    """

    folders: Sequence[Path]
    cells: Sequence[Cell]
    curves: Mapping[str, Sequence[tuple[Cell, Curve]]]

    @property
    def runs(self) -> list[Path]:
        """The runs with a true score over KL."""
        return [cell.run for own in self.curves.values() for cell, _ in own]


def load_study(folders: Sequence[Path]) -> Study:
    """Read the finished runs of pipelines; of several pipelines methods are told apart by the folder's name.

    Raises:
        UserError: A folder is none of a pipeline, or holds no finished run.
    """
    cells: list[Cell] = []
    curves: dict[str, list[tuple[Cell, Curve]]] = {}
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UserError(f"{folder} is given twice: give each folder once")
        own = load_grid(folder)
        cells += own
        for cell in own:
            curve = _curve(cell.run)
            if curve is not None:
                method = f"{folder.name}: {cell.method}" if len(folders) > 1 else cell.method
                curves.setdefault(method, []).append((cell, curve))
    return Study(folders, cells, curves)


def _curve(run: Path, source: str = "auto") -> Curve | None:
    """Of a run that measured a true score at two checkpoints or more; None of others, such as pre-training."""
    try:
        curve = load_curve(run, source=source)
    except UserError:
        return None
    return curve if sum(math.isfinite(point.gold) for point in curve.points) >= FEWEST_POINTS else None


def parts(study: Study, *, kl: float, claims: Path | None) -> list[Part]:
    """Every part of the page, in the order in which one reads it."""
    found = [_guarded("Frontier", lambda: frontier_part(study))]
    found.append(_guarded("Over-optimisation", lambda: overopt_part(study)))
    found.append(_guarded("When to stop", lambda: select_part(study)))
    found.append(_guarded("Scaling", lambda: scaling_part(study)))
    found.append(_guarded("Leaderboard", lambda: leaderboard_part(study, kl)))
    found.append(_guarded("Claims", lambda: claims_part(study, claims)))
    found.append(runs_part(study))
    return found


def _guarded(name: str, build: Callable[[], Part]) -> Part:
    """A part, or in its place why there is none."""
    try:
        return build()
    except UserError as error:
        reason = str(error)
        return Part(name, f"not here: {reason}", [f'<p class="note">{escape(reason)}</p>'])


def frontier_part(study: Study) -> Part:
    """Gold over KL, samples and proxy of all methods, as far as one picture holds them and they were measured alike."""
    _needed(study.runs)
    best = {
        method: max(point.gold for _, curve in own for point in curve.points if math.isfinite(point.gold))
        for method, own in study.curves.items()
    }
    alike, source = _alike(study)
    best_of = _best_of(study) if source == "auto" else []  # measured as the checkpoints were, not as in training
    shown = sorted(alike, key=lambda method: -best[method])[: MOST_METHODS - bool(best_of)]
    runs = [cell.run for method in alike if method in shown for cell, _ in alike[method]]
    tracks = load_tracks(runs, source=source, best_of=best_of)
    summary = summarise(tracks, common_kl(tracks), None)
    rest = [method for method in study.curves if method not in shown]
    notes = [f"Not in this picture: {', '.join(rest)}."] if rest else []
    notes += _about_start(tracks)
    html = [*(f'<p class="note">{escape(note)}</p>' for note in notes), *frontier_page.sections(tracks, summary)]
    return Part("Frontier", frontier_words.headline(summary), html)


def _best_of(study: Study) -> list[Path]:
    """Tables of best-of-n beside the runs."""
    return [path for folder in study.folders for path in sorted(folder.glob("best_of*.csv"))]


def _about_start(tracks: Sequence[Track]) -> list[str]:
    """Why best-of-n does not begin where the others do, though it is the same model."""
    own = [track for track in tracks if track.method == BEST_OF_N]
    few = next((track.settings["num_samples"] for track in tracks if "num_samples" in track.settings), None)
    if not own or few is None:
        return []
    many = max(point.step for track in own for point in track.points)
    return [
        f"{BEST_OF_N} is the start itself, without training: its n = 1 is the mean over {many} answers to each prompt, "
        f"and the start of the other methods the mean over {few}. The two differ by the error of so few answers."
    ]


def _alike(study: Study) -> tuple[dict[str, Sequence[tuple[Cell, Curve]]], str]:
    """The methods whose runs were all measured afterwards, or else those that were all evaluated in training."""
    measured = {m: own for m, own in study.curves.items() if all(curve.source == "measured" for _, curve in own)}
    if len(measured) == len(study.curves):
        return measured, "auto"
    evaluated = {
        method: own
        for method, own in study.curves.items()
        if all(curve.source == "eval" or _curve(cell.run, "eval") is not None for cell, curve in own)
    }
    return (evaluated, "eval") if evaluated else (dict(study.curves), "auto")


def _needed(runs: Sequence[Path]) -> Sequence[Path]:
    if not runs:
        raise UserError(
            "no run has a true score at two checkpoints: give the runs model.gold, or lab frontier --recompute"
        )
    return runs


def overopt_part(study: Study) -> Part:
    """Gold over KL of each method with its law."""
    _needed(study.runs)
    headline, html = overoptimisation(study.curves)
    return Part("Over-optimisation", headline, html)


def select_part(study: Study) -> Part:
    """What each policy for stopping gives away, and the checkpoints to keep."""
    headline, html = stopping(study.curves)
    return Part("When to stop", headline, html)


def scaling_part(study: Study) -> Part:
    """The claims of scaling laws and their pictures, as ``lab scaling`` wrote them."""
    folder = next((folder for folder in study.folders if (folder / SCALING_FILE).is_file()), None)
    if folder is None:
        raise UserError(
            f"no {SCALING_FILE} in {', '.join(map(str, study.folders))}: run lab scaling on a sweep's folder"
        )
    laws = read_scaling(folder).values()
    rows = [
        [
            f'<div class="claim">{escape(str(row["claim"]))}: {escape(str(row["statement"]))}</div>',
            f'<span class="verdict {escape(str(row["verdict"]))}">{escape(str(row["verdict"]))}</span>',
            _estimate(row),
            f'<div class="claim"><small>{escape(str(row["reason"]))}</small></div>',
        ]
        for row in laws
    ]
    pictures = [_image(path) for path in sorted(folder.glob("scaling*.png"))]
    told = "; ".join(f"{row['claim']} {row['verdict']}: {row['statement']}" for row in laws)
    return Part(
        "Scaling",
        told,
        [table("Claims of scaling laws", ["claim", "verdict", "estimate", "why"], rows, words=4), *pictures],
    )


def _estimate(row: Mapping[str, Any]) -> str:
    if row["estimate"] is None:
        return "–"
    low, high = (math.nan if end is None else float(end) for end in row["ci"])
    return f"{number(float(row['estimate']))} ({number(low)} to {number(high)})"


def leaderboard_part(study: Study, kl: float) -> Part:
    """All methods within one KL."""
    places = leaderboard.find_runs(study.folders)
    entries = leaderboard.load_entries(places, kl=kl, samples=math.inf)
    rows = leaderboard.board(entries)
    about = leaderboard.note(entries, kl, math.inf)
    if _best_of(study):
        about += f" {BEST_OF_N} is no policy but a choice among answers of the start: it stands in the frontier alone."
    html = leaderboard_page.sections(rows, entries, about)
    return Part("Leaderboard", leaderboard.headline(rows, kl), html)


def claims_part(study: Study, path: Path | None) -> Part:
    """Claims of the field against these runs."""
    if path is None:
        raise UserError("no claims were given: --claims FILE (docs/claims.md)")
    results = assess_all(read_claims(path), study.cells, study.folders)
    return Part("Claims", _judged(results), claims_sections(results))


def _judged(results: Sequence[Result]) -> str:
    """How many of the claims hold here, those apart of which these runs say nothing."""
    measured = [result for result in results if math.isfinite(result.effect.value)]
    counts = {name: sum(r.verdict == name for r in measured) for name in ("supported", "contradicted", "undecided")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{told}; {len(results) - len(measured)} of {len(results)} claims not measured by these runs"


def runs_part(study: Study) -> Part:
    """Every run, with what it ended at and the time it took."""
    golds = {cell.run: curve for own in study.curves.values() for cell, curve in own}
    seconds = {cell.run: _seconds(cell.run) for cell in study.cells}
    rows = [
        [escape(cell.method), _labels(cell), *_end(golds.get(cell.run)), number(seconds[cell.run], 0)]
        for cell in study.cells
    ]
    total = sum(value for value in seconds.values() if math.isfinite(value))
    head = ["stage", "run", "KL at the end", "reward", "true score", "highest", "seconds of training"]
    told = f"{len(study.cells)} runs, {total / 60:.0f} minutes of training"
    return Part("Runs", told, [table("All finished runs", head, rows, words=2)])


def _labels(cell: Cell) -> str:
    return f"<code>{escape(','.join(f'{axis}={label}' for axis, label in cell.axes.items()) or cell.run.name)}</code>"


def _seconds(run: Path) -> float:
    """Of training, as the leaderboard has them: without the start of the process, which a pipeline counts too."""
    return float(read_status(run).get("durations", {}).get("total_seconds", math.nan))


def _end(curve: Curve | None) -> Iterable[str]:
    if curve is None:
        return ["–"] * 4
    last = curve.points[-1]
    best = max(point.gold for point in curve.points if math.isfinite(point.gold))
    return [kl_text(last.kl), number(last.proxy), number(last.gold), number(best)]


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></figure>'
