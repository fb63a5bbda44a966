"""The page of a study, and that of a single run: everything in one file that needs no network."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lightning_align.errors import UserError
from lightning_align.lab import charts, overopt_page
from lightning_align.lab.analysis import analyse
from lightning_align.lab.findings import conclude
from lightning_align.lab.page import page
from lightning_align.lab.runs import load_curve
from lightning_align.lab.study import Part

READING = (
    "What a policy gains against a learned reward is not what it gains in truth. This page sets both beside each other "
    "over the distance from the start (KL), method by method, and says where to stop. Gold, the true score, was "
    "measured and never trained on."
)


def render_study(name: str, found: Sequence[Part]) -> str:
    """A heading, what each part found, and the parts."""
    script = files("lightning_align.lab").joinpath("leaderboard.js").read_text(encoding="utf-8")
    listed = "".join(
        f'<li><a href="#{_anchor(part)}">{escape(part.name)}</a>: {escape(part.headline)}</li>' for part in found
    )
    sections = [
        '<p class="eyebrow">Alignment lab</p>',
        f"<h1>{escape(name)}</h1>",
        f"<p>{escape(READING)}</p>",
        f'<ul class="found">{listed}</ul>',
    ]
    for part in found:
        sections += [f'<h2 id="{_anchor(part)}">{escape(part.name)}</h2>', *part.html]
    has_board = any('id="leaderboard"' in html for part in found for html in part.html)
    return page(name, sections, script=script if has_board else "")


def _anchor(part: Part) -> str:
    return part.name.lower().replace(" ", "-")


def render_run(run: Path, title: str | None) -> tuple[str, str]:
    """The page of one run: its curve over KL where it has one, and a chart of every metric; and its headline."""
    series = charts.sections(run)
    try:
        curve = load_curve(run)
    except UserError:  # pre-training, SFT and reward models have none
        headline, top = run.resolve().name, []
    else:
        analysis = analyse(curve)
        finding = conclude(analysis)
        headline, top = finding.headline, overopt_page.sections(analysis, finding)
    heading = title or headline
    head = [f'<p class="eyebrow">Run · {escape(run.resolve().name)}</p>', f"<h1>{escape(heading)}</h1>"]
    return page(heading, [*head, *top, "<h2>All metrics</h2>", *series]), headline
