"""``evaluate``: how good policies and reward models are, with intervals; a table on the terminal and one JSON."""

import contextlib
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.run.files import write_atomically, writing

if TYPE_CHECKING:
    from lightning_align.lab.evaluation.subjects import Subject

WIDTH = 120  # of tables that go to a file
REMEDY = "change --out"
FOR_POLICIES = (
    *("against", "judge", "tie_eps", "reward", "gold", "reference", "num_samples", "max_new_tokens", "temperature"),
    *("top_p", "distinct_words", "stop_strings", "engine", "batch_size", "dtype"),
)


def main(argv: list[str]) -> int:
    """Evaluate ``--model`` on ``--data``; reward models on comparisons, policies on prompts."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(options)
    from lightning_align.lab.summary import to_json

    with subjects([*options.model, *([options.against] if options.against else [])]) as found:
        kinds = {subject.is_reward for subject in found}
        if len(kinds) > 1:
            names = [next(s.argument for s in found if s.is_reward is kind) for kind in (True, False)]
            raise UserError(f"{names[0]} is a reward model and {names[1]} a policy: evaluate them apart")
        if kinds == {True}:
            from lightning_align.cli.evaluate_rewards import evaluate_rewards

            _check_for_rewards(options, parser)
            content, tables = evaluate_rewards(found, options)
        else:
            from lightning_align.cli.evaluate_policies import evaluate_policies

            content, tables = evaluate_policies(found, options)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables:
        console.print(table)
    for note in content["notes"]:
        print(f"note: {note}")
    if options.out is not None:
        write_atomically(options.out, to_json(content), REMEDY)
        print(f"wrote {options.out}")
    return 0


@contextlib.contextmanager
def subjects(arguments: Sequence[str]) -> "Iterator[list[Subject]]":
    """The models by their arguments; checkpoints are exported to a folder that is gone afterwards."""
    from lightning_align.lab.evaluation.subjects import is_checkpoint, read_subject, run_of

    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, argument in enumerate(arguments):
            source = None
            run = run_of(argument)
            if is_checkpoint(argument) and run is not None:
                from lightning_align.cli.export import export_checkpoint

                source = str(Path(folder, str(number)))
                export_checkpoint(run, Path(argument), Path(source))
            found.append(read_subject(argument, source))
        yield found


def _parser() -> OptionParser:
    parser = OptionParser("evaluate", "Measure policies on prompts, or reward models on comparisons, with intervals.")
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="MODEL",
        help="run directory, checkpoint of a run, folder or hub id; several are measured on the same data",
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="file, folder or hub id of records, or playground")
    parser.add_argument("--split", default="val", help="of data that tell splits apart: train, val (default) or test")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="rename fields of the records")
    parser.add_argument(
        "--on_bad_record", choices=("error", "skip"), default="error", help="skip: leave out, and count"
    )
    parser.add_argument("--by", nargs="+", default=[], metavar="FIELD", help="also by each value of a record's field")
    parser.add_argument("--limit", type=int, help="use the first so many records only")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and resampling; the same seed, the same JSON")
    policies = parser.add_argument_group("policies")
    policies.add_argument("--against", metavar="MODEL", help="policy to compare every --model with")
    policies.add_argument("--judge", choices=("reward", "gold"), help="who decides (default: gold where there is one)")
    policies.add_argument("--tie_eps", type=float, default=0.0, help="scores that differ by no more are a tie")
    policies.add_argument(
        "--reward", help="what scores: a run, path, hub id, function, or YAML of a composition (default: the runs' own)"
    )
    policies.add_argument("--gold", help="true score, in the same forms (default: playground with --data playground)")
    policies.add_argument("--reference", metavar="MODEL", help="what the KL is taken to (default: each run's start)")
    policies.add_argument("--num_samples", type=int, default=4, help="completions per prompt (default: 4)")
    policies.add_argument("--max_new_tokens", type=int, help="longest completion (default: the runs' own, else 64)")
    policies.add_argument("--temperature", type=float, default=1.0, help="the KL is measured at 1 only")
    policies.add_argument("--top_p", type=float, default=1.0, help="the KL is measured at 1 only")
    policies.add_argument("--distinct_words", type=int, default=500, help="distinct n-grams are of so many words each")
    policies.add_argument("--stop_strings", nargs="*", default=[], help="texts that end a completion")
    policies.add_argument("--engine", choices=("auto", "static", "generate"), default="auto")
    policies.add_argument("--batch_size", type=int, default=128, help="most completions at a time")
    policies.add_argument("--dtype", default="float32")
    return parser


def _check(options: Namespace) -> None:
    """Raise :class:`UserError` for what can be known before anything is loaded."""
    rules = (
        ("limit", options.limit is None or options.limit > 0, "1 or more"),
        ("seed", 0 <= options.seed < 2**23, f"a whole number from 0 to {2**23 - 1}"),
        ("tie_eps", options.tie_eps >= 0, "0 or more"),
        ("distinct_words", options.distinct_words > 1, "2 or more"),
        ("batch_size", options.batch_size > 0, "1 or more"),
    )
    for name, holds, wanted in rules:
        if not holds:
            raise UserError(f"--{name} is {getattr(options, name)}: give {wanted}")
    if len(set(options.model)) < len(options.model):
        raise UserError(f"--model names {max(options.model, key=options.model.count)} twice: give it once")
    if options.out is not None:
        if options.out.is_dir():
            raise UserError(f"{options.out} is a folder: name a file (--out)")
        if options.out.exists() and not options.overwrite:
            raise UserError(f"{options.out} exists: give another --out, or --overwrite")
        with writing(options.out, REMEDY):
            options.out.parent.mkdir(parents=True, exist_ok=True)


def _check_for_rewards(options: Namespace, parser: OptionParser) -> None:
    """Raise :class:`UserError` for options that reward models have no use for."""
    for name in FOR_POLICIES:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name} is for policies, but {options.model[0]} is a reward model: leave it out")
