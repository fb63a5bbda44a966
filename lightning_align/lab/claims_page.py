"""Claims as a table of a page: hypothesis, effect as a bar, verdict."""

import math
from collections.abc import Sequence
from html import escape

from lightning_align.lab.claims import Result
from lightning_align.lab.claims_figure import NOTE, effect_of
from lightning_align.lab.page import table

WIDTH, HEIGHT = 150, 22


def sections(results: Sequence[Result]) -> list[str]:
    """The table and what its bars are."""
    rows = [
        [
            f'<div class="claim">{escape(result.claim.hypothesis)}<br>'
            f"<small>{escape(result.claim.source)}</small></div>",
            f'<span class="verdict {result.verdict}">{result.outcome}</span>',
            bar(result) + f"<br><small>{escape(effect_of(result))}</small>",
            f'<div class="claim"><small>{escape(_test(result))}</small></div>',
        ]
        for result in results
    ]
    head = ["claim", "verdict", "effect", "what was compared"]
    return [table("Claims against these runs", head, rows, words=4), f'<p class="note">{escape(NOTE)}</p>']


def _test(result: Result) -> str:
    claim = result.claim
    if claim.scaling is not None:
        return f"lab scaling, {claim.scaling}: {result.reason}"
    against = f" against {claim.b}" if claim.b is not None else ""
    return f"{claim.measure.described}, {claim.a}{against}; {result.reason}"


def bar(result: Result) -> str:
    """The effect with its interval about 0, on a scale of its own; grey is what counts as equal."""
    effect, margin = result.effect, result.claim.margin
    reach = max((abs(v) for v in (effect.value, effect.low, effect.high, margin) if math.isfinite(v)), default=0.0)

    def x(value: float) -> float:
        return WIDTH / 2 * (1 + value / (1.15 * reach)) if reach else WIDTH / 2

    parts = [
        f'<svg class="bar {result.verdict}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{effect_of(result)}">'
    ]
    if margin:
        parts.append(f'<rect x="{x(-margin):.1f}" width="{x(margin) - x(-margin):.1f}" y="0" height="{HEIGHT}"/>')
    parts.append(f'<line class="zero" x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="{HEIGHT}"/>')
    if math.isfinite(effect.low):
        parts.append(f'<line x1="{x(effect.low):.1f}" x2="{x(effect.high):.1f}" y1="{HEIGHT / 2}" y2="{HEIGHT / 2}"/>')
    if math.isfinite(effect.value):
        parts.append(f'<circle cx="{x(effect.value):.1f}" cy="{HEIGHT / 2}" r="4"/>')
    return "".join([*parts, "</svg>"])
