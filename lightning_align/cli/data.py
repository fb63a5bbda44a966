"""``data``: look at records, convert them, write the playground's."""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_align.data.encode import LossOn
    from lightning_align.data.readers import Loaded
    from lightning_align.data.tables import Limit

PLAYGROUND_OPTIONS = ("size", "seed", "temperature", "noise", "ties", "strength", "k", "aspect", "unsafe", "families")
MAX_LENGTH = 1024  # the datamodules' default
HELP = """usage: lightning-align data COMMAND [options]

commands:
  inspect FILE               what a reader finds: counts, conversions, fields, one record token by token
  convert IN OUT --kind K    checked records with canonical fields, as .jsonl, .json, .parquet or .csv (.gz, .zst)
  export playground --kind K --out FILE    records of the playground"""


def main(argv: list[str]) -> int:
    """Run the data command that ``argv`` names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in COMMANDS:
        names = list(COMMANDS)
        raise UserError(f"unknown data command '{argv[0]}'{nearest(argv[0], names)} (there are: {', '.join(names)})")
    COMMANDS[argv[0]](argv[1:])
    return 0


# ------------------------------------------------------------------------------------------------------- inspect
def inspect(argv: Sequence[str]) -> None:
    """Print the report, the fields and one record; with a model, tokens are counted and the record is shown in them."""
    options = _inspect_parser().parse_args(argv)
    if options.model is None and (options.max_length is not None or options.loss_on is not None):
        raise UserError("--max_length and --loss_on are about tokens: give --model too")
    columns = dict(options.columns)
    kind, doubt = (options.kind, None) if options.kind else _detect(options.path, options.split, columns)
    loaded = _load(options, kind, columns)
    index = _index(1 if options.record is None else options.record, len(loaded.records))
    if options.model is None:
        shown = _as_json(loaded.records[index])
    else:
        index, shown = _as_tokens(loaded, index, options)
    from lightning_align.data.describe import describe

    print("\n".join([*loaded.report.lines(), *([f"  {doubt}"] if doubt else [])]))
    if loaded.report.bad:
        print(f"  bad records: {loaded.report.bad:,}; the first would stop a run without on_bad_record: skip")
    print("fields:", *describe(loaded.records), sep="\n")
    print(f"record {index + 1} ({loaded.places[index]}):")
    print(shown)


def _inspect_parser() -> OptionParser:
    parser = OptionParser("data inspect", "Say what is in a source of records, without training.")
    parser.add_argument("path", help="file, folder, saved dataset, hub id or playground")
    parser.add_argument("--kind", help="kind of records (default: what the first record's fields say)")
    _add_reading(parser, on_bad_record="skip")
    parser.add_argument("--record", type=int, help="which record to show, from 1 (the first that can be)")
    parser.add_argument("--model", help="count and show this model's tokens: run directory, local path or hub id")
    parser.add_argument("--max_length", type=int, help=f"longest sequence in tokens ({MAX_LENGTH}, as in training)")
    parser.add_argument("--loss_on", choices=("completion", "assistant", "all"), help="see SFTDataModule (completion)")
    return parser


def _detect(path: str, split: str, columns: dict[str, str]) -> tuple[str, str | None]:
    """The kind by the first record's fields, and what they look like if one of them is misspelt."""
    from lightning_align.data.misspelt import what_it_looks_like
    from lightning_align.data.readers import detect_kind, first_fields

    if path == "playground":
        raise UserError(f"{path}: give --kind, because it has every kind")
    fields = first_fields(path, split=split, columns=columns)
    found, doubt = detect_kind(fields), what_it_looks_like(fields)
    if found is None:
        likely = f": it {doubt}" if doubt else ""
        raise UserError(f"{path}: give --kind, because the fields of its first record do not tell it{likely}")
    return found, doubt


def _index(number: int, total: int) -> int:
    if not 1 <= number <= total:
        raise UserError(f"--record is {number}: there are records 1 to {total}")
    return number - 1


def _as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, indent=2, default=str)


def _as_tokens(loaded: "Loaded", index: int, options: Namespace) -> tuple[int, str]:
    """A record token by token, and its index; the report gets the counts of all of them."""
    from rich.console import Console

    from lightning_align.data.inspect import render_record
    from lightning_align.data.tables import Limit
    from lightning_align.data.templates import ConversationError
    from lightning_align.models.loading import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    loss_on: LossOn = options.loss_on or "completion"
    max_length = _max_length(loaded, tokenizer, options)
    _count_tokens(loaded, tokenizer, Limit(max_length, "truncate"), loss_on)
    refused = None
    for shown in range(len(loaded.records)) if options.record is None else [index]:
        try:
            tables = render_record(
                loaded.records[shown], loaded.report.kind, tokenizer, loss_on=loss_on, max_length=max_length
            )
        except ConversationError as error:
            refused = refused or error
            continue
        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(tables)
        return shown, capture.get().rstrip("\n")
    assert refused is not None
    every = "" if options.record is not None else ", and no other record can be used either"
    raise UserError(f"{loaded.places[index]}: {refused.reason}{every}") from refused


