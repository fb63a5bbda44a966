"""DPO-1, 5, 6, 9 and 11 through the module and the command line, for every loss."""

import gc
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.callbacks import progress
from lightning_align.cli.main import run
from lightning_align.data.collate import Window
from lightning_align.data.datamodules import PreferenceDataModule
from lightning_align.errors import UserError
from lightning_align.losses.preference import LOSSES, REFERENCE_FREE
from lightning_align.methods import dpo
from lightning_align.playground import records

DPO = {
    **{"model": "DPOModule", "model.model": "@sft", "model.learning_rate": 1e-3, "data": "PreferenceDataModule"},
    **{"data.path": "@preference.jsonl", "data.val_path": "@preference_val.jsonl", "data.batch_size": 8},
}
KTO = {"model.loss_type": "kto", "data.path": "@unpaired.jsonl", "data.val_path": "@unpaired_val.jsonl"}
DOUBLE = {"trainer.precision": "64-true"}
MIXED = {"model.loss_type": ["sigmoid", "orpo"], "model.loss_weights": [0.7, 0.2], "model.rpo_alpha": 0.3}
EVERY: dict[str, dict[str, Any]] = {name: {"model.loss_type": name} for name in LOSSES}
EVERY |= {"smoothed": {"model.label_smoothing": 0.1}, "likelihood": {"model.rpo_alpha": 0.5}}
EVERY |= {"mixed": MIXED, "ties": {"data.ties": "soft"}, "kto": KTO}


