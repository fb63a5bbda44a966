"""``label revise``: a model criticises and revises its answers; what it arrives at becomes demonstrations."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_align.cli.evaluate_data import read_columns
from lightning_align.cli.label_files import beside, show, write_metrics
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError


def main(argv: list[str]) -> int:
    """Make chains, or go on with those in the journal; write records, chains and metrics."""
    from lightning_align.data.writers import check_target, write_records
    from lightning_align.feedback.revise import demonstrations, tally

    options = read_options(argv)
    check_target(options.out, overwrite=options.overwrite)
    work = Work.read(options)
    chains, work = _without_failures(make_chains(work, options), work)
    metrics = {**tally_metrics(tally(chains)), **gold_metrics(work, chains, options)}
    learnt = []
    for chain in chains:
        if chain.steps or options.helpful == "keep":
            found = demonstrations(chain, work.constitution, keep=options.keep, on_bad=options.on_bad)
            learnt += [_record(demonstration) for demonstration in found]
            if not found:
                metrics["cai/nothing_learnt"] += 1
    metrics["cai/records"] = len(learnt)
    rows = [{"prompt": chain.prompt, **chain.as_row()} for chain in chains]
    write_records(rows, beside(options.out, "chains.jsonl"), overwrite=True)
    write_metrics(metrics, beside(options.out, "metrics.json"))
    check_something(metrics, options, learnt)
    write_records(learnt, options.out, overwrite=options.overwrite)
    show(metrics)
    print(f"wrote {len(learnt):,} records to {options.out}, their chains to {beside(options.out, 'chains.jsonl')}")
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("label revise", "Answers that a model has revised under a constitution, as demonstrations.")
    parser.add_argument(
        "--model", required=True, help="answers: run directory, local path, hub id or http://host:port/v1#model"
    )
    parser.add_argument("--critic", help="criticises and revises (default: --model)")
    parser.add_argument("--constitution", required=True, help="playground, default, or a YAML file")
    parser.add_argument("--data", required=True, help="prompts: a file, folder, hub id or playground")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="field names of the data")
    parser.add_argument("--out", type=Path, required=True, help="demonstrations (.jsonl, .csv, .parquet)")
    parser.add_argument("--overwrite", action="store_true", help="replace the --out file if there is one")
    parser.add_argument("--revisions", type=int, default=4, help="steps of a chain (4)")
    parser.add_argument("--no_critique", action="store_true", help="revise at once, without a critique")
    parser.add_argument("--keep", choices=("all", "last"), default="all", help="which revisions become records (all)")
    parser.add_argument(
        "--on_bad",
        choices=("keep_previous", "drop"),
        default="keep_previous",
        help="where a revision is none: the text before it counts once more, or the step is left out",
    )
    parser.add_argument(
        "--helpful",
        choices=("keep", "revise", "leave_out"),
        default="keep",
        help="prompts with is_safety false: answered without revision, revised like the others, or left out",
    )
    parser.add_argument("--gold", help="measures every revision: a reward as in evaluate (default: the playground's)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of an answer or a revision (64)")
    parser.add_argument("--max_critique_tokens", type=int, default=64, help="of a critique (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of answers (1)")
    parser.add_argument("--revision_temperature", type=float, help="of critiques and revisions (default: as answers)")
    parser.add_argument("--batch_size", type=int, default=128, help="chains that are made together (128)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of samples and of the draw of principles (0)")
    return parser


def read_options(argv: list[str]) -> Namespace:
    """The options, checked as far as that takes no model and no data."""
    from lightning_align.feedback.constitution_file import read_constitution

    options = _parser().parse_args(argv)
    for name, least in (("revisions", 1), ("batch_size", 1), ("limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    read_constitution(options.constitution)
    return options


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Args:
        constitution: Principles.
        records: Of the prompts.
        revised: Whether each is revised.
        keys: What each chain's random numbers come from.
    """

    constitution: Any
    records: list[dict[str, Any]]
    revised: list[bool]
    keys: list[str]

    @classmethod
    def read(cls, options: Namespace) -> "Work":
        """The prompts, with what becomes of each."""
        from lightning_align.data.readers import load_records
        from lightning_align.feedback.constitution_file import read_constitution
        from lightning_align.feedback.journal import key_of

        constitution = read_constitution(options.constitution)
        loaded = load_records(options.data, "prompt", split=options.split, columns=read_columns(options))
        records = loaded.records[: options.limit]
        if options.helpful == "leave_out":
            kept = [record for record in records if not is_helpful(record)]
            print(f"{len(records) - len(kept):,} of {len(records):,} prompts are left out: is_safety is false")
            records = kept
        if not records:
            raise UserError(f"{options.data}: no prompt is left, as is_safety is false in all; give another --helpful")
        copies: dict[str, int] = {}
        keys = []
        for record in records:
            prompt = key_of(record["prompt"])
            copies[prompt] = copies.get(prompt, -1) + 1
            keys.append(key_of(options.seed, record["prompt"], copies[prompt]))
        revised = [options.helpful == "revise" or not is_helpful(record) for record in records]
        return cls(constitution, records, revised, keys)


