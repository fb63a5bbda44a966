"""A pipeline file: its stages, with references to earlier ones resolved; read and checked whole before any runs."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.errors import UserError, nearest
from lightning_align.run.directory import is_run
from lightning_align.run.files import write_atomically

STATE_FILE = "pipeline.json"
RECORDS_FILE = "records.jsonl"  # in the folder of a label stage
KINDS = ("config", "lab", "label")  # keys that say what a stage is
REFERENCE = re.compile(r"\$\{([\w-]+)\.(\w+)\}")
PIPELINE_KEYS = ("name", "root", "defaults", "stages")
MEMBER_KEYS = ("members", "folds")  # of a stage, which make several of it
MEMBER_STRIDE = 1000  # between the seeds of members, so that those of pipelines with neighbouring seeds differ too


@dataclass
class Stage:
    """One stage: a ``fit`` (``config``), or a ``lab`` or ``label`` command.

    ``options`` are dotted option names with plain values, references resolved; ``parents`` the stages they refer to.
    """

    name: str
    folder: Path
    config: Path | None = None
    lab: str | None = None
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)

    def command(self, flag: str | None) -> list[str]:
        """The command line of the stage's process; ``flag`` is ``--resume``, ``--overwrite`` or None."""
        start = [sys.executable, "-m", "lightning_align"]
        if self.lab is not None:
            run = str(self.options["run"])
            rest = {name: value for name, value in self.options.items() if name != "run"}
            return [*start, "lab", self.lab, run, *_lab_words(rest)]
        if self.label is not None:  # goes on by itself where it was
            return [*start, "label", *self.label_words(), *(["--overwrite"] if flag == "--overwrite" else [])]
        return [*start, "fit", *self.fit_words(), *([flag] if flag else [])]

    def fit_words(self) -> list[str]:
        """The options of ``fit``, for a stage that is one."""
        place = ["--run.root", str(self.folder.parent), "--run.name", self.folder.name]
        return ["--config", str(self.config), *place, *_words(self.options)]

    def label_words(self) -> list[str]:
        """The name and the options of a ``label`` command, for a stage that is one."""
        return [str(self.label), *_label_words(self.options)]

    @property
    def out(self) -> Path | None:
        """The records that a label stage makes; None of other stages."""
        return None if self.label is None else Path(str(self.options["out"]))

    @property
    def there(self) -> bool:
        """Whether what later stages read of this one is there."""
        return is_run(self.folder) if self.out is None else self.out.is_file()


