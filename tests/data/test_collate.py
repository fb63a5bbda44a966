"""PRE-1 and the contents of batches: positions, documents, weights, pairs, margins."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.data.collate import MARGINS, PackedRows, PreferenceGroups, PromptRows
from lightning_align.data.packing import pack
from lightning_align.data.tables import Arrays, Limit
from lightning_align.data.tabulate import preference_table, prompt_table
from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.reward_model import preference_loss
from lightning_align.models.logprobs import token_stats

VOCABULARY = 37


def table_of(lengths: Sequence[int], seed: int = 0, *, supervised: float = 1.0) -> Arrays:
    """Random documents; the share ``supervised`` of their tokens carries loss, with a weight for each document."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    return {
        "ids": rng.integers(0, VOCABULARY, starts[-1], dtype=np.int32),
        "starts": starts,
        "mask": rng.random(starts[-1]) < supervised,
        "weight": rng.choice(np.array([0.5, 1.0, 2.0], dtype=np.float32), len(lengths)),
    }


def loss_and_gradient(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> tuple[float, list[Tensor]]:
    """Weighted loss of all batches over their whole weight."""
    model.zero_grad()
    weight = sum(batch["loss_weights"].double().sum() for batch in batches)
    total = 0.0
    for batch in batches:
        mask = batch["loss_weights"] > 0
        stats = token_stats(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            mask=mask,
            position_ids=batch["position_ids"],
            document_ids=batch["document_ids"],
        )
        loss = token_cross_entropy(stats.logp, batch["loss_weights"].double())[0] / weight
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---------------------------------------------------------------------- packed rows
@pytest.mark.parametrize("strategy", ["bfd", "wrap", "none"])
@pytest.mark.parametrize("supervised", [1.0, 0.6])
def test_pre_1_packed_loss_is_that_of_the_documents_alone(
    llama: Callable[..., PreTrainedModel], strategy: Any, supervised: float
) -> None:
    model, table = llama(VOCABULARY), table_of([5, 9, 3, 7, 12, 2, 4, 8], supervised=supervised)
    capacity = 16
    packing = pack(np.diff(table["starts"]), capacity, strategy, seed=1)
    rows = PackedRows(table, packing, pad_id=0)
    packed = [rows.collate([0, 2], 0.0), rows.collate([1, *range(3, len(rows))], 0.0)]
    alone = [_alone(table, int(d), int(a), int(b)) for d, a, b in zip(*packing[:3], strict=True)]
    loss, gradient = loss_and_gradient(model, packed)
    expected, expected_gradient = loss_and_gradient(model, alone)
    assert loss == pytest.approx(expected, abs=1e-6)  # the model's norms are float32
    for one, other in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    if strategy == "none":
        return
    plain = PackedRows(table, packing, pad_id=0, document_mask=False)
    leaking = [plain.collate([0, 2], 0.0), plain.collate([1, *range(3, len(rows))], 0.0)]
    assert abs(loss_and_gradient(model, leaking)[0] - expected) > 1e-3


def _alone(table: Arrays, document: int, start: int, stop: int) -> dict[str, Tensor]:
    begin = int(table["starts"][document])
    ids = torch.from_numpy(table["ids"][begin + start : begin + stop].astype(np.int64))[None]
    weights = torch.from_numpy(table["mask"][begin + start : begin + stop] * table["weight"][document])[None]
    weights[0, 0] = 0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "position_ids": torch.arange(ids.shape[1])[None],
        "document_ids": torch.zeros_like(ids),
        "loss_weights": weights,
    }


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("strategy", ["bfd", "wrap", "none"])
def test_batch_says_what_is_where(strategy: Any, document_mask: bool) -> None:
    table = table_of([5, 9, 30, 7, 1, 2], supervised=0.7)
    packing = pack(np.diff(table["starts"]), 12, strategy, seed=0)
    rows = PackedRows(table, packing, pad_id=0, document_mask=document_mask)
    batch = rows.collate(list(range(len(rows))), 12.5)
    real = batch["attention_mask"]
    assert real.dtype == torch.bool
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == batch["document_ids"].dtype == torch.int64
    assert batch["loss_weights"].dtype == torch.float32
    assert batch["input_ids"].shape == (len(rows), int(packing.row_lengths.max()))
    assert batch["window_weight"] == 12.5
    assert real.sum(1).tolist() == packing.row_lengths.tolist() == rows.lengths.tolist()
    assert (real == (batch["document_ids"] >= 0)).all()
    torch.testing.assert_close(batch["loss_weights"].double().sum(1), torch.from_numpy(rows.weights))
    for row, (first, last) in enumerate(pairwise(packing.rows.tolist())):
        cursor = 0
        for number, segment in enumerate(range(first, last)):
            document, start, stop = (int(column[segment]) for column in packing[:3])
            where = slice(int(table["starts"][document]) + start, int(table["starts"][document]) + stop)
            here = slice(cursor, cursor + stop - start)
            weights = table["mask"][where] * table["weight"][document]
            if document_mask or cursor == 0:
                weights[0] = 0
            assert batch["input_ids"][row, here].tolist() == table["ids"][where].tolist()
            assert batch["loss_weights"][row, here].tolist() == weights.tolist()
            assert (batch["document_ids"][row, here] == (number if document_mask else 0)).all()
            origin = 0 if document_mask else cursor
            assert batch["position_ids"][row, here].tolist() == list(range(origin, origin + stop - start))
            cursor = here.stop
        assert not batch["loss_weights"][row, cursor:].any()


