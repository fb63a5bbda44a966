"""The part of a study that says what over-optimisation did to each method."""

from collections.abc import Mapping, Sequence
from html import escape

from lightning_align.errors import UserError
from lightning_align.lab import seeds
from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.figures import NARROW, WIDE, draw, source_line, svg
from lightning_align.lab.findings import conclude
from lightning_align.lab.grid import Cell
from lightning_align.lab.overopt_page import answers
from lightning_align.lab.runs import Curve

MOST_PICTURES = 12  # one a method


def overoptimisation(curves: Mapping[str, Sequence[tuple[Cell, Curve]]]) -> tuple[str, list[str]]:
    """Gold over KL of each method with its law: over its runs, or of the one run with the proxy above it.

    Args:
        curves: Runs with a true score, by method; at least one.

    Returns:
        A headline, of the method that went farthest, and HTML.
    """
    html: list[str] = []
    told: list[str] = []
    farthest = sorted(curves.items(), key=lambda item: -_reach(item[1]))  # it shows most of what is to be seen
    for index, (method, own) in enumerate(farthest):
        cell, curve = own[0]
        analysis = analyse(curve)
        heading, picture, text = _law([one for _, one in own], analysis, f"o{index}")
        told.append(f"{method}: {heading[0].lower()}{heading[1:]}")
        if index >= MOST_PICTURES:
            continue
        opened = " open" if index == 0 else ""
        html.append(
            f"<details{opened}><summary><h3>{escape(method)}: {escape(heading)}</h3></summary>{picture}"
            f"<p>{escape(text)}</p>{answers(analysis)}"
            f'<p class="note"><code>{escape(str(cell.run))}</code></p></details>'
        )
    if len(curves) > MOST_PICTURES:
        listed = "".join(f"<li>{escape(line)}</li>" for line in told[MOST_PICTURES:])
        html.append(f"<ul>{listed}</ul>")
    return told[0], html


def _reach(own: Sequence[tuple[Cell, Curve]]) -> float:
    return max(point.kl for _, curve in own for point in curve.points)


def _law(curves: Sequence[Curve], analysis: Analysis, name: str) -> tuple[str, str, str]:
    """Heading, picture and sentences: of several runs together where they have a law, else of the first."""
    if len(curves) > 1:
        try:
            several = seeds.analyse_seeds(curves)
        except UserError:
            pass  # too few points in each: the first run is shown by itself
        else:
            heading = seeds.headline(several)
            picture = svg(seeds.draw_seeds(several, with_title=False), "seeds", escape(heading), prefix=name)
            return heading, f"<figure>{picture}</figure>", " ".join(seeds.sentences(several))
    finding = conclude(analysis)
    return finding.headline, _picture(analysis, name), " ".join(finding.sentences)


def _picture(analysis: Analysis, name: str) -> str:
    finding = conclude(analysis)
    pictures = "".join(
        svg(draw(analysis, finding, layout, with_title=False), kind, escape(finding.headline), prefix=f"{name}{kind}")
        for kind, layout in (("wide", WIDE), ("narrow", NARROW))
    )
    return f"<figure>{pictures}<figcaption>{escape(source_line(analysis))}</figcaption></figure>"
