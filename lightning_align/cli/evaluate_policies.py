"""The part of ``evaluate`` that samples: the same prompts to every policy, a row for each."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from lightning_align.cli.evaluate_data import read_records
from lightning_align.cli.evaluate_options import choose_judge, read_demonstrations, read_scores, read_settings
from lightning_align.cli.evaluate_tables import policy_tables
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.heldout import heldout_metrics
from lightning_align.lab.evaluation.policies import best_of, compare, control_length, sample_metrics
from lightning_align.lab.evaluation.rewards import subsets
from lightning_align.lab.evaluation.sampling import Policy, Prompts, Samples, Settings, gathered, score_columns
from lightning_align.lab.evaluation.subjects import Subject, place_of
from lightning_align.rewards.base import Reward
from lightning_align.rewards.build import build_reward

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What is measured of every policy.

    Attributes:
        prompts: What it answers.
        by: Positions of the prompts of each subset.
        demonstrations: What its loss is taken of, if there are completions.
        settings: How it answers.
        scores: What scores, by name.
        distinct_words: Size of the sets that distinct n-grams are counted in.
    """

    prompts: Prompts
    by: Mapping[str, Mapping[str, Any]]
    demonstrations: Prompts | None
    settings: Settings
    scores: Mapping[str, Reward]
    distinct_words: int


def evaluate_policies(found: Sequence[Subject], options: Namespace) -> tuple[dict[str, Any], list[Table]]:
    """Content of the JSON and tables for the terminal.

    Args:
        found: The policies; with ``--against`` the last is what the others are compared with.
        options: Of the command line.
    """
    loaded, fields = read_records(options, "prompt")
    settings, specs = read_settings(options, found), read_scores(options, found)
    judge = choose_judge(options, specs)
    plan = Plan(
        Prompts(loaded.records, loaded.places),
        subsets(fields, options.by),
        read_demonstrations(options),
        settings,
        {name: build_reward(spec, default_name=name) for name, spec in specs.items()},
        options.distinct_words,
    )
    notes = [] if specs else ["nothing scores: give --reward, --gold or both"]
    notes += [f"{number:,} records left out: {reason}" for reason, number in loaded.report.dropped.items()]
    rows = measure_all(found, plan, options, judge)
    notes += [f"{row['model']}: {note}" for row in rows for note in row["notes"]]
    references = {place_of(row["reference"]): row["reference"] for row in rows if row["reference"] is not None}
    if len(references) > 1:
        names = ", ".join(sorted(references.values()))
        notes.append(f"each KL is to its own reference ({names}): --reference makes them one")
    content = {
        "format": FORMAT,
        "kind": "policies",
        "data": {
            "source": options.data,
            "split": options.split,
            "prompts": len(plan.prompts),
            "skipped": loaded.report.dropped,
        },
        "settings": {
            **asdict(settings),
            "tie_eps": options.tie_eps,
            "distinct_words": options.distinct_words,
            "by": options.by,
        },
        "scores": specs,
        "judge": judge,
        "policies": rows,
        "notes": notes,
    }
    return content, policy_tables(rows)


def measure_all(found: Sequence[Subject], plan: Plan, options: Namespace, judge: str | None) -> list[dict[str, Any]]:
    """A row for each policy, one loaded at a time; with ``--against`` each is compared with the last."""
    others = found[:-1] if options.against else found
    rows, drawn = [], []
    for index, subject in enumerate(found):
        is_last = index == len(others)
        reference = options.reference or (_common_start(others) if is_last else None)
        row, samples = measure(subject, plan, reference, stream=int(is_last))
        rows.append(row)
        drawn.append(samples)
    if judge is not None:
        how: dict[str, Any] = {"judge": judge, "tie_eps": options.tie_eps, "seed": options.seed}
        controlled = control_length(drawn[:-1], drawn[-1], **how)
        for row, samples, rate in zip(rows[:-1], drawn[:-1], controlled, strict=True):
            row["against"] = {"model": options.against, **compare(samples, drawn[-1], **how)}
            row["against"]["length_controlled_win_rate"] = rate.as_dict()
    return rows


def measure(subject: Subject, plan: Plan, reference: str | None, *, stream: int = 0) -> tuple[dict[str, Any], Samples]:
    """A policy's row, and its samples for comparisons.

    Args:
        subject: The policy.
        plan: What to measure.
        reference: What its KL is taken to; None for what it started from, if that is known and there.
        stream: See :meth:`Policy.draw`.
    """
    settings = plan.settings
    policy = Policy(subject.source, settings)
    reference, network, notes = _reference(policy, subject, reference)
    rollout = policy.draw(plan.prompts, stream=stream)
    columns = policy.token_columns(rollout, network)
    for name, reward in plan.scores.items():
        reward.to(policy.device)
        columns |= score_columns(name, reward, rollout)
    samples = gathered(rollout, columns, settings.params.num_samples)
    options = {"distinct_words": plan.distinct_words, "seed": settings.seed}
    metrics = sample_metrics(samples, **options)
    if "distinct_1" not in metrics:
        notes.append(f"no distinct_n: its answers have fewer than --distinct_words {plan.distinct_words} words")
    if plan.demonstrations is not None:
        heldout, too_long = heldout_metrics(policy, plan.demonstrations, seed=settings.seed)
        metrics |= heldout
        if too_long:
            notes.append(f"{too_long:,} completions with their prompts are longer than its context: left out")
    row = {
        "model": subject.argument,
        "reference": reference,
        "metrics": {name: estimate.as_dict() for name, estimate in metrics.items()},
        "by": {
            field: {
                value: {name: e.as_dict() for name, e in sample_metrics(samples.select(rows), **options).items()}
                for value, rows in values.items()
            }
            for field, values in plan.by.items()
        },
        "best_of": best_of(samples, seed=settings.seed),
        "notes": notes,
    }
    return row, samples


def _reference(
    policy: Policy, subject: Subject, wanted: str | None
) -> tuple[str | None, PreTrainedModel | None, list[str]]:
    """Name and network of what the KL is taken to, or neither and a note that says why."""
    if not policy.settings.measures_kl:
        return None, None, ["no KL: it is measured at temperature 1 without top_p"]
    if wanted is not None:
        return wanted, policy.load_reference(wanted), []
    if subject.start is None:
        return None, None, ["no KL: no run says what it started from; give --reference"]
    try:
        return subject.start, policy.load_reference(subject.start), []
    except UserError as error:
        return None, None, [f"no KL to what it started from: {error}; give --reference"]


def _common_start(found: Sequence[Subject]) -> str | None:
    """What all of them started from; None if that is not one model."""
    starts = [subject.start for subject in found]
    places = {None if start is None else place_of(start) for start in starts}
    return starts[0] if len(places) == 1 else None
