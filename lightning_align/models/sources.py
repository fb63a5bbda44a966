"""What a model argument means: a run directory, a local folder, a hub id, or the YAML file of an architecture."""

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
        if not (path / MODEL_FOLDER / "config.json").is_file():
            raise UserError(f"run {source} has no exported model yet: let it finish, or use `export` on its checkpoint")
        return ModelSource("run", str(path / MODEL_FOLDER))
    if not (path / "config.json").is_file():
        raise UserError(f"{source} is neither a run directory nor a model folder: it has no config.json")
    return ModelSource("path", str(path))


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
            f"{source.location}: there is no such local folder, and the model hub cannot be reached to look for it: "
            "check the spelling, or the network"
        )
    return True


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
