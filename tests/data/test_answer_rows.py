"""DPO-5: where answers lie in the rows a model sees changes nothing of them, and costs as little as it can."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.data.answer_rows import packed_rows, padded_rows
from lightning_align.models import masks
from lightning_align.models.answers import answer_stats

VOCABULARY = 37
# prompts with the lengths of their answers: alone, pairs, a ranking, a prompt of one token, and of none
GROUPS = [(7, (3, 5)), (1, (4, 2)), (12, (6, 9, 1)), (0, (5, 3)), (4, (8,)), (20, (2, 3))]


def batch_of(groups: Sequence[tuple[int, Sequence[int]]], *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """Random prompts with random answers in padded rows."""
    draw = np.random.default_rng(0)
    rows, prompts, group = [], [], []
    for number, (length, answers) in enumerate(groups):
        prompt = draw.integers(0, VOCABULARY, length)
        for answer in answers:
            rows.append(np.concatenate([prompt, draw.integers(0, VOCABULARY, answer)]))
            prompts.append(length)
            group.append(number)
    width = max(map(len, rows)) + right
    ids, real = np.full((len(rows), left + width), 5), np.zeros((len(rows), left + width), dtype=bool)
    completion = real.copy()
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        begin = left + width - right - len(row) if left else 0
        ids[number, begin : begin + len(row)] = row
        real[number, begin : begin + len(row)] = True
        completion[number, begin + prompt : begin + len(row)] = True
    columns = {"input_ids": ids, "attention_mask": real, "completion_mask": completion, "group": np.array(group)}
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def by_hand(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Log-prob of each answer, its sequence alone through the whole model."""
    found = []
    for ids, real, completion in zip(
        *(batch[n] for n in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        logp = model(ids[real][None]).logits[0].double().log_softmax(-1)
        taken = logp[:-1].gather(1, ids[real][1:, None])[:, 0]
        found.append(taken[completion[real][1:]].sum())
    return torch.stack(found)


def gradients(model: PreTrainedModel, logp: Tensor) -> list[Tensor]:
    """Of a sum that weighs every answer differently."""
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    return list(torch.autograd.grad((weights * logp).sum(), list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("width", [1, 32, 10_000])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 3), (2, 0)])
def test_dpo_5_packed_and_padded_rows_are_the_sequences_alone(
    llama: Callable[..., PreTrainedModel], width: int, left: int, right: int
) -> None:
    model, batch = llama(VOCABULARY), batch_of(GROUPS, left=left, right=right)
    model.set_attn_implementation("sdpa")  # eager attention gives padding on the left NaN in float64
    expected = by_hand(model, batch)
    for rows in (padded_rows(batch), packed_rows(batch, width)):
        stats = answer_stats(model, rows, entropy=True, correct=True)
        torch.testing.assert_close(stats.logp, expected, rtol=1e-6, atol=1e-6)
        assert stats.length.tolist() == [3, 5, 4, 2, 6, 9, 1, 4, 2, 8, 2, 3]  # nothing predicts a first token
        for one, other in zip(gradients(model, stats.logp), gradients(model, expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    padded, packed = (answer_stats(model, r, entropy=True, correct=True) for r in (padded_rows(batch), rows))
    torch.testing.assert_close(packed.entropy, padded.entropy, rtol=1e-6, atol=1e-6)
    assert torch.equal(packed.correct, padded.correct)  # type: ignore[arg-type]


def test_dpo_5_answers_that_see_each_other_are_noticed(
    llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama(VOCABULARY), batch_of(GROUPS)
    expected = by_hand(model, batch)
    right = masks._visible
    monkeypatch.setattr(masks, "_visible", lambda mask, documents, positions: right(mask, documents * 0, positions))
    stats = answer_stats(model, packed_rows(batch, 32))
    assert (stats.logp - expected).abs().max() > 0.1


def test_a_long_prompt_is_encoded_once_and_a_short_one_with_each_answer() -> None:
    long, short = batch_of([(60, (8, 9)), (50, (6, 19))]), batch_of([(2, (60, 60)), (3, (59, 59))])
    shared = packed_rows(long, 64)
    # a branch repeats the last token of its prompt
    assert int(shared.attention_mask.sum()) == 60 + 8 + 1 + 9 + 50 + 6 + 1 + 19
    assert int(packed_rows(short, 4).attention_mask.sum()) == int(short["attention_mask"].sum())
    assert int(packed_rows(short, 10_000).attention_mask.sum()) < int(short["attention_mask"].sum())


def test_rows_are_packed_with_little_padding_and_hold_every_answer_once() -> None:
    draw = np.random.default_rng(1)
    groups = [(int(draw.integers(1, 40)), tuple(draw.integers(1, 30, 2).tolist())) for _ in range(32)]
    batch = batch_of(groups)
    rows = packed_rows(batch, 128)
    assert rows.attention_mask.float().mean() > 0.9 > 0.6 > batch["attention_mask"].float().mean()
    assert rows.attention_mask.numel() < batch["attention_mask"].numel() / 2
    slots = rows.slots[rows.mask]
    assert len(slots.unique()) == len(slots) == sum(sum(answers) for _, answers in groups)
    labels = batch["input_ids"][batch["completion_mask"]]
    assert torch.equal(rows.input_ids.view(-1)[slots], labels)


def test_answers_of_equal_length_without_a_shared_prompt_take_a_plain_mask() -> None:
    rows = packed_rows(batch_of([(3, (4,)), (3, (4,))]), 32)
    assert not (rows.document_ids > 0).any()  # type: ignore[operator]
    assert rows.attention_mask.all()


def _columns(rows: Any) -> list[list[int]]:
    return [values[0].tolist() for values in (rows.input_ids, rows.position_ids, rows.document_ids)]


def test_layout_of_a_shared_prompt() -> None:
    batch = batch_of([(3, (2, 1))])
    (a, b, c, d, e), f = batch["input_ids"][0].tolist(), int(batch["input_ids"][1, 3])
    rows = packed_rows(batch, 10_000)
    assert _columns(rows) == [[a, b, c, d, e, c, f], [0, 1, 2, 3, 4, 2, 3], [0, 0, 0, 0, 0, 1, 1]]
    assert rows.slots.tolist() == [[3, 4], [6, 0]]
    assert rows.mask.tolist() == [[True, True], [True, False]]
