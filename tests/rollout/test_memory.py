"""The memory estimate of samplers against the tensors that an engine holds."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_align.rollout.memory import sampler_memory
from lightning_align.rollout.projection import PackedProjection
from lightning_align.rollout.static import StaticCacheEngine

ROWS, SLOTS = 6, 40


def held(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Bytes of an engine's cache, and of those of its projections that are not the model's own tensors."""
    decoder = StaticCacheEngine(model, tokenizer)._decoder
    layers = decoder.plan.layers
    projections = [decoder.plan.head, *(p for layer in layers for p in (layer.qkv, layer.out, layer.up, layer.down))]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copied = [
        projection.weight
        for projection in projections
        if isinstance(projection, PackedProjection) or projection.weight.untyped_storage().data_ptr() not in own
    ]
    size = model.dtype.itemsize
    return decoder.new_cache(ROWS, SLOTS).storage.numel() * size + sum(weight.numel() for weight in copied) * size


def estimated(name: str, model: PreTrainedModel, device: str = "cpu") -> int:
    """The estimate, from the architecture alone."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    size = model.dtype.itemsize
    return sampler_memory(name, empty, torch.device(device), rows=ROWS, slots=SLOTS, dtype_bytes=size)  # type: ignore[arg-type]


def test_the_estimate_is_what_an_engine_holds(any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert estimated("static", any_model) == estimated("auto", any_model) == held(any_model, tokenizer)
    narrow = any_model.to(torch.bfloat16)
    assert estimated("static", narrow) == held(narrow, tokenizer)


def test_large_projections_are_packed_on_a_cpu_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    wide = type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_size": 512, "intermediate_size": 640}))
    assert estimated("static", wide) == held(wide, tokenizer)
    assert estimated("static", wide, "cuda") < estimated("static", wide)


def test_generate_copies_nothing_and_neither_does_auto_where_it_falls_back(model: PreTrainedModel) -> None:
    cache = 2 * 3 * 2 * 8 * ROWS * SLOTS * 4  # layers, key-value heads, head dimension
    assert estimated("generate", model) == cache < estimated("auto", model)

    class Unknown(type(model)):  # type: ignore[misc]
        """An architecture without an adapter."""

    unknown = Unknown(model.config)
    assert estimated("auto", unknown) == cache
