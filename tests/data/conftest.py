"""Tokenizers of several families with chat templates of several styles, and a tiny model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_align.models.tokenizer_training import train_tokenizer

TEXTS = [
    "list three animals . answer : cat , dog , bird .",
    "say something kind about rain . answer : rain is good !",
    "Hello there! How are you? I'm fine.\n\nThanks  a lot, 12 times.",
    "Naïve café — 東京 🎉 ends\nhere\t.",
]
USER = "{%- if m['role'] == 'user' -%}"
TURNS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
)
TEMPLATES = {
    "chatml": TURNS + "{%- endif -%}",
    "llama2": "{%- for m in messages -%}"
    + USER
    + "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{%- else -%}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{%- endif -%}{%- endfor -%}",
    "mistral": "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}" + USER + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{%- else -%}{{ m['content'] + eos_token }}"
    "{%- endif -%}{%- endfor -%}",
    "phi": TURNS + "{%- else -%}{{ eos_token }}{%- endif -%}",
    "bare": "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}",
    # what an earlier answer was thinking is forgotten, so no rendering is a prefix of a longer one
    "forgetful": "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and not loop.last -%}{{ m['content'].split('</think>')[-1] }}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    # as Qwen3: thoughts are kept in the last turn only, which has a block for them even if it is empty
    "qwen3": "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- set parts = m['content'].split('</think>') -%}"
    "{%- if m['role'] == 'assistant' and loop.last -%}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{%- endif -%}{{ parts[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] }}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    # as DeepSeek-R1: thoughts are never kept, but the generation prompt opens one
    "deepseek": "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{ '[INST]' + m['content'] }}"
    "{%- else -%}{{ '[/INST]' + m['content'].split('</think>')[-1] + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[/INST]<think>\n' }}{%- endif -%}",
    # once anything follows an answer, even the questions are written differently
    "hopeless": "{%- for m in messages -%}{{ messages | length ~ m['role'] + ': ' + m['content'] + eos_token }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}",
}


def byte_level(*, bos: bool, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    return _wrapped(core, special, bos, pad_is_eos)


def metaspace(*, bos: bool) -> PreTrainedTokenizerFast:
    """BPE with ▁ for spaces and one put in front of every text, as in Llama 2 and Mistral."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(TEXTS) + "▁:userassistant"))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    return _wrapped(core, special, bos, False)


def _wrapped(core: Tokenizer, special: list[str], bos: bool, pad_is_eos: bool) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>",
        extra_special_tokens=special[4:],
        clean_up_tokenization_spaces=False,
    )


BASES = {
    "bytes": byte_level(bos=False),
    "bytes+bos": byte_level(bos=True),
    "bytes+pad=eos": byte_level(bos=True, pad_is_eos=True),
    "metaspace": metaspace(bos=False),
    "metaspace+bos": metaspace(bos=True),
    "words": train_tokenizer(TEXTS, vocab_size=100, algorithm="words"),
    "words+bos": train_tokenizer(TEXTS, vocab_size=100, algorithm="words", bos=True),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """``make_tokenizer(base, template=None)``: a copy of a base with one of the chat templates (or its own)."""

    def make(base: str = "bytes", template: str | None = None) -> PreTrainedTokenizerBase:
        tokenizer = copy.deepcopy(BASES[base])
        if template is not None:
            tokenizer.chat_template = TEMPLATES.get(template, template)
        return tokenizer

    return make


@pytest.fixture(params=sorted(BASES))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Each base in turn."""
    return copy.deepcopy(BASES[request.param])


@pytest.fixture(scope="session")
def llama() -> Callable[..., PreTrainedModel]:
    """``llama(vocabulary)``: a random two-layer model in float64."""

    def make(vocabulary: int) -> PreTrainedModel:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
            for parameter in model.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


class Module:
    """What a datamodule asks of a module."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, max_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.limit = max_tokens

    def get_tokenizer(self, texts: Callable[[], Any]) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            self.tokenizer = train_tokenizer(texts(), vocab_size=512, algorithm="words")
        return self.tokenizer

    def max_tokens(self) -> int | None:
        return self.limit


@pytest.fixture(scope="session")
def module() -> type[Module]:
    """The class above."""
    return Module
