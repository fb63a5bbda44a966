"""Loading tokenizers and models: safetensors only, no code from the hub, one readable line when something is wrong."""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lightning_align.errors import UserError
from lightning_align.models.adapter_files import MERGED_CONFIG, read_adapter
from lightning_align.models.architecture import read_architecture
from lightning_align.models.lora import LoraOptions, add_lora, merge_
from lightning_align.models.sources import ModelSource, base_of_adapter, local_only, resolve_source

DTYPES = ("float32", "bfloat16", "float16", "auto")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")
# What transformers raises on files that are missing, cut short, of another kind, or not there at all.
READ_ERRORS = (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Loaded:
    """A network, the weights its checkpoint lacked and those it had in excess (both empty when made from scratch)."""

    network: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and its report on missing weights: we judge them ourselves."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


# ---------------------------------------------------------------------- tokenizers
def tokenizer_plan(source: str) -> dict[str, Any] | None:
    """Arguments of ``train_tokenizer`` when ``source`` is an architecture whose tokenizer is trained on the data."""
    resolved = resolve_source(source)
    return read_architecture(resolved.location).tokenizer_plan if resolved.kind == "architecture" else None


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, path, hub id, or of an architecture that names one. It always has EOS and a pad token."""
    resolved = resolve_source(source)
    if resolved.kind == "architecture":
        path = read_architecture(resolved.location).tokenizer_path
        if path is None:
            raise UserError(f"{source}: its tokenizer is trained on data: there is none before a run has trained it")
        return load_tokenizer(path)
    resolved = _holder(resolved, *TOKENIZER_FILES)
    if resolved.kind != "hub":
        _check_tokenizer_files(source, Path(resolved.location))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.location, local_files_only=local_only(resolved), trust_remote_code=False
        )
    except READ_ERRORS as error:
        raise UserError(f"{source}: the tokenizer cannot be read: {_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: its tokenizer has no EOS token: a model needs one to end its answers")
    if tokenizer.pad_token_id is None:
        warnings.warn(
            f"{source}: its tokenizer has no pad token; EOS is used (masks tell them apart), in the exported model too",
            stacklevel=2,
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _holder(source: ModelSource, *names: str) -> ModelSource:
    """Where one of these files is: beside an adapter, or else beside the model that it was trained on."""
    base = base_of_adapter(source)
    if base is None or any((Path(source.location) / name).is_file() for name in names):
        return source
    return resolve_source(base)


def _check_tokenizer_files(source: str, folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{source}: there is no tokenizer (tokenizer.json) in {folder}")
    serialised = folder / "tokenizer.json"
    if serialised.is_file():
        try:
            json.loads(serialised.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{serialised} is damaged: {_one_line(error)}") from error


# ---------------------------------------------------------------------- models
def load_causal_lm(
    source: str, *, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "float32", dropout: float = 0.0
) -> PreTrainedModel:
    """The causal language model of a run, path or hub id, or a new one of an architecture, drawn from torch's seed.

    New weights are N(0, 0.02²), those of residual projections divided by √(2·layers).

    Args:
        source: Run directory, folder, hub id or architecture YAML.
        tokenizer: Checked against the embedding; an architecture takes its vocabulary size from it.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored).
        dropout: Set for every dropout of the architecture.
    """
    loaded = load_network(AutoModelForCausalLM, source, tokenizer=tokenizer, dtype=dtype, dropout=dropout)
    name = type(loaded.network).__name__
    if "score.weight" in loaded.unexpected:
        raise _is_reward_model(source)
    if loaded.missing:
        raise UserError(
            f"{source} does not hold the weights of a {name}: {len(loaded.missing)} are missing, "
            f"first {min(loaded.missing)}"
        )
    if loaded.unexpected:
        warnings.warn(
            f"{source}: {len(loaded.unexpected)} weights are not part of {name} and are left out, "
            f"first {min(loaded.unexpected)}",
            stacklevel=2,
        )
    return loaded.network


class Parameters(NamedTuple):
    """How many a model has, and the bytes that they take."""

    number: int
    size: int


def count_parameters(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    auto_class: Any = AutoModelForCausalLM,
    *,
    dtype: str = "float32",
) -> Parameters:
    """Parameters of ``source``, loaded as ``dtype``, without loading any weights; shared ones count once."""
    network = empty_network(source, tokenizer, auto_class)
    number = sum(parameter.numel() for parameter in network.parameters())
    return Parameters(number, number * (network.dtype if dtype == "auto" else getattr(torch, dtype)).itemsize)


def count_adapter(
    source: str,
    lora: LoraOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    auto_class: Any = AutoModelForCausalLM,
    *,
    dtype: str = "float32",
) -> tuple[Parameters, Parameters]:
    """Parameters of ``source`` under adapters, those that learn and those that do not; a score head learns."""
    network = add_lora(empty_network(source, tokenizer, auto_class), lora)
    for name, parameter in network.named_parameters():
        if name == "score.weight":
            parameter.requires_grad_(True)
    learn = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    rest = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    width = (network.dtype if dtype == "auto" else getattr(torch, dtype)).itemsize
    return Parameters(learn, learn * torch.float32.itemsize), Parameters(rest, rest * width)


def empty_network(
    source: str, tokenizer: PreTrainedTokenizerBase | None = None, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A causal language model (or another auto class, with a single label) without weights, on device ``meta``.

    Its dtype is the stored one. The file of the weights must be there all the same.
    """
    _check_weights_file(source)
    config = load_config(resolve_source(source), tokenizer)
    if auto_class is AutoModelForCausalLM and has_architecture(config, "ForSequenceClassification"):
        raise _is_reward_model(source)
    config.num_labels = 1
    with torch.device("meta"), quiet_transformers():
        return auto_class.from_config(config, trust_remote_code=False)