@dataclass
class Pipeline:
    """The stages of one pipeline, in order, and the folder they run in."""

    folder: Path
    stages: list[Stage]

    def states(self) -> dict[str, dict[str, Any]]:
        """What ``pipeline.json`` says of each stage."""
        path = self.folder / STATE_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}): remove it to run every stage again") from error

    def record(self, stage: Stage, **facts: Any) -> None:
        """Write what is known of a stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / STATE_FILE, json.dumps(self.states() | {stage.name: facts}, indent=2) + "\n")


def read_pipeline(options: argparse.Namespace) -> Pipeline:
    """Read and check the whole file before anything runs."""
    path = options.config
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"pipeline file {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the pipeline file {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or not content["stages"]:
        raise UserError(f"{path} is not a pipeline: it needs a mapping 'stages' with at least one stage")
    for key in content:
        if key not in PIPELINE_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), list(PIPELINE_KEYS))}")
    folder = Path(options.root or content.get("root", "runs")) / (options.name or content.get("name") or path.stem)
    defaults = dict(flatten(content.get("defaults") or {}))
    if options.seed_everything is not None:
        defaults["seed_everything"] = options.seed_everything
    changes = _changes(options.changes, content["stages"])
    stages: list[Stage] = []
    groups: dict[str, list[str]] = {}
    for name, spec in content["stages"].items():
        own_changes = changes.get(str(name), {})
        if isinstance(spec, dict):
            spec = {**spec, **{key: own_changes.pop(key) for key in MEMBER_KEYS if key in own_changes}}
        read = Reader(path, folder, defaults, {stage.name: stage for stage in stages}, groups)
        members = _members(f"{path}: stage '{name}'", str(name), spec, defaults)
        for member, own in members.items():
            if member in read.stages:
                raise UserError(f"{path}: stage '{name}' has a member '{member}', which is a stage already: rename one")
            stages.append(read.stage(member, own, own_changes))
        if list(members) != [str(name)]:
            groups[str(name)] = list(members)
    return Pipeline(folder, stages)


def _members(where: str, name: str, spec: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The stage itself; or, with ``members: K``, ``name_1`` to ``name_K``: other seeds, with ``folds`` other data."""
    if not isinstance(spec, dict) or "members" not in spec:
        if isinstance(spec, dict) and "folds" in spec:
            raise UserError(f"{where} has folds, which are for stages with 'members'")
        return {name: spec}
    count = spec["members"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise UserError(f"{where} has members {count!r}: give a number of runs, at least 2")
    if "config" not in spec:
        raise UserError(f"{where} has members, which are for stages with a 'config'")
    seed = spec.get("seed_everything", defaults.get("seed_everything", 0))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(
            f"{where} has seed_everything {seed!r}: give a whole number, from which the members' seeds follow"
        )
    folds = spec.get("folds", False)
    if not isinstance(folds, bool):
        raise UserError(f"{where} has folds {folds!r}: give true, and each member leaves out another part of the data")
    rest = {key: value for key, value in spec.items() if key not in MEMBER_KEYS}
    members = {}
    for i in range(count):
        fold = {"data.leave_out": f"{i + 1}/{count}"} if folds else {}
        members[f"{name}_{i + 1}"] = {**rest, **fold, "seed_everything": seed + MEMBER_STRIDE * i}
    return members


@dataclass
class Reader:
    """What a stage is read with: its file, the pipeline's folder and defaults, earlier stages and groups of members."""

    path: Path
    folder: Path
    defaults: Mapping[str, Any]
    stages: Mapping[str, Stage]
    groups: Mapping[str, list[str]]

    def stage(self, name: str, spec: Any, changes: Mapping[str, Any]) -> Stage:
        """One stage; ``changes`` are options of the command line."""
        where = f"{self.path}: stage '{name}'"
        if not isinstance(spec, dict) or sum(kind in spec for kind in KINDS) != 1:
            raise UserError(
                f"{where} needs either 'config' (a file for fit), 'lab' (a lab command) or 'label' (a label command)"
            )
        stage = Stage(name, self.folder / name)
        own = dict(flatten({key: value for key, value in spec.items() if key not in KINDS}))
        if "config" in spec:
            beside = self.path.parent / str(spec["config"])
            stage.config = beside if beside.is_file() else Path(str(spec["config"]))
            if not stage.config.is_file():
                raise UserError(f"{where}: config file {beside} does not exist")
            own = {**self.defaults, **own}
        elif "label" in spec:
            stage.label = str(spec["label"])
            seed = {"seed": self.defaults["seed_everything"]} if "seed_everything" in self.defaults else {}
            own = {"out": str(stage.folder / RECORDS_FILE), **seed, **own}
        else:
            stage.lab = str(spec["lab"])
        for option, value in {**own, **changes}.items():
            stage.options[option] = self._resolve(value, where, stage.parents)
        if stage.lab is not None:
            if "run" not in stage.options:
                raise UserError(f"{where}: 'lab: {stage.lab}' needs 'run', for example ${{ppo.run}}")
            stage.folder = Path(stage.options.get("out", stage.options["run"]))
        return stage

    def _resolve(self, value: Any, where: str, parents: list[str]) -> Any:
        """Replace references by folders.

        ``${stage.model}`` and ``${stage.run}`` are the stage's, ``${stage.out}`` the records of a label stage,
        ``${pipeline.run}`` the common folder, and ``${stage.models}`` (alone) the list of those of a stage's members.
        """
        if isinstance(value, dict):
            return {key: self._resolve(item, where, parents) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, where, parents) for item in value]
        if not isinstance(value, str):
            return value
        whole = REFERENCE.fullmatch(value)
        if whole and whole[2] == "models":
            return [str(self._stage(where, member, parents).folder) for member in self._group(where, whole[1])]
        return REFERENCE.sub(lambda match: self._single(where, match, parents), value)

    def _single(self, where: str, match: re.Match[str], parents: list[str]) -> str:
        stage, what = match.groups()
        made = stage in self.stages and self.stages[stage].label is not None
        known = ("out",) if made else ("model", "run")
        if what not in known:
            forms = " or ".join(f"${{{stage}.{name}}}" for name in known)
            raise UserError(f"{where}: ${{{stage}.{what}}} is not known; use {forms}")
        if stage in self.groups:
            first = self.groups[stage][0]
            raise UserError(
                f"{where}: '{stage}' has {len(self.groups[stage])} members; use ${{{stage}.models}}, or one of them: "
                f"${{{first}.{what}}}"
            )
        if stage == "pipeline":
            return str(self.folder)
        parent = self._stage(where, stage, parents)
        return str(parent.out or parent.folder)

    def _group(self, where: str, stage: str) -> list[str]:
        if stage not in self.groups:
            raise UserError(f"{where}: ${{{stage}.models}} needs an earlier stage '{stage}' with 'members'")
        return self.groups[stage]

    def _stage(self, where: str, stage: str, parents: list[str]) -> Stage:
        if stage not in self.stages:
            known = [*self.stages, *self.groups]
            raise UserError(f"{where} refers to '{stage}', which is not an earlier stage{nearest(stage, known)}")
        if stage not in parents:
            parents.append(stage)
        return self.stages[stage]


def _changes(words: list[str], stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``--set stage.option=value`` by stage; values are read as YAML."""
    changes: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise UserError(f"--set {word}: expected STAGE.OPTION=VALUE, for example sft.trainer.max_steps=100")
        if stage not in stages:
            group, _, number = stage.rpartition("_")
            if number.isdecimal() and isinstance(stages.get(group), dict) and "members" in stages[group]:
                raise UserError(
                    f"--set {word}: '{stage}' is a member of stage '{group}', whose members are set together: give "
                    f"{group}.{option}={value}"
                )
            raise UserError(f"--set {word}: there is no stage '{stage}'{nearest(stage, stages)}")
        changes.setdefault(stage, {})[option] = yaml.safe_load(value)
    return changes


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of nested options. ``reward`` and ``gold`` mappings stay whole: they are one option's value."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name.rsplit(".", 1)[-1] not in ("reward", "gold", "columns", "playground"):
            yield from flatten(value, name + ".")
        else:
            yield name, value


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line words; anything but a plain string is written as JSON, which is YAML."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _lab_words(options: Mapping[str, Any]) -> list[str]:
    """The same for lab commands, whose flags have no value, and whose lists are an option given several times."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            for item in value if isinstance(value, list) else [value]:
                words += _words({name: item})
    return words


def _label_words(options: Mapping[str, Any]) -> list[str]:
    """The same for label commands, whose lists follow their option as words."""
    words = []
    for name, value in options.items():
        if isinstance(value, list | dict):
            pairs = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
            words += [f"--{name}", *map(str, pairs)]
        else:
            words += _lab_words({name: value})
    return words
