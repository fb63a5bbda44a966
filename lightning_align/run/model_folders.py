"""The model folders and functions that a run reads, as they were when it began.

Another reference or reward is no way to go on.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError
from lightning_align.models.sources import base_of_adapter, resolve_source
from lightning_align.plugins import function_file
from lightning_align.run.directory import read_status, string_options

# What weights, sizes, tokens, prompts and the end of an answer are read from; a README may change.
READ = (
    *("*.safetensors*", "*config.json", "*.jinja", "tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)
WHOLE_BYTES = 256 * 2**20  # up to this size a file is hashed whole; of a larger one its start and samples are
START_BYTES = 2**20  # of safetensors, the names and shapes of the tensors
SAMPLES, SAMPLE_BYTES = 512, 16 * 2**10  # evenly over the file: 8 MiB of a shard, whatever its size


def find_models(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model folders that the options of ``model`` name, the bases of adapters included, and files of functions.

    Returns:
        For each its ``option``, its ``folder`` (or the file), and a hash of each of its files.
    """
    known: dict[str, dict[str, str]] = {}
    models = []
    for option, value in string_options(config.get("model"), "model"):
        file = function_file(value)
        for folder in _folders(value) if file is None else [str(file)]:
            if folder not in known:
                known[folder] = hash_files(Path(folder)) if file is None else {file.name: _hash(file)}
            models.append({"option": option.replace(".init_args.", "."), "folder": folder, "files": known[folder]})
    return models


def check_models(run: Path, models: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`UserError` if a folder that ``run`` reads a model from holds another one now.

    Args:
        run: A run directory, about to be resumed. One without a record of its folders is not checked.
        models: What :func:`find_models` finds now.
    """
    now = {(model["option"], model["folder"]): model["files"] for model in models}
    for model in read_status(run).get("models", []):
        before, files = model["files"], now.get((model["option"], model["folder"]), {})
        changed = sorted(name for name in before.keys() | files.keys() if before.get(name) != files.get(name))
        if changed:
            raise UserError(
                f"{model['option']} reads {model['folder']}, which has changed since {run} began "
                f"({', '.join(changed[:3])}{', ...' if changed[3:] else ''}): restore it to resume, or start another "
                "run with another --run.name or --overwrite"
            )


def hash_files(folder: Path) -> dict[str, str]:
    """A hash of each file of a model folder, by name; seconds for the largest models, as those are sampled."""
    paths = {path.name: path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    try:
        return {name: _hash(path) for name, path in sorted(paths.items())}
    except OSError as error:
        raise UserError(f"cannot read the model folder {folder}: {error.filename}: {error.strerror}") from error


def _folders(value: str) -> Iterator[str]:
    """The folder of a model argument, and that of its base if it holds an adapter; none for any other string."""
    if not value or len(value) > 4096 or "\n" in value or not Path(value).expanduser().is_dir():
        return
    try:
        source = resolve_source(value)
    except UserError:  # a folder of something else
        return
    yield source.location
    base = base_of_adapter(source)
    if base is not None:
        yield from _folders(base)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        digest.update(file.read(START_BYTES))
        for index in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
