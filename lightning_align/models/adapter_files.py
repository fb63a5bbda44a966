"""Adapters in folders, in the format of ``peft``: written beside what a model folder holds, and read back."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lightning_align.errors import UserError
from lightning_align.models.lora import NAME, fingerprint_of_base, inject, lora_layers
from lightning_align.models.sources import ADAPTER_CONFIG, base_of_adapter, resolve_source

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
# The configuration of base and adapter together. It must not be called config.json: transformers would then look for a
# whole model in the folder.
MERGED_CONFIG = "merged_config.json"
BASE = "base.json"  # the fingerprint of what the adapter was trained on (two keys of metadata have no fixed order)
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


def check_base(source: str) -> None:
    """Raise :class:`UserError` unless an adapter of ``source`` can be kept by itself."""
    resolved = resolve_source(source)
    if base_of_adapter(resolved) is not None:
        raise UserError(
            f"model.lora_export is adapter, but {source} is an adapter itself, so no folder holds the model that the "
            "new one belongs to: give lora_export merged"
        )


def write_adapter(network: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the trained part of a network: its adapter, and what else learns (a score head).

    Args:
        network: With an adapter.
        folder: An existing one.
        base: The model argument that the network was loaded from.
    """
    values = get_peft_model_state_dict(network, save_embedding_layers=False)
    further = {name: p for name, p in network.named_parameters() if p.requires_grad and name not in _adapter(network)}
    saved = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in {**values, **further}.items()}
    save_file(saved, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps({"fingerprint": fingerprint_of_base(network.base_model)}) + "\n")
    config: LoraConfig = copy.deepcopy(network.peft_config[NAME])  # type: ignore[assignment]
    config.target_modules = sorted(config.target_modules or ())
    config.base_model_name_or_path = resolve_source(base).location
    config.inference_mode = True
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in further}) or None
    ends = type(network).__name__
    config.task_type = next((task for end, task in TASKS.items() if ends.endswith(end)), None)
    config.save_pretrained(str(folder))
    network.config.to_json_file(folder / MERGED_CONFIG)
    if network.can_generate() and network.generation_config is not None:
        network.generation_config.save_pretrained(folder)


def _adapter(network: PreTrainedModel) -> set[str]:
    """Names of the adapter's parameters."""
    return {
        f"{name}.{inner}"
        for name, layer in lora_layers(network).items()
        for inner, _ in layer.named_parameters()
        if not inner.startswith("base_layer.")
    }


@torch.no_grad()
def read_adapter(network: PreTrainedModel, folder: Path) -> frozenset[str]:
    """Put the adapter of a folder into the network it was trained on; all of it is frozen then.

    Returns:
        Names of further weights that it brought (a score head).

    Raises:
        UserError: If it is of a kind that is not read here, is damaged, or belongs to another network.
    """
    network.requires_grad_(False)
    config = _read_config(folder)
    values = _read_weights(folder)
    base = folder / BASE  # which only this program writes
    if base.is_file() and json.loads(base.read_text())["fingerprint"] != fingerprint_of_base(network.base_model):
        raise UserError(
            f"the adapter {folder} belongs to other weights than {config.base_model_name_or_path} holds now: "
            "train it again, or bring back the model it was trained on"
        )
    config.modules_to_save = None  # peft would keep the old ones beside them
    config.lora_dropout = 0.0  # which was of the run that trained it
    try:
        inject(network, config)
    except ValueError as error:
        raise UserError(f"the adapter {folder} does not fit {config.base_model_name_or_path}: {error}") from error
    _check_kind(network, folder)
    network.requires_grad_(False)
    state = network.state_dict()
    expected, further = _adapter(network), set()
    for name, tensor in values.items():
        inside = name.removeprefix(PREFIX)
        if inside not in state:
            part, _, leaf = inside.rpartition(".")
            inside = f"{part}.{NAME}.{leaf}"
        if inside not in state or state[inside].shape != tensor.shape:
            raise UserError(f"the adapter {folder} does not fit {config.base_model_name_or_path}: {name} is not in it")
        state[inside].copy_(tensor)
        if inside in expected:
            expected.remove(inside)
        else:
            further.add(inside)
    if expected:
        raise UserError(f"{folder / WEIGHTS} is not whole: {len(expected)} weights are missing, first {min(expected)}")
    if network.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    return frozenset(further)


def _read_config(folder: Path) -> LoraConfig:
    file = folder / ADAPTER_CONFIG
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds an adapter of kind {content.get('peft_type')}: only LORA is read here")
    return LoraConfig.from_peft_type(**content)


def _read_weights(folder: Path) -> Mapping[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no {WEIGHTS} (pickled weights are not read)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _check_kind(network: PreTrainedModel, folder: Path) -> None:
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and not (
            isinstance(module, LoraLinear) and not module.lora_variant and not module.lora_bias[NAME]
        ):
            raise UserError(
                f"{folder} holds an adapter with more than LoRA on linear layers ({name}): merge it into its model "
                "with peft first"
            )
