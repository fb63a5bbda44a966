"""Sampling parameters, and rows of rollouts and experiences: selected, moved, dealt into minibatches."""

import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.rollout import Experience, Rollout, SamplingParams
from lightning_align.rollout.types import by_length

ROWS, WIDTH, PROMPTS = 7, 5, 4


@pytest.fixture
def rollout() -> Rollout:
    """Seven rows whose every field names its row."""
    row = torch.arange(ROWS)
    prompt_lengths = 1 + row % 3
    slots = torch.arange(WIDTH)
    ends = torch.tensor([5, 4, 5, 3, 5, 4, 2])
    return Rollout(
        input_ids=row[:, None] * 10 + slots,
        attention_mask=slots < ends[:, None],
        completion_mask=(slots >= prompt_lengths[:, None]) & (slots < ends[:, None]),
        engine_logp=-(row[:, None] + slots / 10),
        prompt_lengths=prompt_lengths,
        prompt_index=row // 2,
        finish_reason=["eos", "stop", "length", "eos", "eos", "length", "stop"],
        completions=[f"text {index}" for index in range(ROWS)],
        records=[{"number": index} for index in range(ROWS)],
    )


@pytest.fixture
def experience(rollout: Rollout) -> Experience:
    return Experience(
        rollout=rollout,
        scores=torch.arange(ROWS).float(),
        score_parts={"a": torch.arange(ROWS) + 100.0},
        logp=rollout.engine_logp * 2,
        advantages=rollout.engine_logp * 3,
    )


# ---------------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("num_samples", 0),
        ("stop_strings", ("ok", "")),
    ],
)
def test_bad_parameters_are_named_with_their_value(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"sampling: {field} is {re.escape(repr(value))}: must be"):
        SamplingParams(**({"max_new_tokens": 4} | {field: value}))


@pytest.mark.parametrize(
    ("changes", "truncates"),
    [
        ({}, False),
        ({"temperature": 0.5}, False),
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"top_p": 0.9, "greedy": True}, False),
    ],
)
def test_parameters_know_whether_they_truncate(changes: dict[str, Any], truncates: bool) -> None:
    assert SamplingParams(max_new_tokens=4, **changes).truncates is truncates


# ---------------------------------------------------------------------- rollouts
def test_a_rollout_counts_and_cuts_its_completions(rollout: Rollout) -> None:
    assert len(rollout) == ROWS
    assert rollout.completion_lengths.tolist() == [4, 2, 2, 2, 3, 1, 1]
    assert rollout.completion_ids()[1] == [12, 13]


@pytest.mark.parametrize(
    "indices",
    [
        [4, 0, 4],
        torch.tensor([4, 0, 4]),
        slice(1, 6, 2),
        torch.tensor([True, False, False, True, True, False, False]),
        [-1],
        [],
    ],
)
def test_selection_takes_the_same_rows_of_every_field(experience: Experience, indices: Any) -> None:
    rows = torch.arange(ROWS)[indices if isinstance(indices, slice | Tensor) else torch.tensor(indices).long()].tolist()
    picked = experience.select(indices)
    assert len(picked) == len(rows)
    for instance, source in ((picked.rollout, experience.rollout), (picked, experience)):
        for item in fields(instance):
            value, before = getattr(instance, item.name), getattr(source, item.name)
            if isinstance(value, Tensor):
                assert torch.equal(value, before[rows])
            elif isinstance(value, list):
                assert value == [before[row] for row in rows]
    assert picked.score_parts["a"].tolist() == [100.0 + row for row in rows]
    assert picked.ref_logp is None


def test_moving_moves_every_tensor(experience: Experience) -> None:
    moved = experience.to("meta")
    for instance in (moved, moved.rollout):
        for item in fields(instance):
            value = getattr(instance, item.name)
            assert not isinstance(value, Tensor) or value.device.type == "meta"
    assert moved.score_parts["a"].device.type == "meta"
    assert moved.rollout.records == experience.rollout.records


@pytest.mark.parametrize("count", range(1, PROMPTS + 1))
def test_minibatches_partition_the_prompts(experience: Experience, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = list(experience.minibatches(count, generator))
    prompts = [batch.rollout.prompt_index.tolist() for batch in batches]
    sizes = [len(set(batch)) for batch in prompts]
    assert len(batches) == count
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == PROMPTS
    seen = [record["number"] for batch in batches for record in batch.rollout.records]
    assert sorted(seen) == list(range(ROWS))
    assert [score for batch in batches for score in batch.scores.tolist()] == seen


def test_minibatches_are_a_fresh_shuffle_of_their_generator(experience: Experience) -> None:
    def orders(seed: int) -> list[list[float]]:
        generator = torch.Generator().manual_seed(seed)
        return [[x for batch in experience.minibatches(2, generator) for x in batch.scores.tolist()] for _ in range(2)]

    assert orders(1) == orders(1)
    assert orders(1)[0] != orders(1)[1]
    assert orders(1) != orders(2)


def test_minibatches_beyond_the_prompts_have_nothing_to_learn(experience: Experience) -> None:
    batches = list(experience.minibatches(PROMPTS + 2, torch.Generator().manual_seed(1)))
    learnt = [bool(batch.completion_mask.any()) for batch in batches]
    assert learnt == [True] * PROMPTS + [False] * 2
    seen = [record["number"] for batch in batches[:PROMPTS] for record in batch.rollout.records]
    assert sorted(seen) == list(range(ROWS))


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (7, [[0, 1, 2, 3, 4, 5, 6]]),  # longest of each prompt: 5, 5, 5, 2
        (4, [[0, 1, 2, 3], [4, 5, 6]]),
        (3, [[0, 1], [2, 3], [4, 5, 6]]),
        (2, [[0, 1], [2, 3], [4, 5], [6]]),
        (1, [[0], [1], [2], [3], [4], [5], [6]]),
    ],
)
def test_completions_of_a_prompt_share_a_micro_batch_where_they_fit(
    rollout: Rollout, size: int, groups: list[list[int]]
) -> None:
    assert by_length(rollout, size) == groups


def test_longest_prompts_come_first(rollout: Rollout) -> None:
    order = [6, 5, 4, 2, 3]
    assert by_length(rollout.select(order), 2) == [[1, 2], [3, 4], [0]]
