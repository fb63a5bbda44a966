"""``label human``: a page on this machine, on which people rank answers."""

import getpass
import ipaddress
import os
import sys
import webbrowser
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.label_files import beside
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.feedback.human.tasks import MOST_ANSWERS, OVERALL, Plan

if TYPE_CHECKING:
    from lightning_align.feedback.human.candidates import Candidates

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str]) -> int:
    """Find or sample what is to be ranked, show the links, answer until interrupted."""
    from lightning_align.feedback.human.access import annotators_of, tokens_of
    from lightning_align.feedback.human.candidates import add_candidates, said_of
    from lightning_align.feedback.human.server import build_app, listen, serve
    from lightning_align.feedback.human.store import Store

    options = read_options(argv)
    guidelines = _guidelines(options.guidelines)
    plan = None if options.prompts is None and options.responses is None else _plan(options)
    if plan is None or options.store.exists():
        Store(options.store, plan).close()  # refused before the long work, and not made before that has gone well
    found = None if plan is None else _candidates(options)
    tokens_file = beside(options.store, "tokens.json")
    tokens = tokens_of(tokens_file, options.annotators or annotators_of(tokens_file) or [_own_name()])
    with listen(options.host, options.port) as where:
        store = Store(options.store, plan)
        if found is not None:
            for line in said_of(add_candidates(store, found, most=options.num_answers, seed=options.seed)):
                print(line)
        num_items = len(store.items())
        if not num_items:
            raise UserError(f"{options.store} holds nothing to rank: give --responses, or --prompts with --model")
        names = _names(options)
        port = where.getsockname()[1]
        links = {name: f"http://{_address(names[0])}:{port}/#token={token}" for name, token in tokens.items()}
        print(f"{num_items:,} prompts in {options.store}; a link for each annotator, who keep them to themselves:")
        for name, link in links.items():
            print(f"  {name:<16}{link}")
        if options.host not in LOOPBACK:
            print("  others can reach this server: what is sent is not encrypted, so use a network that you trust")
        print("Ctrl-C stops the server; every judgement is kept, and the same command goes on", flush=True)
        if not options.no_browser:
            _open(next(iter(links.values())))
        with suppress(KeyboardInterrupt):  # how the page is meant to end
            serve(build_app(store, tokens, names, guidelines), where)
    judgements = store.judgements()
    store.close()
    people = len({judgement.annotator for judgement in judgements})
    print(f"\n{len(judgements):,} judgements by {people:,} annotators in {options.store}; make records of them with")
    print(f"  python -m lightning_align label export {options.store} --out preferences.jsonl")
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("label human", "A page on which people rank answers; what they say trains a reward model.")
    what = parser.add_argument_group("what is ranked", "without these, what the store holds")
    what.add_argument("--prompts", help="prompts whose answers --model gives: file, folder, hub id or playground")
    what.add_argument("--model", help="samples the answers: run directory, path, hub id or http://host:port/v1#model")
    what.add_argument("--responses", help="prompts with answers: file, folder or hub id")
    what.add_argument("--split", choices=("train", "val", "test"), default="train")
    what.add_argument("--limit", type=int, help="only the first so many prompts")
    what.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="field names of the data")
    what.add_argument(
        "--num_answers", type=int, help=f"answers to a prompt, 2 to {MOST_ANSWERS} (4; of --responses all there are)"
    )
    what.add_argument("--max_new_tokens", type=int, default=256, help="of a sampled answer (256)")
    what.add_argument("--temperature", type=float, default=1.0, help="of sampled answers (1)")
    what.add_argument("--batch_size", type=int, default=128, help="answers sampled together (128)")
    what.add_argument("--dtype", default="auto")
    how = parser.add_argument_group("how", "fixed when the store is made")
    how.add_argument("--aspects", nargs="+", default=[OVERALL], help="judged apart: helpfulness safety")
    how.add_argument("--overlap", type=float, default=0.2, help="share of prompts that several people judge (0.2)")
    how.add_argument("--annotators_per_prompt", type=int, default=2, help="how many people judge those (2)")
    how.add_argument("--seed", type=int, default=0, help="of samples, and of who is shown what in which order (0)")
    page = parser.add_argument_group("page")
    page.add_argument("--store", type=Path, default=Path("labels.sqlite"), help="keeps everything (labels.sqlite)")
    page.add_argument(
        "--annotators",
        nargs="+",
        metavar="NAME",
        help="who judges; each gets a link (default: those who have one, else you)",
    )
    page.add_argument("--guidelines", type=Path, help="Markdown shown beside the answers (default: a short text)")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    page.add_argument("--port", type=int, default=8642, help="0 takes a free one (8642)")
    page.add_argument("--allow_host", nargs="*", default=[], metavar="NAME", help="further names of this machine")
    page.add_argument("--no_browser", action="store_true", help="do not open the first link")
    return parser


