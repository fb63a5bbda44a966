"""Methods that train adapters: what learns, what is kept, what the reference is, and what comes out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_align.cli.main import run as run_command
from lightning_align.errors import UserError
from lightning_align.methods.ppo import PPOModule
from lightning_align.methods.sft import SFTModule
from lightning_align.models.loading import load_causal_lm
from lightning_align.models.logprobs import token_stats
from lightning_align.models.lora import WithoutAdapter, adapters_off, lora_layers

LORA = {"model.lora_r": 4, "model.lora_alpha": 8}
ADAPTER = LORA | {"model.lora_export": "adapter"}
SFT = {
    **{"model": "SFTModule", "model.model": "@pretrain", "model.learning_rate": 1e-2, "data": "SFTDataModule"},
    **{"data.path": "@sft.jsonl", "data.val_path": "@sft_val.jsonl", "data.batch_size": 8, "trainer.max_epochs": 2},
}
PRETRAIN = SFT | {"model": "PretrainModule", "data": "TextDataModule", "data.path": "@text.jsonl"}
PRETRAIN |= {"data.val_path": "@text_val.jsonl", "data.packing": "none"}
REWARD = SFT | {"model": "RewardModule", "model.model": "@sft", "data": "PreferenceDataModule"}
REWARD |= {"data.path": "@preference.jsonl", "data.val_path": "@preference_val.jsonl"}
DPO = REWARD | {"model": "DPOModule", "model.beta": 0.5}
PPO = {
    **{"model": "PPOModule", "model.model": "@sft", "model.reward": "@reward", "model.learning_rate": 1e-2},
    **{"model.iterations": 4, "model.max_new_tokens": 8, "model.eval_every": 2, "model.num_ppo_epochs": 2},
    **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    **{"data.batch_size": 8},
}
EVERY = {"pretrain": PRETRAIN, "sft": SFT, "reward": REWARD, "dpo": DPO, "ppo": PPO}
every_method = pytest.mark.parametrize("name", EVERY)
Shared = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(world: Any) -> Shared:
    """``trained(name)``: a run with adapters, made once; with ``export`` one that keeps the adapter alone."""
    made: dict[tuple[str, str], Any] = {}

    def get(name: str, export: str = "merged") -> Any:
        if (name, export) not in made:
            made[name, export] = world.fit({**EVERY[name], **LORA, "model.lora_export": export})
        return made[name, export]

    return get


def network_of(module: Any) -> nn.Module:
    """The transformers network that a module exports."""
    return module.model.network if hasattr(module.model, "network") else module.model


def stored(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model" / "model.safetensors")


# ------------------------------------------------------------------------------------------------ what learns
@every_method
def test_ppo_8_only_adapters_and_heads_learn(world: Any, trained: Shared, name: str) -> None:
    run = trained(name)
    base = stored(world.root / EVERY[name]["model.model"].removeprefix("@"))
    learning = {n: p for n, p in run.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.endswith(("score.weight", "head.weight")) for n in learning)
    heads = [n for n in learning if ".lora_" not in n]
    assert len(heads) == {"reward": 1, "ppo": 1}.get(name, 0)
    optimised = {id(p) for group in run.module.optimizers().param_groups for p in group["params"]}
    assert optimised == {id(p) for p in learning.values()}
    frozen = 0
    for key, parameter in network_of(run.module).named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[key.replace(".base_layer.", ".")]), key
            assert parameter.grad is None
            frozen += 1
    assert frozen == len(base) - ("score.weight" in base)
    assert all(p.any() for n, p in learning.items() if "lora_B" in n)  # every adapter has moved


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_run_with_adapters_starts_where_one_without_does(world: Any, trained: Shared, name: str) -> None:
    whole = world.fit({**EVERY[name], "trainer.max_steps": 1, "trainer.limit_val_batches": 0})
    assert trained(name).row(1, "loss")["loss"] == pytest.approx(whole.row(1, "loss")["loss"], abs=1e-6)


def test_recomputed_activations_change_nothing(world: Any, trained: Shared) -> None:
    again = world.fit({**SFT, **LORA, "model.gradient_checkpointing": True})
    for name, values in trained("sft").weights.items():
        torch.testing.assert_close(again.weights[name], values, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ exports
@every_method
def test_the_export_is_the_merged_model(trained: Shared, name: str) -> None:
    run = trained(name)
    network = network_of(run.module).eval()
    again = type(network).from_pretrained(run.path / "model")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        theirs, ours = again(input_ids=ids), network(input_ids=ids, use_cache=False)
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=1e-4, atol=1e-4)
    assert not list((run.path / "model").glob("adapter*"))


def test_later_stages_start_from_runs_that_keep_adapters(world: Any, trained: Shared) -> None:
    """The same export in both forms, and a run from each."""
    run = trained("sft", "adapter")
    files = {path.name for path in (run.path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    read = load_causal_lm(str(run.path)).state_dict()
    for name, values in trained("sft").weights.items():
        torch.testing.assert_close(read[name], values)
    losses = [
        world.fit({**SFT, "model.model": str(start.path), "trainer.max_steps": 1}).row(1, "loss")["loss"]
        for start in (run, trained("sft"))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    with pytest.raises(UserError, match="is an adapter itself"):
        SFTModule(model=str(run.path), lora_r=4, lora_export="adapter")


def test_a_checkpoint_is_exported_in_either_form(trained: Shared, tmp_path: Path) -> None:
    run = trained("sft", "adapter")
    for form in ("adapter", "merged"):
        words = ["export", str(run.path), "--out", str(tmp_path / form), "--lora", form]
        assert run_command(words) == 0
    file = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / file).read_bytes() == (run.path / "model" / file).read_bytes()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, values in trained("sft").weights.items():
        torch.testing.assert_close(merged[name], values)


# ------------------------------------------------------------------------------------------------ checkpoints
@every_method
def test_checkpoints_hold_what_learns(trained: Shared, name: str) -> None:
    run = trained(name)
    state = run.checkpoint()["state_dict"]
    learning = {n for n, p in run.module.named_parameters() if p.requires_grad}
    assert set(state) - learning <= {"value_model.shift", "value_model.scale"}
    assert learning <= set(state)


@every_method
def test_pre_5_resume_with_adapters(world: Any, name: str) -> None:
    options = {**EVERY[name], **LORA}
    if name == "sft":
        options |= {"model.lora_dropout": 0.1, "model.neftune_noise_alpha": 5.0}
    runs = [world.fork(options), world.fork(options, stop_at=3, code=130)]
    shutil.copytree(runs[1].path, world.root / f"{name}_lora")
    runs[1] = world.fork(options, "--resume", name=f"{name}_lora")
    assert runs[1].status["resumed"] == 1
    assert repr(runs[0].rows) == repr(runs[1].rows)
    one, other = (run.checkpoint() for run in runs)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(values, other["state_dict"][key]) for key, values in one["state_dict"].items())
    models = [(run.path / "model" / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]


def test_a_checkpoint_of_other_weights_is_refused(
    world: Any, trained: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained("sft").path / "checkpoints" / "last.ckpt")
    options = {**SFT, "ckpt_path": checkpoint, "trainer.max_epochs": 3}
    for changes, message in (
        ({**LORA, "model.model": "@sft"}, "holds an adapter of other weights than"),
        ({}, "holds adapters of a run with model.lora_r"),
        ({**LORA, "model.lora_r": 3}, "is a checkpoint of another model"),
    ):
        world.fit({**options, **changes}, code=2)
        assert message in capsys.readouterr().err
    whole = str(world.root / "sft" / "checkpoints" / "last.ckpt")
    world.fit({**SFT, **LORA, "ckpt_path": whole}, code=2)
    assert "leave model.lora_r out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ references
def test_ppo_references_are_the_base(world: Any, trained: Shared) -> None:
    """Their log-probs are those of the model that training started from, to the last bit; nothing is copied."""
    module = trained("ppo").module
    reference = module.frozen.reference
    assert isinstance(reference, WithoutAdapter)
    assert reference.network is module.model
    start = load_causal_lm(str(world.root / "sft"))
    ids = torch.arange(3, 13)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = (token_stats(model, ids, mask, mask=mask).logp for model in (reference, start))
        moved = token_stats(module.model, ids, mask, mask=mask).logp
    assert torch.equal(ours, theirs)
    assert float((moved - theirs).abs().max()) > 1e-3


def test_ppo_measures_the_same_kl_with_a_copy(world: Any, trained: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(self: Any) -> nn.Module:
        return load_causal_lm(self.source, tokenizer=self.tokenizer).eval().requires_grad_(False)

    monkeypatch.setattr(PPOModule, "build_reference", copied)
    assert repr(world.fit({**PPO, **LORA}).rows) == repr(trained("ppo").rows)


def test_ppo_3_and_the_sampler_takes_up_every_update(world: Any) -> None:
    run = world.fit({**PPO, **LORA, "model.num_ppo_epochs": 1, "model.kl_estimator": "exact"})
    for row in run.rows:
        if "val/ratio" in row:
            assert row["val/ratio"] == pytest.approx(1.0, abs=1e-5)
            assert row["sampling/sampling_logp_difference/max"] < 1e-3
    assert run.row(4, "eval/lab/kl")["eval/lab/kl"] > 1e-3


def unique_bytes(*networks: nn.Module) -> int:
    """Memory that parameters take, those that are the same once."""
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for n in networks for p in n.parameters()}
    return sum(sizes.values())


@pytest.mark.parametrize("value_init", ["auto", "policy"])
def test_policy_reference_value_and_reward_hold_their_base_once(world: Any, trained: Shared, value_init: str) -> None:
    reward = trained("reward", "adapter")
    options = {**PPO, **LORA, "model.reward": str(reward.path), "model.value_init": value_init}
    module = world.ready(options)
    networks = [module.model, module.value_model, module.frozen.reward.parts[0].scorer.model]
    base = sum(values.nbytes for values in stored(world.root / "sft").values())
    adapter = sum(p.nbytes for p in module.model.parameters() if p.requires_grad)
    width = module.model.config.hidden_size
    assert unique_bytes(*networks) == base + 3 * adapter + 2 * 4 * width
    assert set(module.parameter_roles()) == {"policy", "value", "base", "reward"}
    whole = world.ready({**options, "model.lora_r": 0})  # which reads the same adapter into weights of its own
    found = [
        m.frozen.reward.score(["say a"], ["a b"], finished=[True], records=[{}], all_reduce=m.all_reduce).total
        for m in (module, whole)
    ]
    torch.testing.assert_close(*found)


def test_a_value_model_goes_on_with_the_reward_models_adapter(world: Any, trained: Shared) -> None:
    reward = trained("reward", "adapter")
    module = world.ready({**PPO, **LORA, "model.reward": str(reward.path)})
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        score = module.frozen.reward.parts[0].scorer.model.normalised_scores(ids, torch.ones_like(ids))
        torch.testing.assert_close(module.value_model.last_value(ids, torch.ones_like(ids)), score)
    assert sum(p.requires_grad for p in module.value_model.parameters()) == 2 * len(lora_layers(module.model)) + 1


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto", "orpo"])
def test_dpo_references_are_the_base(world: Any, loss_type: str) -> None:
    options = {**DPO, **LORA, "model.loss_type": loss_type}
    if loss_type == "kto":
        options |= {"data.path": "@unpaired.jsonl", "data.val_path": "@unpaired_val.jsonl"}
    run = world.fit(options)
    module = run.module
    assert set(module.parameter_roles()) == {"policy", "base"}
    with module.reference_network() as network:
        if loss_type == "orpo":
            assert network is None
            return
        assert network is module.model
        ids = torch.arange(3, 13)[None]
        start = AutoModelForCausalLM.from_pretrained(world.root / "sft" / "model")
        with torch.no_grad():
            assert torch.equal(network(input_ids=ids).logits, start(input_ids=ids).logits)
    assert abs(run.rows[0]["rewards/chosen"]) < 1e-5  # DPO-1: the policy is its reference


def test_dpo_6_cached_log_probs_are_those_of_the_base_and_of_a_whole_run(world: Any, trained: Shared) -> None:
    cached = world.fit({**DPO, **LORA, "model.reference": "cached"})
    for one, other in zip(cached.rows, trained("dpo").rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    file = str(cached.path / "reference_logps.safetensors")
    whole = {**DPO, "model.reference": "cached", "model.reference_cache": file, "trainer.max_steps": 1}
    assert abs(world.fit(whole).rows[0]["rewards/chosen"]) < 1e-5


# ------------------------------------------------------------------------------------------------ options and plan
def test_the_plan_counts_adapters_as_what_learns(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = world.ready({**PPO, **LORA})
    roles = module.parameter_roles()
    assert set(roles) == {"policy", "value", "base", "value base", "reward"}  # no reference
    assert roles["policy"].number == sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    assert roles["base"].number == sum(p.numel() for p in module.model.parameters() if not p.requires_grad)
    said = capsys.readouterr().out
    gradients = f"gradients {2 * roles['policy'].size / 2**20:,.0f} MiB"
    assert gradients in said


def test_options_that_mean_nothing_or_harm_are_said(world: Any, tmp_path: Path) -> None:
    start = str(world.root / "sft")
    with pytest.warns(UserWarning, match=r"lora_target_modules is not used: without model\.lora_r"):
        SFTModule(model=start, lora_target_modules=["q_proj"])
    for options, message in (
        ({"lora_r": -1}, "lora_r is -1"),
        ({"lora_r": 4, "lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_r": 4, "lora_target_modules": []}, "lora_target_modules is"),
    ):
        with pytest.raises(UserError, match=message):
            SFTModule(model=start, **options)
    with pytest.raises(UserError, match=r"lora_dropout is 0\.1: give 0: this method compares log-probs"):
        PPOModule(model=start, reward="playground", lora_r=4, lora_dropout=0.1)
    with pytest.raises(UserError, match="is an architecture without weights"):
        SFTModule(model=str(world.root / "model.yaml"), lora_r=4)


def test_unknown_layers_are_refused_before_weights_are_read(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    world.fit({**SFT, **LORA, "model.lora_target_modules": ["q_porj"]}, code=2)
    assert "did you mean 'q_proj'" in capsys.readouterr().err


def test_with_adapters_off_evaluation_is_the_starts(world: Any, trained: Shared) -> None:
    module = trained("sft").module
    start = AutoModelForCausalLM.from_pretrained(world.root / "pretrain" / "model")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), adapters_off(module.model.eval()):
        assert torch.equal(module.model(input_ids=ids).logits, start(input_ids=ids).logits)
