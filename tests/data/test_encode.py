"""Which ids records become and which carry loss: turns, ends, BOS, the seam between prompt and completion."""

import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lightning_align.data.encode import (
    Encoded,
    encode_conversations,
    encode_messages,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_prompts,
    encode_texts,
)
from lightning_align.data.templates import conventions
from lightning_align.errors import UserError

Make = Callable[..., PreTrainedTokenizerBase]
MARKERS = re.compile(r"\{%-? (?:end)?generation -?%\}")
CHAT = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "I'm fine."},
    {"role": "user", "content": "cat\n"},
    {"role": "assistant", "content": "dog , bird\n\n"},
    {"role": "user", "content": "12 times"},
    {"role": "assistant", "content": "東京 🎉"},
]
LEARNT = {
    "chatml": ["I'm fine.<|im_end|>", "dog , bird\n\n<|im_end|>", "東京 🎉<|im_end|>"],
    "llama2": [" I'm fine. </s>", " dog , bird\n\n </s>", " 東京 🎉 </s>"],
    "mistral": ["I'm fine.</s>", "dog , bird\n\n</s>", "東京 🎉</s>"],
    "phi": ["I'm fine.<|im_end|>", "dog , bird\n\n<|im_end|>", "東京 🎉<|im_end|>"],
    "bare": ["I'm fine.\n", "dog , bird\n\n\n", "東京 🎉\n"],
}


