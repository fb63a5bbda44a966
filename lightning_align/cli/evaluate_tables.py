"""What ``evaluate`` shows on the terminal of its policies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lightning_align.lab.evaluation.subjects import short_names

SCORES = ("gold", "proxy", "kl")
MORE = (
    *("length", "truncated", "entropy", "distinct_1", "distinct_2", "self_bleu", "unique_fraction"),
    *("heldout_loss", "perplexity"),
)


def policy_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What counts, a row per policy with intervals; what else was measured; and scores by subset."""
    names = short_names([row["model"] for row in rows])
    tables = [_scores(rows, names), _more(rows, names)]
    if any(row["best_of"] for row in rows):
        tables.append(_best_of(rows, names))
    if any(row["by"] for row in rows):
        tables.append(_subsets(rows, names))
    return tables


def _scores(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    shown = [name for name in SCORES if any(name in row["metrics"] for row in rows)]
    compared = any("against" in row for row in rows)
    table = _table("policy", *shown, *(("win rate", "p", "at equal length") if compared else ()))
    for name, row in zip(names, rows, strict=True):
        cells = [text(row["metrics"].get(column)) for column in shown]
        if compared:
            against = row.get("against", {})
            cells += [text(against.get("win_rate")), f"{against['win_rate']['p']:.4f}" if against else ""]
            cells.append(text(against.get("length_controlled_win_rate")))
        table.add_row(name, *cells)
    return table


def _more(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Without intervals, which are in the JSON."""
    table = _table("", *names)
    for metric in MORE:
        if any(metric in row["metrics"] for row in rows):
            values = [row["metrics"].get(metric, {}).get("value") for row in rows]
            table.add_row(metric.replace("_", " "), *("" if value is None else f"{value:.3f}" for value in values))
    return table


def _best_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    shown = [name for name in SCORES if any(name in best for row in rows for best in row["best_of"])]
    table = _table("policy", "best of", *shown, "KL at most")
    for name, row in zip(names, rows, strict=True):
        for best in row["best_of"]:
            cells = [text(best.get(column)) for column in shown]
            table.add_row(name, str(best["n"]), *cells, f"{best['kl_bound']:.3f}")
    return table


def _subsets(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    shown = [name for name in SCORES if any(name in row["metrics"] for row in rows)]
    table = _table("policy", "subset", "prompts", *shown)
    for name, row in zip(names, rows, strict=True):
        for field, values in row["by"].items():
            for value, metrics in values.items():
                cells = [text(metrics.get(column)) for column in shown]
                table.add_row(name, f"{field} {value}", f"{metrics['length']['n']:,}", *cells)
    return table


def _table(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def text(metric: Mapping[str, Any] | None) -> str:
    """A number above the ends of its interval."""
    if metric is None:
        return ""
    low, high = metric["ci"]
    ends = f"\n{low:.3f} … {high:.3f}" if low == low and high == high else ""  # NaN of a single prompt
    return f"{metric['value']:.3f}{ends}"
