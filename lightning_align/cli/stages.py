"""The stages of a pipeline: their commands, and what ``pipeline.json`` says of them."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError
from lightning_align.run.directory import is_run
from lightning_align.run.files import write_atomically

STATE_FILE = "pipeline.json"


@dataclass
class Stage:
    """One stage: a ``fit`` (``config``), or a ``lab`` or ``label`` command.

    ``options`` are dotted option names with plain values, references resolved; ``parents`` the stages they refer to.
    Of a stage with axes this is one run; ``base`` is the stage's name in the file and ``axes`` the labels of the run.
    """

    name: str
    folder: Path
    config: Path | None = None
    lab: str | None = None
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    base: str = ""
    axes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.base or self.name

    def command(self, flag: str | None) -> list[str]:
        """The command line of the stage's process; ``flag`` is ``--resume``, ``--overwrite`` or None."""
        start = [sys.executable, "-m", "lightning_align"]
        if self.lab is not None:
            run = self.options["run"]  # one, or a list of them
            rest = {name: value for name, value in self.options.items() if name != "run"}
            return [*start, "lab", self.lab, *map(str, run if isinstance(run, list) else [run]), *_lab_words(rest)]
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
        if stage.axes:
            facts = {"stage": stage.base, "axes": stage.axes, **facts}
        write_atomically(self.folder / STATE_FILE, json.dumps(self.states() | {stage.name: facts}, indent=2) + "\n")


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
