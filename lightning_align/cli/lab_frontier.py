"""``lab frontier``: several runs and methods over KL and over samples."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import pair, write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

SAMPLES, BEST_OF_SAMPLES = 4, 2  # completions of a prompt by default; fewest that best-of-n chooses from
# without --recompute or --best-of nothing is measured, so that these would say nothing
MEASURING = (
    *("data", "split", "limit", "num_samples", "seed", "max_new_tokens", "stop_strings", "batch_size", "dtype"),
    *("reward", "gold", "reference", "overwrite"),
)
RECOMPUTING = ("heldout", "judge")


def main(argv: Sequence[str]) -> int:
    """Write ``frontier.html``, ``.png``, ``.json``, ``.csv``; runs of folders of one name are seeds of one method."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(options, parser)

    from lightning_align.lab.figures import png
    from lightning_align.lab.frontier import common_kl, load_tracks, summarise
    from lightning_align.lab.frontier_figures import draw_frontier
    from lightning_align.lab.frontier_page import render
    from lightning_align.lab.frontier_words import headline, lines, to_csv
    from lightning_align.lab.summary import to_json

    options.run, left_out = _runs(options)
    best_of = _measure(options)
    columns = dict(pair(word) for word in options.columns)
    tracks = load_tracks(options.run, columns=columns, source=options.source, best_of=best_of)
    summary = summarise(tracks, common_kl(tracks) if options.kl is None else options.kl, options.samples)
    outputs = {
        options.out / "frontier.png": png(draw_frontier(tracks, summary)),
        options.out / "frontier.html": render(tracks, summary).encode(errors="replace"),
        options.out / "frontier.json": to_json(summary).encode(),
        options.out / "frontier.csv": to_csv(tracks).encode(),
    }
    write_all(outputs)
    told = [*lines(summary), *(f"  left out: {reason}" for reason in left_out)]
    print("\n".join([headline(summary), *told, f"wrote {', '.join(map(str, [*outputs, *best_of]))}"]))
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("lab frontier", "Draw the true score of several runs over KL and over samples, and compare.")
    parser.add_argument(
        "run", nargs="+", type=Path, metavar="RUN", help="run, CSV with step, kl, proxy, gold, or folder of a pipeline"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (default: the current one)")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="FIELD=NAME", help="columns of CSVs, such as gold=judge"
    )
    parser.add_argument(
        "--source", choices=("auto", "measured", "eval", "train"), default="auto",
        help="of runs: measured by --recompute, evaluations or iterations of training (default: the first there is)",
    )  # fmt: skip
    parser.add_argument("--kl", type=float, help="KL to compare at, in nats (default: the largest that all reach)")
    parser.add_argument("--samples", type=float, help="also compare after so many answers of the policy")
    parser.add_argument(
        "--recompute", action="store_true", help="measure every kept checkpoint that is not measured yet"
    )
    parser.add_argument("--best-of", type=int, metavar="N", help="also best-of-n of what the runs started from, n to N")
    measuring = parser.add_argument_group("measuring", "with --recompute and --best-of")
    measuring.add_argument("--overwrite", action="store_true", help="measure everything again")
    measuring.add_argument("--data", help="prompts: file, folder, hub id or playground (default: each run's held-out)")
    measuring.add_argument(
        "--split", default="val", help="of data that tell splits apart: train, val (default) or test"
    )
    measuring.add_argument("--limit", type=int, help="use the first so many prompts only")
    measuring.add_argument(
        "--num_samples", type=int, default=SAMPLES, help=f"completions per prompt (default: {SAMPLES})"
    )
    measuring.add_argument("--seed", type=int, default=0, help="of sampling and resampling")
    measuring.add_argument("--reward", help="proxy: run, path, hub id, function or YAML (default: each run's own)")
    measuring.add_argument(
        "--gold", help="true score, in the same forms (default: the runs' own, else the playground's)"
    )
    measuring.add_argument(
        "--heldout", action="extend", nargs="+", default=[], metavar="REWARD",
        help="a reward that nobody trained on; several are an ensemble",
    )  # fmt: skip
    measuring.add_argument(
        "--judge", choices=("gold", "proxy", "heldout"), help="decides who wins (default: the first of them there is)"
    )
    measuring.add_argument("--reference", metavar="MODEL", help="what the KL is taken to (default: each run's start)")
    measuring.add_argument("--max_new_tokens", type=int, help="longest completion (default: the runs' longest)")
    measuring.add_argument("--stop_strings", nargs="*", help="texts that end a completion (default: the runs' own)")
    measuring.add_argument("--batch_size", type=int, default=128, help="most completions at a time")
    measuring.add_argument("--dtype", default="float32")
    return parser


def _check(options: Namespace, parser: OptionParser) -> None:
    """Raise :class:`UserError` for what can be known before anything is loaded."""
    rules = (
        ("kl", options.kl is None or options.kl > 0, "a number above 0"),
        ("samples", options.samples is None or options.samples > 0, "a number above 0"),
        ("limit", options.limit is None or options.limit > 0, "1 or more"),
        ("num_samples", options.num_samples > 0, "1 or more"),
        ("seed", 0 <= options.seed < 2**23, f"a whole number from 0 to {2**23 - 1}"),
        ("max_new_tokens", options.max_new_tokens is None or options.max_new_tokens > 0, "1 or more"),
        ("batch_size", options.batch_size > 0, "1 or more"),
        ("best-of", options.best_of is None or options.best_of >= BEST_OF_SAMPLES, f"{BEST_OF_SAMPLES} or more"),
    )
    for name, holds, wanted in rules:
        if not holds:
            value = getattr(options, name.replace("-", "_"))
            raise UserError(f"--{name} is {value:g}: give {wanted}")
    if options.recompute and options.source not in ("auto", "measured"):
        raise UserError(
            f"--recompute measures anew and --source {options.source} reads what was logged: give one of them"
        )
    without = {"recompute": (*MEASURING, *RECOMPUTING)} if options.best_of is None else {"recompute": RECOMPUTING}
    for name in () if options.recompute else without["recompute"]:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name} is for measuring: add --recompute, or leave it out")


def _runs(options: Namespace) -> tuple[list[Path], list[str]]:
    """The runs that were given, of a pipeline's folder those with a curve; and why others of a folder have none.

    Raises:
        UserError: None is left.
    """
    from lightning_align.lab.grid import expand
    from lightning_align.lab.runs import find_checkpoints, load_curve

    left_out: list[str] = []

    def wanted(run: Path) -> bool:
        if not find_checkpoints(run):
            return False
        if options.source == "auto" or options.recompute:
            return True
        try:
            load_curve(run, source=options.source)
        except UserError as error:
            left_out.append(str(error))
            return False
        return True

    runs = expand(options.run, wanted)
    if not runs and left_out:
        raise UserError(left_out[0])
    if not runs:
        raise UserError(f"no run in {', '.join(map(str, options.run))} kept checkpoints for the lab (run.keep_every)")
    return runs, left_out


def _measure(options: Namespace) -> list[Path]:
    """Do what is to be measured; returns the tables of best-of-n."""
    if not options.recompute and options.best_of is None:
        return []
    from lightning_align.cli.lab_measure import measure

    return measure(options)
