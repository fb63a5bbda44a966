"""Reward models: ids, scores, loss, gradients and metrics are TRL's, but for the differences named here."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from lightning_align.data.datamodules import PreferenceDataModule
from lightning_align.data.encode import encode_pair
from lightning_align.methods.reward import RewardModule
from lightning_align.models.heads import RewardModel

trl = pytest.importorskip("trl", reason="make test-parity installs TRL")

TRL = (trl.RewardTrainer, trl.RewardConfig)
Records = Sequence[Mapping[str, Any]]
PAIRS = [
    {"prompt": "list three animals", "chosen": " cat , dog and bird", "rejected": " rain"},
    {"prompt": "count to nine", "chosen": " one two", "rejected": " nine nine nine nine nine nine"},
    {"prompt": "sort dog cat", "chosen": " cat dog", "rejected": " dog cat"},
    {"prompt": "say it twice : rain", "chosen": " rain rain", "rejected": " rain"},
]
WITH_MARGINS = [{**pair, "margin": margin} for pair, margin in zip(PAIRS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)]
CHAT = {
    "prompt": [{"role": "user", "content": "sort dog cat"}],
    "chosen": [{"role": "assistant", "content": "cat dog"}],
    "rejected": [{"role": "assistant", "content": "dog cat"}],
}
METRICS = ("loss", "grad_norm", "accuracy", "margin", "mean_reward")
EXTREMES = ("min_reward", "max_reward")  # of the step here; TRL logs the mean of its micro-batches' extremes


@pytest.fixture
def network(world: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The tiny reward model."""
    return AutoModelForSequenceClassification.from_pretrained(world / "reward").to(dtype)


@pytest.fixture
def train_both(
    tokenizer: PreTrainedTokenizerFast,
    network: PreTrainedModel,
    write: Callable[[Records], str],
    train_theirs: Callable[..., Any],
    train_ours: Callable[..., Any],
) -> Callable[..., tuple[Any, Any]]:
    """``train_both(records, batch_size, accumulate, center)``: one step of ours and of theirs."""

    def train(records: Records, batch_size: int, accumulate: int, center: float = 0.0) -> tuple[Any, Any]:
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
        options = {"max_steps": 1, "center_rewards_coefficient": center or None, **sizes}
        theirs = train_theirs(TRL, network, tokenizer, records, **options)
        data = PreferenceDataModule(
            path=write(records), batch_size=batch_size, val_fraction=0.0, shuffle=False, cache_dir=None
        )
        ours = train_ours(
            RewardModule,
            lambda module: module.model.network,
            network,
            {"center_rewards_coefficient": center},
            data,
            max_steps=1,
            accumulate_grad_batches=accumulate,
        )
        return ours, theirs

    return train


# ---------------------------------------------------------------------- ids
@pytest.mark.parametrize("record", [PAIRS[0], CHAT], ids=["plain", "chat"])
def test_ids_of_both_answers(
    world: Path,
    tokenizer: PreTrainedTokenizerFast,
    with_breaks: PreTrainedTokenizerFast,
    make_theirs: Callable[..., Any],
    record: Mapping[str, Any],
) -> None:
    """TRL keeps what a chat template puts behind the last turn, and reads the score there."""
    network = AutoModelForSequenceClassification.from_pretrained(world / "reward")
    (line_break,) = with_breaks("\n")["input_ids"]
    for each, behind in ((tokenizer, []), (with_breaks, [line_break] if record is CHAT else [])):
        (row,) = make_theirs(TRL, network, each, [record]).train_dataset
        for answer in ("chosen", "rejected"):
            ours = encode_pair(each, record["prompt"], record[answer])
            assert ours.input_ids + behind == row[f"{answer}_ids"]


# ---------------------------------------------------------------------- loss, gradients, metrics
@pytest.mark.parametrize(("records", "center"), [(PAIRS, 0.0), (WITH_MARGINS, 0.01)], ids=["plain", "margin+centring"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2)], ids=["whole", "accumulated"])
def test_one_step_has_the_same_loss_gradients_and_metrics(
    dtype: torch.dtype,
    train_both: Callable[..., Any],
    agree: Callable[..., None],
    records: Records,
    center: float,
    batch_size: int,
    accumulate: int,
) -> None:
    ours, theirs = train_both(records, batch_size, accumulate, center)
    agree("gradients", ours.gradients[0], theirs.gradients[0], dtype)
    names = METRICS + EXTREMES if accumulate == 1 else METRICS
    agree("metrics", {n: ours.rows[0][n] for n in names}, {n: theirs.rows[0][n] for n in names}, dtype)
    for name in ("num_tokens", "epoch", "learning_rate"):
        assert ours.rows[0][name] == theirs.rows[0][name]
    assert 0 < ours.rows[0]["accuracy"] < 1, "a number that says something"
    assert theirs.rows[0].keys() <= ours.rows[0].keys(), "every name that TRL logs"


def test_micro_batches_of_unequal_size(
    dtype: torch.dtype, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    """TRL takes the mean of their means; ours is the mean over the pairs of the optimiser step."""
    ours, theirs = train_both(PAIRS, 3, 2)
    parts = [train_both(pairs, 3, 1)[0].gradients[0] for pairs in (PAIRS[:3], PAIRS[3:])]
    names = parts[0].keys()
    agree("mean of means", {n: (parts[0][n] + parts[1][n]) / 2 for n in names}, theirs.gradients[0], dtype)
    agree("mean over pairs", {n: (3 * parts[0][n] + parts[1][n]) / 4 for n in names}, ours.gradients[0], dtype)


def test_equal_scores_count_half(
    dtype: torch.dtype, network: PreTrainedModel, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    """In TRL an undecided pair is a miss; nothing else differs."""
    torch.nn.init.zeros_(network.score.weight)
    ours, theirs = train_both(PAIRS, 4, 1)
    agree("gradients", ours.gradients[0], theirs.gradients[0], dtype)
    assert (ours.rows[0]["accuracy"], theirs.rows[0]["accuracy"]) == (0.5, 0.0)
    agree("loss", ours.rows[0]["loss"], theirs.rows[0]["loss"], dtype)
    agree("loss of guessing", ours.rows[0]["loss"], math.log(2), dtype)


def test_padding_with_eos_does_not_hide_the_eos(
    dtype: torch.dtype,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train_theirs: Callable[..., Any],
    agree: Callable[..., None],
) -> None:
    """TRL finds the last token by the padding id: where that is EOS, it reads the token before. We go by the mask."""
    model = RewardModel(network)
    pairs = [encode_pair(tokenizer, pair["prompt"], pair[name]) for pair in PAIRS for name in ("chosen", "rejected")]

    def mean_score(length: Callable[[list[int]], int]) -> float:
        rows = [torch.tensor([pair.input_ids[: length(pair.input_ids)]]) for pair in pairs]
        with torch.no_grad():
            return float(torch.cat([model(ids, torch.ones_like(ids)) for ids in rows]).mean())

    options = {"max_steps": 1, "per_device_train_batch_size": 4}
    for pad_token, length in ((tokenizer.pad_token, len), (tokenizer.eos_token, lambda ids: len(ids) - 1)):
        theirs = train_theirs(TRL, network, tokenizer, PAIRS, pad_token=pad_token, **options)
        agree(f"mean score, padded with {pad_token}", mean_score(length), theirs.rows[0]["mean_reward"], dtype)
    assert abs(mean_score(len) - theirs.rows[0]["mean_reward"]) > 1e-3
