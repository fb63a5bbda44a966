"""What a ``--model`` of ``evaluate`` is: what to load, what its run recorded, and whether it scores or writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_align.errors import UserError
from lightning_align.models.loading import has_architecture, load_config
from lightning_align.models.sources import ADAPTER_CONFIG, ModelSource, base_of_adapter, resolve_source
from lightning_align.run.directory import CHECKPOINTS, CONFIG_FILE, is_run


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        argument: As it was given; it names the row.
        source: Run, folder or hub id to load.
        settings: Options of the method that made it, from its run; empty without one.
        is_reward: Whether it is a reward model.
    """

    argument: str
    source: str
    settings: Mapping[str, Any]
    is_reward: bool

    @property
    def start(self) -> str | None:
        """The model that its run began with, which is what its KL is taken to; None if it began with random weights."""
        model = self.settings.get("model")
        if not isinstance(model, str) or model.endswith((".yaml", ".yml")):
            return None
        return model


def read_subject(argument: str, source: str | None = None) -> Subject:
    """A subject by its argument; raises :class:`UserError` where there is no such model.

    Args:
        argument: Run directory, folder, hub id, or checkpoint file of a run.
        source: Where the model lies that the checkpoint was exported to.
    """
    source = source or argument
    resolved = resolve_source(source)
    if resolved.kind == "architecture":
        raise UserError(f"--model {argument} is an architecture, not a trained model: give a run, a folder or a hub id")
    run = run_of(argument)
    return Subject(argument, source, {} if run is None else recorded_options(run), _is_reward(resolved))


def _is_reward(resolved: ModelSource) -> bool:
    """By the architecture, or by what peft wrote of an adapter (the configuration beside it may be its base's)."""
    if base_of_adapter(resolved) is None:
        return has_architecture(load_config(resolved), "ForSequenceClassification")
    return bool(json.loads(Path(resolved.location, ADAPTER_CONFIG).read_text()).get("task_type") == "SEQ_CLS")


def run_of(argument: str) -> Path | None:
    """The run that a run directory, its ``model`` folder or a checkpoint of it belongs to."""
    path = Path(argument).expanduser()
    return next((folder for folder in (path, *list(path.parents)[:2]) if path.exists() and is_run(folder)), None)


def place_of(source: str) -> str:
    """Where a model lies: the same for a run and for the model in it. Of what is not there, the argument itself."""
    try:
        resolved = resolve_source(source)
    except UserError:
        return source
    return resolved.location if resolved.kind == "hub" else str(Path(resolved.location).resolve())


def is_checkpoint(argument: str) -> bool:
    """Whether the argument is a checkpoint file of a run."""
    path = Path(argument).expanduser()
    return path.is_file() and path.suffix == ".ckpt" and path.parent.name == CHECKPOINTS


def recorded_options(run: Path) -> dict[str, Any]:
    """``model.init_args`` of a run's configuration."""
    file = run / CONFIG_FILE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}): restore it") from error
    model = content.get("model") if isinstance(content, dict) else None
    options = model.get("init_args") if isinstance(model, dict) else None
    return options if isinstance(options, dict) else {}


def agreed(subjects: Sequence[Subject], option: str) -> Any:
    """What the runs recorded of an option, where they agree; None where none did.

    Raises:
        UserError: Two runs recorded different values: which of them is meant must be said.
    """
    recorded = {subject.argument: subject.settings.get(option) for subject in subjects}
    known = {name: value for name, value in recorded.items() if value is not None}
    for name, value in known.items():
        first, one = next(iter(known.items()))
        if value != one:
            raise UserError(f"{first} was trained with {option} {one}, {name} with {value}: say which with --{option}")
    return next(iter(known.values()), None)


def short_names(arguments: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(argument).parts for argument in arguments]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(arguments)):
            break
    return names
