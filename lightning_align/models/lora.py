"""Low-rank adapters (LoRA, Hu et al. 2021), through ``peft``: added, switched off, merged, saved and read.

An adapter is put *into* a network, whose class, decoder and output layer stay what they are: an adapted linear layer
computes ``W x + (alpha / r) · B A x``. ``W`` is frozen, ``B`` starts at 0: the network starts as it was, and with its
adapters switched off it is that again, exactly.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeGuard

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_align.errors import UserError, nearest

ALL_LINEAR = "all-linear"
NAME = "default"  # of the one adapter that a network has, in peft's tables
SAMPLES = 1024  # values of each weight that go into a fingerprint


@dataclass(frozen=True)
class LoraOptions:
    """What adapters are like.

    Args:
        r: Their rank.
        alpha: Their output is multiplied by alpha / r.
        dropout: Of their input.
        target_modules: ``all-linear``, which is every linear layer of the decoder, or names of layers, as ``q_proj``.
    """

    r: int
    alpha: int
    dropout: float
    target_modules: str | list[str]


@dataclass(frozen=True)
class WithoutAdapter:
    """A network as it is with its adapters switched off, where a reference is wanted: it costs no memory."""

    network: PreTrainedModel


@contextmanager
def in_use(model: "nn.Module | WithoutAdapter") -> Iterator[nn.Module]:
    """The network to call, in the state that is meant."""
    if isinstance(model, WithoutAdapter):
        with adapters_off(model.network):
            yield model.network
    else:
        yield model


# ---------------------------------------------------------------------- adding
def add_lora(network: PreTrainedModel, options: LoraOptions, *, partly: bool = False) -> PreTrainedModel:
    """Freeze a network and put trainable adapters into it, which are float32 or wider.

    Args:
        network: A language model, a decoder, or a sequence classifier. One that has an adapter already keeps that.
        options: What they are like.
        partly: Whether it may lack some of the named layers, as a decoder lacks the output layer.

    Raises:
        UserError: If a named layer does not exist or cannot be adapted.
    """
    network.requires_grad_(False)
    if not lora_layers(network):
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=_targets(network, options.target_modules, partly),
        )
        inject(network, config)
    for layer in lora_layers(network).values():
        layer.set_adapter(NAME)  # which makes it trainable
    return network


def inject(network: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into a network, as peft describes them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")  # of GPT-2's layers, where peft sets it itself
        with next(network.parameters()).device:  # or adapters of a network on ``meta`` would be real
            inject_adapter_in_model(config, network, NAME)
    cast_adapter_dtype(network, NAME)


def _targets(network: PreTrainedModel, wanted: str | list[str], partly: bool) -> list[str]:
    """Full names of the layers to adapt."""
    output = network.get_output_embeddings()
    decoder = {id(module) for module in network.base_model.modules()}
    inner = [name for name, module in network.named_modules() if _is_linear(module) and id(module) in decoder]
    if wanted == ALL_LINEAR:
        if not inner:
            raise UserError(f"{type(network).__name__} has no plain linear layers that an adapter could be added to")
        return inner
    outer = [name for name, module in network.named_modules() if module is output and _is_linear(module)]
    found: list[str] = []
    for item in wanted:
        matches = [name for name in inner + outer if name == item or name.endswith(f".{item}")]
        if not matches and not partly:
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in inner + outer))
            hint = nearest(item, known) or f" (it has {', '.join(known)})"
            raise UserError(
                f"model.lora_target_modules names {item}, but {type(network).__name__} has no such linear layer{hint}"
            )
        found += [name for name in matches if name not in found]
    if set(found) & set(outer) and network.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"model.lora_target_modules names the output layer {outer[0]}, which shares its weight with the input "
            f"embedding in this {type(network).__name__}: an adapter cannot be merged into one of them, leave it out"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def lora_layers(network: nn.Module) -> dict[str, LoraLinear]:
    """Adapted layers by name."""
    return {name: module for name, module in network.named_modules() if is_adapted(module)}


def is_adapted(module: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether it is a linear layer with an adapter."""
    return isinstance(module, LoraLinear)


def base_layer(layer: LoraLinear) -> nn.Linear | Conv1D:
    """The layer itself."""
    inner = layer.get_base_layer()
    assert isinstance(inner, nn.Linear | Conv1D)
    return inner


def has_dropout(layer: LoraLinear) -> bool:
    """Whether its adapter drops inputs while it trains."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in layer.lora_dropout.values())


# ---------------------------------------------------------------------- switching off and merging
@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network as it was before it had adapters, for a while."""
    layers = [layer for layer in lora_layers(network).values() if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted_weight(layer: LoraLinear) -> Tensor:
    """``W + (alpha / r) · B A`` in the layout and dtype of ``W``, differentiable; ``W`` itself with adapters off."""
    weight = base_layer(layer).weight
    if layer.disable_adapters:
        return weight
    return (weight + layer.get_delta_weight(NAME)).to(weight.dtype)


@torch.no_grad()
def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """State of the network without adapters that computes what this one computes now."""
    state = network.state_dict()
    for name, layer in lora_layers(network).items():
        for key in [key for key in state if key.startswith(f"{name}.")]:
            values, inner = state.pop(key), key.removeprefix(f"{name}.")
            if inner.startswith("base_layer."):
                state[f"{name}.{inner.removeprefix('base_layer.')}"] = values
        state[f"{name}.weight"] = adapted_weight(layer).detach()
    return state


def merged(network: PreTrainedModel) -> PreTrainedModel:
    """A network of the same class whose weights have the adapters in them, to be saved; the same one if it has none.

    Weights that no adapter touches are shared, not copied. It cannot be called: what is not saved is not there.
    """
    if not lora_layers(network):
        return network
    with torch.device("meta"):
        plain = type(network)(copy.deepcopy(network.config))
    plain.load_state_dict(plain_state(network), assign=True)
    plain.tie_weights()
    if network.can_generate():
        plain.generation_config = copy.deepcopy(network.generation_config)
    return plain.train(network.training)


@torch.no_grad()
def merge_(network: PreTrainedModel) -> None:
    """Add the adapters to the weights in place and take them out; everything may learn then."""
    for name, layer in lora_layers(network).items():
        inner = base_layer(layer)
        inner.weight.copy_(adapted_weight(layer))
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, inner)
    del network.peft_config
    network.requires_grad_(True)


def share_frozen(owner: PreTrainedModel, other: PreTrainedModel) -> int:
    """Let frozen weights of ``other``'s decoder that equal ``owner``'s take no memory of their own; returns how many.

    So a policy, its value model and a reward model that are adapters of one base hold it once.
    """
    own = {name.replace(".base_layer.", "."): p for name, p in owner.base_model.named_parameters()}
    shared = 0
    for name, module in list(other.base_model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            twin = own.get(f"{name}.{leaf}".replace(".base_layer.", ".").removeprefix("."))
            if twin is not None and twin is not parameter and _interchangeable(twin, parameter):
                setattr(module, leaf, twin)
                shared += 1
    return shared


def _interchangeable(one: nn.Parameter, other: nn.Parameter) -> bool:
    if one.requires_grad or other.requires_grad:
        return False
    same_kind = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same_kind and torch.equal(one, other)


# ---------------------------------------------------------------------- what identifies a base
def fingerprint_of_base(module: nn.Module) -> str:
    """A hash of samples of the frozen weights, the same whatever floating-point type they are held in."""
    digest = blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            sample = values[:: max(1, len(values) // SAMPLES)].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name.replace('.base_layer.', '.')} {tuple(parameter.shape)}".encode())
            digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()
