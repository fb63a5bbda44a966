"""Tiny random models of every supported architecture, and a tokenizer for them."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 53
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # logits far enough apart that greedy choices are not decided by rounding
}
GATED = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
SMALL_HEADS = GATED | {"head_dim": 8}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL_HEADS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL_HEADS, sliding_window=5)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**(SMALL_HEADS | {"num_key_value_heads": 1}))),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL_HEADS, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=9.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL_HEADS,
            sliding_window=5,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**COMMON)),
}


def build_model(name: str) -> PreTrainedModel:
    """A random model; biases and norm weights are random too, since the defaults would hide their absence."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = BUILDERS[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=sorted(BUILDERS))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn."""
    return build_model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    """A Llama."""
    return build_model("llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 … w52 and the usual special tokens."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{index}" for index in range(4, VOCABULARY)]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of unequal length, two of them equal."""
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 1, 9, 3, 7, 2, 9]
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
