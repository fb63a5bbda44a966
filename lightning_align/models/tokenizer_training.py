"""Tokenizers trained on the spot: whole words for the playground, byte-level BPE for anything else."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_align.errors import UserError

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")
TURN_END = "<|end|>"
BYTES = 256
# An assistant's turn ends with EOS, so that one token means "finished" with and without a template; other turns end
# with their own, so that a prompt never contains EOS. The markers tell transformers which tokens carry the loss.
CHAT_TEMPLATE = (
    "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ('user', 'system') -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, algorithm: Literal["words", "bpe"], bos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with ``<pad> <eos> <unk>``, turn tokens and a chat template; the same texts give the same ids.

    Args:
        texts: Training texts, read once.
        vocab_size: Largest number of tokens, special ones included; ``words`` may end with fewer.
        algorithm: ``words`` splits at white space and decodes to words joined by single spaces; ``bpe`` is byte level
            and reproduces any text.
        bos: Whether sequences begin with ``<bos>``.

    Raises:
        UserError: If the vocabulary has no room for the special tokens (and all bytes), or there is no text.
    """
    special = [PAD, *([BOS] if bos else []), EOS, UNKNOWN, *TURNS, TURN_END]
    smallest = len(special) + (BYTES if algorithm == "bpe" else 1)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.train.vocab_size is {vocab_size}: {algorithm} needs at least {smallest}")
    if algorithm == "words":
        tokenizer = _train_words(texts, vocab_size, special)
    elif algorithm == "bpe":
        tokenizer = _train_bpe(texts, vocab_size, special)
    else:
        raise UserError(f"tokenizer.train.algorithm is {algorithm}: give words or bpe")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS if bos else None,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[*TURNS, TURN_END],
        clean_up_tokenization_spaces=False,  # it would glue "cat ," together
    )
    trained.chat_template = CHAT_TEMPLATE
    return trained


def _train_words(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for token in special:
        counts.pop(token, None)
    if not counts:
        raise UserError("there is no text to train a tokenizer on")
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = special + by_frequency[: vocab_size - len(special)]
    model = models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(special) + BYTES:
        raise UserError("there is too little text to train a tokenizer on")
    return tokenizer