def learnt(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The text of each run of tokens that carry loss."""
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return [tokenizer.decode([i for i, _ in run]) for mask, run in groupby(pairs, lambda pair: pair[1]) if mask]


# ---------------------------------------------------------------------- conversations
@pytest.mark.parametrize("base", ["bytes", "bytes+bos", "bytes+pad=eos"])
@pytest.mark.parametrize("template", sorted(LEARNT))
def test_sft_3_loss_is_on_the_turns_and_their_ends(make_tokenizer: Make, base: str, template: str) -> None:
    tokenizer = make_tokenizer(base, template)
    for turns in (1, 2, 3):
        encoded = encode_messages(tokenizer, CHAT[: 2 * turns])
        expected = LEARNT[template][:turns]
        if template == "bare":  # its turns end with no special token: EOS is added to the last
            expected = [*expected[:-1], expected[-1] + "</s>"]
        assert learnt(tokenizer, encoded) == expected
        last = encode_messages(tokenizer, CHAT[: 2 * turns], "completion")
        assert learnt(tokenizer, last) == expected[-1:]
        assert last.input_ids == encoded.input_ids or template == "bare"  # whose header ends within a token
        assert all(encode_messages(tokenizer, CHAT[: 2 * turns], "all").loss_mask)


@pytest.mark.parametrize("base", ["words", "words+bos"])
def test_sft_3_markers_and_differencing_agree(make_tokenizer: Make, base: str) -> None:
    marked = make_tokenizer(base)
    bare = make_tokenizer(base, MARKERS.sub("", marked.chat_template))
    assert conventions(marked).has_markers
    assert not conventions(bare).has_markers
    for messages in (CHAT, CHAT[:2], CHAT[:5], [{"role": "system", "content": "cat"}, *CHAT]):
        assert encode_messages(marked, messages) == encode_messages(bare, messages)


def test_sft_3_markers_without_the_end_are_extended_to_it(make_tokenizer: Make) -> None:
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m['content'] }}{%- endgeneration -%}"
        "{%- else -%}{{ m['content'] }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    )
    tokenizer = make_tokenizer("bytes", template)
    assert learnt(tokenizer, encode_messages(tokenizer, CHAT)) == LEARNT["chatml"]


@pytest.mark.parametrize("template", ["chatml", "llama2", "mistral", "phi", "forgetful"])
def test_nothing_follows_the_end_of_the_last_turn(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer("bytes", template)
    encoded = encode_messages(tokenizer, CHAT[:2])
    assert encoded.input_ids[-1] == conventions(tokenizer).turn_end_id
    assert encoded.loss_mask[-1]


THINKING = [CHAT[0], {"role": "assistant", "content": "<think>cat</think>dog"}, *CHAT[2:4]]


@pytest.mark.parametrize(
    ("template", "one", "two", "num_without"),
    [
        ("forgetful", "<think>cat</think>dog<|im_end|>", ["dog , bird\n\n<|im_end|>"], 1),
        ("qwen3", "<think>\ncat\n</think>\n\ndog<|im_end|>", ["<think>\n\n</think>\n\ndog , bird\n\n<|im_end|>"], 1),
        ("deepseek", "dog</s>", ["dog</s>", "dog , bird\n\n</s>"], 0),
    ],
)
def test_turns_that_the_template_writes_differently_later_are_counted(
    make_tokenizer: Make, template: str, one: str, two: list[str], num_without: int
) -> None:
    tokenizer = make_tokenizer("bytes", template)
    single, both = encode_conversations(tokenizer, [THINKING[:2], THINKING])
    assert learnt(tokenizer, single) == [one]
    assert learnt(tokenizer, both) == two
    assert (single.turns_without_loss, both.turns_without_loss) == (0, num_without)
    assert learnt(tokenizer, encode_messages(tokenizer, THINKING, "completion")) == two[-1:]
    assert single.other_header == both.other_header == (template == "deepseek")


@pytest.mark.parametrize("template", ["qwen3", "deepseek"])
def test_pairs_of_thinking_templates_share_their_prompt(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer("bytes", template)
    for prompt in (THINKING[:1], THINKING[:3]):
        pairs = encode_pairs(tokenizer, [prompt] * 3, ["fine", "<think>a</think>\nfirst", "fish"])
        heads = [pair.input_ids[: pair.prompt_length] for pair in pairs]
        assert heads[0] == heads[1] == heads[2]
        assert (heads[0] == encode_prompt(tokenizer, prompt)) == (template == "qwen3")
        answers = [tokenizer.decode(pair.input_ids[pair.prompt_length :]) for pair in pairs]
        assert [answer.split("</think>")[-1].strip() for answer in answers] == [
            text + (tokenizer.eos_token if template == "deepseek" else "<|im_end|>")
            for text in ("fine", "first", "fish")
        ]


def test_completion_whose_first_answer_is_not_found_still_begins_with_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes", "qwen3")
    encoded = encode_pair(tokenizer, THINKING[:1], THINKING[1:])
    assert encoded.input_ids[: encoded.prompt_length] == encode_prompt(tokenizer, THINKING[:1])
    assert learnt(tokenizer, encoded) == ["<think>\n\n</think>\n\ndog , bird\n\n<|im_end|>"]
    assert encoded.turns_without_loss == 1


def test_generation_prompt_may_differ_in_white_space(make_tokenizer: Make) -> None:
    template = (
        "{%- for m in messages -%}{{ m['role'] + ':\n' + m['content'] + eos_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    )
    tokenizer = make_tokenizer("bytes", template)
    encoded = encode_pair(tokenizer, CHAT[:1], "fine")
    assert learnt(tokenizer, encoded) == ["\nfine</s>"]
    assert encoded.other_header


def test_no_turn_to_be_found_is_an_error(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes", "hopeless")
    messages = [*CHAT[:2], CHAT[2]]
    with pytest.raises(UserError, match=r"^a: message 2 cannot be told from its surroundings.*generation %"):
        encode_conversations(tokenizer, [messages], places=["a"])


def test_several_messages_in_a_completion(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    completion = [CHAT[1], {"role": "tool", "content": "12"}, {"role": "assistant", "content": "good !"}]
    encoded = encode_pair(tokenizer, CHAT[:1], completion)
    assert learnt(tokenizer, encoded) == ["I'm fine.<|im_end|>", "good !<|im_end|>"]
    assert encoded.completion_mask.index(True) == encoded.prompt_length == encoded.loss_mask.index(True)


@pytest.mark.parametrize(
    ("messages", "loss_on", "message"),
    [
        (CHAT[:1], "assistant", "^a: the conversation has no assistant's message"),
        (CHAT[:3], "completion", "^a: the conversation does not end with the assistant's message"),
    ],
)
def test_nothing_to_learn_is_an_error(make_tokenizer: Make, messages: list[Any], loss_on: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_conversations(make_tokenizer("bytes", "chatml"), [messages], loss_on, places=["a"])


def test_markers_that_enclose_nothing(make_tokenizer: Make) -> None:
    template = "{%- for m in messages -%}{{ m['content'] }}{%- endfor -%}{%- generation -%}{%- endgeneration -%}"
    with pytest.raises(UserError, match=r"^a: the chat template's markers enclose none"):
        encode_conversations(make_tokenizer("bytes", template), [CHAT], places=["a"])


def test_conversation_without_template(make_tokenizer: Make) -> None:
    for call in (encode_prompt, encode_messages):
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            call(make_tokenizer("bytes"), CHAT[:1] if call is encode_prompt else CHAT)


# ---------------------------------------------------------------------- prompt and completion
@given(st.text(), st.text(min_size=1), st.booleans())
@settings(max_examples=150, deadline=None)
def test_seam_is_that_of_sampling(make_tokenizer: Make, prompt: str, completion: str, finished: bool) -> None:
    tokenizer = make_tokenizer("bytes+bos")
    for token in tokenizer.all_special_tokens:
        prompt, completion = prompt.replace(token, ""), completion.replace(token, "")
    encoded = encode_pair(tokenizer, prompt, completion, finished=finished)
    head = encode_prompt(tokenizer, prompt)
    assert encoded.input_ids[: encoded.prompt_length] == head
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.input_ids[1:]) == prompt + completion + ("</s>" if finished else "")
    assert encoded.loss_mask == encoded.completion_mask == [i >= len(head) for i in range(len(encoded.input_ids))]
    whole = tokenizer(prompt + completion)["input_ids"]
    assert encoded.split_seam == (whole[: len(head)] != head)
    if not encoded.split_seam:
        assert encoded.input_ids[: len(whole)] == whole


@pytest.mark.parametrize("base", ["metaspace", "metaspace+bos"])
@pytest.mark.parametrize(
    ("prompt", "completion", "split"),
    [("answer :", " cat , dog", False), ("answer : ", "cat", True), ("ans", "wer", True), ("answer :", "cat", False)],
)
def test_a_continuation_is_not_taken_for_a_new_text(
    make_tokenizer: Make, base: str, prompt: str, completion: str, split: bool
) -> None:
    tokenizer = make_tokenizer(base)
    encoded = encode_pair(tokenizer, prompt, completion, finished=False)
    assert encoded.split_seam == split
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == prompt + completion


def test_whole_words_are_not_glued(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("words")
    for prompt, completion in (
        ("answer :", "cat"),
        ("answer : ", "cat"),
        ("answer :", " cat"),
        ("answer :\n", " cat "),
    ):
        tokens = tokenizer.convert_ids_to_tokens(encode_pair(tokenizer, prompt, completion).input_ids)
        assert tokens == ["answer", ":", "cat", "<eos>"]


@pytest.mark.parametrize("template", ["chatml", "llama2", "mistral", "phi", "bare"])
@pytest.mark.parametrize("base", ["bytes", "bytes+bos", "metaspace", "metaspace+bos"])
def test_chat_prompt_of_training_is_that_of_sampling(make_tokenizer: Make, base: str, template: str) -> None:
    tokenizer = make_tokenizer(base, template)
    for length in (1, 3, 5):
        for answer in ("fine", " fine", "\nfine"):
            encoded = encode_pair(tokenizer, CHAT[:length], answer)
            head = encode_prompt(tokenizer, CHAT[:length])
            assert encoded.input_ids[: encoded.prompt_length] == head
            assert encoded.loss_mask == encoded.completion_mask
            assert encoded == encode_pair(tokenizer, CHAT[:length], [{"role": "assistant", "content": answer}])


@pytest.mark.parametrize("template", ["chatml", "llama2", "mistral", "phi", "bare"])
def test_an_unfinished_answer_has_no_end(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer("bytes", template)
    whole = encode_pair(tokenizer, CHAT[:1], "good !")
    part = encode_pair(tokenizer, CHAT[:1], "good !", finished=False)
    assert part.input_ids == whole.input_ids[: len(part.input_ids)]
    assert tokenizer.decode(part.input_ids).endswith("good !")
    assert part.prompt_length == whole.prompt_length


@pytest.mark.parametrize("base", ["bytes", "bytes+pad=eos", "metaspace+bos", "words"])
def test_eos_is_there_once_and_learnt(make_tokenizer: Make, base: str) -> None:
    tokenizer = make_tokenizer(base)
    eos = tokenizer.eos_token_id
    for text in ("cat dog", f"cat dog{tokenizer.eos_token}"):
        encoded = encode_pair(tokenizer, "answer :", " " + text)
        assert encoded.input_ids.count(eos) == 1
        assert encoded.input_ids[-1] == eos
        assert encoded.loss_mask[-1]
        (ids,) = encode_texts(tokenizer, [text])
        assert ids.count(eos) == 1
        assert ids[-1] == eos


@pytest.mark.parametrize("template", ["chatml", "llama2", "mistral", "phi", "bare"])
@pytest.mark.parametrize("base", ["bytes", "bytes+bos", "metaspace+bos"])
def test_sft_6_exactly_one_bos_with_and_without_one_in_the_template(
    make_tokenizer: Make, base: str, template: str
) -> None:
    tokenizer = make_tokenizer(base, template)
    bos = tokenizer.bos_token_id
    wanted = int("bos" in base or template in ("llama2", "mistral"))
    for ids in (
        encode_prompt(tokenizer, CHAT[:1]),
        encode_pair(tokenizer, CHAT[:1], "fine").input_ids,
        encode_messages(tokenizer, CHAT[:2]).input_ids,
    ):
        assert ids.count(bos) == wanted
        assert not wanted or ids[0] == bos


def test_many_at_once_are_as_one_by_one(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes+bos", "chatml")
    prompts = ["a ", CHAT[:1], "a ", "", CHAT[:3], "Hello"]
    completions = ["b", "fine", " c", "x", CHAT[3:4], " there!"]
    pairs = encode_pairs(tokenizer, prompts, completions)
    assert pairs == [encode_pair(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]
    chats = [CHAT, CHAT[:2], CHAT[:4]]
    assert encode_conversations(tokenizer, chats) == [encode_messages(tokenizer, chat) for chat in chats]


def test_text_and_messages_do_not_mix(make_tokenizer: Make) -> None:
    with pytest.raises(UserError, match=r"^b: the prompt is text but the completion is a list of messages"):
        encode_pairs(make_tokenizer("bytes", "chatml"), ["x", "y"], ["z", CHAT[1:2]], places=["a", "b"])
