"""Endings, their reasons, and the layout of a rollout, of sequences whose logits allow one token only."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightning_align.errors import UserError
from lightning_align.rollout.ledger import Ledger, eos_ids
from lightning_align.rollout.types import Rollout, SamplingParams

EOS = "<end>"
PIECES = ["ab", "Human", ": ", "xyz", "\n\n"]  # tokens of several characters


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, a few longer ones, and special tokens <end> and <turn>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [to_bytes.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet + pieces)}, []))
    raw.pre_tokenizer, raw.decoder = to_bytes, decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(EOS, special=True), AddedToken("<turn>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


@pytest.fixture
def small_model(bytes_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(bytes_tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=100,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@pytest.fixture
def tokens(bytes_tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[int]]:
    """Texts to tokens: a piece or special token whole, anything else byte by byte."""

    def of(*parts: str) -> list[int]:
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        vocabulary = bytes_tokenizer.get_vocab()
        ids = []
        for part in parts:
            encoded = to_bytes.pre_tokenize_str(part)[0][0]
            if part in (EOS, "<turn>"):
                ids.append(vocabulary[part])
            elif part in PIECES:
                ids.append(vocabulary[encoded])
            else:
                ids += [vocabulary[character] for character in encoded]
        return ids

    return of


@pytest.fixture
def play(
    small_model: PreTrainedModel, bytes_tokenizer: PreTrainedTokenizerFast
) -> Callable[[Sequence[list[int]], SamplingParams], Rollout]:
    """Sample scripts: sequence i draws the tokens of script i until it ends. A script too short is an error."""

    def run(scripts: Sequence[list[int]], params: SamplingParams, prompts: Any = None, records: Any = None) -> Rollout:
        prompts = prompts or [[7]] * (len(scripts) // params.num_samples)
        seeds = range(len(scripts))
        ledger = Ledger(prompts, params, seeds, records, small_model, bytes_tokenizer)
        running, step = list(range(len(scripts))), 0
        while running:
            logits = torch.full((len(running), ledger.vocabulary), -20.0)
            for row, sequence in enumerate(running):
                logits[row, scripts[sequence][step]] = 0.0
            chosen, ended = ledger.draw(logits, torch.tensor(running), torch.full((len(running),), step))
            assert chosen.tolist() == [scripts[sequence][step] for sequence in running]
            running = [sequence for sequence, over in zip(running, ended.tolist(), strict=True) if not over]
            step += 1
        return ledger.rollout()

    return run


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 12, "greedy": True} | changes))


# ---------------------------------------------------------------------- ends and reasons
def test_a_completion_ends_at_eos_at_a_stop_string_or_at_the_limit(play: Any, tokens: Any) -> None:
    scripts = [tokens("abc", EOS), tokens("ab", "xyz"), tokens("abcd"), tokens("abc", EOS), tokens("abc", "xyz")]
    rollout = play(scripts, sampling(max_new_tokens=4, stop_strings=("xyz",)))
    assert rollout.finish_reason == ["eos", "stop", "length", "eos", "stop"]
    assert rollout.completion_ids() == scripts  # an ending at the limit is an ending
    assert rollout.completions == ["abc", "abxyz", "abcd", "abc", "abcxyz"]


def test_eos_is_eos_even_when_asked_for_as_a_stop_string(play: Any, tokens: Any) -> None:
    assert play([tokens("a", EOS)], sampling(stop_strings=(EOS,))).finish_reason == ["eos"]


def test_one_token_is_enough(play: Any, tokens: Any) -> None:
    rollout = play([tokens(EOS), tokens("a")], sampling(max_new_tokens=1))
    assert rollout.finish_reason == ["eos", "length"]
    assert rollout.completions == ["", "a"]
    assert rollout.completion_lengths.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("script", "stop", "text"),
    [
        (("abc", "d"), ("c",), "abc"),
        (("abcd", "e"), ("bcd",), "abcd"),  # over several tokens
        (("a", "xyz", "b"), ("y",), "axyz"),  # inside a token: the token completes it
        (("a", "xyz", "b"), ("ax",), "axyz"),  # begins in one token, ends inside another
        (("\n", "\n\n", "a"), ("\n\nH", "\n\n"), "\n\n\n"),
        (("no ", "Human", ": ", "a"), ("Human:",), "no Human: "),
        (("é!",), ("é",), "é"),  # one character of two tokens
        (("x€y",), ("€",), "x€"),  # and of three
        (("a", "<turn>", "b"), ("<turn>",), "a"),  # a special token is text to stop at, not text to read
        (("0123456789", "ab"), ("0123456789a",), "0123456789ab"),
    ],
)
def test_a_stop_string_ends_a_completion_after_the_token_that_completes_it(
    play: Any, tokens: Any, script: tuple[str, ...], stop: tuple[str, ...], text: str
) -> None:
    rollout = play([tokens(*script)], sampling(max_new_tokens=14, stop_strings=stop))
    assert rollout.finish_reason == ["stop"]
    assert rollout.completions == [text]


def test_prompts_and_parts_of_a_stop_string_stop_nothing(play: Any, tokens: Any) -> None:
    prompts = [tokens("a STOP"), tokens("a ST")]  # the second completion begins with the rest
    rollout = play([tokens("STO."), tokens("OP..")], sampling(max_new_tokens=4, stop_strings=("STOP",)), prompts)
    assert rollout.finish_reason == ["length", "length"]


def test_stop_strings_are_found_in_long_completions_as_a_search_of_the_whole_text_would(play: Any, tokens: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    letters = ["a", "b", "é", "ab", "xyz", "\n\n"]
    scripts, expected = [], []
    for _ in range(40):
        parts = [letters[int(i)] for i in torch.randint(0, len(letters), (60,), generator=generator)]
        script = tokens(*parts)
        scripts.append(script)
        text, length = "", 0
        for part in parts:
            text, ids = text + part, tokens(part)
            length += len(ids)
            if "bab" in text or "zéa" in text:
                break
        expected.append(length)
    rollout = play(scripts, sampling(max_new_tokens=60, stop_strings=("bab", "zéa")))
    assert rollout.completion_lengths.tolist() == [min(length, 60) for length in expected]
    assert set(rollout.finish_reason) == {"stop", "length"}


# ---------------------------------------------------------------------- layout
def test_the_rows_of_a_rollout(play: Any, tokens: Any, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [[1, 2, 3], [4]]
    scripts = [tokens("ab", EOS), tokens("cdef"), tokens(EOS), tokens("c", EOS)]
    rollout = play(scripts, sampling(max_new_tokens=4, num_samples=2), prompts, records=[{"number": 0}, {"number": 1}])
    pad = bytes_tokenizer.eos_token_id  # the tokenizer has no token for padding
    rows = [prompts[row // 2] + script for row, script in enumerate(scripts)]
    assert rollout.input_ids.tolist() == [row + [pad] * (7 - len(row)) for row in rows]
    assert rollout.attention_mask.sum(1).tolist() == [len(row) for row in rows]
    slots = torch.arange(7)
    starts, ends = rollout.prompt_lengths[:, None], rollout.attention_mask.sum(1)[:, None]
    assert torch.equal(rollout.attention_mask, slots < ends)
    assert torch.equal(rollout.completion_mask, (slots >= starts) & (slots < ends))
    assert rollout.prompt_lengths.tolist() == [3, 3, 1, 1]
    assert rollout.prompt_index.tolist() == [0, 0, 1, 1]
    assert [record["number"] for record in rollout.records] == [0, 0, 1, 1]
    assert bool((rollout.engine_logp[~rollout.completion_mask] == 0).all())
    assert bool((rollout.engine_logp[rollout.completion_mask] < 0).all())  # close to 0, not 0
    assert rollout.engine_logp.dtype == torch.float32


# ---------------------------------------------------------------------- end-of-sequence tokens
def test_a_turn_ending_token_of_the_generation_config_ends_a_completion(
    small_model: PreTrainedModel, bytes_tokenizer: PreTrainedTokenizerFast, tokens: Any, play: Any
) -> None:
    turn, end = tokens("<turn>", EOS)
    small_model.generation_config.eos_token_id = [turn, 3]  # 3 is a letter: another tokenizer's
    assert eos_ids(small_model, bytes_tokenizer) == sorted([turn, end])
    assert play([[5, turn]], sampling()).finish_reason == ["eos"]
    small_model.generation_config.eos_token_id = turn
    assert eos_ids(small_model, bytes_tokenizer) == sorted([turn, end])
    small_model.generation_config = None
    assert eos_ids(small_model, bytes_tokenizer) == [end]


def test_beginning_and_unknown_tokens_are_never_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.generation_config.eos_token_id = [1, 3]
    assert eos_ids(model, tokenizer) == [2]


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_ids": []}, ValueError, "at least one prompt"),
        ({"seeds": [1]}, ValueError, "1 seeds for 2 completions"),
        ({"records": [{}]}, ValueError, "1 records for 2 prompts"),
        ({"prompt_ids": [[1], []]}, UserError, "prompt 1 has no tokens"),
        ({"prompt_ids": [[1], [2, 999]]}, UserError, "prompt 1 has tokens 2 to 999, outside .* vocabulary of 263"),
        ({"prompt_ids": [[1], [-1]]}, UserError, "prompt 1 has tokens -1 to -1"),
        ({"prompt_ids": [[1], [2] * 89]}, UserError, "prompt 1 has 89 tokens; .* that is 101, but .* 100 positions"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    small_model: PreTrainedModel,
    bytes_tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given = {"prompt_ids": [[1], [2]], "params": sampling(), "seeds": [1, 2], "records": None} | arguments
    with pytest.raises(error, match=message) as caught:
        Ledger(**given, model=small_model, tokenizer=bytes_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_prompt_may_fill_the_context_to_the_last_position(play: Any) -> None:
    assert len(play([[5] * 12], sampling(), prompts=[[2] * 88])) == 1


def test_ends_must_lie_in_the_vocabulary(
    small_model: PreTrainedModel, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    small_model.resize_token_embeddings(100)
    with pytest.raises(UserError, match="end-of-sequence token 261 is outside"):
        Ledger([[1]], sampling(), [1], None, small_model, bytes_tokenizer)


def test_a_tokenizer_without_end_is_refused(small_model: PreTrainedModel) -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UserError, match="no end-of-sequence token: set eos_token"):
        Ledger([[1]], sampling(), [1], None, small_model, PreTrainedTokenizerFast(tokenizer_object=raw))


def test_a_model_without_position_limit_has_none(small_model: PreTrainedModel, play: Any) -> None:
    del small_model.config.max_position_embeddings
    assert len(play([[5] * 12], sampling(), prompts=[[2] * 300])) == 1


def test_logits_that_are_not_numbers_are_an_error(
    small_model: PreTrainedModel, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    ledger = Ledger([[1], [2]], sampling(max_new_tokens=1), [1, 2], None, small_model, bytes_tokenizer)
    logits = torch.zeros(2, ledger.vocabulary)
    logits[1] = torch.nan
    ledger.draw(logits, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="not numbers"):
        ledger.rollout()