def is_helpful(record: Mapping[str, Any]) -> bool:
    """Whether a prompt is one that asks for nothing unsafe, as far as it says so."""
    return record.get("is_safety") is False


def _without_failures(chains: Sequence[Any], work: Work) -> tuple[list[Any], Work]:
    """The chains that were made, and their part of the work."""
    there = [row for row, chain in enumerate(chains) if chain is not None]
    if len(there) < len(chains):
        print(
            f"{len(chains) - len(there):,} of {len(chains):,} chains lack a reply of a model and are left out: "
            "the same command with --overwrite asks for them again",
            file=sys.stderr,
        )
    if not there:
        raise UserError("no chain was made: the models gave no replies")
    kept = Work(
        work.constitution,
        [work.records[row] for row in there],
        [work.revised[row] for row in there],
        [work.keys[row] for row in there],
    )
    return [chains[row] for row in there], kept


def make_chains(work: Work, options: Namespace) -> list[Any]:
    """All chains, None for one that failed; those that the journal holds are not made again."""
    from lightning_align.feedback.journal import Journal, key_of
    from lightning_align.feedback.revise import Chain, Reviser
    from lightning_align.feedback.sources import load_language_model
    from lightning_align.rollout.types import SamplingParams

    temperature = options.temperature if options.revision_temperature is None else options.revision_temperature
    how = {"max_new_tokens": options.max_new_tokens}
    sampling = {
        "answer": SamplingParams(temperature=options.temperature, **how),
        "revision": SamplingParams(temperature=temperature, **how),
        "critique": SamplingParams(temperature=temperature, max_new_tokens=options.max_critique_tokens),
    }
    same = options.critic in (None, options.model)
    settings = {
        "model": identity(options.model),
        "critic": identity(options.model if same else options.critic),
        "constitution": work.constitution.key(),
        **{name: asdict(params) for name, params in sampling.items()},
        **{"revisions": options.revisions, "critique": not options.no_critique, "dtype": options.dtype},
    }
    keys = [key_of(settings, key, revised) for key, revised in zip(work.keys, work.revised, strict=True)]
    journal = Journal(beside(options.out, "journal"))
    there = sum(key in journal for key in keys)
    if there:
        print(f"{there:,} of {len(keys):,} chains are in {journal.path}", file=sys.stderr)
    if there < len(keys):
        load = {"dtype": options.dtype, "batch_size": options.batch_size}
        model = load_language_model(options.model, **load)
        reviser = Reviser(
            model,
            model if same else load_language_model(options.critic, **load),
            work.constitution,
            **sampling,
            revisions=options.revisions,
            critiques=not options.no_critique,
        )
    # batches have fixed bounds, so that a chain has the same neighbours after an interruption
    for start in range(0, len(keys), options.batch_size):
        rows = [row for row in range(len(keys))[start : start + options.batch_size] if keys[row] not in journal]
        if not rows:
            continue
        prompts = [work.records[row]["prompt"] for row in rows]
        made = reviser.chains(prompts, [work.keys[row] for row in rows], [work.revised[row] for row in rows])
        journal.add({keys[row]: chain.as_row() for row, chain in zip(rows, made, strict=True) if not chain.failed})
        print(f"chains {rows[-1] + 1:,}/{len(keys):,}", file=sys.stderr, flush=True)
    return [
        Chain.from_row(record["prompt"], journal[key]) if key in journal else None
        for record, key in zip(work.records, keys, strict=True)
    ]