def has_architecture(config: PretrainedConfig, *endings: str) -> bool:
    """Whether the configuration of stored weights names an architecture, and each that it names ends like this."""
    names = config.architectures or []
    return bool(names) and all(name.endswith(endings) for name in names)


def _is_reward_model(source: str) -> UserError:
    return UserError(f"{source} is a reward model (it has a score head), but a language model is wanted here")


def load_config(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase | None = None, *, dropout: float = 0.0
) -> PretrainedConfig:
    """The configuration of a source, every dropout set to ``dropout``."""
    if source.kind == "architecture":
        config = read_architecture(source.location).config(tokenizer or load_tokenizer(source.location))
    else:
        source = _holder(source, MERGED_CONFIG)
        merged = Path(source.location, MERGED_CONFIG)
        place = str(merged) if merged.is_file() else source.location
        try:
            config = AutoConfig.from_pretrained(place, local_files_only=local_only(source), trust_remote_code=False)
        except READ_ERRORS as error:
            raise UserError(f"{source.location}: the model cannot be read: {_one_line(error)}") from error
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float):
            setattr(config, name, dropout)
    return config


def max_positions(config: PretrainedConfig) -> int | None:
    """Positions a model was made for; None for those without a limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)  # GPT-2 maps its own name to it
    return None if limit is None else int(limit)


def load_network(
    auto_class: Any,
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    dropout: float = 0.0,
    config_changes: Mapping[str, Any] | None = None,
    merge: bool = True,
) -> Loaded:
    """A network of one of transformers' auto classes; judging missing and unexpected weights is left to the caller.

    An adapter becomes part of the weights, or with ``merge`` false stays beside them, frozen as they are.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype}: give one of {', '.join(DTYPES)}")
    resolved = resolve_source(source)
    base = base_of_adapter(resolved)
    config = load_config(resolved, tokenizer, dropout=dropout)
    for name, value in (config_changes or {}).items():
        setattr(config, name, value)
    try:
        if resolved.kind == "architecture":
            loaded = Loaded(_new_network(auto_class, config, dtype), frozenset(), frozenset())
        elif base is not None:
            loaded = _stored_network(auto_class, base, resolve_source(base), config, dtype)
            brought = read_adapter(loaded.network, Path(resolved.location))
            loaded = replace(loaded, missing=loaded.missing - brought)
            if merge:
                merge_(loaded.network)
        else:
            loaded = _stored_network(auto_class, source, resolved, config, dtype)
    except READ_ERRORS as error:
        raise UserError(f"{source}: the model cannot be loaded: {_one_line(error)}") from error
    _prepare(source, loaded.network, tokenizer)
    return loaded


def _new_network(auto_class: Any, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    pad_token_id, config.pad_token_id = config.pad_token_id, None  # or the pad row would start at zero: pad may be EOS
    with quiet_transformers():
        network = auto_class.from_config(config, trust_remote_code=False)
    network.config.pad_token_id = pad_token_id
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(RESIDUAL_PROJECTIONS):
                parameter.div_(math.sqrt(2 * config.num_hidden_layers))
    return network if dtype == "auto" else network.to(getattr(torch, dtype))


def _stored_network(
    auto_class: Any, source: str, resolved: ModelSource, config: PretrainedConfig, dtype: str
) -> Loaded:
    _check_weights_file(source)
    with quiet_transformers():
        network, report = auto_class.from_pretrained(
            resolved.location,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=local_only(resolved),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{source}: the weights do not fit its config.json: {name} is {list(stored)}, not {list(wanted)}"
        )
    return Loaded(network, frozenset(report["missing_keys"]), frozenset(report["unexpected_keys"]))


def _check_weights_file(source: str) -> None:
    resolved = resolve_source(source)
    base = base_of_adapter(resolved)
    if base is not None:
        source, resolved = base, resolve_source(base)
    folder = Path(resolved.location)
    if resolved.kind not in ("run", "path") or any(folder.glob("*.safetensors")):
        return
    remedy = "restore it"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        remedy = (
            "the weights there are pickled, which can run code, and are not read: where you trust them, load them with "
            "transformers' from_pretrained and write them with save_pretrained"
        )
    raise UserError(f"{source}: there is no model.safetensors in {folder}: {remedy}")


def _prepare(source: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    embedding = network.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    # padding_idx stops the gradient of that row, which is EOS where pad and EOS share an id; masks do that job here
    embedding.padding_idx = None
    if tokenizer is None:
        return
    if len(tokenizer) > embedding.num_embeddings:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens but the model only {embedding.num_embeddings}: "
            "they do not belong together"
        )
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
