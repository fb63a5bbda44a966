"""What ``label export`` shows of those who judged."""

import math
from collections.abc import Mapping

from rich.table import Table

from lightning_align.lab.agreement import is_biased
from lightning_align.lab.annotators import Panel
from lightning_align.lab.evaluation.intervals import Estimate


def agreement_table(together: Panel, apart: Mapping[str, Panel]) -> Table:
    """A row per aspect that was judged apart, and one of all."""
    table = _table(
        "aspect", "items", "pairs", "α nominal", "α ordinal", "agreement", "without ties", "first shown wins"
    )
    for name, panel in {**apart, "all": together}.items():
        shares = (panel.nominal, panel.ordinal, panel.agreement, panel.agreement_decided)
        cells = [f"{panel.items:,}", f"{panel.pairs:,}", *map(_text, shares), _place(panel.first_wins)]
        table.add_row(name, *cells)
    table.caption = "items and pairs: those that two or more have judged; 95 % intervals; * excludes one half"
    return table


def annotator_table(panel: Panel) -> Table:
    """A row per annotator."""
    columns = ("judgements", "skipped", "ties", "unsafe", "seconds", "agreement with others", "first shown wins")
    table = _table("annotator", *columns)
    for name, row in panel.annotators.items():
        counts = (f"{row.judgements:,}", f"{row.skipped:,}", _share(row.ties), _share(row.unsafe))
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
        table.add_row(name, *counts, seconds, _text(row.agreement), _place(row.first_wins))
    return table


def notes(panel: Panel) -> list[str]:
    """What the tables do not say in numbers."""
    found = []
    if not panel.items:
        found.append("no pair of answers was judged by two annotators: how far they agree is unknown (see --overlap)")
    for place, is_so in (("first", lambda share: share > 0.5), ("last", lambda share: share < 0.5)):
        names = [
            name for name, row in panel.annotators.items() if is_biased(row.first_wins) and is_so(row.first_wins.value)
        ]
        if names:
            found.append(f"what is shown {place} wins more often than chance for {', '.join(names)}")
    return found


def _table(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _text(estimate: Estimate) -> str:
    """A number above the ends of its interval; nothing where there is none."""
    if math.isnan(estimate.low):
        return _share(estimate.value)
    return f"{estimate.value:.3f}\n{estimate.low:.3f} … {estimate.high:.3f}"


def _place(estimate: Estimate) -> str:
    text = _text(estimate)
    return f"{text} *" if is_biased(estimate) else text
