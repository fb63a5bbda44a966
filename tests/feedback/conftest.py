"""Tiny models with tokenizers of their own, in plain text and with a chat template."""

import copy
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_align.feedback.models import LocalModel

TEXTS = ["Preferred Response=1 or 10, 2 or 20.", "the answer is first, the answer is second", "Rating= 1 2 3 10"]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which words have one token or several."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special[4:],
    )


BYTES = byte_level()


@pytest.fixture(scope="session")
def local_model() -> Callable[..., LocalModel]:
    """``local_model(chat=False, batch_size=128)``: a random Llama whose logits lie a few units apart."""

    def make(*, chat: bool = False, batch_size: int = 128, seed: int = 5) -> LocalModel:
        tokenizer = copy.deepcopy(BYTES)
        tokenizer.chat_template = TEMPLATE if chat else None
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.3,
            pad_token_id=3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = LlamaForCausalLM(config).eval().requires_grad_(False)
        return LocalModel("tiny", network, tokenizer, batch_size=batch_size)

    return make
