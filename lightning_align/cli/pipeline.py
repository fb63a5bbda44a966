"""``pipeline``: stages in order, each in its own process; finished ones whose inputs are unchanged are skipped."""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

import lightning_align
from lightning_align.cli.main import EXIT_INTERRUPTED, nearest
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.run.directory import STATUS_FILE, find_parents, is_run, read_status, write_atomically
from lightning_align.run.signals import SIGNALS, STAGE_VARIABLE

STATE_FILE = "pipeline.json"
WHOLE_FILE_BYTES = 64 * 2**20  # smaller inputs are compared by content, larger ones by size and time
REFERENCE = re.compile(r"\$\{([\w-]+)\.(\w+)\}")
PIPELINE_KEYS = ("name", "root", "defaults", "stages")


@dataclass
class Stage:
    """One stage: a ``fit`` (``config``) or a ``lab`` command.

    ``options`` are dotted option names with plain values, references resolved; ``parents`` the stages they refer to.
    """

    name: str
    folder: Path
    config: Path | None = None
    lab: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)

    def command(self, flag: str | None) -> list[str]:
        """The command line of the stage's process; ``flag`` is ``--resume``, ``--overwrite`` or None."""
        start = [sys.executable, "-m", "lightning_align"]
        if self.lab is not None:
            run = str(self.options["run"])
            rest = {name: value for name, value in self.options.items() if name != "run"}
            return [*start, "lab", self.lab, run, *_words(rest)]
        place = ["--run.root", str(self.folder.parent), "--run.name", self.folder.name]
        return [*start, "fit", "--config", str(self.config), *place, *_words(self.options), *([flag] if flag else [])]


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


def main(argv: list[str]) -> int:
    """Run the stages of a pipeline file; returns the exit code of the first that fails."""
    options = _parser().parse_args(argv)
    pipeline = read_pipeline(options)
    names = [stage.name for stage in pipeline.stages]
    for chosen in (options.start, options.only):
        if chosen is not None and chosen not in names:
            raise UserError(f"there is no stage '{chosen}'{nearest(chosen, names)} (stages: {', '.join(names)})")
    first = names.index(options.start) if options.start else 0
    started = time.monotonic()
    ran = 0
    for number, stage in enumerate(pipeline.stages):
        if number < first or (options.only and stage.name != options.only):
            continue
        action = decide(pipeline, stage, forced=options.start is not None or options.only is not None)
        print(
            f"[{number + 1}/{len(names)}] {stage.name}: {DESCRIPTIONS[action]} ({stage.folder})",
            file=sys.stderr,
            flush=True,
        )
        if options.dry_run:
            print("  " + " ".join(stage.command(FLAGS.get(action))[1:]))
        elif action != "skip":
            ran += 1
            code = run_stage(pipeline, stage, action)
            if code != 0:
                return code
    if not options.dry_run:
        verb = f"done in {time.monotonic() - started:.0f} s" if ran else "is done already, nothing has changed"
        print(f"pipeline {pipeline.folder.name} {verb}: {pipeline.folder}", file=sys.stderr)
    return 0


DESCRIPTIONS = {"skip": "done, unchanged", "run": "running", "resume": "continuing", "overwrite": "running again"}
FLAGS = {"resume": "--resume", "overwrite": "--overwrite"}


def _parser() -> OptionParser:
    parser = OptionParser(
        "pipeline", "Run several stages in order; finished stages whose inputs are unchanged are skipped."
    )
    parser.add_argument("--config", required=True, type=Path, help="pipeline file (YAML)")
    parser.add_argument("--run.name", dest="name", help="name of the pipeline's folder (default: from the file)")
    parser.add_argument("--run.root", dest="root", help="folder that holds all runs (default: runs)")
    parser.add_argument("--seed_everything", type=int, help="seed of every stage")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="STAGE.OPTION=VALUE")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all after it, done or not")
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone, done or not")
    parser.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true", help="say what would run")
    return parser


# ---------------------------------------------------------------------------------------------------------- reading
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
    changes = _changes(options.changes, list(content["stages"]))
    stages: list[Stage] = []
    for name, spec in content["stages"].items():
        stages.append(_read_stage(path, folder, str(name), spec, defaults, changes.get(str(name), {}), stages))
    return Pipeline(folder, stages)


def _read_stage(
    path: Path,
    folder: Path,
    name: str,
    spec: Any,
    defaults: Mapping[str, Any],
    changes: Mapping[str, Any],
    earlier: list[Stage],
) -> Stage:
    where = f"{path}: stage '{name}'"
    if not isinstance(spec, dict) or ("config" in spec) == ("lab" in spec):
        raise UserError(f"{where} needs either 'config' (a file for fit) or 'lab' (a lab command)")
    stage = Stage(name, folder / name)
    own = dict(flatten({key: value for key, value in spec.items() if key not in ("config", "lab")}))
    if "config" in spec:
        beside = path.parent / str(spec["config"])
        stage.config = beside if beside.is_file() else Path(str(spec["config"]))
        if not stage.config.is_file():
            raise UserError(f"{where}: config file {beside} does not exist")
        own = {**defaults, **own}
    else:
        stage.lab = str(spec["lab"])
    places = {before.name: before.folder for before in earlier}
    for option, value in {**own, **changes}.items():
        stage.options[option] = _resolve(value, where, folder, places, stage.parents)
    if stage.lab is not None:
        if "run" not in stage.options:
            raise UserError(f"{where}: 'lab: {stage.lab}' needs 'run', for example ${{ppo.run}}")
        stage.folder = Path(stage.options.get("out", stage.options["run"]))
    return stage


