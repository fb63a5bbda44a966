"""The frontier as a page: the picture, a table of methods, answers side by side, and how it was measured."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_align.lab.figures import NARROW, WIDE, svg
from lightning_align.lab.findings import kl_text, number
from lightning_align.lab.frontier import SCORES, by_method
from lightning_align.lab.frontier_figures import draw_frontier, note
from lightning_align.lab.frontier_tracks import Track
from lightning_align.lab.frontier_words import headline, told_gain
from lightning_align.lab.overopt_page import as_text, clip
from lightning_align.lab.page import page, table
from lightning_align.lab.runs import Point

PROMPTS_SHOWN = 3
THEMED = {"#9c3d7c": "no", "#1d7a5f": "yes"}  # colours of lines that the page has for a dark ground too
SCORE_WORDS = {"proxy": "reward", "gold": "true score", "heldout": "held-out"}


def render(tracks: Sequence[Track], summary: Mapping[str, Any]) -> str:
    """The whole page."""
    title = headline(summary)
    return page(title, [f"<h1>{escape(title)}</h1>", *sections(tracks, summary)])


def sections(tracks: Sequence[Track], summary: Mapping[str, Any]) -> list[str]:
    """The parts of the page, for others that show them too."""
    return [_pictures(tracks, summary), _methods(summary), _answers(tracks), _settings(tracks)]


def _pictures(tracks: Sequence[Track], summary: Mapping[str, Any]) -> str:
    label = escape(headline(summary))
    drawn = "".join(
        svg(draw_frontier(tracks, summary, layout, with_title=False), kind, label, prefix=f"frontier-{kind}")
        for kind, layout in (("wide", WIDE), ("narrow", NARROW))
    )
    for colour, name in THEMED.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return f'<figure style="max-width: 54rem">{drawn}<figcaption>{escape(note(tracks))}</figcaption></figure>'


# ---------------------------------------------------------------------------------------------------------- the table
def _methods(summary: Mapping[str, Any]) -> str:
    rows = summary["methods"]
    counted = any("at_samples" in row for row in rows.values())
    there = [name for name in ("win_rate", "heldout") if any(f"{name}_there" in row["best"] for row in rows.values())]
    on_front = [entry["method"] for entry in summary["pareto"]]
    head = [
        "method",
        "runs",
        f"gain at KL {kl_text(summary['kl'])}",
        *([f"gain at {summary['samples']:,.0f} samples"] if counted else []),
        *("highest score", "its gain", "at KL", "after samples"),
        *(f"{SCORES[name]} there" for name in there),
        *("farthest KL", "on the front"),
    ]
    body = [
        [
            escape(method),
            str(row["runs"]),
            _gain(row["at_kl"]),
            *([_gain(row["at_samples"])] if counted else []),
            number(row["best"][summary["score"]]),
            _gain(row["best"]["gain"]) if row["best"]["gain"]["n"] else "–",
            kl_text(row["best"]["kl"]),
            f"{row['best']['samples']:,.0f}" if math.isfinite(row["best"]["samples"]) else "–",
            *(_share(row["best"].get(f"{name}_there"), name) for name in there),
            kl_text(row["farthest_kl"]),
            f"{on_front.count(method)} of {len(on_front)}",
        ]
        for method, row in rows.items()
    ]
    score = SCORES[summary["score"]] + ("" if summary["score"] == "gold" else ", as no true score was found")
    caption = (
        f"Compared by {score}; gains are over the start, with their 95 % interval. The highest of many is flattered."
    )
    return "<h2>Methods</h2>" + table(caption, [escape(cell) for cell in head], body)


def _gain(estimate: Mapping[str, Any]) -> str:
    return escape(told_gain(estimate, 2)).replace("-", "−").replace(" (", "<br><small>").replace(")", "</small>")


def _share(estimate: Mapping[str, Any] | None, name: str) -> str:
    if estimate is None:
        return "–"
    return f"{estimate['value']:.0%}" if name == "win_rate" else number(estimate["value"])


# ---------------------------------------------------------------------------------------------------------- answers
def _answers(tracks: Sequence[Track]) -> str:
    """Of the first run of each method that kept answers: the same prompts at the start, the best and the farthest."""
    blocks: list[str] = []
    for method, own in by_method(tracks).items():
        track = next((track for track in own if track.answers), None)
        columns = answer_columns(track) if track is not None else []
        if track is None or not columns:
            continue
        prompts = list(dict.fromkeys(prompt for _, _, rows in columns for prompt in rows))
        prompts.sort(key=lambda prompt: -sum(prompt in rows for _, _, rows in columns))
        shown = "".join(
            f'<div><p class="prompt">{escape(clip(prompt))}</p><div class="columns">'
            f"{''.join(_card(title, point, rows.get(prompt)) for title, point, rows in columns)}</div></div>"
            for prompt in prompts[:PROMPTS_SHOWN]
        )
        opened = "" if blocks else " open"
        blocks.append(
            f"<details{opened}><summary><h3>{escape(method)}</h3></summary>"
            f'<p class="note"><code>{escape(str(track.run))}</code></p><div class="answers">{shown}</div></details>'
        )
    if not blocks:
        return ""
    text = f"The first {PROMPTS_SHOWN} prompts, not selected; one sampled answer each. Of several runs the first."
    return f'<h2>Answers side by side</h2><p class="note">{text}</p>{"".join(blocks)}'


def answer_columns(track: Track) -> list[tuple[str, Point, dict[str, Mapping[str, Any]]]]:
    """Title, point and rows by prompt at the start, at the highest score and at the largest KL, as far as they differ.

    Where answers were kept at other steps than these, those of the nearest step.
    """
    by_step: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in track.answers:
        if isinstance(row["step"], int):
            by_step.setdefault(row["step"], {}).setdefault(as_text(row["prompt"]), row)
    kept = [point for point in track.points if point.step in by_step]
    if not kept:
        return []
    wanted = {
        "Start": min(track.points, key=lambda point: point.step),
        f"Highest {SCORES[track.score]}": track.top,
        "Farthest": max(track.points, key=lambda point: point.kl),
    }
    titles: dict[int, tuple[Point, list[str]]] = {}
    for title, point in wanted.items():
        nearest = min(kept, key=lambda other: abs(other.step - point.step))
        titles.setdefault(nearest.step, (nearest, []))[1].append(title)
    return [(", ".join(names), point, by_step[point.step]) for point, names in titles.values()]


def _card(title: str, point: Point, row: Mapping[str, Any] | None) -> str:
    head = f'<div class="note">{escape(title)} · step {point.step}, KL {kl_text(point.kl)}</div>'
    if row is None:
        return f'<div class="card">{head}<div class="text note">no answer to this prompt</div></div>'
    scores = "".join(
        f'<span class="{key}">{word} <strong>{number(float(value))}</strong></span>'
        for key, word in SCORE_WORDS.items()
        if isinstance(value := row.get(key), int | float)
    )
    cut = '<span class="note">cut at the length limit</span>' if row.get("finish_reason") == "length" else ""
    text = escape(clip(as_text(row["completion"]))) or '<span class="note">(empty)</span>'
    return f'<div class="card">{head}<div class="text">{text}</div><div class="scores">{scores}{cut}</div></div>'


# ---------------------------------------------------------------------------------------------------------- settings
def _settings(tracks: Sequence[Track]) -> str:
    """Where the numbers come from, run by run, and how they were measured, if that was done afterwards."""
    settings = next((track.settings for track in tracks if track.settings), {})
    own = {"start", "proxy"}  # differ from run to run, and stand in the table
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_word(value))}</dd>" for name, value in settings.items() if name not in own
    )
    rows = [
        [
            escape(track.method),
            f"<code>{escape(str(track.run))}</code>",
            escape(track.source),
            str(len(track.points)),
            *(f"<code>{escape(_word(track.settings.get(name)))}</code>" for name in sorted(own)),
        ]
        for track in tracks
    ]
    head = ["method", "run", "points from", "points", *sorted(own)]
    listed = f"<dl>{entries}</dl>" if entries else ""
    return f"<h2>How it was measured</h2>{listed}{table('Runs', head, rows, words=3)}"


def _word(value: Any) -> str:
    if value in (None, "", [], {}):
        return "–"
    return ", ".join(map(_word, value)) if isinstance(value, list) else str(value)