def read_options(argv: list[str]) -> Namespace:
    """The options, checked as far as that takes no model and no data."""
    options = _parser().parse_args(argv)
    if (options.prompts is None) != (options.model is None):
        raise UserError(
            "--prompts and --model go together: the model answers the prompts; answers of a file: --responses"
        )
    if options.prompts is not None and options.responses is not None:
        raise UserError("--responses and --prompts exclude each other")
    for name, least in (("limit", 1), ("max_new_tokens", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    if options.num_answers is not None and not 2 <= options.num_answers <= MOST_ANSWERS:
        raise UserError(f"--num_answers is {options.num_answers}: give 2 to {MOST_ANSWERS}")
    if options.temperature <= 0:
        raise UserError(f"--temperature is {options.temperature}: give one above 0")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port is {options.port}: give one below {2**16}, or 0 for a free one")
    _plan(options)
    return options


def _plan(options: Namespace) -> Plan:
    return Plan(tuple(options.aspects), options.overlap, options.annotators_per_prompt, options.seed)


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return "me"


def _guidelines(path: Path | None) -> str:
    from importlib.resources import files

    if path is None:
        return files("lightning_align.feedback.human").joinpath("page/guidelines.md").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path} (--guidelines): {reason}") from error


def _candidates(options: Namespace) -> "list[Candidates]":
    """What the options name."""
    from lightning_align.cli.evaluate_data import read_columns
    from lightning_align.feedback.human.candidates import read_responses

    if options.responses is None:
        return _sampled(options)
    return read_responses(options.responses, split=options.split, columns=read_columns(options))[: options.limit]


def _sampled(options: Namespace) -> "list[Candidates]":
    """Answers of the model; those that were sampled before are in a journal beside the store."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_align.cli.evaluate_data import read_columns
    from lightning_align.data.readers import load_records
    from lightning_align.feedback.human.candidates import Candidates
    from lightning_align.feedback.journal import Journal
    from lightning_align.feedback.label_pairs import answer_to, sampled_texts
    from lightning_align.feedback.sources import load_language_model
    from lightning_align.rollout.types import SamplingParams

    loaded = load_records(options.prompts, "prompt", split=options.split, columns=read_columns(options))
    records = loaded.records[: options.limit]
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, num_samples=options.num_answers or 4
    )
    model = load_language_model(options.model, dtype=options.dtype, batch_size=options.batch_size)
    journal = Journal(beside(options.store, "journal"))
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prompts", total=len(records))
        texts = sampled_texts(
            model, records, params, journal, seed=options.seed, progress=lambda count: progress.advance(task, count)
        )
        progress.update(task, completed=len(records))
    return [
        Candidates(record["prompt"], [answer_to(record["prompt"], text) for text in own], place)
        for record, own, place in zip(records, texts, loaded.places[: options.limit], strict=True)
    ]


def _names(options: Namespace) -> list[str]:
    """Names and addresses under which the server may be asked, the one for the links first."""
    if options.host in LOOPBACK:
        return [options.host, *LOOPBACK, *options.allow_host]
    found = [options.host]
    with suppress(ValueError):
        if ipaddress.ip_address(options.host).is_unspecified:
            found = list(_own_addresses())
    return [*options.allow_host, *found, *LOOPBACK]


def _own_addresses() -> Sequence[str]:
    """Of this machine in its networks, and its name."""
    import socket

    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    addresses = [
        a.address.split("%")[0] for group in psutil.net_if_addrs().values() for a in group if a.family in kinds
    ]
    outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return [*sorted(outside, key=lambda address: ":" in address), socket.gethostname()]


def _address(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _open(link: str) -> None:
    """Show the page, where there is a screen to show it on."""
    has_screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_screen and sys.stdout.isatty():
        webbrowser.open(link)
