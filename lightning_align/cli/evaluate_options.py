"""What the options of ``evaluate`` mean for policies, with what their runs recorded where an option is not given."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli.evaluate_data import read_columns, read_records
from lightning_align.data.readers import detect_source_kind
from lightning_align.data.sources import PLAYGROUND
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.sampling import Prompts, Settings
from lightning_align.lab.evaluation.subjects import Subject, agreed
from lightning_align.rollout.types import SamplingParams

DEFAULT_NEW_TOKENS = 64


def read_demonstrations(options: Namespace) -> Prompts | None:
    """Records with completions, to take the held-out loss of; None if the data have none."""
    if options.data != PLAYGROUND:
        found = detect_source_kind(options.data, split=options.split, columns=read_columns(options), wanted="prompt")
        if found != "sft":
            return None
    loaded, _ = read_records(options, "sft")
    return Prompts(loaded.records, loaded.places)


def read_settings(options: Namespace, found: Sequence[Subject]) -> Settings:
    """How to sample; the longest completion is the longest that the runs allowed themselves."""
    recorded = [subject.settings.get("max_new_tokens") for subject in found]
    longest = max((tokens for tokens in recorded if isinstance(tokens, int)), default=DEFAULT_NEW_TOKENS)
    params = SamplingParams(
        max_new_tokens=longest if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        num_samples=options.num_samples,
        stop_strings=tuple(options.stop_strings),
    )
    return Settings(params, options.seed, options.engine, options.batch_size, options.dtype)


def read_scores(options: Namespace, found: Sequence[Subject]) -> dict[str, Any]:
    """What scores, by name: ``gold`` and ``proxy``, as specifications of rewards."""
    gold = read_spec(options.gold) if options.gold else PLAYGROUND if options.data == PLAYGROUND else None
    proxy = read_spec(options.reward) if options.reward else agreed(found, "reward")
    return {name: spec for name, spec in (("gold", gold), ("proxy", proxy)) if spec is not None}


def read_spec(text: str) -> str | dict[str, Any]:
    """A source as it is, or the content of a YAML file."""
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        return text
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{text} cannot be read as a reward: {' '.join(str(error).split())}") from error
    if not isinstance(content, str | dict):
        raise UserError(f"{text} is no reward: give a source, or a mapping as under model.reward")
    return content


def choose_judge(options: Namespace, specs: Mapping[str, Any]) -> str | None:
    """The name of the score that decides; None without a comparison."""
    if options.against is None:
        if options.judge is not None:
            raise UserError("--judge decides a comparison: give --against too")
        return None
    if options.judge is None:
        if not specs:
            raise UserError("--against needs a judge: give --reward or --gold")
        return next(iter(specs))
    name = {"reward": "proxy", "gold": "gold"}[options.judge]
    if name not in specs:
        raise UserError(f"--judge {options.judge} needs --{options.judge}, what scores")
    return name
