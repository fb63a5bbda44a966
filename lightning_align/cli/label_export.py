"""``label export``: judgements of people to records, and how far those who judged agree."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.label_files import beside, write_metrics
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_align.feedback.human.export import Export
    from lightning_align.feedback.human.tasks import Judgement

WIDTH = 120  # of tables that go to a file


def main(argv: list[str]) -> int:
    """Write records and measures, and show what was left out and how far people agree."""
    from rich.console import Console

    from lightning_align.cli.label_tables import agreement_table, annotator_table, notes
    from lightning_align.data.writers import check_target, write_records
    from lightning_align.lab.annotators import as_dict, by_aspect, panel

    options = read_options(argv)
    check_target(options.out, overwrite=options.overwrite)
    judgements = _judgements(options)
    kind = _kind(options, judgements)
    export = _export(kind, options, judgements)
    together, apart = panel(judgements), by_aspect(judgements)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in (agreement_table(together, apart), annotator_table(together)):
        console.print(table)
    for note in notes(together):
        print(f"note: {note}")
    print("\n".join(_lines(export)))
    measures = beside(options.out, "agreement.json")
    aspects = {aspect: as_dict(found) for aspect, found in apart.items()}
    counts = {**vars(export), "kind": kind, "records": len(export.records)}
    write_metrics({"export": counts, **as_dict(together), "aspects": aspects}, measures)
    if not export.records:
        raise UserError(f"{options.store}: no judgement gives a record of kind {kind}; see above")
    write_records(export.records, options.out, overwrite=options.overwrite)
    print(f"wrote {len(export.records):,} records of kind {kind} to {options.out}, the measures to {measures}")
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("label export", "Judgements of people to records, with their agreement.")
    parser.add_argument("store", type=Path, metavar="STORE", help="file that label human or label import has made")
    parser.add_argument("--out", type=Path, required=True, help="records to write (.jsonl, .csv, .parquet)")
    parser.add_argument(
        "--kind", choices=("ranked", "preference"), help="of the records (preference, if all items have two answers)"
    )
    parser.add_argument(
        "--combine", choices=("each", "soft"), default="each", help="a record a judgement, or soft labels of all (each)"
    )
    parser.add_argument(
        "--keep_unsafe", action="store_true", help="keep pairs whose better answer alone was flagged unsafe"
    )
    parser.add_argument("--annotators", nargs="+", metavar="NAME", help="only judgements of these")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if there is one")
    return parser


def read_options(argv: list[str]) -> Namespace:
    """The options, checked as far as that takes no store."""
    options = _parser().parse_args(argv)
    if options.kind == "ranked" and options.combine == "soft":
        raise UserError("--combine soft is of pairs: give --kind preference, or leave one of the two out")
    if options.kind == "ranked" and options.keep_unsafe:
        raise UserError("--keep_unsafe is of pairs: rankings are never left out; give --kind preference, or leave it")
    return options


def _judgements(options: Namespace) -> "list[Judgement]":
    from lightning_align.feedback.human.store import Store

    store = Store(options.store)
    try:
        judgements = store.judgements()
    finally:
        store.close()
    if not judgements:
        raise UserError(f"{options.store} holds no judgement yet: `label human` shows the page on which people judge")
    if options.annotators is None:
        return judgements
    known = dict.fromkeys(judgement.annotator for judgement in judgements)
    for name in options.annotators:
        if name not in known:
            raise UserError(
                f"--annotators: {name!r} has judged nothing{nearest(name, known)} ({', '.join(known)} have)"
            )
    return [judgement for judgement in judgements if judgement.annotator in options.annotators]


def _kind(options: Namespace, judgements: "Sequence[Judgement]") -> str:
    if options.kind is not None:
        return str(options.kind)
    if options.combine == "soft":
        print("kind preference, because labels are soft")
        return "preference"
    most = max(len(judgement.item.answers) for judgement in judgements)
    kind = "preference" if most == 2 else "ranked"
    print(f"kind {kind}, because {'every item has two answers' if most == 2 else f'items have up to {most} answers'}")
    return kind


def _export(kind: str, options: Namespace, judgements: "Sequence[Judgement]") -> "Export":
    from lightning_align.feedback.human.export import preferences, ranked

    if kind == "ranked":
        return ranked(judgements)
    return preferences(judgements, combine=options.combine, keep_unsafe=options.keep_unsafe)


def _lines(export: "Export") -> list[str]:
    """What is in the records, and what was left out, where anything was."""
    said = {
        "left out: pairs whose better answer alone was flagged unsafe (--keep_unsafe keeps them)": export.unsafe,
        "left out: strengths, for which these records have no place": export.strengths,
        **{f"skipped: {reason}": count for reason, count in export.skipped.most_common()},
    }
    start = f"{export.judgements:,} judgements, {len(export.records):,} records, {export.ties:,} of them ties"
    return [start, *(f"{name}: {count:,}" for name, count in said.items() if count)]
