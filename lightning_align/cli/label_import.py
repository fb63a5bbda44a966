"""``label import``: what people labelled in Argilla or Label Studio, into a store of judgements."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.feedback.human.tasks import OVERALL, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_align.data.files import Row
    from lightning_align.feedback.human.imported import Found, Reader
    from lightning_align.feedback.human.store import Store

FORMATS = ("argilla", "label_studio")


def main(argv: list[str]) -> int:
    """Read the whole file, then put it into the store and show what was left out."""
    from lightning_align.data.files import read_rows
    from lightning_align.feedback.human.imported import collect, put

    options = read_options(argv)
    if options.store.exists():
        _store(options).close()  # refused before the file is read
    rows = list(read_rows(options.file, options.file.name))
    reader = _reader(options, rows)
    found = collect(rows, reader, skips_bad=options.on_bad_record == "skip")
    _check(found, reader, options)
    store = _store(options)
    try:
        with store.together():
            imported = put(store, found, options.format)
        num_items = len(store.items())
    finally:
        store.close()
    counts = imported.counts
    print(f"{counts['records']:,} records, {counts['items']:,} of them new prompts with answers")
    print(f"{counts['judgements']:,} judgements and {counts['skips']:,} skips added, {counts['there']:,} there before")
    for note in reader.notes:
        print(f"note: {note}")
    for reason, count in (reader.left_out + imported.left_out).most_common():
        print(f"left out: {reason}: {count:,}")
    print(f"{options.store} holds {num_items:,} prompts; make records of them with")
    print(f"  python -m lightning_align label export {options.store} --out preferences.jsonl")
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("label import", "What people labelled in Argilla or Label Studio, into a store.")
    parser.add_argument("file", type=Path, metavar="FILE", help="their export (.json, .jsonl, also .gz or .zst)")
    parser.add_argument("--format", choices=FORMATS, required=True, help="who wrote it")
    parser.add_argument("--store", type=Path, default=Path("labels.sqlite"), help="added to (labels.sqlite)")
    parser.add_argument("--prompt", metavar="FIELD", help="field of the prompt (default: found by its name)")
    parser.add_argument(
        "--answers",
        nargs="+",
        metavar="FIELD",
        default=[],
        help="fields of the answers, the left one first; of a ranker that of the list (default: found by their names)",
    )
    parser.add_argument(
        "--question",
        nargs="+",
        metavar="NAME",
        default=[],
        help="question or control that compares the answers, or ratings, one an answer (default: the only one)",
    )
    parser.add_argument(
        "--buckets", nargs="+", metavar="NAME", default=[], help="of Label Studio's ranker, from best to worst"
    )
    parser.add_argument(
        "--on_bad_record", choices=("error", "skip"), default="error", help="skip: leave out, and count"
    )
    return parser


def read_options(argv: list[str]) -> Namespace:
    """The options, checked as far as that takes no file."""
    from lightning_align.data.files import format_of

    options = _parser().parse_args(argv)
    if format_of(options.file) not in (".json", ".jsonl"):
        raise UserError(f"{options.file}: exports are read from .json and .jsonl, each also with .gz or .zst")
    if options.buckets and options.format != "label_studio":
        raise UserError("--buckets are those of Label Studio's ranker: leave the option out")
    for name in ("answers", "question", "buckets"):
        words = getattr(options, name)
        if len(set(words)) < len(words):
            raise UserError(f"--{name} {' '.join(words)}: give each once")
    if options.prompt in options.answers:
        raise UserError(f"--prompt and --answers both name {options.prompt}")
    return options


def _reader(options: Namespace, rows: "Sequence[Row]") -> "Reader":
    from lightning_align.feedback.human.argilla import Argilla
    from lightning_align.feedback.human.fields import Wish
    from lightning_align.feedback.human.label_studio import LabelStudio

    answers, question, buckets = (tuple(words) for words in (options.answers, options.question, options.buckets))
    wish = Wish(options.file.name, options.prompt, answers, question, buckets)
    return Argilla(rows, wish) if options.format == "argilla" else LabelStudio(rows, wish)


def _check(found: "Sequence[tuple[str, Found]]", reader: "Reader", options: Namespace) -> None:
    if not any(said.opinions for _, said in found):
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in (+reader.left_out).most_common())
        raise UserError(f"{options.file} holds no judgement that can be used ({reasons or 'no responses'})")


def _store(options: Namespace) -> "Store":
    from lightning_align.feedback.human.store import Store

    store = Store(options.store, None if options.store.exists() else Plan())
    if store.plan.aspects != (OVERALL,):
        aspects = ", ".join(store.plan.aspects)
        store.close()
        raise UserError(f"{options.store} judges {aspects} apart, which the file does not: name another --store")
    return store
