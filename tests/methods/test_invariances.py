"""What must not change a method's gradients, metrics or files. A method enters with one line of :data:`METHODS`.

Every invariance has counter-examples: the same comparison on a variant that is wrong, where it must fail.
"""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.methods import dpo, reward, sampling
from lightning_align.models import heads, logprobs
from lightning_align.playground import records

DOUBLE = {"trainer.precision": "64-true"}
TOLERANCE = 1e-6  # relative, in float64


@dataclass(frozen=True)
class Method:
    """What the invariances need to know of a method.

    Args:
        options: Of a tiny run; ``@name`` is a file or run of the world.
        weighs: The tensor of a batch that says how much a row counts.
        packs: Whether rows may hold several documents.
        smallest: Elements of the smallest micro-batch.
    """

    options: dict[str, Any]
    weighs: str
    packs: bool = False
    smallest: int = 1

    @property
    def online(self) -> bool:
        """Whether it makes its own samples."""
        return self.options["data"] == "PromptDataModule"


def offline(model: str, start: str, data: str, records: str, **options: Any) -> dict[str, Any]:
    """A run of two epochs of three optimiser steps."""
    return {
        **{"model": model, "model.model": f"@{start}", "model.learning_rate": 1e-2, "data": data},
        **{"data.path": f"@{records}.jsonl", "data.val_path": f"@{records}_val.jsonl", "data.batch_size": 8},
        **{"trainer.max_epochs": 2, **options},
    }


def online(model: str, **options: Any) -> dict[str, Any]:
    """A run of five iterations; an option that is None is left out."""
    given = {
        **{"model": model, "model.model": "@sft", "model.learning_rate": 3e-3, "model.reward": "@reward"},
        **{"model.gold": "playground", "model.iterations": 5, "model.max_new_tokens": 8, "model.eval_every": 3},
        **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
        **{"data.batch_size": 8, **options},
    }
    return {name: value for name, value in given.items() if value is not None}


DROPOUT = {"model.dropout": 0.1}
ADAPTIVE = {"model.kl_control": "adaptive", "model.kl_horizon": 40, "model.score_scaling": "running"}
PTX = {"model.ptx_coef": 0.5, "model.ptx_path": "@text.jsonl", "model.ptx_batch_size": 4}
UNPACKED = {"data.packing": "none"}
LORA = {"model.lora_r": 4}
# of pairs with a reference, and of the tokens of the better answers
MIXED, KTO = {"model.loss_type": ["sigmoid", "orpo"]}, {"model.loss_type": "kto"}
TIES = {"data.ties": "davidson"}
RANKING = {"model.objective": "plackett_luce", "model.center_rewards_coefficient": 0.01, "data.ties": "soft"}
SCORES = {"model.objective": "huber"}
# ratios that are not 1, a KL in the loss, and statistics of the batch beside those of the group
GROUPS = {
    **{"model.preset": "dapo", "model.dynamic_sampling": False, "model.samples_per_prompt": 4, "model.num_epochs": 2},
    **{"model.advantage": "batch_std", "model.kl": "loss", "model.beta": 0.1},
}
SELECTED = {"model.samples_per_prompt": 3, "model.num_epochs": 2}
# three Grow steps of two batches, and two Improve steps each unless the reward does not rise
GROWN = {
    **{"model.iterations": None, "model.grow_steps": 3, "model.grow_batches": 2, "model.quantiles": [0.2, 0.5]},
    **{"model.min_kept": 1, "model.samples_per_prompt": 3, "model.loss": "weighted_bc", "model.eval_every": 1},
    **{"model.improve_batch_size": 1000, "data.batch_size": 4},
}
PAIRS = {"model.samples_per_prompt": 4, "model.num_epochs": 2, "model.missing_eos_penalty": 0.5}
HINDSIGHT = {
    **{"model.relabel": "score_bucket", "model.instructions": ["cat : ", "dog : ", "cow : "]},
    **{"model.samples_per_prompt": 3, "model.num_epochs": 2, "model.buffer_rounds": 2, "model.entropy_coef": 0.1},
}
REVISED = {"model.constitution": "playground", "model.revisions": 2, "model.max_new_tokens": 16, "model.num_epochs": 2}
METHODS = {
    "pretrain": Method(
        offline("PretrainModule", "model.yaml", "TextDataModule", "text", **UNPACKED), "loss_weights", packs=True
    ),
    "sft": Method(offline("SFTModule", "pretrain", "SFTDataModule", "sft"), "loss_weights", packs=True),
    "reward": Method(offline("RewardModule", "sft", "PreferenceDataModule", "preference", **TIES), "pair_weight"),
    "ranking": Method(offline("RewardModule", "sft", "PreferenceDataModule", "ranked", **RANKING), "group_weight"),
    "scores": Method(offline("RewardModule", "sft", "PreferenceDataModule", "scored", **SCORES), "response_weight"),
    "dpo": Method(offline("DPOModule", "sft", "PreferenceDataModule", "preference", **MIXED), "pair_weight"),
    "dpo_lora": Method(offline("DPOModule", "sft", "PreferenceDataModule", "preference", **LORA), "pair_weight"),
    "kto": Method(offline("DPOModule", "sft", "PreferenceDataModule", "unpaired", **KTO), "weight", smallest=2),
    "ppo": Method(online("PPOModule", **ADAPTIVE, **PTX, **{"model.num_ppo_epochs": 2}), "advantages"),
    "grpo": Method(online("GRPOModule", **GROUPS), "advantages"),
    "online_dpo": Method(online("OnlineDPOModule", **PAIRS), "ref_logp", smallest=2),
    "rest": Method(online("ReSTModule", **GROWN), "advantages"),
    "hir": Method(online("HIRModule", **HINDSIGHT), "weights"),
    "constitutional": Method(online("ConstitutionalModule", **REVISED), "completion_mask"),
    "rejection": Method(online("RejectionSamplingModule", **SELECTED), "completion_mask"),
}
every_method = pytest.mark.parametrize("name", METHODS)


