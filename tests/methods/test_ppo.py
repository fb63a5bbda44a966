"""PPO through its module and the command line."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_align.losses.masked import masked_whiten
from lightning_align.methods.measures import truncated
from lightning_align.methods.ppo import PPOModule
from lightning_align.models.logprobs import token_stats

Ppo = Callable[..., Any]
BANDIT = """
architecture: llama
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 1
num_attention_heads: 4
max_position_embeddings: 16
tie_word_embeddings: false
tokenizer: {train: {vocab_size: 64, algorithm: words}}
"""


@pytest.fixture
def ppo(world: Any, ppo_options: dict[str, Any]) -> Ppo:
    """``ppo(**changes)``: a run of three iterations; options of the model without their prefix."""

    def fit(*, ready: bool = False, **changes: Any) -> Any:
        options = {**ppo_options, **{name if "." in name else f"model.{name}": v for name, v in changes.items()}}
        return world.ready(options) if ready else world.fit(options)

    return fit


# -------------------------------------------------------------------------------------------------- the first minibatch
def test_ppo_3_first_step_is_the_vanilla_policy_gradient(ppo: Ppo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    step_gradients = PPOModule.step_gradients

    def watched(self: PPOModule, minibatch: Any) -> Any:
        sums = step_gradients(self, minibatch)
        if not seen:
            seen["metrics"] = self.ratios(sums)
            seen["gradients"] = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
            stats = token_stats(
                self.model, minibatch.input_ids, minibatch.attention_mask, mask=minibatch.completion_mask
            )
            mask = minibatch.completion_mask
            loss = -(minibatch.advantages * stats.logp)[mask].sum() / mask.sum()
            parameters = dict(self.model.named_parameters())
            seen["vanilla"] = dict(
                zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
            )
        return sums

    monkeypatch.setattr(PPOModule, "step_gradients", watched)
    run = ppo(iterations=1, num_mini_batches=2)
    metrics = seen["metrics"]
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["val/ratio_squared"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-10
    size = sum(float(gradient.norm()) ** 2 for gradient in seen["vanilla"].values()) ** 0.5
    assert size > 1e-2
    for name, gradient in seen["vanilla"].items():
        assert float((seen["gradients"][name] - gradient).norm()) < 1e-5 * size
    assert run.rows[0]["policy/approxkl_avg"] > 1e-10  # later steps have moved


def test_ppo_4_padding_a_rollout_changes_nothing_that_is_made_of_it(ppo: Ppo) -> None:
    module = ppo(ready=True, score_scaling="running", kl_control="adaptive", **{"trainer.precision": "64-true"})
    rollout = module.sample(next(iter(module.trainer.datamodule.train_dataloader())))

    def widened(values: Any) -> Any:
        if not isinstance(values, Tensor) or values.ndim != 2:
            return values
        return torch.nn.functional.pad(values, (0, 3), value=7 if values.dtype == torch.int64 else 0)

    fields = {field.name: widened(getattr(rollout, field.name)) for field in dataclasses.fields(rollout)}
    first, metrics = module.experience(rollout)
    module.score_moments = [0.0, 0.0, 0.0]
    module.kl_controller.value = 0.05
    second, same = module.experience(type(rollout)(**fields))
    for name in ("logp", "ref_logp", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(second, name)[:, :-3], getattr(first, name), rtol=1e-6, atol=1e-6)
        assert not getattr(second, name)[:, -3:].any()
    assert same == pytest.approx(metrics, rel=1e-6, abs=1e-6)
    assert module.iteration == 0


def test_ppo_8_reference_and_reward_are_left_alone(world: Any, ppo: Ppo) -> None:
    run = ppo(reward={"learned": "@reward", "rule": "@rewards.py:length"}, gold="@reward")
    frozen = run.module.frozen
    models = {"sft": frozen.reference, "reward": frozen.reward.parts[0].scorer.model.network}
    for name, model in models.items():
        before = load_file(world.root / name / "model" / "model.safetensors")
        for key, values in model.state_dict().items():
            if key in before:  # not the tied output layer
                assert torch.equal(values, before[key]), key
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = {id(p) for group in run.module.optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.module.parameters()}  # policy and value model, nothing else
    assert not torch.equal(run.weights["model.norm.weight"], before["model.norm.weight"])


# ------------------------------------------------------------------------------------------------------------- bandits
@pytest.fixture(scope="module")
def bandit(world: Any) -> dict[str, Any]:
    """Options of PPO on one prompt with completions of one token; letter ``a`` is worth 1."""
    (world.root / "bandit.yaml").write_text(BANDIT)
    letters = world.write("letters.jsonl", [{"text": f"say {letter}"} for letter in "abcdef"])
    start = {"model": "PretrainModule", "model.model": "@bandit.yaml", "model.learning_rate": 1e-3}
    start |= {"data": "TextDataModule", "data.path": letters, "data.val_fraction": 0.0, "trainer.max_steps": 3}
    world.fit(start, name="bandit")
    return {
        **{"model": "PPOModule", "model.model": "@bandit", "model.reward": "@rewards.py:first_letter"},
        **{"model.max_new_tokens": 1, "model.eval_every": 0, "model.value_lr": 1e-2, "model.micro_batch_size": 512},
        **{"data": "PromptDataModule", "data.path": world.write("say.jsonl", [{"prompt": "say"}])},
        **{"data.val_fraction": 0.0, "run.checkpoint_every": 1000, "trainer.log_every_n_steps": 100},
    }


def distribution(model: Any, tokenizer: Any) -> Tensor:
    """Probabilities of the first token after the prompt, float64."""
    with torch.no_grad():
        return model(torch.tensor([tokenizer("say")["input_ids"]])).logits[0, -1].double().softmax(-1)


def test_ppo_11_bandit_finds_the_best_arm(world: Any, bandit: dict[str, Any]) -> None:
    options = {**bandit, "model.iterations": 60, "model.num_ppo_epochs": 2, "data.batch_size": 32}
    module = world.fit({**options, "model.kl_coef": 0.0, "model.learning_rate": 1e-2}).module
    best = module.tokenizer.convert_tokens_to_ids("a")
    before = distribution(module.frozen.reference, module.tokenizer)[best]
    after = distribution(module.model, module.tokenizer)[best]
    assert before < 0.3
    assert after > 0.95


def test_ppo_11_bandit_reaches_the_optimum_with_kl(world: Any, bandit: dict[str, Any]) -> None:
    options = {**bandit, "model.iterations": 100, "model.num_ppo_epochs": 2, "data.batch_size": 256}
    module = world.fit({**options, "model.kl_coef": 0.5, "model.learning_rate": 1e-2}).module
    reference = distribution(module.frozen.reference, module.tokenizer)
    reward = torch.zeros_like(reference)
    reward[module.tokenizer.convert_tokens_to_ids("a")] = 1.0
    optimum = (reference.log() + reward / 0.5).softmax(-1)
    found = distribution(module.model, module.tokenizer)
    assert float((reference - optimum).abs().sum()) / 2 > 0.1
    assert float((found - optimum).abs().sum()) / 2 < 0.02