@pytest.fixture(scope="module")
def module(world: Any) -> Callable[[str], Any]:
    """``module(name)``: in float64, its policy already away from its reference; made once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = world.ready({**DPO, **DOUBLE, **EVERY[name]})
            draw = torch.Generator().manual_seed(0)
            for parameter in made[name].model.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        return made[name]

    return get


def parts(module: Any, *sizes: int) -> list[tuple[dict[str, Tensor], float]]:
    """An optimiser step of so many micro-batches with so many elements each, and its weight."""
    data = module.trainer.datamodule.datasets["train"]
    elements = list(range(sum(sizes)))
    weight = float(data.weights[elements].sum())
    found, start = [], 0
    for size in sizes:
        window = Window(elements, elements, first=start == 0)
        found.append((data.collate(elements[start : start + size], weight, window), weight))
        start += size
    return found


@pytest.mark.parametrize("name", EVERY)
def test_dpo_5_conv_5_neither_micro_batches_nor_padding_nor_packing_change_a_gradient(
    module: Callable[[str], Any],
    gradients: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    of = module(name)

    def gradient(*sizes: int) -> Tensor:
        loss = sum(of.loss(batch)[0] / weight for batch, weight in parts(of, *sizes))
        return torch.cat([values.flatten() for values in gradients(of, loss).values()])

    whole = gradient(8)
    assert whole.norm() > 1e-4
    for other in (gradient(3, 3, 2), gradient(6, 2)):
        assert (other - whole).norm() < 1e-6 * whole.norm()
    monkeypatch.setattr(dpo, "keeps_documents_apart", lambda model, otherwise: False)
    assert (gradient(8) - whole).norm() < 1e-6 * whole.norm()


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "kto"])
def test_dpo_1_a_run_begins_at_its_reference(world: Any, name: str) -> None:
    run = world.fit({**DPO, **EVERY[name], "trainer.max_steps": 1, "model.beta": 0.2})
    row = run.row(1, "loss")
    assert row["loss"] == pytest.approx({"sigmoid": math.log(2), "ipo": 6.25, "hinge": 1.0, "kto": 0.5}[name], rel=1e-5)
    assert [row["rewards/margins"], row["rewards/chosen"]] == pytest.approx([0, 0], abs=1e-6)
    assert row["entropy"] > 0
    assert row["grad_norm"] > 0
    assert all(key.startswith("model.") for key in run.checkpoint()["state_dict"])  # no reference in it


@pytest.mark.filterwarnings("ignore:training bfloat16 weights")
@pytest.mark.parametrize("precision", [{"model.dtype": "bfloat16"}, {"trainer.precision": "bf16-mixed"}, DOUBLE])
def test_dpo_1_no_precision_moves_the_reference(world: Any, precision: dict[str, Any]) -> None:
    for name in ("sigmoid", "kto"):
        run = world.fit({**DPO, **EVERY[name], **precision, "trainer.max_steps": 1, "model.beta": 1.0})
        row = run.row(1, "loss")
        assert [row[f"rewards/{side}"] for side in ("chosen", "rejected")] == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("reference", [{}, {"model.reference": "cached"}, {"model.lora_r": 2}])
def test_dpo_1_at_the_reference_every_pair_is_undecided(world: Any, reference: dict[str, Any], precision: str) -> None:
    run = world.fit({**DPO, **reference, "trainer.precision": precision, "trainer.max_steps": 1})
    assert run.row(1, "loss")["rewards/accuracies"] == 0.5


COMMON = {"loss", "num_tokens", "epoch", "grad_norm", "learning_rate", "entropy", "step"}
COMMON |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
COMMON |= {"logits/chosen", "logits/rejected"}
NAMES = {
    "sigmoid": COMMON | {"rewards/accuracies", "mean_token_accuracy"},
    "cpo": COMMON | {"rewards/accuracies", "mean_token_accuracy", "nll_loss"},
    "orpo": COMMON | {"rewards/accuracies", "mean_token_accuracy", "nll_loss", "log_odds_chosen", "log_odds_ratio"},
    "kto": COMMON | {"kl"},
}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_have_the_names_of_trl(world: Any, name: str) -> None:
    run = world.fit({**DPO, **EVERY[name], "trainer.max_steps": 1})
    assert set(run.row(1, "loss")) == NAMES[name]
    measured = {key for key in NAMES[name] if key not in ("num_tokens", "epoch", "grad_norm", "learning_rate", "step")}
    assert set(run.row(1, "eval/loss")) == {f"eval/{key}" for key in measured} | {"step"}


@pytest.mark.parametrize("name", ["cpo", "orpo", "mixed", "kto"])
def test_evaluation_does_not_depend_on_its_batches(world: Any, name: str) -> None:
    options = {**DPO, **DOUBLE, **EVERY[name], "trainer.max_epochs": 1}
    rows = [world.fit({**options, "data.eval_batch_size": size}).row(3, "eval/loss") for size in (5, 2)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-9)


def test_training_raises_the_margin_of_held_out_pairs(world: Any) -> None:
    many = {"data.path": world.write("more.jsonl", records("preference", size=200)), "data.batch_size": 16}
    held_out = {"data.val_path": world.write("more_val.jsonl", records("preference", split="val", size=60))}
    run = world.fit({**DPO, **many, **held_out, "trainer.max_epochs": 2, "model.learning_rate": 3e-3})
    last = [row for row in run.rows if "eval/loss" in row][-1]
    assert last["eval/rewards/margins"] > 0.1
    assert last["eval/rewards/accuracies"] > 0.55


# ---------------------------------------------------------------------- references
def test_dpo_6_cached_log_probs_are_those_of_the_live_reference(world: Any) -> None:
    for name in ("sigmoid", "kto"):
        options = {**DPO, **EVERY[name], "trainer.max_epochs": 2}
        live = world.fit(options)
        cached = world.fit({**options, "model.reference": "cached"})
        assert cached.module.frozen is None
        for one, other in zip(live.rows, cached.rows, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
        again = world.fit({**options, "model.reference": "cached", "model.reference_cache": _cache(cached)})
        assert again.rows == cached.rows
        assert not (again.path / dpo.CACHE_FILE).exists()


def _cache(run: Any) -> str:
    return str(run.path / dpo.CACHE_FILE)


def test_dpo_6_what_was_cached_from_something_else_is_refused(
    world: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = {**DPO, "model.reference": "cached", "trainer.max_steps": 1}
    cache = {"model.reference_cache": _cache(world.fit(options))}
    other = world.fit({**DPO, "trainer.max_steps": 2})
    longer = records("preference", size=18)
    tokenizer = _with_another_tokenizer(world)
    for changes, reason in (
        ({"model.model": str(other.path)}, "another reference model"),
        ({"model.model": tokenizer}, "another train data"),
        ({"data.path": world.write("longer.jsonl", longer)}, "another train data"),
        ({"data.val_path": world.write("val.jsonl", longer)}, "another val data"),
        ({"data.max_length": 12}, "another train data"),
        ({"trainer.precision": "64-true"}, "another precision"),
    ):
        world.fit({**options, **cache, **changes}, code=2)
        assert reason in capsys.readouterr().err
    damaged = tmp_path / "cache.safetensors"
    damaged.write_bytes(b"no such thing")
    world.fit({**options, "model.reference_cache": str(damaged)}, code=2)
    assert "is damaged" in capsys.readouterr().err


def _with_another_tokenizer(world: Any) -> str:
    """The SFT model with two tokens that have changed places."""
    folder = world.root / "other_tokenizer"
    folder.mkdir()
    for file in (world.root / "sft" / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if word.strip("Ġ▁ ").isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def test_dpo_6_a_resumed_run_reads_its_own_cache(world: Any) -> None:
    options = {**DPO, "model.reference": "cached", "trainer.max_epochs": 2}
    whole = world.fork(options)
    stopped = world.fork(options, stop_at=4, code=130)
    resumed = world.fork(options, "--resume", name=stopped.path.name)
    assert resumed.rows == whole.rows
    assert all(torch.equal(values, whole.weights[name]) for name, values in resumed.weights.items())


def test_dpo_6_a_reference_that_has_left_is_not_made_of_the_trained_policy(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.root / "splits").mkdir()
    for split in ("train", "val", "test"):
        world.write(f"splits/{split}.jsonl", records("preference", split=split, size=8))
    cached = {**DPO, "model.reference": "cached", "data.path": "@splits", "data.val_path": None, "trainer.max_steps": 1}
    margins: list[float] = []
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**quiet, enable_model_summary=False)
    # the first has left memory; that of a model with adapters is still there
    for options, left in ((cached, True), ({**cached, "model.lora_r": 2}, False)):
        module = world.fit(options).module
        known = module.trainer.datamodule
        again = PreferenceDataModule(path=str(world.root / "splits"), cache_dir=None)
        monkeypatch.setattr(module, "report", lambda row, step: margins.append(row["eval/rewards/margins"]))
        trainer.validate(module, known, verbose=False)
        for evaluate, datamodule in ((trainer.validate, again), (trainer.test, known)):
            with pytest.raises(UserError, match="the reference has left memory") if left else nullcontext():
                evaluate(module, datamodule, verbose=False)
    whole, before, after, _ = margins
    assert whole != 0
    assert before == pytest.approx(after, rel=1e-4) != 0


def test_dpo_6_log_probs_that_another_run_left_in_the_data_are_not_read(world: Any) -> None:
    module = world.ready(DPO)
    data = module.trainer.datamodule.datasets["train"]
    loss, _ = module.loss(data.collate(range(8), 8.0))
    data.ref_logp = np.zeros(data.num_sequences, dtype=np.float32)
    assert torch.equal(module.loss(data.collate(range(8), 8.0))[0], loss)


def test_dpo_6_two_processes_share_the_pass(world: Any) -> None:
    options = {**DPO, **DOUBLE, "model.reference": "cached", "trainer.max_epochs": 1}
    one = world.fork(options)
    both = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 4, "data.eval_batch_size": 4}
    two = world.fork({**options, **both}, processes=2)
    assert two.rows[0] == pytest.approx(one.rows[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_dpo_9_losses_without_a_reference_load_none(world: Any, name: str) -> None:
    gc.collect()
    before = sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())
    module = world.ready({**DPO, **EVERY[name]})
    assert module.frozen is None
    assert set(module.parameter_roles()) == {"policy"}
    gc.collect()
    found = sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())
    assert found - before == sum(isinstance(part, PreTrainedModel) for part in module.modules())


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.loss_type": "sigmiod"}, "unknown model.loss_type 'sigmiod'; did you mean 'sigmoid'?"),
        ({"model.loss_type": []}, "model.loss_type is empty"),
        ({"model.loss_type": ["ipo", "ipo"]}, "names a loss twice"),
        ({"model.loss_type": ["ipo", "hinge"], "model.loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"model.loss_type": ["sigmoid", "kto"]}, "mixes kto"),
        ({"model.loss_type": "ipo", "model.label_smoothing": 0.1}, "loss_type ipo does not use it"),
        ({"model.loss_type": ["hinge", "odpo"], "model.simpo_gamma": 1.0}, "loss_type [hinge, odpo] does not use it"),
        ({"model.loss_type": "slic", "model.beta": 0.2}, "model.beta is 0.2, but loss_type slic does not use it"),
        ({"model.label_smoothing": 0.5}, "model.label_smoothing is 0.5"),
        ({"model.beta": 0.0}, "model.beta is 0.0"),
        ({"model.reference": "none"}, "loss_type sigmoid compares with one"),
        ({"model.loss_type": "simpo", "model.reference": "model"}, "loss_type simpo uses none"),
        ({"model.reference_cache": "file"}, "set model.reference cached too"),
        ({**KTO, "data.batch_size": 1}, "data.batch_size is 1, and so is the step"),
        ({"model.loss_type": ["ipo", "hinge"], "model.loss_weights": [1.0, -1.0]}, "give numbers above 0"),
        ({"model.loss_type": ["ipo", "hinge"], "model.loss_weights": [0.0, 1.0]}, "give numbers above 0"),
        ({"model.loss_type": ["ipo", "hinge"], "model.loss_weights": "[1.0, .nan]"}, "give numbers above 0"),
        ({"model.loss_type": "simpo", "model.simpo_gamma": ".nan"}, "model.simpo_gamma is nan: give a finite"),
        ({"model.loss_type": "dpop", "model.dpop_lambda": ".inf"}, "model.dpop_lambda is inf: give a finite"),
        ({"data.margin": "small"}, "data.margin is small, but this loss has no margins: leave it out"),
        ({**KTO, "data.margin": "small"}, "data.margin is small, but this loss has no margins: leave it out"),
        ({"model.loss_type": "odpo", "data.margin": "none"}, "odpo needs to know by how much"),
        ({"data.ties": "davidson"}, "data.ties is davidson"),
        ({"model.dropout": 0.1}, "dropout"),
    ],
)
def test_dpo_11_options_that_cannot_be_meant_are_refused(
    world: Any, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    run = world.fit({**DPO, **options}, code=2)
    assert message in capsys.readouterr().err
    assert not run.path.exists()


@pytest.mark.parametrize(("loss", "said"), [("sigmoid", False), ("odpo", True)])
def test_margins_are_spoken_of_where_they_are_used(world: Any, loss: str, said: bool) -> None:
    module = world.ready({**DPO, "model.loss_type": loss})
    assert ("margin by strength" in module.trainer.datamodule.report.notes) is said
    assert bool(module.trainer.datamodule.datasets["train"].margins.any()) is said


def test_kto_learns_the_same_from_batches_of_one(world: Any) -> None:
    options = {**DPO, **KTO, **DOUBLE, "trainer.max_epochs": 1}
    ones = {"data.batch_size": 1, "trainer.accumulate_grad_batches": 8}
    one, whole = (world.fit({**options, **sizes}).row(3, "loss") for sizes in (ones, {}))
    assert one == pytest.approx(whole, rel=1e-6, abs=1e-6)


def test_kto_weighs_answers_as_their_records_say(world: Any) -> None:
    weights = [2.0, 3.0, 0.5, 0.5, 0.5, 0.5]
    rows = [{**row, "weight": weight} for row, weight in zip(records("unpaired", size=6), weights, strict=True)]
    options = {"data.path": world.write("weighted.jsonl", rows), "data.val_fraction": 0.0, "data.val_path": None}
    module = world.ready({**DPO, **KTO, **options})
    data = module.trainer.datamodule.datasets["train"]
    loss, sums = module.loss(data.collate(range(6), sum(weights)))
    assert float(loss.detach()) == pytest.approx(0.5 * sum(weights))  # at its reference every answer costs one half
    assert float(sums["loss"][1]) == sum(weights) == data.weights.sum()


def test_kto_warns_where_good_and_bad_answers_are_out_of_balance(world: Any) -> None:
    rows = records("unpaired", size=40)
    good, bad = ([row for row in rows if row["label"] is label][:8] for label in (True, False))
    options = {**DPO, **KTO, "data.path": world.write("unbalanced.jsonl", [*good, *bad[:4]]), "trainer.max_steps": 1}
    with pytest.warns(UserWarning, match="between 0.5 and 0.667"):
        world.fit(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"label": True}, "all answers are good"), ({"prompt": "say so :"}, "all records have the same prompt")],
)
def test_kto_refuses_records_that_are_all_alike(
    world: Any, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    rows = [{**row, **changes} for row in records("unpaired", size=16)]
    options = {**DPO, **KTO, "data.path": world.write("alike.jsonl", rows)}
    argv, path = world.command(options)
    for words in (argv, [*argv, "--dry-run"]):
        assert run(words) == 2
        assert message in capsys.readouterr().err
        assert not path.exists()


def test_thumbs_for_a_loss_of_pairs_name_the_loss_that_learns_from_them(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fit({**DPO, "data.path": world.write("thumbs.jsonl", records("unpaired", size=16))}, code=2)
    assert "this is an unpaired record, which DPOModule learns from with --model.loss_type kto" in (
        capsys.readouterr().err
    )


def test_progress_ends_with_accuracy_margin_and_the_last_evaluation(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)  # the last step has a line of its own before the evaluation
    options = {"trainer.enable_progress_bar": True, "trainer.max_steps": 2, "trainer.val_check_interval": 1.0}
    world.fit({**DPO, **options})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == len(set(lines))
    assert all(f" {name} " in lines[0] for name in ("loss", "acc", "margin"))
    assert " eval loss " in lines[-1]


def test_a_preference_file_serves_kto_too(world: Any) -> None:
    run = world.fit({**DPO, "model.loss_type": "kto", "trainer.max_steps": 1})
    assert run.row(1, "loss")["loss"] == pytest.approx(0.5, rel=1e-5)
