"""Reading a pipeline file: members, axes and references to earlier stages resolved, all checked before any runs."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli.axes import (
    AXES,
    LISTS,
    REFERENCE,
    Axes,
    agree,
    axes_of,
    cell_name,
    combinations,
    read_axes,
    substitute,
)
from lightning_align.cli.stages import Pipeline, Stage, flatten
from lightning_align.errors import UserError, nearest

RECORDS_FILE = "records.jsonl"  # in the folder of a label stage
KINDS = ("config", "lab", "label")  # keys that say what a stage is
PIPELINE_KEYS = ("name", "root", "defaults", AXES, "stages")
MEMBER_KEYS = ("members", "folds")  # of a stage, which make several of it
MEMBER_STRIDE = 1000  # between the seeds of members, so that those of pipelines with neighbouring seeds differ too


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
    axes = read_axes(path, content.get(AXES), changes.pop(AXES, {}))
    reader = Reader(path, folder, defaults, axes)
    for name, spec in content["stages"].items():
        reader.add(str(name), spec, changes.get(str(name), {}))
    unused = set(axes).difference(*reader.axes_by_stage.values())
    if unused:
        raise UserError(f"{path}: no stage uses axis '{min(unused)}': write ${{{AXES}.{min(unused)}}} where it belongs")
    return Pipeline(folder, list(reader.stages.values()))


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
    """Reads stages in order: their file, the pipeline's folder, defaults and axes, and what was read so far.

    ``groups`` are the runs of stages that stand for several, members or cells; ``axes_by_stage`` what each depends on.
    """

    path: Path
    folder: Path
    defaults: Mapping[str, Any]
    axes: Axes
    stages: dict[str, Stage] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    axes_by_stage: dict[str, frozenset[str]] = field(default_factory=dict)

    def add(self, name: str, spec: Any, changes: dict[str, Any]) -> None:
        """Read a stage of the file, with its members or a run for each combination of its axes."""
        where = f"{self.path}: stage '{name}'"
        if isinstance(spec, dict):
            spec = {**spec, **{key: changes.pop(key) for key in MEMBER_KEYS if key in changes}}
        defaults = self.defaults if isinstance(spec, dict) and "config" in spec else {}
        names = axes_of(where, [spec, changes, defaults], self.axes, self.axes_by_stage)
        if names and isinstance(spec, dict) and "members" in spec:
            raise UserError(f"{where} has members and depends on axis '{min(names)}': give it one of the two")
        members = _members(where, name, spec, self.defaults)
        self.axes_by_stage[name] = names
        read = [
            self.stage(member, name, labels, own, changes)
            for member, own in members.items()
            for labels in combinations(names, self.axes)
        ]
        for stage in read:
            if stage.name in self.stages:
                raise UserError(f"{where} has a member '{stage.name}', which is a stage already: rename one")
        self.stages |= {stage.name: stage for stage in read}
        if [stage.name for stage in read] != [name]:
            self.groups[name] = [stage.name for stage in read]

    def stage(self, name: str, base: str, labels: dict[str, str], spec: Any, changes: Mapping[str, Any]) -> Stage:
        """One run; ``changes`` are options of the command line."""
        where = f"{self.path}: stage '{name}'"
        if not isinstance(spec, dict) or sum(kind in spec for kind in KINDS) != 1:
            raise UserError(
                f"{where} needs either 'config' (a file for fit), 'lab' (a lab command) or 'label' (a label command)"
            )
        name = cell_name(name, labels)
        stage = Stage(name, self.folder / name, base=base if labels else "", axes=labels)
        spec, changes, defaults = (substitute(node, self.axes, labels) for node in (spec, dict(changes), self.defaults))
        own = dict(flatten({key: value for key, value in spec.items() if key not in KINDS}))
        if "config" in spec:
            beside = self.path.parent / str(spec["config"])
            stage.config = beside if beside.is_file() else Path(str(spec["config"]))
            if not stage.config.is_file():
                raise UserError(f"{where}: config file {beside} does not exist")
            own = {**defaults, **own}
        elif "label" in spec:
            stage.label = str(spec["label"])
            seed = {"seed": self.defaults["seed_everything"]} if "seed_everything" in self.defaults else {}
            own = {"out": str(stage.folder / RECORDS_FILE), **seed, **own}
        else:
            stage.lab = str(spec["lab"])
        for option, value in {**own, **changes}.items():
            stage.options[option] = self._resolve(value, where, stage)
        if stage.lab is not None:
            if "run" not in stage.options:
                raise UserError(f"{where}: 'lab: {stage.lab}' needs 'run', for example ${{ppo.run}}")
            runs = stage.options["run"]
            if isinstance(runs, list) and not (runs and "out" in stage.options):
                raise UserError(f"{where}: a 'run' that is a list needs a run in it, and 'out', the folder to write to")
            stage.folder = Path(stage.options.get("out", runs))
        return stage

    def _resolve(self, value: Any, where: str, own: Stage) -> Any:
        """Replace references by folders.

        ``${stage.model}`` and ``${stage.run}`` are the stage's (with axes, of the run with the same labels),
        ``${stage.out}`` the records of a label stage, ``${pipeline.run}`` the common folder, and ``${stage.models}`` or
        ``${stage.runs}`` (alone) the list of those of a stage's members, or of its runs over all axes.
        """
        if isinstance(value, dict):
            return {key: self._resolve(item, where, own) for key, item in value.items()}
        if isinstance(value, list):
            resolved = [(item, self._resolve(item, where, own)) for item in value]
            return [run for item, found in resolved for run in (found if _is_list(item) else [found])]
        if not isinstance(value, str):
            return value
        whole = REFERENCE.fullmatch(value)
        if whole and whole[2] in LISTS:
            runs = [self._stage(where, member, own) for member in self._group(where, whole[1], whole[2])]
            return [str(stage.folder) for stage in runs if agree(stage.axes, own.axes)]
        return REFERENCE.sub(lambda match: self._single(where, match, own), value)

    def _single(self, where: str, match: re.Match[str], own: Stage) -> str:
        stage, what = match.groups()
        made = stage in self.stages and self.stages[stage].label is not None
        cells = [name for name in self.groups.get(stage, []) if self.stages[name].axes]
        if cells:
            stage = next(name for name in cells if agree(self.stages[name].axes, own.axes))
            made = self.stages[stage].label is not None
        known = ("out",) if made else ("model", "run")
        if what not in known:
            forms = " or ".join(f"${{{match[1]}.{name}}}" for name in known)
            raise UserError(f"{where}: ${{{match[1]}.{what}}} is not known; use {forms}")
        if stage in self.groups:
            first = self.groups[stage][0]
            raise UserError(
                f"{where}: '{stage}' has {len(self.groups[stage])} members; use ${{{stage}.models}}, or one of them: "
                f"${{{first}.{what}}}"
            )
        if stage == "pipeline":
            return str(self.folder)
        parent = self._stage(where, stage, own)
        return str(parent.out or parent.folder)

    def _group(self, where: str, stage: str, what: str) -> list[str]:
        if stage not in self.groups:
            raise UserError(f"{where}: ${{{stage}.{what}}} needs an earlier stage '{stage}' with 'members' or axes")
        return self.groups[stage]

    def _stage(self, where: str, stage: str, own: Stage) -> Stage:
        if stage not in self.stages:
            known = [*self.stages, *self.groups]
            raise UserError(f"{where} refers to '{stage}', which is not an earlier stage{nearest(stage, known)}")
        if stage not in own.parents and agree(self.stages[stage].axes, own.axes):
            own.parents.append(stage)
        return self.stages[stage]


def _is_list(item: Any) -> bool:
    whole = REFERENCE.fullmatch(item) if isinstance(item, str) else None
    return whole is not None and whole[2] in LISTS


def _changes(words: list[str], stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``--set stage.option=value`` by stage; values are read as YAML."""
    changes: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise UserError(f"--set {word}: expected STAGE.OPTION=VALUE, for example sft.trainer.max_steps=100")
        if stage not in stages and stage != AXES:
            group, _, number = stage.rpartition("_")
            if number.isdecimal() and isinstance(stages.get(group), dict) and "members" in stages[group]:
                raise UserError(
                    f"--set {word}: '{stage}' is a member of stage '{group}', whose members are set together: give "
                    f"{group}.{option}={value}"
                )
            raise UserError(f"--set {word}: there is no stage '{stage}'{nearest(stage, stages)}")
        changes.setdefault(stage, {})[option] = yaml.safe_load(value)
    return changes
