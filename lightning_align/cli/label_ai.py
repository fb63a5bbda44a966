"""``label ai``: a judge compares answers; what it says becomes preferences with soft labels."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align.cli.label_files import beside, show, write_metrics
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_align.feedback.journal import Journal
    from lightning_align.feedback.judges import CachedJudge
    from lightning_align.feedback.label_pairs import Labelled

WARN_MASS = 0.5
WARN_BIAS = 0.9


def main(argv: list[str]) -> int:
    """Find or sample pairs, ask the judge what the journal does not know, write records and metrics."""
    from lightning_align.data.writers import check_target, write_records
    from lightning_align.feedback.journal import Journal

    options = read_options(argv)
    check_target(options.out, overwrite=options.overwrite)
    journal = Journal(options.cache or beside(options.out, "journal"))
    pairs = _read_pairs(options, journal)
    judge = _judge(options, journal)
    label, metrics = _ask(judge, pairs, options, journal)
    records = pairs.records(label)
    metrics |= {"ai/records": len(records), **_costs(judge)}
    write_metrics(metrics, beside(options.out, "metrics.json"))
    show(metrics)
    if metrics["ai/mass"] is not None and metrics["ai/mass"] < WARN_MASS:
        print(
            f"warning: the judge chooses one of the two with probability {metrics['ai/mass']:.2f} only: its wording "
            "does not suit it, and its labels say little",
            file=sys.stderr,
        )
    if (metrics.get("ai/position_bias") or 0.0) > WARN_BIAS:
        print(
            f"warning: {metrics['ai/position_bias']:.0%} of pairs change their winner with the order in which they are "
            "shown: the judge knows places, not answers, and its labels are all near one half",
            file=sys.stderr,
        )
    if not records:
        answered = judge.num_asked + judge.num_cached > judge.num_failed
        kept = f": its replies choose neither answer; ask otherwise, or remove {journal.path}, which keeps them"
        raise UserError(
            f"judge {options.judge} gave no label for any of {len(pairs.prompts):,} pairs{kept if answered else ''}"
        )
    write_records(records, options.out, overwrite=options.overwrite)
    print(f"wrote {len(records):,} records to {options.out}, what the judge said to {journal.path}")
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("label ai", "Preferences with soft labels, by a judge that compares answers.")
    parser.add_argument(
        "--judge",
        required=True,
        help="run, path, hub id, http://host:port/v1#model, package.function, file.py:function",
    )
    parser.add_argument("--wording", default="default", help="default, playground[:safety|:helpfulness] or a YAML file")
    parser.add_argument("--constitution", help="compare by its preferences: playground, default or a YAML file")
    parser.add_argument(
        "--principles", choices=("draw", "all"), default="draw", help="one a pair, or mean of all (draw)"
    )
    parser.add_argument("--orders", choices=("both", "given"), default="both", help="show pairs in both orders (both)")
    parser.add_argument("--cot", action="store_true", help="ask for reasons before the choice")
    parser.add_argument("--max_rationale_tokens", type=int, default=128, help="of the reasons (128)")
    parser.add_argument(
        "--clamp", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of each probability, such as 0.4 0.6 with --cot"
    )
    parser.add_argument("--data", required=True, help="preferences or rankings; with --model prompts; or playground")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="field names of the data")
    parser.add_argument("--model", help="samples the answers to prompts: run directory, path, hub id or endpoint")
    parser.add_argument("--num_pairs", type=int, default=1, help="pairs a prompt, with --model (1)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of a sampled answer (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampled answers (1)")
    parser.add_argument("--out", type=Path, required=True, help="records to write (.jsonl, .csv, .parquet)")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if there is one")
    parser.add_argument("--cache", type=Path, help="keeps what was said (default: beside --out)")
    parser.add_argument("--batch_size", type=int, default=128, help="questions read together, by a model here (128)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of samples, principles and who is shown first (0)")
    parser.add_argument("--parallel", type=int, default=8, help="questions under way at an endpoint (8)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for an endpoint's answer (60)")
    parser.add_argument("--retries", type=int, default=5, help="tries after the first, at an endpoint (5)")
    parser.add_argument(
        "--max_failures", type=int, default=10, help="questions in a row without an answer that stop the run (10)"
    )
    return parser


def read_options(argv: list[str]) -> Namespace:
    """The options, checked as far as that takes no model and no data."""
    options = _parser().parse_args(argv)
    rules = ("limit", 1), ("num_pairs", 1), ("max_new_tokens", 1), ("batch_size", 1), ("max_rationale_tokens", 1)
    for name, least in rules:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    if options.temperature <= 0:
        raise UserError(f"--temperature is {options.temperature}: give one above 0")
    from lightning_align.feedback.judges import check_bounds
    from lightning_align.feedback.sources import kind_of_judge, load_language_model
    from lightning_align.feedback.wording_file import read_wording

    check_bounds(_bounds(options))
    if kind_of_judge(options.judge) != "function":
        wording = read_wording(options.wording)
        principles = _principles(options)
        wording = wording if principles is None else wording.with_principles(principles)
        if options.cot:
            wording.reasons("")
    for source in (options.judge, options.model):
        if source is not None and kind_of_judge(source) == "endpoint":
            load_language_model(source, **_loading(options))
    return options


def _bounds(options: Namespace) -> tuple[float, float] | None:
    return None if options.clamp is None else (options.clamp[0], options.clamp[1])


def _principles(options: Namespace) -> tuple[str, ...] | None:
    from lightning_align.feedback.constitution_file import read_constitution

    return None if options.constitution is None else read_constitution(options.constitution).preferences


def _loading(options: Namespace) -> dict[str, Any]:
    names = ("parallel", "timeout", "retries", "max_failures")
    endpoint = {name: getattr(options, name) for name in names}
    return {"dtype": options.dtype, "batch_size": options.batch_size, "endpoint": endpoint}


def _read_pairs(options: Namespace, journal: "Journal") -> "Labelled":
    """Pairs to compare: those of the data, or sampled ones."""
    from lightning_align.cli.evaluate_data import read_columns
    from lightning_align.data.readers import load_records
    from lightning_align.feedback.label_pairs import pairs_of_preferences, sampled_pairs
    from lightning_align.feedback.sources import load_language_model
    from lightning_align.rollout.types import SamplingParams

    kind = "preference" if options.model is None else "prompt"
    loaded = load_records(options.data, kind, split=options.split, columns=read_columns(options))
    records = loaded.records[: options.limit]
    if options.model is None:
        return pairs_of_preferences(records, seed=options.seed)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, num_samples=2 * options.num_pairs
    )
    model = load_language_model(options.model, **_loading(options))
    pairs = sampled_pairs(model, records, params, journal, seed=options.seed)
    if pairs.num_equal:
        print(f"{pairs.num_equal:,} pairs of equal or empty answers are left out", file=sys.stderr)
    if not pairs.prompts:
        raise UserError(f"model {options.model} gave no two different answers to any prompt of {options.data}")
    return pairs


def _judge(options: Namespace, journal: "Journal") -> "CachedJudge":
    from lightning_align.feedback.judges import CHUNK, CachedJudge
    from lightning_align.feedback.sources import kind_of_judge, load_judge

    judge = load_judge(
        options.judge,
        options.wording,
        principles_of=_principles(options),
        loading=_loading(options),
        principles=options.principles,
        bounds=_bounds(options),
        rationale_tokens=options.max_rationale_tokens if options.cot else 0,
        seed=options.seed,
    )
    chunk = 2 * options.parallel if kind_of_judge(options.judge) == "endpoint" else CHUNK
    return CachedJudge(judge, journal, chunk=chunk)


def _ask(
    judge: "CachedJudge", pairs: "Labelled", options: Namespace, journal: "Journal"
) -> tuple["Tensor", dict[str, Any]]:
    """Labels of the pairs, and what they say of the judge."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_align.feedback.judges import preferences

    total = len(pairs.prompts) * (2 if options.orders == "both" else 1)
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("questions", total=total)
        judge.progress = lambda count: progress.advance(task, count)
        try:
            label, sums = preferences(judge, pairs.prompts, pairs.first, pairs.second, orders=options.orders)
        except UserError as error:
            kept = judge.num_cached + judge.num_asked - judge.num_failed
            raise UserError(
                f"{error}; {kept:,} of {total:,} answers are kept in {journal.path}: the same command goes on"
            ) from error
    metrics: dict[str, Any] = {
        name: float(value / count) if float(count) else None for name, (value, count) in sums.items()
    }
    return label, {"ai/pairs": len(pairs.prompts), **metrics, **_alignment(label, pairs, options)}