def _max_length(loaded: "Loaded", tokenizer: "PreTrainedTokenizerBase", options: Namespace) -> int:
    """Longest sequence in tokens: what is asked for or the model's own limit, as in training."""
    from lightning_align.models.loading import load_config, max_positions
    from lightning_align.models.sources import resolve_source

    asked: int = MAX_LENGTH if options.max_length is None else options.max_length
    if asked < 1:
        raise UserError(f"--max_length is {asked}: give at least 1")
    limit = max_positions(load_config(resolve_source(options.model), tokenizer))
    if limit is None or limit >= asked:
        return asked
    room = "; with a prompt, fit leaves room for model.max_new_tokens" if loaded.report.kind == "prompt" else ""
    loaded.report.note("longest sequence", f"{limit} tokens, as the model takes no more{room}")
    return limit


def _count_tokens(loaded: "Loaded", tokenizer: "PreTrainedTokenizerBase", limit: "Limit", loss_on: "LossOn") -> None:
    """Count tokens, what is cut and what is dropped, as the datamodules do with their defaults."""
    from lightning_align.data.tabulate import preference_table, prompt_table, sft_table, text_table

    source, kind = (tokenizer, loaded.records, loaded.places), loaded.report.kind
    if kind == "text":
        _, counts = text_table(*source, None)
    elif kind == "prompt":
        _, counts = prompt_table(*source, limit, skip_bad=True)
    elif kind in ("preference", "ranked"):
        _, counts = preference_table(*source, limit, "drop", skip_bad=True)
    else:
        _, counts = sft_table(*source, limit, loss_on, skip_bad=True)
    counts.note(loaded.report)


# ------------------------------------------------------------------------------------------------------- convert
def convert(argv: Sequence[str]) -> None:
    """Write canonical records of what another file holds."""
    parser = OptionParser("data convert", "Write checked records with canonical fields.")
    parser.add_argument("path", metavar="IN", help="file, folder, saved dataset, hub id or playground")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write; its name says the format")
    parser.add_argument("--kind", required=True, help="kind of records to write")
    _add_reading(parser, on_bad_record="error")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args(argv)
    from lightning_align.data.writers import check_target

    check_target(options.out, overwrite=options.overwrite)
    _write(_load(options, options.kind, dict(options.columns)), options)


def export(argv: Sequence[str]) -> None:
    """Write records of the playground, as anybody's file."""
    parser = OptionParser("data export", "Write records of the playground.")
    parser.add_argument("source", choices=("playground",))
    parser.add_argument("--kind", required=True, help="kind of records")
    parser.add_argument("--out", required=True, type=Path, help="file to write; its name says the format")
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument("--size", type=int, help="number of records")
    parser.add_argument("--seed", type=int, help="seed of everything (0)")
    parser.add_argument("--temperature", type=float, help="the annotator's; higher is less reliable")
    parser.add_argument("--noise", type=float, help="share of labels drawn by a coin")
    parser.add_argument("--ties", type=float, help="how readily the annotator calls a tie")
    parser.add_argument("--strength", action=argparse.BooleanOptionalAction, help="whether preferences say how strong")
    parser.add_argument("--k", type=int, help="answers in a ranking")
    parser.add_argument("--aspect", help="what is judged: gold, helpfulness or safety")
    parser.add_argument("--unsafe", type=float, help="share of unsafe prompts")
    parser.add_argument("--families", nargs="+", help="only these families of requests")
    parser.add_argument("--quality", nargs="+", type=_weight, metavar="TIER=WEIGHT", help="where answers come from")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(argv)
    from lightning_align.data.readers import load_records
    from lightning_align.data.writers import check_target

    check_target(options.out, overwrite=options.overwrite)
    given = {name: getattr(options, name) for name in PLAYGROUND_OPTIONS if getattr(options, name) is not None}
    if options.quality is not None:
        given["quality"] = dict(options.quality)
    _write(load_records("playground", options.kind, split=options.split, playground=given), options)


def _write(loaded: "Loaded", options: Namespace) -> None:
    from lightning_align.data.writers import write_records

    write_records(loaded.records, options.out, overwrite=options.overwrite)
    print("\n".join(loaded.report.lines()))
    print(f"wrote {options.out}")


# -------------------------------------------------------------------------------------------------------- shared
def _add_reading(parser: OptionParser, *, on_bad_record: str) -> None:
    parser.add_argument("--split", default="train", help="train, val or test, of a source that tells them apart")
    parser.add_argument(
        "--columns", nargs="+", default=[], type=_column, metavar="FIELD=NAME", help="such as prompt=question"
    )
    parser.add_argument(
        "--on_bad_record", choices=("error", "skip"), default=on_bad_record, help=f"default: {on_bad_record}"
    )


def _load(options: Namespace, kind: str, columns: dict[str, str]) -> "Loaded":
    from lightning_align.data.readers import load_records

    return load_records(options.path, kind, split=options.split, columns=columns, on_bad_record=options.on_bad_record)


def _column(word: str) -> tuple[str, str]:
    field, equals, column = word.partition("=")
    if not field or not equals or not column:
        raise argparse.ArgumentTypeError(f"give FIELD=NAME, such as prompt=question, not '{word}'")
    return field, column


def _weight(word: str) -> tuple[str, float]:
    tier, _, weight = word.partition("=")
    try:
        return tier, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give TIER=WEIGHT, such as good=0.5, not '{word}'") from error


COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {"inspect": inspect, "convert": convert, "export": export}
