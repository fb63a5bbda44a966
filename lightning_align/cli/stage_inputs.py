"""Whether a stage of a pipeline has to run: a hash of everything that its result depends on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import lightning_align
from lightning_align.cli.stages import Pipeline, Stage
from lightning_align.plugins import function_file
from lightning_align.run.directory import STATUS_FILE, find_parents, is_run, read_status

RESULTS = {"select": "selection.json", "report": "report.html"}  # of lab commands; of others NAME.json
WHOLE_FILE_BYTES = 64 * 2**20  # smaller inputs are compared by content, larger ones by size and time


def decide(pipeline: Pipeline, stage: Stage, *, forced: bool) -> str:
    """``skip``, ``run``, ``resume`` or ``overwrite``."""
    before = pipeline.states().get(stage.name, {})
    unchanged = before.get("inputs") == fingerprint(pipeline, stage)
    if stage.lab is not None:
        done = before.get("finished") and (stage.folder / RESULTS.get(stage.lab, f"{stage.lab}.json")).exists()
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
    if stage.lab is not None:  # it may read the whole folder
        before = pipeline.stages[: pipeline.stages.index(stage)]
        inputs["before"] = [_run_stamp(other.folder) for other in before if is_run(other.folder)]
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
        path = function_file(node) or Path(node)
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
