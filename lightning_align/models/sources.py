"""What a model argument means: a run directory, a local folder, a hub id, or the YAML file of an architecture."""

import json
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_align.errors import UserError

SourceKind = Literal["run", "path", "hub", "architecture"]
RUN_FILE = "run.json"
MODEL_FOLDER = "model"
ADAPTER_CONFIG = "adapter_config.json"  # as peft writes it
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """A resolved model argument.

    Args:
        kind: ``run`` (its exported model), ``path`` (a model folder), ``hub`` or ``architecture`` (to be initialised).
        location: Folder, hub id or YAML file to read.
    """

    kind: SourceKind
    location: str


def resolve_source(source: str) -> ModelSource:
    """The kind and place of a model argument; raises :class:`UserError` when it can be neither of the four."""
    if not source:
        raise UserError("the model argument is empty: give a run directory, a path, a hub id or an architecture YAML")
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{source}: there is no such architecture file")
        return ModelSource("architecture", str(path))
    if path.is_dir():
        return _resolve_folder(source, path)
    if path.is_file():
        raise UserError(f"{source} is a file: give a model folder, a run directory, a hub id or an architecture YAML")
    if HUB_ID.fullmatch(source):
        return ModelSource("hub", source)
    raise UserError(f"{source}: there is no such folder, and it cannot be a hub id (owner/name)")


def _resolve_folder(source: str, path: Path) -> ModelSource:
    if (path / RUN_FILE).is_file() or (path / MODEL_FOLDER).is_dir():
        if not _holds_model(path / MODEL_FOLDER):
            raise UserError(f"run {source} has no exported model yet: let it finish, or use `export` on its checkpoint")
        return ModelSource("run", str(path / MODEL_FOLDER))
    if not _holds_model(path):
        raise UserError(f"{source} is neither a run directory nor a model folder: it has no config.json")
    return ModelSource("path", str(path))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def base_of_adapter(source: ModelSource) -> str | None:
    """The model argument that an adapter in a folder was trained on; None if the source holds a whole model."""
    file = Path(source.location) / ADAPTER_CONFIG
    if source.kind not in ("run", "path") or not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: it does not say which model the adapter belongs to") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{file} does not say which model the adapter belongs to: set its base_model_name_or_path")
    try:
        resolved = resolve_source(base)
    except UserError as error:
        raise UserError(f"the adapter {source.location} needs the model it was trained on: {error}") from error
    if resolved.kind in ("run", "path") and (Path(resolved.location) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{file} names {base}, which is an adapter itself: merge that first (export --lora merged)")
    return base


def local_only(source: ModelSource) -> bool:
    """Whether to read without the network: local folders, and hub models in the cache while the hub cannot be reached.

    Asking first spares the half minute of retries that the hub client spends on a mistyped name.
    """
    if source.kind != "hub":
        return True
    from huggingface_hub import try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(source.location, "config.json"), str)
    if hub_reachable():
        return False
    if not cached:
        raise UserError(
            f"{source.location}: there is no such local folder{_in_a_pipeline(source.location)}, and the model hub "
            "cannot be reached to look for it: check the spelling, or the network"
        )
    return True


def _in_a_pipeline(source: str) -> str:
    """Where a stage of that name lies, if the runs are a pipeline's."""
    path = Path(source)
    found = sorted(path.parent.glob(f"*/{path.name}/{RUN_FILE}")) if path.parent.is_dir() else []
    return f" (there is {found[0].parent})" if found else ""


def hub_reachable() -> bool:
    """Whether the hub may be asked and can be."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT)


def _reachable(endpoint: str) -> bool:
    address = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies().get(address.scheme):  # only the proxy can tell
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
