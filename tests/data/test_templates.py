"""What is found out about a tokenizer, and the errors of rendering."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_align.data.templates import conventions, raw_ids, render, render_marked, tokenise
from lightning_align.errors import UserError

Make = Callable[..., PreTrainedTokenizerBase]
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fine"}]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama2", "</s>"),
        ("mistral", "</s>"),
        ("phi", "<|im_end|>"),
        ("bare", None),
        ("forgetful", "<|im_end|>"),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_end_of_turn_is_found_by_asking(make_tokenizer: Make, template: str, end: str | None) -> None:
    tokenizer = make_tokenizer("bytes", template)
    found = conventions(tokenizer)
    assert found.turn_end == end
    assert found.turn_end_id == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    assert not found.has_markers
    assert found.end_ids == {tokenizer.eos_token_id} | ({found.turn_end_id} - {None})


def test_own_template_has_markers(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("words")
    assert conventions(tokenizer).has_markers
    (text,), (spans,) = render_marked(tokenizer, [CHAT])
    assert [text[start:stop] for start, stop in spans] == ["fine<eos>"]


def test_bos_is_used_only_where_the_tokenizer_adds_it(make_tokenizer: Make) -> None:
    assert conventions(make_tokenizer("bytes")).bos_id is None  # it has a BOS token, as GPT-2 does, but adds none
    tokenizer = make_tokenizer("bytes+bos")
    assert conventions(tokenizer).bos_id == tokenizer.bos_token_id


def test_sft_6_bos_is_there_exactly_once(any_tokenizer: PreTrainedTokenizerBase) -> None:
    bos = conventions(any_tokenizer).bos_id
    texts = ["cat dog", "", f"{any_tokenizer.bos_token or ''}cat dog"]
    rows = tokenise(any_tokenizer, texts)
    assert rows[0] == rows[2] if any_tokenizer.bos_token and bos is not None else True
    for ids in rows:
        assert ids.count(bos) == (bos is not None)
        assert bos is None or ids[0] == bos


def test_text_is_neither_cut_nor_completed(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes+bos")
    tokenizer.model_max_length = 4
    (ids,) = raw_ids(tokenizer, ["Hello there! How are you?" * 9])
    assert len(ids) > 40
    assert tokenizer.decode(ids) == "Hello there! How are you?" * 9


def test_changed_template_is_noticed(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    assert conventions(tokenizer).turn_end == "<|im_end|>"
    tokenizer.chat_template = make_tokenizer("bytes", "mistral").chat_template
    assert conventions(tokenizer).turn_end == "</s>"


def test_refused_conversation_is_named(make_tokenizer: Make) -> None:
    with pytest.raises(UserError, match=r"^b: the chat template refuses the conversation: roles must alternate$"):
        render(make_tokenizer("bytes", "mistral"), [CHAT, CHAT[1:]], places=["a", "b"])


def test_conversation_needs_a_template(make_tokenizer: Make) -> None:
    with pytest.raises(UserError, match=r"^a: the record is a conversation, but the tokenizer has no chat template"):
        render(make_tokenizer("bytes"), [CHAT], places=["a"])
    assert render(make_tokenizer("bytes"), []) == []


def test_tokenizer_without_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        conventions(tokenizer)