# ------------------------------------------------------------------------------------------------ gradients of a batch
class Subject:
    """A method in float64 at the start of a run, and how to ask it for the gradients of a batch."""

    def __init__(self, method: Method, world: Any, gradients: Callable[..., dict[str, Tensor]]) -> None:
        self.method = method
        self.module = world.ready({**method.options, **DOUBLE})
        self.gradients = gradients
        self.datamodule = self.module.trainer.datamodule
        if method.online:
            experience, _ = self.module.collect(next(iter(self.datamodule.train_dataloader())))
            self.samples = experience
            if experience.logp is not None:  # ratios that are not 1
                noise = torch.randn(experience.logp.shape, generator=torch.Generator().manual_seed(0)) / 4
                self.samples = dataclasses.replace(experience, logp=experience.logp + noise)

    def batch(self, *elements: int) -> Any:
        """These elements of the training set (of the samples, for an online method), in this order."""
        if self.method.online:
            return self.samples.select(list(elements))
        data = self.datamodule.datasets["train"]
        return data.collate(list(elements), float(data.weights[list(elements)].sum()))

    def loss(self, batch: Any) -> Tensor:
        """Loss as it is when the batch is a whole optimiser step."""
        if self.method.online:
            return self.module.minibatch_loss(batch, batch.completion_mask.sum().double())[0]
        return self.module.loss(batch)[0] / batch["window_weight"]

    def distance(self, *batches: Any) -> float:
        """Relative difference between the gradients of the first batch and the summed ones of the others."""
        first, second = (
            self.gradients(self.module, sum(self.loss(batch) for batch in side)) for side in (batches[:1], batches[1:])
        )
        size = torch.stack([gradient.norm() for gradient in first.values()]).norm()
        assert size > 1e-4
        return float(torch.stack([(first[name] - second[name]).norm() for name in first]).norm() / size)


@pytest.fixture(scope="module")
def subject(world: Any, gradients: Any) -> Callable[[str], Subject]:
    """``subject(name)``, made once."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = Subject(METHODS[name], world, gradients)
        return made[name]

    return get


def mapped(batch: Any, function: Callable[[str, Tensor], Tensor]) -> Any:
    """A batch with every tensor replaced, those of dataclasses in it too."""
    if isinstance(batch, dict):
        return {name: function(name, value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    changes = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(field.name, value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = mapped(value, function)
    return dataclasses.replace(batch, **changes)


FILL = {"document_ids": -1, "loss_weights": 0.0, "position_ids": 0}


def repadded(batch: Any, side: str, extra: int) -> Any:
    """The same rows with ``extra`` more padding, all of it on one side; in it stands whatever may stand there."""
    real = batch["attention_mask"] if isinstance(batch, dict) else batch.attention_mask
    width = int(real.sum(1).max()) + extra
    target = torch.arange(width) < real.sum(1)[:, None]
    target = target.flip(1) if side == "left" else target

    def move(name: str, values: Tensor) -> Tensor:
        if values.shape != real.shape:
            return values
        garbage = torch.nan if values.is_floating_point() else 0 if values.dtype == torch.bool else 5
        return values.new_full(target.shape, FILL.get(name, garbage)).masked_scatter(target, values[real])

    return mapped(batch, move)


def padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: models get an attention mask of ones."""
    for place in (logprobs, heads):
        right = place.attention_inputs

        def wrong(config: Any, mask: Tensor, *rest: Any, right: Any = right, **options: Any) -> dict[str, Any]:
            return right(config, torch.ones_like(mask), *rest, **options)

        monkeypatch.setattr(place, "attention_inputs", wrong)
    rows = dpo.packed_rows
    ones = lambda batch: {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}  # noqa: E731
    for method in (dpo, reward, sampling):
        monkeypatch.setattr(method, "packed_rows", lambda batch, width: rows(ones(batch), width))


