"""Tokenised data on disk, found again by what they were made from.

The key is a hash of the records, of everything about the tokenizer that matters (chat template included) and of the
options, so nothing stale can be found; a file that was damaged is noticed by its own hash and made again.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lightning_align.data.tables import Arrays, Counts

_LOGGER = logging.getLogger(__name__)
FORMAT = 3  # to be raised whenever the same records would give other tokens
# Tokenising this much text takes about a second; below, a cache would only fill the disk.
SMALLEST = 4_000_000


def cache_folder(cache_dir: str | None) -> Path | None:
    """Where tokens are kept; ``auto`` is in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    if cache_dir is None:
        return None
    if cache_dir != "auto":
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_align" / "tokens"


def cached(
    folder: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    options: Mapping[str, Any],
    build: Callable[[], tuple[Arrays, Counts]],
) -> tuple[Arrays, Counts]:
    """The table of these records: from the folder, else built, and kept there for the next time."""
    if folder is None:
        return build()
    content, size = hash_records(records, places)
    if size < SMALLEST:
        return build()
    versions = [FORMAT, importlib.metadata.version("tokenizers")]
    key = _digest(json.dumps([versions, content, fingerprint(tokenizer), dict(options)], sort_keys=True).encode())
    path = folder / f"{key}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    arrays, counts = build()
    _write(path, arrays, counts)
    return arrays, counts


@contextmanager
def first_process_first(local_rank: int) -> Iterator[None]:
    """What is done inside, the first process of each machine does before the others, however long it takes.

    They begin even if it fails: they would wait forever, and what it found wrong they find too.
    """
    with _InfiniteBarrier() as barrier:
        if local_rank > 0:
            barrier()
        try:
            yield
        finally:
            if local_rank == 0:
                barrier()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of whatever decides which ids a text or a conversation becomes."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("truncation"), core.pop("padding")  # leftovers of the last call
    else:
        core = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest(json.dumps([core, special, tokenizer.chat_template], sort_keys=True).encode())


def hash_records(records: Sequence[Mapping[str, Any]], places: Sequence[str]) -> tuple[str, int]:
    """A hash of records and their places, and how many bytes they are."""
    digest, size = hashlib.blake2b(digest_size=20), 0
    for record, place in zip(records, places, strict=True):
        line = json.dumps([place, record], sort_keys=True, default=str).encode()
        digest.update(line)
        size += len(line)
    return digest.hexdigest(), size


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def hash_arrays(arrays: Arrays) -> str:
    """A hash of arrays, their names and types."""
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def hash_training(arrays: Arrays, records: Sequence[Mapping[str, Any]]) -> str:
    """A hash of what is trained on: tokens, and records where their fields count too."""
    return _digest((hash_arrays(arrays) + hash_records(records, [""] * len(records))[0]).encode())


def _read(path: Path) -> tuple[Arrays, Counts] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            counts = Counts.from_dict(json.loads(metadata["counts"]))
        if metadata["hash"] == hash_arrays(arrays):
            return arrays, counts
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    _LOGGER.warning("%s is damaged: the data are tokenised again", path)
    return None


def _write(path: Path, arrays: Arrays, counts: Counts) -> None:
    """Under another name first: whoever reads sees the whole file or none."""
    metadata = {"counts": json.dumps(counts.to_dict()), "hash": hash_arrays(arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(arrays, name, metadata=metadata)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        _LOGGER.warning("tokenised data cannot be kept in %s: %s", path.parent, error)
