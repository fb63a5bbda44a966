"""Trained tokenizers: round trips, special tokens, chat template, determinism."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models.tokenizer_training import train_tokenizer

TEXTS = [
    "list three animals . answer : cat , dog , bird .",
    "say something kind about rain . answer : rain is good !",
    "reverse these words : cat dog . answer : dog cat",
    "Naïve café — 東京 🎉 ends\nhere\t.",
]
WORDS = train_tokenizer(TEXTS * 3, vocab_size=64, algorithm="words")
BPE = train_tokenizer(TEXTS * 3, vocab_size=300, algorithm="bpe")


@pytest.mark.parametrize("text", TEXTS[:3])
@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_playground_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


def test_words_are_one_token_each() -> None:
    text = TEXTS[0]
    assert len(WORDS(text)["input_ids"]) == len(text.split())
    assert WORDS.convert_ids_to_tokens(WORDS("unheard cat")["input_ids"]) == ["<unk>", "cat"]


@given(st.text())
def test_bytes_reproduce_any_text(text: str) -> None:
    for token in BPE.all_special_tokens:
        text = text.replace(token, "")
    assert BPE.decode(BPE(text)["input_ids"], skip_special_tokens=False) == text


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_special_tokens_are_distinct_and_never_added_by_themselves(tokenizer: PreTrainedTokenizerBase) -> None:
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2]
    assert tokenizer.bos_token_id is None
    assert not set(tokenizer("cat dog")["input_ids"]) & set(tokenizer.all_special_ids)
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_sft_3_template_marks_assistant_turns_with_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "say something kind"},
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "bird"},
        {"role": "assistant", "content": "good !"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|system|>say something kind<|end|><|user|>cat<|end|><|assistant|>dog<eos>"
        "<|user|>bird<|end|><|assistant|>good !<eos>"
    )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text == prompt + "good !<eos>"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(learnt).replace(" ", "") == "dog<eos>good!<eos>"


@pytest.mark.parametrize("algorithm", ["words", "bpe"])
def test_sft_6_with_bos_there_is_exactly_one(algorithm: str) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, algorithm=algorithm, bos=True)  # type: ignore[arg-type]
    assert tokenizer("cat dog")["input_ids"].count(tokenizer.bos_token_id) == 1
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_saving_keeps_everything(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again.all_special_ids == tokenizer.all_special_ids
    for text in TEXTS[:3]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text


@pytest.mark.parametrize("algorithm", ["words", "bpe"])
def test_the_same_texts_give_the_same_ids_in_another_process(algorithm: str) -> None:
    code = (
        "from lightning_align.models.tokenizer_training import train_tokenizer\n"
        f"t = train_tokenizer({TEXTS!r}, vocab_size=290, algorithm={algorithm!r})\n"
        "import hashlib; print(hashlib.sha256(repr(sorted(t.get_vocab().items())).encode()).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_frequent_words_come_first() -> None:
    tokenizer = train_tokenizer(["d b b b a a c c"], vocab_size=10, algorithm="words")
    assert tokenizer.convert_ids_to_tokens([7, 8, 9]) == ["b", "a", "c"]
    assert len(tokenizer) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 4, "algorithm": "words"}, "words needs at least"),
        ({"vocab_size": 200, "algorithm": "bpe"}, "bpe needs at least 263"),
        ({"vocab_size": 400, "algorithm": "letters"}, "give words or bpe"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(TEXTS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["words", "bpe"])
def test_no_text(algorithm: str) -> None:
    with pytest.raises(UserError, match="text to train a tokenizer on"):
        train_tokenizer([" "], vocab_size=300, algorithm=algorithm)  # type: ignore[arg-type]