@every_method
@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("left", 5), ("right", 1), ("right", 7)])
def test_conv_2_ppo_4_padding_side_and_amount(subject: Any, name: str, side: str, extra: int) -> None:
    of = subject(name)
    batch = of.batch(*range(8))
    assert of.distance(batch, repadded(batch, side, extra)) < TOLERANCE
    torch.testing.assert_close(of.loss(repadded(batch, side, extra)), of.loss(batch), rtol=TOLERANCE, atol=TOLERANCE)


@every_method
def test_padding_that_is_seen_is_noticed(subject: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = subject(name)
    batch = of.batch(*range(8))
    padding_is_seen(monkeypatch)
    assert of.distance(batch, repadded(batch, "left", 5)) > 1e-3


@every_method
def test_order_of_the_batch(subject: Any, name: str) -> None:
    of = subject(name)
    assert of.distance(of.batch(*range(8)), of.batch(3, 1, 7, 0, 2, 6, 5, 4)) < TOLERANCE


@every_method
def test_loss_that_depends_on_the_place_in_the_batch_is_noticed(subject: Any, name: str) -> None:
    of = subject(name)

    def by_place(batch: Any) -> Any:
        def weigh(key: str, values: Tensor) -> Tensor:
            if key != of.method.weighs:
                return values
            dtype = values.dtype if values.is_floating_point() else torch.float64
            place = 1 + torch.arange(len(values), dtype=dtype) / 10
            return values * (place if values.ndim == 1 else place[:, None])

        return mapped(batch, weigh)

    assert of.distance(by_place(of.batch(*range(8))), by_place(of.batch(3, 1, 7, 0, 2, 6, 5, 4))) > 1e-3


# ------------------------------------------------------------------------------------------------------------- packing
packing_methods = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.packs])


@pytest.fixture(scope="module")
def packed(world: Any, gradients: Any) -> Callable[[str], Subject]:
    """``packed(name)``: with rows of several documents."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            method = METHODS[name]
            options = {**method.options, "data.packing": "bfd", "data.max_length": 64}
            made[name] = Subject(dataclasses.replace(method, options=options), world, gradients)
        return made[name]

    return get


def documents(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Every document of a packed batch as a batch of its own, cut out by hand; the weight stays the whole's."""
    for row in range(len(batch["input_ids"])):
        ids = batch["document_ids"][row]
        for document in range(int(ids.max()) + 1):
            inside = ids == document
            alone = {name: value[row][inside][None] for name, value in batch.items() if value.ndim == 2}
            alone["document_ids"] = torch.zeros_like(alone["document_ids"])
            yield {**alone, "window_weight": batch["window_weight"]}


@packing_methods
def test_pre_1_sft_2_packed_rows_are_their_documents_alone(packed: Any, name: str) -> None:
    of = packed(name)
    batch = of.batch(0, 1, 2)
    assert int(batch["document_ids"].max()) > 0
    assert of.distance(batch, *documents(batch)) < TOLERANCE
    assert of.distance(batch, repadded(batch, "right", 3)) < TOLERANCE


