"""Tiny random models of many architectures with eager attention, and a batch of sequences of unequal length."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY = 41
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
MIXED = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED | {"attention_bias": True}),
    "llama_tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", HEADED),
    "qwen3_sliding": ("qwen3", HEADED | {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    "mistral": ("mistral", HEADED | {"sliding_window": None}),
    "mistral_sliding": ("mistral", HEADED | {"sliding_window": 4}),
    "gemma2": ("gemma2", HEADED | {"sliding_window": 4, "layer_types": MIXED, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", HEADED | {"sliding_window": 4, "layer_types": MIXED}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox", SMALL),
    "phi": ("phi", GROUPED),
    "phi3": ("phi3", GROUPED),
    "granite": ("granite", GROUPED | {"logits_scaling": 3.0}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25}),
    "olmo2": ("olmo2", GROUPED),
    "smollm3": ("smollm3", GROUPED),
}
WITHOUT_CLASSIFIER = {"granite", "cohere"}


def build(name: str, auto_class: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode, logits a few units apart, biases and norms random as well."""
    model_type, fields = ARCHITECTURES[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(model_type, **(special | fields | changes))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = auto_class.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def make() -> Callable[..., PreTrainedModel]:
    """The builder itself."""
    return build


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn."""
    return build(request.param)


@pytest.fixture(params=sorted(set(ARCHITECTURES) - WITHOUT_CLASSIFIER))
def any_classifier(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture that transformers can score sequences with."""
    return build(request.param, AutoModelForSequenceClassification, num_labels=1)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def sequences() -> list[list[int]]:
    """Five sequences of 3 to 11 tokens; pad, BOS and EOS ids may occur anywhere."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (11, 3, 7, 8, 5)]


@pytest.fixture(scope="session")
def pad() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Ids, attention mask and completion mask (all but the first two tokens), padded on one side, by extra too."""

    def padded(rows: list[list[int]], side: str, extra: int, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        width = max(map(len, rows)) + extra
        ids, real, completion = [], [], []
        for row in rows:
            gap = width - len(row)
            before, after = (gap, 0) if side == "left" else (0, gap)
            ids.append([pad_id] * before + row + [pad_id] * after)
            real.append([False] * before + [True] * len(row) + [False] * after)
            completion.append([False] * (before + 2) + [True] * (len(row) - 2) + [False] * after)
        return torch.tensor(ids), torch.tensor(real), torch.tensor(completion)

    return padded


@pytest.fixture(scope="session")
def golden_case() -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs and outputs of one of the golden vectors."""
    cases = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["cases"]
    return lambda name: (cases[name]["inputs"], cases[name]["outputs"])
