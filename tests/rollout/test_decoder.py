"""The decoder over every supported architecture against the model's own forward, and what it refuses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_align.errors import UserError
from lightning_align.rollout import StaticCacheEngine, projection

LONG = [[(5 * position + 3 * row) % 53 for position in range(length)] for row, length in enumerate((40, 2, 13, 29, 7))]
SMALL = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
ROPE = {"rope_theta": 1e4}
VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, linear rope": lambda: LlamaForCausalLM(
        LlamaConfig(**GATED, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0})
    ),
    "llama, llama3 rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **GATED,
            rope_parameters=ROPE
            | {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "llama, yarn rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **GATED,
            rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        )
    ),
    "llama, wide heads": lambda: LlamaForCausalLM(LlamaConfig(**GATED, head_dim=24, tie_word_embeddings=True)),
    "mistral, no window": lambda: MistralForCausalLM(MistralConfig(**GATED, sliding_window=None)),
    "qwen2, windows in some layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(**GATED, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "gemma2, no soft-caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GATED, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=None)
    ),
    "gpt2, scaled by layer": lambda: GPT2LMHeadModel(
        GPT2Config(**SMALL, max_position_embeddings=64, scale_attn_by_inverse_layer_idx=True)
    ),
}


def relative_difference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]) -> float:
    """Between logits of a prefill with one decoding step and those of the model on each prompt alone."""
    ours = StaticCacheEngine(model, tokenizer).logits(prompts)
    with torch.no_grad():
        theirs = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    return float((ours - theirs).abs().max() / (1 + theirs.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_equal_the_models_for_every_architecture(
    any_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    tolerance: float,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "PACK_FROM", 0 if packed else 2**40)
    assert relative_difference(any_model.to(dtype), tokenizer, LONG) < tolerance


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_logits_equal_the_models_for_variants(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = VARIANTS[name]().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    assert relative_difference(model, tokenizer, LONG) < 1e-5


def test_a_wrong_weight_shows_in_the_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The comparison itself can fail."""
    engine = StaticCacheEngine(model, tokenizer)
    changed = copy.deepcopy(model)
    changed.model.layers[0].self_attn.v_proj.weight.data[0] += 0.1
    assert float((engine.logits(LONG) - StaticCacheEngine(changed, tokenizer).logits(LONG)).abs().max()) > 1e-3


# ---------------------------------------------------------------------- what the decoder refuses
class Wrapped(nn.Linear):
    """What adapters and quantisation do: a linear layer that is more than its weight."""


def test_an_unknown_architecture_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48))
    with pytest.raises(UserError, match=r"does not know GPTNeoXForCausalLM \(it knows Llama, .*use engine generate"):
        StaticCacheEngine(model, tokenizer)


def test_wrapped_linear_layers_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.model.layers[1].mlp.down_proj = Wrapped(48, 32)
    with pytest.raises(UserError, match="plain linear layers, not Wrapped"):
        StaticCacheEngine(model, tokenizer)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**SMALL, add_cross_attention=True)), "no cross-attention"),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**GATED, head_dim=8, use_bidirectional_attention=True)),
            "causal attention only",
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**GATED, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0})
            ),
            "no 'dynamic' rotary embedding",
        ),
    ],
    ids=["cross-attention", "bidirectional", "dynamic rope"],
)
def test_unsupported_settings_are_refused(
    build: Callable[[], PreTrainedModel], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        StaticCacheEngine(build(), tokenizer)