@packing_methods
def test_pre_1_documents_that_see_each_other_are_noticed(
    packed: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = packed(name)
    batch = of.batch(0, 1, 2)
    right = logprobs.attention_inputs

    def wrong(config: Any, mask: Tensor, positions: Any, ids: Any, **options: Any) -> dict[str, Any]:
        return right(config, mask, positions, None, **options)

    monkeypatch.setattr(logprobs, "attention_inputs", wrong)
    assert of.distance(batch, *documents(batch)) > 1e-3


# ------------------------------------------------------------------------------------------------- runs of the Trainer
# what depends on micro-batches rather than on what is in them
OF_THE_SPLIT = {"epoch", "empty_batches", "clip_ratio/low_min", "clip_ratio/high_max"}


def differences(first: Any, second: Any, tolerance: float) -> list[str]:
    """What two runs do not agree on: metrics by row and name, weights by name."""
    found = []
    if len(first.rows) != len(second.rows):
        return [f"{len(first.rows)} rows of metrics and {len(second.rows)}"]
    for one, other in zip(first.rows, second.rows, strict=True):
        for metric in one.keys() | other.keys():
            if metric.removeprefix("eval/") in OF_THE_SPLIT:
                continue
            left, right = one.get(metric, torch.nan), other.get(metric, torch.nan)
            if not abs(left - right) <= tolerance * (1 + abs(left)) and (left == left or right == right):
                found.append(f"{metric} at {one['step']}: {left} and {right}")
    weights = second.weights
    for tensor, values in first.weights.items():
        if not torch.allclose(values, weights[tensor], rtol=tolerance, atol=tolerance):
            found.append(f"{tensor} by {float((values - weights[tensor]).abs().max())}")
    return found


@pytest.fixture(scope="module")
def whole(world: Any) -> Callable[[str], Any]:
    """``whole(name)``: the run in float64 by one process, in one piece; made once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = world.fork({**METHODS[name].options, **DOUBLE})
        return made[name]

    return get


def splits(name: str) -> list[dict[str, Any]]:
    """Options that take the same batch in smaller parts, and with recomputed activations."""
    recomputed = {"model.gradient_checkpointing": True}
    if METHODS[name].online:
        return [{"model.micro_batch_size": 3}, {"model.micro_batch_size": METHODS[name].smallest, **recomputed}]
    parts = [
        {"data.batch_size": size, "trainer.accumulate_grad_batches": 8 // size} for size in (4, METHODS[name].smallest)
    ]
    return [parts[0], {**parts[1], **recomputed}]


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in METHODS for way in (0, 1)])
def test_conv_5_micro_batches_and_accumulation(world: Any, whole: Any, name: str, way: int) -> None:
    split = world.fork({**METHODS[name].options, **DOUBLE, **splits(name)[way]})
    assert differences(whole(name), split, TOLERANCE) == []


@every_method
def test_conv_5_mean_of_means_is_noticed(world: Any, whole: Any, name: str) -> None:
    split = world.fork({**METHODS[name].options, **DOUBLE, **splits(name)[0]}, breaks=["mean_of_means"])
    assert differences(whole(name), split, 1e-3)


# ----------------------------------------------------------------------------------------------------------- resuming
def resumable(name: str) -> dict[str, Any]:
    """Options under which everything that a checkpoint holds matters: accumulation, and random numbers if any."""
    method = METHODS[name]
    if method.online:
        return method.options
    draws = DROPOUT if method.packs else {}
    return {**method.options, **splits(name)[0], **draws}


@pytest.fixture(scope="module")
def unbroken(world: Any) -> Callable[[str], Any]:
    """``unbroken(name)``: the run that is not interrupted; made once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = world.fork(resumable(name))
        return made[name]

    return get


def equal(first: Any, second: Any) -> bool:
    """Whether two nested values are the same, tensors to the last bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def leaves_the_same(first: Any, second: Any) -> bool:
    """Whether two runs left the same files behind, the clock aside."""
    if repr(first.rows) != repr(second.rows):  # NaN equals NaN in writing
        return False
    if (first.path / "samples.jsonl").exists() and first.samples != second.samples:
        return False
    models = [(run.path / "model" / "model.safetensors").read_bytes() for run in (first, second)]
    states = [run.checkpoint() for run in (first, second)]
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "method", "global_step")
    return models[0] == models[1] and all(equal(states[0][part], states[1][part]) for part in parts)


@pytest.fixture(scope="module")
def resumed(world: Any) -> Callable[..., Any]:
    """``resumed(name, step, breaks)``: the run that is stopped after ``step`` and goes on in another process."""
    stopped: dict[tuple[str, int], Any] = {}

    def resume(name: str, step: int, breaks: Sequence[str] = ()) -> Any:
        if (name, step) not in stopped:
            stopped[name, step] = world.fork(resumable(name), stop_at=step, code=130)
        assert stopped[name, step].status["status"] == "interrupted"
        copy = "-".join([name, str(step), *breaks])
        shutil.copytree(stopped[name, step].path, world.root / copy)
        return world.fork(resumable(name), "--resume", name=copy, breaks=breaks)

    return resume


@pytest.mark.parametrize("step", [3, 4])  # the end of an epoch of an offline run, and a place within one
@every_method
def test_pre_5_ppo_14_resume_at_step_k(unbroken: Any, resumed: Any, name: str, step: int) -> None:
    run = resumed(name, step)
    assert run.status["resumed"] == 1
    assert leaves_the_same(unbroken(name), run)


@every_method
def test_resuming_a_finished_run_changes_nothing(world: Any, unbroken: Any, name: str) -> None:
    copy = f"{name}_again"
    shutil.copytree(unbroken(name).path, world.root / copy)
    again = world.fork(resumable(name), "--resume", name=copy)
    assert leaves_the_same(unbroken(name), again)
    assert again.status["status"] == "finished"


FORGETS = [(name, what) for name in METHODS for what in ("position", "optimiser", "counters")]
FORGETS.remove(("dpo_lora", "counters"))  # without the hook that restores them there would be no base either


@pytest.mark.parametrize(("name", "what"), [*FORGETS, ("pretrain", "random"), ("sft", "random")])
def test_state_that_is_not_restored_is_noticed(unbroken: Any, resumed: Any, name: str, what: str) -> None:
    assert not leaves_the_same(unbroken(name), resumed(name, 4, [f"forgotten_{what}"]))


# -------------------------------------------------------------------------------------------- one process against two
def halved(name: str) -> dict[str, Any]:
    """Options of two processes that together take the same batches."""
    options = {**METHODS[name].options, **DOUBLE, "trainer.devices": 2, "trainer.strategy": "ddp"}
    sizes = {key: value // 2 for key, value in options.items() if key.endswith(".batch_size") or "ptx_batch" in key}
    return {**options, **sizes}


@every_method
def test_ppo_15_comp_4_two_processes_are_one(world: Any, whole: Any, name: str) -> None:
    assert differences(whole(name), world.fork(halved(name), processes=2), TOLERANCE) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("pretrain", "no_world_size"), ("sft", "mean_of_means"), ("reward", "own_statistics")),
        ("kto", "own_statistics"),
        *(("ppo", "no_world_size"), ("ppo", "equal_seeds"), ("ppo", "own_statistics")),
        *(("grpo", "no_world_size"), ("grpo", "own_statistics")),
    ],
)
def test_two_processes_that_are_not_one_are_noticed(world: Any, whole: Any, name: str, what: str) -> None:
    assert differences(whole(name), world.fork(halved(name), processes=2, breaks=[what]), 1e-3)


def test_two_processes_tokenise_once(world: Any) -> None:
    options = {**halved("sft"), "data.cache_dir": str(world.root / "tokens"), "trainer.max_epochs": 1}
    run = world.fork(options, processes=2, log_tokenising=True)
    said = [line for line in world.log(run).splitlines() if line.endswith("tokenises")]
    assert said == ["process 0 tokenises"] * 2  # records to learn from, and held-out ones


def test_two_processes_refuse_the_same_data(world: Any) -> None:
    options = {**halved("sft"), "data.path": world.write("bad.jsonl", [{"prompt": "no answer"}])}
    run = world.fork(options, processes=2, code=2)  # neither waits for the other
    assert world.log(run).count("error: ") == 2


def test_copies_of_a_held_out_prompt_are_sampled_alike_by_two_processes(world: Any) -> None:
    prompts = records("prompt", split="val", size=3)
    data = world.write("copies.jsonl", [prompts[0], prompts[0], prompts[1], prompts[0], prompts[2], prompts[1]])
    options = {"data.val_path": data, "data.eval_batch_size": 1, "model.iterations": 1}
    runs = [
        world.fork({**METHODS["ppo"].options, **DOUBLE, **options}),
        world.fork({**halved("ppo"), **options}, processes=2),
    ]
    first, second = (run.row(0, "eval/lab/proxy") for run in runs)
    assert second == pytest.approx(first, rel=TOLERANCE, abs=TOLERANCE)
    drawn = {
        sample["completion"]
        for sample in runs[0].samples
        if (sample["step"], sample["prompt"]) == (0, prompts[0]["prompt"])
    }
    assert len(drawn) > 1


def test_two_processes_that_the_command_line_starts(world: Any, whole: Any) -> None:
    argv, path = world.command(halved("sft"))
    command = [sys.executable, "-m", "lightning_align", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert differences(whole("sft"), type(whole("sft"))(path), TOLERANCE) == []