def _alignment(label: "Tensor", pairs: "Labelled", options: Namespace) -> dict[str, Any]:
    """Agreement with the records' own labels, and with the gold score on the playground, with intervals."""
    from lightning_align.data.sources import PLAYGROUND
    from lightning_align.feedback.label_pairs import agreement
    from lightning_align.lab.evaluation.intervals import means
    from lightning_align.rewards.build import build_reward

    columns = {}
    if options.model is None:
        columns["ai/alignment"] = agreement(label, pairs.own)
    if options.data == PLAYGROUND:
        gold = build_reward(PLAYGROUND, default_name="gold")
        sides = [
            gold.score(pairs.prompts, texts, finished=[True] * len(texts), records=[{}] * len(texts)).total
            for texts in (pairs.first, pairs.second)
        ]
        columns["ai/gold_alignment"] = agreement(label, 0.5 + 0.5 * (sides[0] - sides[1]).sign())
    return {name: estimate.as_dict() for name, estimate in means(columns).items()} if columns else {}


def _costs(judge: "CachedJudge") -> dict[str, int]:
    """Questions asked, answered before and not at all; requests and retries of an endpoint."""
    counts = {"ai/questions": judge.num_asked, "ai/from_cache": judge.num_cached, "ai/failures": judge.num_failed}
    return {**counts, **{f"ai/endpoint/{name}": count for name, count in judge.judge.counts().items()}}
