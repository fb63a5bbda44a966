"""Supervised fine-tuning: ids, loss mask, loss, gradients and metrics are TRL's, but for the differences named here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lightning_align.data.datamodules import SFTDataModule
from lightning_align.data.encode import encode_messages, encode_pair, encode_texts
from lightning_align.methods.sft import SFTModule
from lightning_align.models.linear_stats import logits_row_stats

trl = pytest.importorskip("trl", reason="make test-parity installs TRL")

TRL = (trl.SFTTrainer, trl.SFTConfig)
Records = Sequence[Mapping[str, Any]]
DIALOGUE = [
    {"role": "user", "content": "list three animals"},
    {"role": "assistant", "content": "cat , dog and bird"},
    {"role": "user", "content": "say it twice : rain"},
    {"role": "assistant", "content": "rain rain"},
]


# ---------------------------------------------------------------------- ids and loss mask
@pytest.fixture
def prepared(world: Path, make_theirs: Callable[..., Any]) -> Callable[..., tuple[list[int], list[bool]]]:
    """``prepared(tokenizer, record, **options)``: what TRL makes of a record, as ids and loss mask."""

    def prepare(
        tokenizer: PreTrainedTokenizerFast, record: Mapping[str, Any], **options: Any
    ) -> tuple[list[int], list[bool]]:
        network = AutoModelForCausalLM.from_pretrained(world / "policy")
        (row,) = make_theirs(TRL, network, tokenizer, [record], **options).train_dataset
        return row["input_ids"], [label != -100 for label in row["labels"]]

    return prepare


def test_ids_and_loss_mask_of_each_record_kind(
    tokenizer: PreTrainedTokenizerFast, demonstrations: Records, prepared: Callable[..., Any]
) -> None:
    for record in (demonstrations[0], {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}):
        ours = encode_pair(tokenizer, record["prompt"], record["completion"])
        assert (ours.input_ids, ours.loss_mask) == prepared(tokenizer, record)
    ours = encode_messages(tokenizer, DIALOGUE)
    theirs = prepared(tokenizer, {"messages": DIALOGUE}, assistant_only_loss=True)
    assert (ours.input_ids, ours.loss_mask) == theirs
    (text,) = encode_texts(tokenizer, ["the sun is hot"])
    assert (text, [True] * len(text)) == prepared(tokenizer, {"text": "the sun is hot"})


def test_nothing_follows_the_end_of_the_last_turn(
    with_breaks: PreTrainedTokenizerFast, prepared: Callable[..., Any]
) -> None:
    """TRL keeps what a template puts behind it, and of a completion also learns it, though no sample contains it."""
    (line_break,) = with_breaks("\n")["input_ids"]
    pair = encode_pair(with_breaks, DIALOGUE[:3], DIALOGUE[3:])
    ids, mask = prepared(with_breaks, {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]})
    assert (ids, mask) == ([*pair.input_ids, line_break], [*pair.loss_mask, True])
    whole = encode_messages(with_breaks, DIALOGUE)
    ids, mask = prepared(with_breaks, {"messages": DIALOGUE}, assistant_only_loss=True)
    assert (ids, mask) == ([*whole.input_ids, line_break], [*whole.loss_mask, False])


def test_a_prompt_keeps_the_ids_that_sampling_gives_it(
    tokenizer: PreTrainedTokenizerFast, prepared: Callable[..., Any]
) -> None:
    """Where a token would lie across prompt and completion, TRL learns it whole, after a prompt that no sample has."""
    prompt, completion = "say ra", "in"
    head, joint = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion + "<|im_end|>"))
    assert joint[: len(head)] != head, "the record must have such a token"
    ours = encode_pair(tokenizer, prompt, completion)
    theirs, _ = prepared(tokenizer, {"prompt": prompt, "completion": completion})
    assert ours.input_ids[: len(head)] == head
    assert theirs == joint
    assert tokenizer.decode(ours.input_ids) == tokenizer.decode(theirs)


# ---------------------------------------------------------------------- loss, gradients, metrics
@pytest.fixture
def network(world: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The tiny language model."""
    return AutoModelForCausalLM.from_pretrained(world / "policy").to(dtype)


@pytest.fixture
def train_both(
    tokenizer: PreTrainedTokenizerFast,
    network: PreTrainedModel,
    write: Callable[[Records], str],
    train_theirs: Callable[..., Any],
    train_ours: Callable[..., Any],
) -> Callable[..., tuple[Any, Any]]:
    """``train_both(records, batch_size, accumulate, steps)``: ours and theirs."""

    def train(records: Records, batch_size: int, accumulate: int, steps: int) -> tuple[Any, Any]:
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
        theirs = train_theirs(TRL, network, tokenizer, records, max_steps=steps, **sizes)
        data = SFTDataModule(
            path=write(records), batch_size=batch_size, val_fraction=0.0, shuffle=False, cache_dir=None
        )
        options = {"max_steps": steps, "accumulate_grad_batches": accumulate}
        return train_ours(SFTModule, lambda module: module.model, network, {}, data, **options), theirs

    return train


def test_one_step_has_the_same_loss_gradients_and_metrics(
    demonstrations: Records, dtype: torch.dtype, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    ours, theirs = train_both(demonstrations, 6, 1, 1)
    agree("gradients", ours.gradients[0], theirs.gradients[0], dtype)
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    agree("metrics", {n: ours.rows[0][n] for n in names}, {n: theirs.rows[0][n] for n in names}, dtype)
    for name in ("num_tokens", "epoch", "learning_rate"):
        assert ours.rows[0][name] == theirs.rows[0][name]
    assert 0 < ours.rows[0]["mean_token_accuracy"] < 1, "a number that says something"
    assert theirs.rows[0].keys() <= ours.rows[0].keys(), "every name that TRL logs"


def test_accumulated_micro_batches_and_a_short_last_window(
    demonstrations: Records, dtype: torch.dtype, train_both: Callable[..., Any], agree: Callable[..., None]
) -> None:
    """Both divide by the tokens of the window. Only metrics beside the loss are means of means in TRL."""
    ours, theirs = train_both(demonstrations, 2, 2, 2)  # windows of 2 + 2 and of 2 records
    single, _ = train_both(demonstrations, 2, 1, 3)
    for step in range(2):
        agree(f"gradients of window {step}", ours.gradients[step], theirs.gradients[step], dtype)
        agree(f"loss of window {step}", ours.rows[step]["loss"], theirs.rows[step]["loss"], dtype)
    for name in ("entropy", "mean_token_accuracy"):
        micro = [row[name] for row in single.rows[:2]]
        agree(f"{name} as a mean of means", sum(micro) / 2, theirs.rows[0][name], dtype)
        assert abs(ours.rows[0][name] - theirs.rows[0][name]) > 1e-4
        agree(f"{name} of one micro-batch", ours.rows[1][name], theirs.rows[1][name], dtype)


def test_token_statistics_are_those_of_trl(dtype: torch.dtype, agree: Callable[..., None]) -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(7, 41, generator=generator, dtype=dtype)
    labels = torch.randint(0, 41, (7,), generator=generator)
    ours = logits_row_stats(logits, labels, temperature=0.7, entropy=True, correct=True)
    agree("log-probs", ours.logp, selective_log_softmax(logits / 0.7, labels), dtype)
    agree("entropy", ours.entropy, entropy_from_logits(logits / 0.7), dtype)
