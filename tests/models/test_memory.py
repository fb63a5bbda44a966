"""The memory estimate against counted tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.models.memory import estimate_memory

SIZES = {
    "trained_bytes": 4_000_000,
    "frozen_bytes": 2_000_000,
    "tokens_per_microbatch": 512,
    "hidden_size": 128,
    "num_layers": 4,
    "vocab_size": 512,
}


def test_parts_add_up_and_scale() -> None:
    parts = estimate_memory(**SIZES)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    assert parts["parameters"] == 6_000_000
    assert parts["gradients"] == 4_000_000
    assert parts["optimizer"] == 8_000_000
    assert parts["logits"] == 512 * 512 * 4
    narrow = estimate_memory(**SIZES, dtype_bytes=2)
    assert narrow["activations"] == parts["activations"] // 2
    assert estimate_memory(**SIZES, gradient_checkpointing=True)["activations"] < parts["activations"]


def test_logits_do_not_grow_without_bound() -> None:
    huge = estimate_memory(**(SIZES | {"tokens_per_microbatch": 10**6, "vocab_size": 128_256}))
    assert huge["logits"] < 400 * 2**20


def test_activations_are_about_what_a_llama_keeps(make: Callable[..., PreTrainedModel]) -> None:
    model = make("llama", hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_key_value_heads=4)
    model.set_attn_implementation("sdpa")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(8, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    assert 0.8 < sum(kept.values()) / estimate_memory(**SIZES)["activations"] < 1.25
