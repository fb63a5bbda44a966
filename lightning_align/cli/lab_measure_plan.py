"""What ``lab frontier`` measures of each run, and how its answers are scored."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli.evaluate_data import read_records
from lightning_align.cli.evaluate_options import read_settings, read_spec
from lightning_align.data.sources import PLAYGROUND
from lightning_align.data.splits import Splits
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.sampling import Policy, Prompts, Settings
from lightning_align.lab.evaluation.subjects import Subject, read_subject, recorded_options
from lightning_align.lab.measure import HELDOUT, Meter, Scorers
from lightning_align.lab.measured import fingerprint, prompts_hash
from lightning_align.lab.runs import find_checkpoints
from lightning_align.rewards.base import Reward
from lightning_align.rewards.build import build_reward
from lightning_align.run.directory import CONFIG_FILE, MODEL, is_run, read_status
from lightning_align.run.model_folders import find_models

DATA_OPTIONS = ("path", "val_path", "val_fraction", "columns", "on_bad_record", "playground")


@dataclass
class Shared:
    """What several runs have in common is read once.

    Attributes:
        options: Of the command line.
        rewards: Loaded, by their specification.
        prompts: By where they come from.
        starts: The last start that was loaded, by its source.
        meters: The last meter, by everything that its numbers follow from.
    """

    options: Namespace
    rewards: dict[str, Reward] = field(default_factory=dict)
    prompts: dict[str, tuple[str, Prompts]] = field(default_factory=dict)
    starts: dict[str, Policy] = field(default_factory=dict)
    meters: dict[str, Meter] = field(default_factory=dict)

    def reward(self, spec: Any, name: str) -> Reward:
        """A reward by its specification."""
        key = json.dumps([spec, name], sort_keys=True)
        if key not in self.rewards:
            self.rewards[key] = build_reward(spec, default_name=name)
        return self.rewards[key]

    def start(self, source: str, settings: Settings) -> Policy:
        """A model that runs started from."""
        if source not in self.starts:
            self.starts = {source: Policy(source, settings)}
        return self.starts[source]

    def prompts_of(self, run: Path) -> tuple[str, Prompts]:
        """Name of the source and the held-out prompts: of ``--data``, else of the run's own data."""
        options = self.options
        data = {} if options.data is not None else _data_options(run)
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in self.prompts:
            if options.data is not None:
                plain = Namespace(**vars(options) | {"columns": [], "by": [], "on_bad_record": "error"})
                loaded, _ = read_records(plain, "prompt")
                self.prompts[key] = options.data, Prompts(loaded.records, loaded.places)
            else:
                split = Splits(kind="prompt", leave_out=None, **data).read(options.split)
                if not split.records:
                    raise UserError(f"{run} holds no prompts out: give --data")
                chosen = slice(0, options.limit)
                source = data["val_path"] or data["path"]
                self.prompts[key] = source, Prompts(split.records[chosen], split.places[chosen])
        return self.prompts[key]


def _data_options(run: Path) -> dict[str, Any]:
    """Where a run's records come from, as its configuration says."""
    content = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    recorded = content["data"]["init_args"]
    return {name: recorded.get(name) for name in DATA_OPTIONS} | {"playground": recorded.get("playground") or {}}


