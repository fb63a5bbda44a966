"""Attention inputs and the packing check."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from lightning_align.models.masks import (
    attention_inputs,
    check_packing,
    evaluation_mode,
    positions_from_mask,
    predictable_tokens,
)

Make = Callable[..., PreTrainedModel]


def test_conv_2_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_a_token_needs_a_predecessor_in_its_document() -> None:
    real = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 1, 1, -1], [-1, 0, 0, 0, 1]])
    assert predictable_tokens(real).int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert predictable_tokens(real, documents).int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]


def test_unpacked_rows_take_a_plain_mask() -> None:
    real = torch.tensor([[True, True, False]])
    for documents in (None, torch.tensor([[0, 0, -1]])):
        inputs = attention_inputs(AutoConfig.for_model("llama"), real, document_ids=documents)
        assert inputs["attention_mask"].tolist() == [[True, True, False]]
        assert inputs["position_ids"].tolist() == [[0, 1, 1]]
        assert inputs["use_cache"] is False


def test_packed_rows_take_an_additive_block_diagonal_mask_and_restarting_positions() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    inputs = attention_inputs(AutoConfig.for_model("llama"), documents >= 0, document_ids=documents)
    mask = inputs["attention_mask"]
    assert mask.shape == (1, 1, 6, 6)
    assert mask.dtype == torch.float32
    assert (mask == 0)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]


def test_windows_apply_to_the_layers_that_have_them() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1]])
    uniform = AutoConfig.for_model("mistral", sliding_window=2)
    mixed = AutoConfig.for_model("gemma2", sliding_window=2)
    window = attention_inputs(uniform, documents >= 0, document_ids=documents)["attention_mask"]
    assert (window == 0)[0, 0].int().tolist()[3] == [0, 0, 1, 1, 0]
    masks = attention_inputs(mixed, documents >= 0, document_ids=documents, dtype=torch.bfloat16)["attention_mask"]
    assert sorted(masks) == ["full_attention", "sliding_attention"]
    assert torch.equal(masks["sliding_attention"] == 0, window == 0)
    assert (masks["full_attention"] == 0)[0, 0].int().tolist()[3] == [1, 1, 1, 1, 0]
    assert masks["full_attention"].dtype == torch.bfloat16


def test_other_kinds_of_attention_are_refused() -> None:
    config = AutoConfig.for_model("llama")
    config.layer_types = ["chunked_attention"]
    documents = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="chunked_attention"):
        attention_inputs(config, documents >= 0, document_ids=documents)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pre_1_packing_check_passes(any_model: PreTrainedModel, attention: str) -> None:
    if attention == "sdpa" and not any_model._supports_sdpa:
        pytest.skip(f"{type(any_model).__name__} has eager attention only")
    any_model.set_attn_implementation(attention)
    assert check_packing(any_model)


def test_pre_1_packing_check_finds_a_leak(make: Make) -> None:
    model = make("llama")
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    assert not check_packing(model)
    model = make("llama")
    model.config.layer_types = ["chunked_attention"] * 2
    assert not check_packing(model)


def test_evaluation_mode_gives_every_module_its_own_mode_back(llama: PreTrainedModel) -> None:
    llama.train()
    llama.model.norm.eval()
    with evaluation_mode(llama):
        assert not any(module.training for module in llama.modules())
    assert llama.training
    assert not llama.model.norm.training


def test_dpo_5_a_branch_sees_what_it_goes_on_from_and_itself() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 1, 2, 2, 3, 0]])
    inputs = attention_inputs(AutoConfig.for_model("llama"), documents >= 0, positions, documents)
    assert (inputs["attention_mask"] == 0)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_a_branch_goes_on_from_the_last_document_that_starts_at_0() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 1]])
    inputs = attention_inputs(AutoConfig.for_model("llama"), documents >= 0, positions, documents)
    assert (inputs["attention_mask"] == 0)[0, 0, 4].int().tolist() == [0, 0, 1, 0, 1]


def test_pre_1_packing_check_does_not_round_with_the_training(any_model: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert check_packing(any_model)
