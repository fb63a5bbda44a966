"""``pipeline``: stages in order, each in its own process; finished ones whose inputs are unchanged are skipped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

import lightning_align
from lightning_align.cli.label import check_label
from lightning_align.cli.main import EXIT_INTERRUPTED
from lightning_align.cli.options import OptionParser
from lightning_align.cli.stages import Pipeline, Stage, read_pipeline
from lightning_align.errors import UserError, nearest
from lightning_align.run.directory import STATUS_FILE, find_parents, is_run, read_status
from lightning_align.run.signals import SIGNALS, STAGE_VARIABLE

WHOLE_FILE_BYTES = 64 * 2**20  # smaller inputs are compared by content, larger ones by size and time


def main(argv: list[str]) -> int:
    """Run the stages of a pipeline file; returns the exit code of the first that fails."""
    options = _parser().parse_args(argv)
    pipeline = read_pipeline(options)
    names = [stage.name for stage in pipeline.stages]
    for chosen in (options.start, options.only):
        if chosen is not None and chosen not in names:
            raise UserError(f"there is no stage '{chosen}'{nearest(chosen, names)} (stages: {', '.join(names)})")
    first = names.index(options.start) if options.start else 0
    wanted = [stage for stage in pipeline.stages[first:] if options.only in (None, stage.name)]
    check_stages(pipeline, wanted)
    started = time.monotonic()
    ran = 0
    for number, stage in enumerate(pipeline.stages):
        if stage not in wanted:
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


def check_stages(pipeline: Pipeline, wanted: list[Stage]) -> None:
    """Raise :class:`UserError` for what would only be found when a stage begins, before the first one does."""
    checked = [stage for stage in wanted if stage.lab is None]
    for stage in checked:
        for parent in pipeline.stages:
            if parent.name in stage.parents and parent not in wanted and not parent.there:
                raise UserError(
                    f"stage '{stage.name}' needs stage '{parent.name}', which has not run ({parent.folder}): run that "
                    "first"
                )
    from lightning_align.cli.build import check_words, import_methods  # takes seconds

    import_methods()
    for stage in checked:
        try:
            if stage.label is not None:
                check_label(stage.label_words())
            else:
                check_words("fit", stage.fit_words())
        except UserError as error:
            raise UserError(f"stage '{stage.name}': {error}") from error


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


# ---------------------------------------------------------------------------------------------------------- deciding
def decide(pipeline: Pipeline, stage: Stage, *, forced: bool) -> str:
    """``skip``, ``run``, ``resume`` or ``overwrite``."""
    before = pipeline.states().get(stage.name, {})
    unchanged = before.get("inputs") == fingerprint(pipeline, stage)
    if stage.lab is not None:
        done = before.get("finished") and (stage.folder / f"{stage.lab}.json").exists()
        return "skip" if unchanged and done and not forced else "run"
    if stage.out is not None:
        if stage.out.exists():
            return "skip" if unchanged and before.get("finished") and not forced else "overwrite"
        return "resume" if unchanged else "run"
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
    if stage.label is not None:
        inputs["label"] = stage.label
    made = [parent.out for parent in pipeline.stages if parent.name in stage.parents and parent.out is not None]
    if made:
        inputs["made"] = [_stamp(out) if out.is_file() else None for out in made]
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