def _resolve(value: Any, where: str, folder: Path, places: Mapping[str, Path], parents: list[str]) -> Any:
    """Replace ``${stage.model}`` and ``${stage.run}`` by the stage's folder, ``${pipeline.run}`` by the common one."""
    if isinstance(value, dict):
        return {key: _resolve(item, where, folder, places, parents) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, where, folder, places, parents) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        stage, what = match.groups()
        if what not in ("model", "run"):
            raise UserError(f"{where}: ${{{stage}.{what}}} is not known; use ${{{stage}.model}} or ${{{stage}.run}}")
        if stage == "pipeline":
            return str(folder)
        if stage not in places:
            raise UserError(f"{where} refers to '{stage}', which is not an earlier stage{nearest(stage, list(places))}")
        if stage not in parents:
            parents.append(stage)
        return str(places[stage])

    return REFERENCE.sub(replace, value)


def _changes(words: list[str], stages: list[str]) -> dict[str, dict[str, Any]]:
    """``--set stage.option=value`` by stage; values are read as YAML."""
    changes: dict[str, dict[str, Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        stage, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise UserError(f"--set {word}: expected STAGE.OPTION=VALUE, for example sft.trainer.max_steps=100")
        if stage not in stages:
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


# ---------------------------------------------------------------------------------------------------------- deciding
def decide(pipeline: Pipeline, stage: Stage, *, forced: bool) -> str:
    """``skip``, ``run``, ``resume`` or ``overwrite``."""
    before = pipeline.states().get(stage.name, {})
    unchanged = before.get("inputs") == fingerprint(pipeline, stage)
    if stage.lab is not None:
        done = before.get("finished") and (stage.folder / f"{stage.lab}.json").exists()
        return "skip" if unchanged and done and not forced else "run"
    if not stage.folder.exists() or not any(stage.folder.iterdir()):
        return "run"
    finished = is_run(stage.folder) and read_status(stage.folder).get("status") == "finished"
    if unchanged and not finished:
        return "resume"
    return "skip" if unchanged and not forced else "overwrite"


def fingerprint(pipeline: Pipeline, stage: Stage) -> str:
    """Hash of everything a stage's result depends on: configuration, options, files, and the runs it reads."""
    config = yaml.safe_load(stage.config.read_text(encoding="utf-8")) if stage.config is not None else {}
    inputs = {
        "version": lightning_align.__version__,
        "config": config,
        "lab": stage.lab,
        "options": stage.options,
        "files": dict(_files({"config": config, "options": stage.options}, pipeline.folder)),
        "runs": [
            _run_stamp(Path(parent["run"])) for parent in find_parents({"config": config, "options": stage.options})
        ],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _run_stamp(run: Path) -> list[Any]:
    status = read_status(run)
    return [str(run), status.get("status"), status.get("created"), status.get("updated")]


def _files(node: Any, own: Path) -> Iterator[tuple[str, str]]:
    """Every file that a value names, with its hash; what lies in ``own`` is the pipeline's output, not its input."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _files(value, own)
    elif isinstance(node, list):
        for value in node:
            yield from _files(value, own)
    elif isinstance(node, str) and 0 < len(node) < 1024 and "\n" not in node:
        path = Path(node)
        if path.is_relative_to(own):
            return
        if path.is_file():
            yield node, _stamp(path)
        elif path.is_dir() and not (path / STATUS_FILE).exists():
            for child in sorted(path.iterdir()):
                if child.is_file():
                    yield str(child), _stamp(child)


def _stamp(path: Path) -> str:
    facts = path.stat()
    if facts.st_size > WHOLE_FILE_BYTES:
        return f"{facts.st_size} bytes at {facts.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- running
def run_stage(pipeline: Pipeline, stage: Stage, action: str) -> int:
    """Run one stage in its own process, so that its memory is given back; returns its exit code."""
    inputs = fingerprint(pipeline, stage)
    if action != "resume":
        pipeline.record(stage, inputs=inputs, finished=False)
    started = time.monotonic()
    code = run_child(stage.command(FLAGS.get(action)))
    if code == 0:
        pipeline.record(stage, inputs=inputs, finished=True, seconds=round(time.monotonic() - started, 1))
        return 0
    if code == EXIT_INTERRUPTED or -code in SIGNALS:
        print("the same command continues the pipeline", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"error: stage '{stage.name}' failed with exit code {code}", file=sys.stderr)
    return code if code > 0 else 1


def run_child(command: list[str]) -> int:
    """Run a command to its end and forward signals to it.

    It gets a session of its own: a Ctrl-C in the terminal would otherwise reach it twice, and the second means at once.
    """
    child = subprocess.Popen(command, start_new_session=True, env={**os.environ, STAGE_VARIABLE: "1"})

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
