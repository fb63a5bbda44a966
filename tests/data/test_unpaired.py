"""DPO-11: single answers, whose partners neither order nor batch can change."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lightning_align.data.collate import Window
from lightning_align.data.report import Report
from lightning_align.data.tables import Limit
from lightning_align.data.tabulate import preference_table
from lightning_align.data.unpaired import UnpairedRows, partners

RECORDS: list[dict[str, Any]] = [
    {"prompt": "cat :", "completion": " cat", "label": True},
    {"prompt": "good dog :", "completion": " dog , bird", "label": False},
    {"prompt": "rain :", "completion": " rain rain rain", "label": False},
    {"prompt": "kind :", "completion": " good", "label": True},
]


@pytest.fixture
def rows(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> Callable[..., UnpairedRows]:
    """``rows(capacity)``: of the records above."""

    def make(capacity: int = 64) -> UnpairedRows:
        places = [f"r{number}" for number in range(len(RECORDS))]
        table, _ = preference_table(make_tokenizer("words"), RECORDS, places, Limit(64, "truncate"), "drop")
        return UnpairedRows(table, pad_id=0, capacity=capacity, report=Report("", "unpaired"))

    return make


def texts(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> list[str]:
    """Each row without padding."""
    return [
        tokenizer.decode(ids[real], skip_special_tokens=True)
        for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([0, 1, 2, 3], [3, 0, 1, 2]),  # as TRL: the one before
        ([0, 0, 1, 1, 2, 2], [4, 5, 0, 1, 2, 3]),  # pairs that came apart: every answer is a partner once
        ([0, 0, 0, 0, 1], [4, 4, 4, 4, 3]),  # no number of places will do
    ],
)
def test_partners_have_other_prompts(prompts: list[int], expected: list[int]) -> None:
    assert partners(np.array(prompts)).tolist() == expected


def test_partners_of_many_records() -> None:
    prompts = np.random.default_rng(0).integers(0, 40, 500)
    found = partners(prompts)
    assert (prompts[found] != prompts).all()


def test_a_single_prompt_has_no_mismatched_pairs(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    table, _ = preference_table(make_tokenizer("words"), RECORDS[:1], ["r"], Limit(64, "truncate"), "drop")
    data = UnpairedRows(table, pad_id=0, capacity=64, report=Report("", "unpaired"))
    assert not data.has_partners
    assert data.collate([0], 1.0)["weight"].tolist() == [1, 0]


def test_dpo_11_a_batch_brings_the_mismatched_pairs_of_its_step(
    rows: Callable[..., UnpairedRows], make_tokenizer: Callable[..., PreTrainedTokenizerBase]
) -> None:
    data, tokenizer = rows(), make_tokenizer("words")
    batch = data.collate([2, 0], 4.0, Window([2, 0, 3, 1], [2, 0, 1], first=True))
    assert texts(tokenizer, batch) == [
        *("rain : rain rain rain", "cat : cat"),
        *("rain : dog , bird", "cat : good", "good dog : cat"),
    ]
    assert batch["is_partner"].tolist() == [False, False, True, True, True]
    assert batch["label"].tolist()[:2] == [False, True]
    assert batch["row"].tolist() == [2, 0, 6, 4, 5]
    assert float(batch["window_weight"]) == 4
    answers = [row[mask].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert answers[4] == answers[1]  # the answer of record 0, the end of the turn included
    later = data.collate([1], 4.0, Window([2, 0, 3, 1], [2, 0, 1], first=False))
    assert later["is_partner"].tolist() == [False]
    assert texts(tokenizer, data.collate([1], 1.0)) == ["good dog : dog , bird", "good dog : cat"]


def test_an_empty_batch_weighs_nothing(rows: Callable[..., UnpairedRows]) -> None:
    data = rows()
    for window in (None, Window([0], [], first=True), Window([0], [], first=False)):
        batch = data.collate([], 1.0, window)
        assert batch.keys() == data.collate([0], 1.0).keys()
        assert not batch["weight"].any()


def test_a_mismatched_pair_that_is_too_long_loses_the_beginning_of_its_prompt(
    rows: Callable[..., UnpairedRows],
) -> None:
    whole, cut = rows(), rows(4)
    assert whole._ids(1, 2)[0].tolist() != cut._ids(1, 2)[0].tolist()
    ids, start = cut._ids(1, 2)
    assert len(ids) - start == len(whole._ids(1, 2)[0]) - whole._ids(1, 2)[1]  # the answer is whole
    assert whole.sequences_hash() != cut.sequences_hash()
    little, start = rows(6)._ids(1, 2)
    uncut = whole._ids(1, 2)[0].tolist()  # of 7 tokens, the first of which would be BOS
    assert little[:start].tolist() == [uncut[0], uncut[2]]
