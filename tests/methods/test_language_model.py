"""Pre-training and SFT through their modules and the command line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_align.playground import records

PRETRAIN = {
    **{"model": "PretrainModule", "model.model": "@pretrain", "model.learning_rate": 1e-2, "data": "TextDataModule"},
    **{"data.path": "@text.jsonl", "data.val_path": "@text_val.jsonl", "data.max_length": 64},
}
SFT = {
    **{"model": "SFTModule", "model.model": "@pretrain", "model.learning_rate": 1e-2, "data": "SFTDataModule"},
    **{"data.path": "@sft.jsonl", "data.val_path": "@sft_val.jsonl"},
}


def test_pre_3_uniform_logits_have_loss_ln_v(world: Any) -> None:
    module = world.ready(PRETRAIN)
    for parameter in module.model.parameters():
        parameter.data.zero_()
    module.export(world.root / "uniform")
    metrics = world.validated({**PRETRAIN, "model.model": "@uniform"})
    size = len(module.tokenizer)
    assert math.isclose(metrics["eval/loss"], math.log(size), rel_tol=1e-5)
    assert math.isclose(metrics["eval/perplexity"], size, rel_tol=1e-5)
    assert math.isclose(metrics["eval/entropy"], math.log(size), rel_tol=1e-5)


def test_evaluation_is_weighted_by_tokens_whatever_the_batches(world: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.root / "pretrain" / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.root / "pretrain" / "model")
    known = [r for r in records("text", split="val", size=40) if set(r["text"].split()) <= set(tokenizer.get_vocab())]
    options = {**PRETRAIN, "data.val_path": world.write("known.jsonl", known)}
    metrics = world.validated({**options, "data.eval_batch_size": 2, "data.packing": "none"})
    assert world.validated(options) == pytest.approx(metrics, rel=1e-5)
    nats, hits, tokens, size = 0.0, 0, 0, 0
    for record in known:
        ids = torch.tensor([[*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logp.gather(1, ids[0, 1:, None]).sum())
        hits += int((logp.argmax(1) == ids[0, 1:]).sum())
        tokens += ids.shape[1] - 1
        size += len(record["text"].encode())
    assert math.isclose(metrics["eval/loss"], nats / tokens, rel_tol=1e-5)
    assert math.isclose(metrics["eval/perplexity"], math.exp(nats / tokens), rel_tol=1e-5)
    assert math.isclose(metrics["eval/bits_per_byte"], nats / math.log(2) / size, rel_tol=1e-5)
    assert math.isclose(metrics["eval/mean_token_accuracy"], hits / tokens, rel_tol=1e-5)


def test_pre_4_overfits_eight_sequences(world: Any) -> None:
    # that begin with different words: what nobody can know would count as loss
    first_words = {record["text"].split()[0]: record for record in reversed(records("text", size=400))}
    assert len(first_words) >= 8
    data = world.write("eight.jsonl", sorted(first_words.values(), key=lambda record: len(record["text"]))[:8])
    options = {**PRETRAIN, "data.path": data, "data.packing": "none", "data.batch_size": 8, "model.weight_decay": 0.0}
    finished = world.fit({**options, "data.max_length": 96, "trainer.max_steps": 150, "trainer.limit_val_batches": 0})
    assert finished.rows[-1]["loss"] < 0.05


def test_pre_5_the_next_twenty_losses_after_a_resume_within_an_epoch(world: Any) -> None:
    options = {**PRETRAIN, "data.packing": "none", "data.batch_size": 1, "trainer.max_epochs": 2}
    options |= {"model.dropout": 0.1, "trainer.limit_val_batches": 0}
    whole = world.fork(options)
    stopped = world.fork(options, stop_at=7, code=130)
    assert len(stopped.rows) == 7
    resumed = world.fork(options, "--resume", name=stopped.path.name)
    assert [row["loss"] for row in resumed.rows[7:27]] == [row["loss"] for row in whole.rows[7:27]]
    assert len({row["loss"] for row in whole.rows[7:27]}) == 20


def test_sft_1_loss_is_the_mean_negative_log_prob_of_the_completions(world: Any) -> None:
    module = world.ready({**SFT, "trainer.precision": "64-true"})
    data = module.trainer.datamodule.datasets["train"]
    batch = data.collate(range(17), 1.0)
    with torch.no_grad():
        logp = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    total = weight = 0.0
    for index, record in enumerate(records("sft", size=17)):
        prompt = module.tokenizer(record["prompt"])["input_ids"]
        whole = [*module.tokenizer(record["prompt"] + record["completion"])["input_ids"], module.tokenizer.eos_token_id]
        (row,) = [r for r, ids in enumerate(batch["input_ids"].tolist()) if ids[: len(whole)] == whole]
        for position in range(len(prompt), len(whole)):
            total -= (1.0, 0.25, 3.0)[index % 3] * float(logp[row, position - 1, whole[position]])
            weight += (1.0, 0.25, 3.0)[index % 3]
    loss, sums = module.loss(batch)
    assert math.isclose(float(loss.detach()), total, rel_tol=1e-6)
    assert math.isclose(float(sums["loss"][1]), weight, rel_tol=1e-6)
    assert math.isclose(float(data.weights.sum()), weight, rel_tol=1e-6)  # what the loader divides by


def test_sft_1_weights_of_records_scale_their_gradient(world: Any, gradients: Callable[..., dict[str, Tensor]]) -> None:
    module = world.ready({**SFT, "trainer.precision": "64-true"})
    data = module.trainer.datamodule.datasets["train"]
    batch = data.collate(range(4), 1.0)
    parts = [data.collate([index], 1.0) for index in range(4)]
    factors = (1.0, 7.0, 0.0, 0.5)
    scaled = {**batch, "loss_weights": batch["loss_weights"].double() * torch.tensor(factors)[:, None].double()}
    together = gradients(module, module.loss(scaled)[0])
    alone = [gradients(module, module.loss(part)[0]) for part in parts]
    for name, gradient in together.items():
        expected = sum(factor * part[name] for factor, part in zip(factors, alone, strict=True))
        assert float((gradient - expected).norm()) < 1e-6 * float(expected.norm())


def test_dropout_is_on_in_training_and_off_in_evaluation(world: Any) -> None:
    options = {**SFT, "data.batch_size": 8, "trainer.max_steps": 1, "model.learning_rate": 0.0}
    off, on = world.fit(options), world.fit({**options, "model.dropout": 0.5})
    assert on.rows[0]["loss"] != off.rows[0]["loss"]
    assert on.row(1, "eval/loss")["eval/loss"] == off.row(1, "eval/loss")["eval/loss"]


def test_sft_5_noise_on_embeddings_is_on_in_training_and_off_in_evaluation(world: Any) -> None:
    options = {**SFT, "data.batch_size": 8, "trainer.max_steps": 1, "model.learning_rate": 0.0}
    off, on = world.fit(options), world.fit({**options, "model.neftune_noise_alpha": 15.0})
    assert on.rows[0]["loss"] != off.rows[0]["loss"]
    assert on.row(1, "eval/loss")["eval/loss"] == off.row(1, "eval/loss")["eval/loss"]
    assert not on.module.model.get_input_embeddings()._forward_hooks
    for name, values in off.weights.items():
        assert torch.equal(on.weights[name], values)


def test_a_model_that_cannot_pack_gets_a_row_for_every_document(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PRETRAIN, "data.packing": "bfd", "data.batch_size": 4, "trainer.max_steps": 3}
    options |= {"trainer.precision": "64-true"}
    packed = world.fit(options)
    monkeypatch.setattr("lightning_align.models.masks.check_packing", lambda model: False)
    with pytest.warns(UserWarning, match="every document gets a row of its own"):
        apart = world.fit(options)
    for one, other in zip(packed.rows, apart.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    for name, values in packed.weights.items():
        torch.testing.assert_close(apart.weights[name], values, rtol=1e-9, atol=1e-9)