def identity(source: str) -> Any:
    """What tells a model from others: hashes of its files; the name of one that lies on the hub."""
    from lightning_align.run.model_folders import find_models

    return [model["files"] for model in find_models({"model": {"model": source}})] or source


def _record(demonstration: Any) -> dict[str, Any]:
    prompt, completion = demonstration.prompt, demonstration.completion
    if not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    return {
        **{"prompt": prompt, "completion": completion},
        **{"revision": demonstration.revision, "principles": list(demonstration.principles)},
    }


# ------------------------------------------------------------------------------------------------------------- measures
def tally_metrics(counts: Mapping[str, int]) -> dict[str, Any]:
    """Counts of all chains, and the share of revisions that changed something."""
    from lightning_align.feedback.revise import FAULTS

    metrics: dict[str, Any] = {
        **{"cai/critiques": counts["critiques"], "cai/revisions": counts["revisions"]},
        "cai/bad_revisions": sum(counts[fault] for fault in FAULTS),
        **{f"cai/bad_revisions/{fault}": counts[fault] for fault in FAULTS},
        "cai/nothing_learnt": 0,
    }
    if counts["revisions"]:
        metrics["cai/revision_changed"] = counts["changed"] / counts["revisions"]
    return metrics


def gold_metrics(work: Work, chains: Sequence[Any], options: Namespace) -> dict[str, Any]:
    """Gold score and harmlessness by revision, and what the last one gains, as means over prompts with intervals."""
    from lightning_align.cli.evaluate_options import read_spec
    from lightning_align.data.sources import PLAYGROUND
    from lightning_align.lab.evaluation.intervals import means
    from lightning_align.rewards.build import build_reward
    from lightning_align.rewards.revisions import score_revisions

    spec = read_spec(options.gold) if options.gold else PLAYGROUND if options.data == PLAYGROUND else None
    rows = [row for row, chain in enumerate(chains) if chain.steps]
    if spec is None or not rows:
        return {}
    gold = build_reward(spec, default_name="gold")
    scores = score_revisions(gold, [chains[row] for row in rows], [work.records[row] for row in rows])
    columns: dict[str, Any] = {}
    for name, table in zip(("gold", "harmlessness"), scores, strict=True):
        values = table.double().numpy()
        columns |= {f"cai/{name}_by_revision/{n}": values[:, n] for n in range(values.shape[1])}
        columns[f"cai/{name}_gain"] = values[:, -1] - values[:, 0]
    return {name: estimate.as_dict() for name, estimate in means(columns).items()}


def check_something(metrics: Mapping[str, Any], options: Namespace, learnt: Sequence[Any]) -> None:
    """Raise where no revision changed anything, or nothing is left to learn."""
    chains = beside(options.out, "chains.jsonl")
    if metrics.get("cai/revision_changed") == 0:
        raise UserError(
            f"none of {metrics['cai/revisions']:,} revisions differs from the text that it revises (look at {chains}): "
            "the critic does not revise; give another --critic, or a --constitution whose questions it understands"
        )
    if not learnt:
        raise UserError(
            f"nothing is left to learn of {metrics['cai/nothing_learnt']:,} chains (look at {chains}): answers and "
            "revisions are empty, cut off at --max_new_tokens, or repeat the questions"
        )
