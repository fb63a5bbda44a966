"""How much memory an engine takes beside the model it samples from: said before anything is loaded."""

import torch
from transformers import PreTrainedModel

from lightning_align.errors import UserError
from lightning_align.rollout.adapters import build_plan
from lightning_align.rollout.engine import EngineName
from lightning_align.rollout.projection import PACK_FROM, PlainProjection


def sampler_memory(
    name: EngineName, model: PreTrainedModel, device: torch.device, *, rows: int, slots: int, dtype_bytes: int
) -> int:
    """Bytes of the keys and values of a full batch, and of the engine's copies of weights.

    Args:
        name: The engine, as for ``build_engine``.
        model: The model without its weights, on device ``meta``.
        device: Where it will sample.
        rows: Sequences decoded at a time.
        slots: Most tokens of a sequence.
        dtype_bytes: Bytes per weight, key and value.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * rows * slots
    return (cache + (0 if name == "generate" else _copied(model, device))) * dtype_bytes


def _copied(model: PreTrainedModel, device: torch.device) -> int:
    """Elements of the projections that a plan joins, or packs for a CPU, and so does not share with the model."""
    try:
        plan = build_plan(model)
    except UserError:  # the static engine does not know it: transformers' ``generate`` will sample
        return 0
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    copied = 0
    for projection in (plan.head, *(p for layer in plan.layers for p in (layer.qkv, layer.out, layer.up, layer.down))):
        assert isinstance(projection, PlainProjection)  # nothing is packed on device ``meta``
        weight = projection.weight
        if weight.untyped_storage()._cdata not in own or (device.type == "cpu" and weight.numel() >= PACK_FROM):
            copied += weight.numel()
    return copied
