"""PPO through its module and the command line."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_align.losses.masked import masked_whiten
from lightning_align.methods import ppo as ppo_module
from lightning_align.methods.measures import truncated
from lightning_align.methods.ppo import PPOModule
from lightning_align.models.logprobs import token_stats

Ppo = Callable[..., Any]


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
            seen["vanilla"] = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
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
def distribution(model: Any, tokenizer: Any) -> Tensor:
    """Probabilities of the first token after the prompt, float64."""
    with torch.no_grad():
        return model(torch.tensor([tokenizer("say")["input_ids"]])).logits[0, -1].double().softmax(-1)


def test_ppo_11_bandit_finds_the_best_arm(world: Any, bandit: dict[str, Any]) -> None:
    options = {
        **bandit,
        "model": "PPOModule",
        "model.value_lr": 1e-2,
        "model.iterations": 60,
        "model.num_ppo_epochs": 2,
        "data.batch_size": 32,
    }
    module = world.fit({**options, "model.kl_coef": 0.0, "model.learning_rate": 1e-2}).module
    best = module.tokenizer.convert_tokens_to_ids("a")
    before = distribution(module.frozen.reference, module.tokenizer)[best]
    after = distribution(module.model, module.tokenizer)[best]
    assert before < 0.3
    assert after > 0.95


def test_ppo_11_bandit_reaches_the_optimum_with_kl(world: Any, bandit: dict[str, Any]) -> None:
    options = {
        **bandit,
        "model": "PPOModule",
        "model.value_lr": 1e-2,
        "model.iterations": 40,
        "model.num_ppo_epochs": 2,
        "data.batch_size": 256,
    }
    module = world.fit({**options, "model.kl_coef": 0.5, "model.learning_rate": 1e-2}).module
    reference = distribution(module.frozen.reference, module.tokenizer)
    reward = torch.zeros_like(reference)
    reward[module.tokenizer.convert_tokens_to_ids("a")] = 1.0
    optimum = (reference.log() + reward / 0.5).softmax(-1)
    found = distribution(module.model, module.tokenizer)
    assert float((reference - optimum).abs().sum()) / 2 > 0.1
    assert float((found - optimum).abs().sum()) / 2 < 0.02


# ----------------------------------------------------------------------------------------------------------------- ptx
def documents(batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """Ids of every document of a packed batch."""
    for ids, inside in zip(batch["input_ids"], batch["document_ids"], strict=True):
        yield from (ids[inside == number] for number in range(int(inside.max()) + 1))


def test_ppo_16_without_policy_loss_a_step_is_a_language_modelling_step_times_gamma(
    ppo: Ppo, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_gradients, endless = PPOModule.step_gradients, ppo_module.endless
    texts: list[Any] = []
    steps: list[int] = []

    def remembered(loader: Any) -> Iterator[Any]:
        for batch in endless(loader):
            texts.append(batch)
            yield batch

    def watched(self: PPOModule, minibatch: Any) -> Any:
        sums = step_gradients(self, minibatch)
        parameters = dict(self.model.named_parameters())
        logps = [
            self.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
            for ids in documents(texts[-1])
        ]
        expected = torch.autograd.grad(-27.8 * torch.cat(logps).mean(), list(parameters.values()))
        for parameter, gradient in zip(parameters.values(), expected, strict=True):
            assert float((parameter.grad - gradient).norm()) < 1e-5 * float(gradient.norm())
        assert not any(parameter.grad.any() for parameter in self.value_model.parameters())
        steps.append(len(texts))
        return sums

    monkeypatch.setattr(ppo_module, "endless", remembered)
    monkeypatch.setattr(PPOModule, "step_gradients", watched)
    ptx = {"ptx_coef": 27.8, "ptx_path": "@text.jsonl", "ptx_batch_size": 4}
    run = ppo(reward="@rewards.py:nothing", num_ppo_epochs=2, iterations=2, **ptx)  # a third would stop the run
    assert steps == [1, 2, 3, 4]  # a batch of text for every optimiser step
    assert run.rows[0]["loss/ptx"] > 0
    assert run.rows[0]["policy/grad_norm"] > 1


# -------------------------------------------------------------------------------------------------------------- control
def test_adaptive_control_follows_its_rule(ppo: Ppo) -> None:
    rows = ppo(kl_control="adaptive", kl_coef=0.2, kl_target=0.5, kl_horizon=100, iterations=5, num_ppo_epochs=1).rows
    assert rows[0]["objective/kl_coef"] == 0.2
    for before, after in pairwise(rows):
        error = min(max(before["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 8 / 100))
    assert len({row["objective/kl_coef"] for row in rows}) > 2


def test_target_kl_update_leaves_the_inner_epochs_before_the_step(ppo: Ppo) -> None:
    run = ppo(target_kl_update=1e-9, num_ppo_epochs=4)
    assert run.checkpoint()["global_step"] == 3  # of three iterations, the first step alone
    assert all(row["policy/approxkl_avg"] < 1e-9 for row in run.rows)
    assert ppo(num_ppo_epochs=4).checkpoint()["global_step"] == 12


def test_schedule_runs_over_iterations_for_both_models(ppo: Ppo) -> None:
    run = ppo(iterations=4, learning_rate=4e-3, value_lr=8e-3)
    assert [row["lr"] for row in run.rows] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    rates = [group["lr"] for group in run.checkpoint()["optimizer_states"][0]["param_groups"]]
    assert rates == [0.0] * 4
    initial = [group["initial_lr"] for group in run.checkpoint()["optimizer_states"][0]["param_groups"]]
    assert initial == [4e-3, 4e-3, 8e-3, 8e-3]


# --------------------------------------------------------------------------------------------------------------- scores
def test_missing_eos_penalty_is_subtracted_from_truncated_completions(ppo: Ppo) -> None:
    for row in ppo(missing_eos_penalty=2.5).rows:
        assert row["completions/clipped_ratio"] > 0
        expected = row["lab/proxy"] - 2.5 * row["completions/clipped_ratio"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)


def test_missing_eos_score_replaces_that_of_truncated_completions(ppo: Ppo, experiences: list[Any]) -> None:
    run = ppo(missing_eos_score=-1.0, max_new_tokens=16, iterations=1)
    (experience,) = experiences
    cut = truncated(experience.rollout)
    assert cut.any()
    assert not cut.all()
    assert (experience.scores[cut] == -1).all()
    torch.testing.assert_close(experience.scores[~cut], experience.score_parts["reward"][~cut])
    assert run.rows[0]["lab/proxy"] == pytest.approx(float(experience.score_parts["reward"].mean()))


def test_scores_are_clipped_and_whitened_in_this_order(ppo: Ppo, experiences: list[Any]) -> None:
    ppo(reward="@rewards.py:length", score_clip=5.0, score_scaling="whiten", max_new_tokens=16, iterations=1)
    (experience,) = experiences
    clipped = experience.score_parts["reward"].clamp(-5, 5)
    assert not torch.equal(clipped, experience.score_parts["reward"])
    torch.testing.assert_close(experience.scores, masked_whiten(clipped, torch.ones(8)))


def test_running_scaling_uses_all_scores_so_far(ppo: Ppo, experiences: list[Any]) -> None:
    ppo(score_scaling="running")
    so_far = torch.cat([experience.score_parts["reward"] for experience in experiences]).double()
    for count, experience in enumerate(experiences, 1):
        known = so_far[: 8 * count]
        scaled = (known[-8:] - known.mean()) / known.std(correction=0)
        torch.testing.assert_close(experience.scores.double(), scaled, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------- advantages and values
def test_bootstrap_adds_the_last_value_of_truncated_completions(ppo: Ppo) -> None:
    module = ppo(ready=True, lam=1.0, max_new_tokens=16)
    rollout = module.sample(next(iter(module.trainer.datamodule.train_dataloader())))
    cut = truncated(rollout)
    assert cut.any()
    assert not cut.all()
    plain, _ = module.experience(rollout)
    module.bootstrap_truncated = True
    bootstrapped, _ = module.experience(rollout)
    with torch.no_grad():
        last = module.value_model.last_value(rollout.input_ids, rollout.attention_mask)
    expected = torch.where(cut, last, 0.0)[:, None] * rollout.completion_mask
    torch.testing.assert_close(bootstrapped.returns - plain.returns, expected, rtol=1e-4, atol=1e-4)
    assert expected.any()


@pytest.mark.parametrize("scope", ["batch", "minibatch"])
def test_advantages_are_whitened_over_the_scope(ppo: Ppo, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    seen: list[Tensor] = []
    minibatch_loss = PPOModule.minibatch_loss

    def watched(self: PPOModule, experience: Any, normaliser: Tensor) -> Any:
        seen.append(experience.advantages[experience.completion_mask].double())
        return minibatch_loss(self, experience, normaliser)

    monkeypatch.setattr(PPOModule, "minibatch_loss", watched)
    ppo(iterations=1, num_ppo_epochs=1, num_mini_batches=2, whiten_scope=scope)
    for advantages in [torch.cat(seen)] if scope == "batch" else seen:
        assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
        assert float(advantages.var(correction=0)) == pytest.approx(1, abs=1e-4)
    if scope == "batch":
        assert abs(float(seen[0].mean())) > 1e-3


@pytest.mark.parametrize(
    ("value_init", "reward", "trunk", "says"),
    [
        ("auto", "@reward", "reward", "value model: from the reward model"),
        ("reward", "@reward", "reward", "value model: from the reward model"),
        ("reward_backbone", "@reward", "reward", "its head at zero"),
        ("policy", "@reward", "sft", "value model: from the policy"),
        ("auto", "@rewards.py:length", "sft", "value model: from the policy"),
    ],
)
def test_where_the_value_model_starts(
    world: Any, ppo: Ppo, capsys: pytest.CaptureFixture[str], value_init: str, reward: str, trunk: str, says: str
) -> None:
    module = ppo(ready=True, value_init=value_init, reward=reward)
    assert says in capsys.readouterr().err
    saved = load_file(world.root / trunk / "model" / "model.safetensors")
    for name, values in module.value_model.trunk.state_dict().items():
        assert torch.equal(values, saved[f"model.{name}"])
    zero = trunk == "sft" or value_init == "reward_backbone"
    assert bool(module.value_model.head.weight.any()) is not zero
    if not zero:
        assert torch.equal(module.value_model.head.weight, saved["score.weight"])
        assert float(module.value_model.shift) == pytest.approx(module.frozen.reward.parts[0].scorer.model.reward_mean)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    rollout = module.sample(batch)
    with torch.no_grad():
        assert bool(module.values(rollout).any()) is not zero


def test_value_init_reward_needs_a_reward_model(world: Any, ppo_options: dict[str, Any], capsys: Any) -> None:
    options = {**ppo_options, "model.value_init": "reward", "model.reward": "@rewards.py:length"}
    run = world.fit(options, code=2)
    assert "model.value_init is reward, but model.reward is no reward model" in capsys.readouterr().err
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}, "exclude each other"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"ptx_coef": 1.0}, "ptx_coef and model.ptx_path belong together"),
        ({"dual_clip": 1.1}, "dual_clip is 1.1"),
        ({"max_new_tokens": 96}, "no prompt fits before such a completion"),
        ({"num_mini_batches": 9}, "num_mini_batches is 9: give at most 8"),
        ({"trainer.accumulate_grad_batches": 2}, "set model.micro_batch_size instead"),
        ({"trainer.max_steps": 2}, "set model.iterations instead"),
    ],
)
def test_options_that_cannot_be_are_refused(
    world: Any, ppo_options: dict[str, Any], capsys: Any, changes: dict[str, Any], message: str
) -> None:
    options = {**ppo_options, **{name if "." in name else f"model.{name}": v for name, v in changes.items()}}
    world.fit(options, code=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