@dataclass(frozen=True)
class Job:
    """A run that is to be measured.

    Attributes:
        run: Its directory.
        subject: What it recorded.
        start: Model that the KL is taken to and the win rate is over.
        prompts: What is answered.
        specs: What scores, by name; held-out rewards as a list.
        settings: How answers are drawn.
        recorded: Everything that the numbers follow from, for the rows.
    """

    run: Path
    subject: Subject
    start: str
    prompts: Prompts
    specs: Mapping[str, Any]
    settings: Settings
    recorded: Mapping[str, Any]

    def meter(self, shared: Shared) -> Meter:
        """Its meter, with all that is loaded for it."""
        key = fingerprint(self.recorded)
        if key not in shared.meters:
            shared.meters = {key: self._meter(shared)}
        return shared.meters[key]

    def _meter(self, shared: Shared) -> Meter:
        scores = {name: shared.reward(self.specs[name], name) for name in ("proxy", "gold") if name in self.specs}
        heldout = [shared.reward(spec, HELDOUT) for spec in self.specs.get(HELDOUT, [])]
        scorers = Scorers(scores, heldout, self.recorded["judge"])
        return Meter(shared.start(self.start, self.settings), self.prompts, self.settings, scorers)

    @property
    def targets(self) -> dict[int, Path | None]:
        """What is measured, by step: kept checkpoints, the final model where none is of its step, None for the start.

        A run without a checkpoint of its step 0 has the model that it started from there.
        """
        found: dict[int, Path | None] = dict(find_checkpoints(self.run))
        last = read_status(self.run).get("step")
        if isinstance(last, int) and (self.run / MODEL).is_dir():
            found.setdefault(last, self.run / MODEL)
        found.setdefault(0, None)
        return dict(sorted(found.items()))

    @property
    def expected(self) -> set[int]:
        """Steps whose checkpoints ``run.keep_every`` has kept by now; what online methods keep beside is not known."""
        content = yaml.safe_load((self.run / CONFIG_FILE).read_text(encoding="utf-8"))
        every, last = content.get("run", {}).get("keep_every"), read_status(self.run).get("step")
        return set(range(every, last + 1, every)) if every and isinstance(last, int) else set()


def plan(runs: Sequence[Path], shared: Shared) -> list[Job]:
    """What is to be measured of each run, and how; :class:`UserError` for what cannot be."""
    options = shared.options
    subjects = [_subject(run) for run in runs]
    stops = options.stop_strings
    if stops is None:
        recorded = {tuple(subject.settings.get("stop_strings") or ()) for subject in subjects}
        if len(recorded) > 1:
            raise UserError("the runs stopped their completions at different texts: say which with --stop_strings")
        (stops,) = recorded
    settings = read_settings(
        Namespace(**vars(options) | {"temperature": 1.0, "top_p": 1.0, "engine": "auto", "stop_strings": stops}),
        subjects,
    )
    return [_job(run, subject, settings, shared) for run, subject in zip(runs, subjects, strict=True)]


def _subject(run: Path) -> Subject:
    if not is_run(run):
        raise UserError(f"{run} is not a run directory: only runs have checkpoints to measure")
    if not (run / MODEL).is_dir():  # not finished
        return Subject(str(run), str(run), recorded_options(run), is_reward=False)
    subject = read_subject(str(run))
    if subject.is_reward:
        raise UserError(f"{run} is a reward model: give runs that train a policy")
    return subject


def _job(run: Path, subject: Subject, settings: Settings, shared: Shared) -> Job:
    options = shared.options
    start = options.reference or subject.settings.get("initial") or subject.start
    if start is None:
        raise UserError(f"{run} began with random weights: give --reference, the model that the KL is taken to")
    source, prompts = shared.prompts_of(run)
    gold = read_spec(options.gold) if options.gold else subject.settings.get("gold")
    proxy = read_spec(options.reward) if options.reward else subject.settings.get("reward")
    specs: dict[str, Any] = {"proxy": proxy, "gold": gold or (PLAYGROUND if source == PLAYGROUND else None)}
    specs = {name: spec for name, spec in specs.items() if spec is not None}
    if options.heldout:
        specs[HELDOUT] = [read_spec(text) for text in options.heldout]
    judge = options.judge or next((name for name in ("gold", "proxy", HELDOUT) if name in specs), None)
    if options.judge is not None and options.judge not in specs:
        given = {"gold": "--gold", "proxy": "--reward", HELDOUT: "--heldout"}[options.judge]
        raise UserError(f"--judge {options.judge}: nothing scores that of {run}; give {given}")
    recorded = {
        "data": source,
        "split": options.split,
        "prompts": len(prompts),
        "prompts_hash": prompts_hash(prompts.records),
        "num_samples": settings.params.num_samples,
        "seed": settings.seed,
        "max_new_tokens": settings.params.max_new_tokens,
        "stop_strings": list(settings.params.stop_strings),
        "dtype": settings.dtype,
        "start": start,
        "proxy": None,
        "gold": None,
        HELDOUT: [],
        **specs,
        "judge": judge,
        "scorers": {model["folder"]: model["files"] for model in find_models({"model": specs})},
    }
    return Job(run, subject, start, prompts, specs, settings, recorded)
