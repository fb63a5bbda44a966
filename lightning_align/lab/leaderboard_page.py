"""The leaderboard as a page: a table that sorts, and the answers of the methods that are ticked side by side."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_align.lab.evaluation.intervals import Estimate
from lightning_align.lab.figures import COLOURS, TITLE_COLUMNS, WIDE, bare, style
from lightning_align.lab.findings import number
from lightning_align.lab.leaderboard import COLUMNS, START, Entry, moved
from lightning_align.lab.overopt_page import as_text
from lightning_align.lab.page import page, table

SHOWN = 3  # methods whose answers are shown at first, beside the start
DIGITS = {"length": 1, "samples": 0, "seconds": 0, "memory": 0}


def render(rows: Mapping[str, Mapping[str, Estimate]], entries: Sequence[Entry], title: str, note: str) -> str:
    """The whole page; without scripts it is a plain table with all answers."""
    script = files("lightning_align.lab").joinpath("leaderboard.js").read_text(encoding="utf-8")
    return page(title, [f"<h1>{escape(title)}</h1>", *sections(rows, entries, note)], script=script)


def sections(rows: Mapping[str, Mapping[str, Estimate]], entries: Sequence[Entry], note: str) -> list[str]:
    """The parts of the page, for others that show them too."""
    return [f'<p class="note">{escape(note)}</p>', _table(rows), _answers(rows, entries)]


def _table(rows: Mapping[str, Mapping[str, Estimate]]) -> str:
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    head = ["method", *(f'<button type="button" class="sort">{escape(COLUMNS[name][0])}</button>' for name in names)]
    best = {name: _best(rows, name) for name in names}
    body = [
        [escape(method), *(_cell(row.get(name), name, strong=best[name] == method) for name in names)]
        for method, row in rows.items()
    ]
    caption = "Mean over seeds with its 95 % interval; bold: best (the start apart). Press a heading to sort."
    return table(caption, head, body, name="leaderboard")


def _best(rows: Mapping[str, Mapping[str, Estimate]], name: str) -> str | None:
    better = COLUMNS[name][1]
    known = {method: row[name].value for method, row in rows.items() if name in row and method != START and moved(row)}
    if better is None or len(known) < 2:
        return None
    return (max if better else min)(known, key=lambda method: known[method])


def _cell(estimate: Estimate | None, name: str, *, strong: bool) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return '<span data-value="">–</span>'
    digits = DIGITS.get(name, 2)
    ends = ""
    if math.isfinite(estimate.low):
        ends = f"<br><small>{number(estimate.low, digits)} to {number(estimate.high, digits)}</small>"
    text = number(estimate.value, digits)
    return f'<span data-value="{estimate.value:.6g}">{f"<strong>{text}</strong>" if strong else text}{ends}</span>'


def _answers(rows: Mapping[str, Mapping[str, Estimate]], entries: Sequence[Entry]) -> str:
    """The first run of each method answers the same prompts."""
    firsts = {method: next(entry for entry in entries if entry.method == method) for method in rows}
    firsts = {method: entry for method, entry in firsts.items() if entry.answers}
    if not firsts:
        return ""
    order = [*(method for method in firsts if method != START), *(method for method in firsts if method == START)]
    shown = {*order[:SHOWN], START}
    boxes = "".join(
        f'<label><input type="checkbox" class="pick" value="{index}"{" checked" if method in shown else ""}> '
        f"{escape(method)}</label> "
        for index, method in enumerate(order)
    )
    by_prompt: dict[str, list[str]] = {}
    for index, method in enumerate(order):
        for answer in firsts[method].answers:
            by_prompt.setdefault(as_text(answer["prompt"]), []).append(_card(index, method, answer))
    blocks = "".join(
        f'<div><p class="prompt">{escape(prompt)}</p><div class="columns">{"".join(cards)}</div></div>'
        for prompt, cards in by_prompt.items()
    )
    return (
        '<h2>Answers side by side</h2><p class="note">The first prompts, not selected; one sampled answer of the first '
        f'run of each method.</p><p class="picks">{boxes}</p><div class="answers">{blocks}</div>'
    )


def _card(index: int, method: str, answer: Mapping[str, object]) -> str:
    scores = "".join(
        f'<span class="{key}">{word} <strong>{number(float(value))}</strong></span>'
        for key, word in (("proxy", "reward"), ("gold", "true score"))
        if isinstance(value := answer.get(key), int | float)
    )
    text = escape(as_text(answer["completion"])) or '<span class="note">(empty)</span>'
    return (
        f'<div class="card" data-method="{index}"><div class="note">{escape(method)}</div>'
        f'<div class="text">{text}</div><div class="scores">{scores}</div></div>'
    )


def draw_leaderboard(rows: Mapping[str, Mapping[str, Estimate]], title: str) -> Figure:
    """True score, or what there is in its place, as a dot with its interval, a line for each method."""
    name = next(name for name in ("gold", "win_rate", "heldout", "proxy") if any(name in row for row in rows.values()))
    known = [(method, row[name]) for method, row in rows.items() if name in row]
    with mpl.rc_context(style(WIDE.font)):
        figure = Figure(figsize=(WIDE.width, 1.5 + 0.32 * len(known)), layout="constrained")
        ax = figure.subplots()
        bare(ax)
        ax.grid(visible=False)
        for place, (method, estimate) in enumerate(reversed(known)):
            colour = COLOURS["muted"] if method == START else COLOURS["gold"]
            if math.isfinite(estimate.low):
                ax.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=2, alpha=0.5)
            ax.plot(estimate.value, place, "o", color=colour, markersize=7)
            if method == START:
                ax.axvline(estimate.value, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        ax.set_ylim(-0.5, len(known) - 0.5)
        ax.set_yticks(range(len(known)), [method for method, _ in reversed(known)])
        ax.tick_params(axis="y", labelcolor=COLOURS["ink"])
        ax.set_xlabel(f"{COLUMNS[name][0]}, 95 % interval")
        ax.grid(axis="x", color=COLOURS["grid"], linewidth=0.8)
        figure.suptitle(
            "\n".join(textwrap.wrap(title, TITLE_COLUMNS)), x=0.012, ha="left", weight="bold", size=WIDE.font * 1.28
        )
    return figure