def test_conv_9_a_batch_of_nothing_weighs_nothing(llama: Callable[..., PreTrainedModel]) -> None:
    table = table_of([5, 9])
    rows = PackedRows(table, pack(np.diff(table["starts"]), 12, "none"), pad_id=0)
    batch = rows.collate([], 7.0)
    assert batch["input_ids"].shape == (1, 1)
    assert not batch["loss_weights"].any()
    assert batch.keys() == rows.collate([0], 7.0).keys()
    model = llama(VOCABULARY)
    stats = token_stats(model, batch["input_ids"], batch["attention_mask"], mask=batch["loss_weights"] > 0)
    loss, _ = token_cross_entropy(stats.logp, batch["loss_weights"])
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------- preferences
RECORDS: list[dict[str, Any]] = [
    {"prompt": "a b :", "chosen": " cat", "rejected": " dog , bird", "strength": "significantly"},
    {"prompt": "c :", "chosen": " rain", "rejected": " good", "strength": "slightly", "margin": 0.25, "weight": 2.0},
    {"prompt": "d :", "chosen": " rain", "rejected": " cat", "tie": True},
    {"prompt": "e :", "completions": [" cat", " dog", " bird", " rain !"], "ranks": [2, 1, 2, 3]},
    {"prompt": "f :", "completions": [" cat", " dog"], "scores": [0.1, 0.9]},
    {"prompt": "g :", "chosen": " good", "rejected": " kind"},
]


def groups_of(
    tokenizer: PreTrainedTokenizerBase, ties: Any, margins: Sequence[float], limit: int = 64
) -> PreferenceGroups:
    places = [f"r{number}" for number in range(len(RECORDS))]
    table, _ = preference_table(tokenizer, RECORDS, places, Limit(limit, "truncate"), ties)
    return PreferenceGroups(table, pad_id=0, margins=margins)


