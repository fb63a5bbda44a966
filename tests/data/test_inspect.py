"""``data inspect``: every token with its loss, its origin and its fate."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lightning_align.data.collate import PackedRows
from lightning_align.data.inspect import explain_record, render_record
from lightning_align.data.packing import pack
from lightning_align.data.tables import Limit
from lightning_align.data.tabulate import sft_table

Make = Callable[..., PreTrainedTokenizerBase]
CHAT = [
    {"role": "user", "content": "cat , dog"},
    {"role": "assistant", "content": "bird !"},
    {"role": "user", "content": "rain"},
    {"role": "assistant", "content": "good"},
]
RECORDS: dict[Any, dict[str, Any]] = {
    "text": {"text": "cat dog"},
    "sft": {"prompt": "cat :", "completion": " dog"},
    "prompt": {"prompt": CHAT[:3], "extra": 1},
    "preference": {"prompt": "cat :", "chosen": " dog", "rejected": " bird", "strength": "better"},
    "ranked": {"prompt": "cat :", "completions": [" dog", " bird", " cat"], "ranks": [1, 2, 2]},
    "unpaired": {"prompt": "cat :", "completion": " dog", "label": True},
    "scored": {"prompt": "cat :", "completion": " dog", "score": 0.5},
}


def printed(record: dict[str, Any], kind: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render_record(record, kind, tokenizer, **options))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_sft_3_shows_the_turns_and_their_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bytes+bos", "chatml")
    (sequence,) = explain_record({"messages": CHAT}, "sft", tokenizer)
    learnt = tokenizer.decode([token.id for token in sequence.tokens if token.loss])
    assert learnt == "bird !<|im_end|>good<|im_end|>"
    inside = tokenizer.decode([token.id for token in sequence.tokens if not token.added])
    assert inside == "cat , dogbird !raingood"
    assert [token.note for token in sequence.tokens if token.note] == ["BOS"] + ["end of turn"] * 4
    assert [token.part for token in sequence.tokens].count("prompt") == sequence.tokens.index(
        next(token for token in sequence.tokens if token.loss)
    )


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
@pytest.mark.parametrize("limit", [64, 14, 9])
def test_shows_what_training_sees(make_tokenizer: Make, loss_on: Any, limit: int) -> None:
    tokenizer = make_tokenizer("words+bos")
    for record in ({"messages": CHAT}, RECORDS["sft"], {"prompt": CHAT[:3], "completion": CHAT[3:]}):
        table, _ = sft_table(tokenizer, [record], ["here"], Limit(limit, "truncate"), loss_on)
        row = PackedRows(table, pack(table["starts"][1:], 64, "none"), pad_id=0).collate([0], 1.0)
        (sequence,) = explain_record(record, "sft", tokenizer, loss_on=loss_on, max_length=limit)
        kept = [token for token in sequence.tokens if token.kept]
        assert [token.id for token in kept] == row["input_ids"][0].tolist()
        assert [token.loss for token in kept] == (row["loss_weights"][0] > 0).tolist()


@pytest.mark.parametrize(
    ("kind", "titles"),
    [
        ("text", ["text"]),
        ("sft", ["demonstration"]),
        ("prompt", ["prompt"]),
        ("preference", ["chosen", "rejected"]),
        ("ranked", ["completion 1 (rank 1)", "completion 2 (rank 2)", "completion 3 (rank 2)"]),
        ("unpaired", ["completion"]),
        ("scored", ["completion"]),
    ],
)
def test_every_kind(make_tokenizer: Make, kind: Any, titles: list[str]) -> None:
    tokenizer = make_tokenizer("words")
    sequences = explain_record(RECORDS[kind], kind, tokenizer)
    assert [sequence.title for sequence in sequences] == titles
    text = printed(RECORDS[kind], kind, tokenizer, max_length=100)
    assert all(title in text for title in titles)
    if kind not in ("text", "sft", "prompt"):
        assert text.count("the score is read here") == len(titles)
    if kind != "prompt":
        assert text.count("EOS") == len(titles)


def test_marks_what_is_cut_and_shows_white_space(make_tokenizer: Make) -> None:
    text = printed({"prompt": "a\n b\tc", "completion": " d[red]"}, "sft", make_tokenizer("bytes"), max_length=6)
    assert "cut" in text
    for sign in ("↵", "·", "→", "["):
        assert sign in text


def test_split_seam_is_shown_without_guessing(make_tokenizer: Make) -> None:
    (sequence,) = explain_record({"prompt": "answer : ", "completion": "cat"}, "sft", make_tokenizer("bytes"))
    assert not any(token.added for token in sequence.tokens)