def described(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Each pair as (chosen text, rejected text, weight, margin, label, strength)."""
    completions = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    names = ("pair_weight", "pair_margin", "pair_label", "pair_strength")
    columns = zip(*(batch[name].tolist() for name in ("pair_chosen", "pair_rejected", *names)), strict=True)
    return [
        (completions[c], completions[r], pytest.approx(w), pytest.approx(m), label, strength)
        for c, r, w, m, label, strength in columns
    ]


def test_rm_5_pairs_of_a_prompt_share_its_weight(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer("words")
    groups = groups_of(tokenizer, "drop", MARGINS["small"])
    batch = groups.collate(range(len(groups)), 6.0)
    assert described(tokenizer, batch) == [
        ("cat", "dog , bird", 1, 1, 1, 0),
        ("rain", "good", 2, 0.25, 1, 2),
        ("dog", "cat", 1 / 5, 0, 1, -1),
        ("cat", "rain !", 1 / 5, 0, 1, -1),
        ("dog", "bird", 1 / 5, 0, 1, -1),
        ("dog", "rain !", 1 / 5, 0, 1, -1),
        ("bird", "rain !", 1 / 5, 0, 1, -1),
        ("dog", "cat", 1, 0, 1, -1),
        ("good", "kind", 1, 0, 1, -1),
    ]
    assert batch["group"].tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    assert len(batch["input_ids"]) == 12  # each answer once
    assert groups.weights.tolist() == [1, 2, 1, 1, 1]
    assert float(batch["pair_weight"].sum()) == pytest.approx(6)


def test_a_window_counts_the_tokens_of_better_answers_that_something_predicts(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    tokenizer = make_tokenizer("words")
    records = [*RECORDS, {"prompt": "", "chosen": " rain rain", "rejected": " cat"}]
    places = [f"r{number}" for number in range(len(records))]
    table, _ = preference_table(tokenizer, records, places, Limit(64, "truncate"), "drop")
    batch = PreferenceGroups(table, pad_id=0, margins=MARGINS["none"]).collate([0, 1, 2, 5], 5.0)
    predicted = batch["completion_mask"][:, 1:].sum(1)[batch["pair_chosen"]]
    assert int(predicted[-1]) == 2  # of an empty prompt's " rain rain" and its end, the first token is not learnt
    assert float(batch["window_chosen_tokens"]) == pytest.approx(float((batch["pair_weight"] * predicted).sum()))


def test_answers_of_a_prompt_know_their_ranks_and_scores(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    groups = groups_of(make_tokenizer("words"), "drop", MARGINS["none"])
    batch = groups.collate([2, 1, 3], 4.0)
    assert batch["group_rows"].tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, -1, -1]]
    assert batch["group_ranks"].tolist() == [[2, 1, 2, 3], [1, 2, 0, 0], [2, 1, 0, 0]]  # the last by its scores
    assert batch["group_weight"].tolist() == [1, 2, 1]
    assert batch["response_weight"].tolist() == [0.25] * 4 + [1] * 2 + [0.5] * 2
    assert batch["score"].isnan().tolist() == [True] * 6 + [False] * 2
    assert batch["score"][6:].tolist() == pytest.approx([0.1, 0.9])
    nothing = groups.collate([], 4.0)
    assert not nothing["group_weight"].any()
    assert not nothing["response_weight"].any()


def test_ranks_close_their_gaps_and_a_tied_pair_has_one(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    records = [
        {"prompt": "a :", "completions": [" cat", " dog", " bird"], "ranks": [7, 1, 7]},
        {"prompt": "b :", "chosen": " cat", "rejected": " dog", "tie": True},
    ]
    table, _ = preference_table(make_tokenizer("words"), records, ["x", "y"], Limit(64, "truncate"), "rao_kupper")
    assert table["rank"].tolist() == [2, 1, 2, 1, 1]
    assert table["label"].tolist() == [1.0, 0.5, 1.0, 0.5]


def test_scored_answers_are_alone_and_have_no_pairs(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    records = [
        {"prompt": f"{name} :", "completion": " cat", "score": score} for name, score in (("a", 1.5), ("b", -2.0))
    ]
    table, counts = preference_table(make_tokenizer("words"), records, ["x", "y"], Limit(64, "truncate"), "drop")
    assert counts.records == 2
    batch = PreferenceGroups(table, pad_id=0, margins=MARGINS["small"]).collate([1, 0], 2.0)
    assert batch["score"].tolist() == [-2.0, 1.5]
    assert batch["response_weight"].tolist() == [1, 1]
    assert len(batch["pair_weight"]) == 0
    assert batch["group_rows"].tolist() == [[0], [1]]


def test_soft_ties_are_half_labels(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer("words")
    groups = groups_of(tokenizer, "soft", MARGINS["large"])
    pairs = described(tokenizer, groups.collate([0, 2, 3], 1.0))
    assert pairs[0][3] == 3
    assert pairs[1] == ("rain", "cat", 1, 0, 0.5, -1)
    assert [pair[4] for pair in pairs[2:]] == [1, 0.5, 1, 1, 1, 1]
    assert all(pair[2] == 1 / 6 for pair in pairs[2:])


def test_soft_labels_are_the_labels_of_their_pairs(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    pair = {"prompt": "a :", "chosen": " cat", "rejected": " dog"}
    records = [pair, {**pair, "soft_label": 0.75}, {**pair, "soft_label": 0.5}]
    tokenizer, places = make_tokenizer("words"), ["line"] * 3
    for ties, labels in (("soft", [1, 0.75, 0.5]), ("drop", [1, 0.75])):
        table, counts = preference_table(tokenizer, records, places, Limit(64, "truncate"), ties)
        assert table["label"].tolist() == labels
        number, _ = counts.dropped.get("its answers tie", (0, ""))
        assert number == 3 - len(labels)


@pytest.mark.parametrize("name", sorted(MARGINS))
def test_margin_tables(make_tokenizer: Callable[..., PreTrainedTokenizerBase], name: str) -> None:
    groups = groups_of(make_tokenizer("words"), "drop", MARGINS[name])
    expected = {"none": [0.0, 0.25], "small": [1.0, 0.25], "large": [3.0, 0.25]}[name]  # a margin of its own wins
    assert groups.collate([0, 1], 1.0)["pair_margin"].tolist() == expected


def test_batches_of_prompts_do_not_depend_on_how_they_are_cut(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    groups = groups_of(make_tokenizer("words"), "soft", MARGINS["small"])

    def loss(batch: dict[str, Tensor]) -> float:
        scores = (batch["input_ids"] * batch["attention_mask"]).sum(1).double() / 50
        return float(
            preference_loss(
                scores,
                batch["pair_chosen"],
                batch["pair_rejected"],
                weight=batch["pair_weight"].double(),
                margin=batch["pair_margin"].double(),
                label=batch["pair_label"].double(),
            )[0]
        )

    whole = loss(groups.collate(range(len(groups)), 1.0))
    assert sum(loss(groups.collate([i], 1.0)) for i in range(len(groups))) == pytest.approx(whole, rel=1e-6)
    nothing = groups.collate([], 1.0)
    assert loss(nothing) == 0
    assert nothing.keys() == groups.collate([0], 1.0).keys()


def test_both_sides_see_the_same_prompt_after_truncation(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    tokenizer = make_tokenizer("bytes+bos")
    record = {"prompt": "list three animals . answer :", "chosen": " cat", "rejected": " dog , bird . rain is good"}
    table, counts = preference_table(tokenizer, [record], ["a"], Limit(12, "truncate"), "drop")
    batch = PreferenceGroups(table, pad_id=0, margins=MARGINS["none"]).collate([0], 1.0)
    is_prompt = batch["attention_mask"] & ~batch["completion_mask"]
    heads = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], is_prompt, strict=True)]
    assert heads[0] == heads[1]
    assert heads[0][0] == tokenizer.bos_token_id
    assert record["prompt"].endswith(tokenizer.decode(heads[0][1:]))
    assert batch["attention_mask"].sum(1).max() == 12
    assert counts.truncated == 1
    assert counts.ends_lost == 1


def test_prompts_stay_plain(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = make_tokenizer("words")
    records = [{"prompt": "cat :", "reference": 3}, {"prompt": "dog , bird", "is_safety": True}]
    table, _ = prompt_table(tokenizer, records, ["a", "b"], Limit(64, "truncate"))
    batch = PromptRows(table, records).collate([1, 0, 1], 3.0)
    assert batch == {
        "prompt_ids": [tokenizer(record["prompt"])["input_ids"] for record in (records[1], records[0], records[1])],
        "records": [records[1], records[0], records[1]],
        "copy": [0, 0, 0],
    }


def test_copies_of_a_prompt_are_numbered(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    records = [{"prompt": prompt} for prompt in ("cat", "dog", "cat", "cat dog", "cat", "dog")]
    table, _ = prompt_table(make_tokenizer("words"), records, list("abcdef"), Limit(64, "truncate"))
    assert PromptRows(table, records).collate([0, 1, 2, 3, 4, 5], 1.0)["copy"] == [0, 0, 1, 0, 2, 1]
    assert PromptRows(table, records).collate([4, 2], 1.0)["copy"] == [2, 1]
