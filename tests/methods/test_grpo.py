"""Group methods: shared prompts, presets, what is learnt from, dynamic sampling, and a bandit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.losses.group import PRESETS, group_policy_loss
from lightning_align.methods.grpo import GRPOModule, adjusted
from lightning_align.models.logprobs import token_stats


@pytest.fixture
def options() -> dict[str, Any]:
    """Two iterations of GRPO with four completions of each of four prompts."""
    return {
        **{"model": "GRPOModule", "model.model": "@sft", "model.reward": "@reward", "model.gold": "playground"},
        **{"model.learning_rate": 3e-3, "model.iterations": 2, "model.max_new_tokens": 8, "model.eval_every": 0},
        **{"model.samples_per_prompt": 4, "data.batch_size": 4},
        **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    }


def rollout_of(module: GRPOModule) -> Any:
    return module.sample(next(iter(module.trainer.datamodule.train_dataloader())))  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ shared prompts
def test_a_prompt_encoded_once_gives_the_statistics_of_rows_of_their_own(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "trainer.precision": "64-true"})
    rollout = rollout_of(module)
    weights = torch.randn(rollout.input_ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients, found = [], []
    for way in (module.completion_stats, alone):
        stats = way(module.model, rollout, temperature=0.7, entropy=True, ref_model=module.frozen.reference)
        loss = (weights * (stats.logp + stats.entropy + stats.kl)).sum()
        gradients.append(torch.autograd.grad(loss, list(module.model.parameters())))
        found.append(stats)
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    size = torch.stack([gradient.norm() for gradient in gradients[0]]).norm()
    for one, other in zip(*gradients, strict=True):  # norms of the decoder are in float32
        assert float((one - other).norm()) < 1e-6 * size


def alone(model: Any, rollout: Any, **options: Any) -> Any:
    return token_stats(model, rollout.input_ids, rollout.attention_mask, mask=rollout.completion_mask, **options)


def test_the_prompt_is_encoded_once_for_all_its_completions(
    world: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = world.ready(options)
    rollout = rollout_of(module)
    seen: list[int] = []
    forward = type(module.model.model).forward

    def counted(self: Any, *args: Any, **inputs: Any) -> Any:
        seen.append(int((inputs["input_ids"]).numel()))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(module.model.model), "forward", counted)
    module.completion_stats(module.model, rollout)
    prompts = rollout.prompt_lengths[::4].sum()
    assert seen[-1] < rollout.input_ids.numel()
    # each completion but the first of a prompt repeats its last token
    assert seen[-1] >= int(prompts + rollout.completion_mask.sum() + 3 * 4)


# -------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("preset", PRESETS)
def test_grp_2_the_first_step_of_every_preset_is_on_policy(world: Any, options: dict[str, Any], preset: str) -> None:
    run = world.fit({**options, "model.preset": preset, "model.dynamic_sampling": False})
    for row in run.rows:
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row.get("clip_ratio/region_mean", 0) == 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["episode"] == row["step"] * 16
    assert run.rows[0]["lab/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(run.rows[1]["lab/kl"]) > 1e-4


def test_on_policy_and_old_log_probs_of_their_own_are_the_same_step(world: Any, options: dict[str, Any]) -> None:
    options = {**options, "trainer.precision": "64-true", "model.iterations": 1, "model.kl": "reward"}
    first = world.fit(options)
    second = world.ready(options)
    second.on_policy = False
    experience, _ = second.collect(next(iter(second.trainer.datamodule.train_dataloader())))
    second.step_gradients(experience)
    expected = torch.stack([parameter.grad.norm() for parameter in second.model.parameters()]).norm()
    assert first.rows[0]["policy/grad_norm"] == pytest.approx(float(expected), rel=1e-6)


def test_rloo_takes_the_kl_from_the_reward(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "model.preset": "rloo", "model.beta": 0.5, "trainer.precision": "64-true"})
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    module.sampler.refresh()
    rollout = rollout_of(module)
    experience, metrics = module.experience(rollout)
    policy, reference = (alone(model, rollout).logp.detach() for model in (module.model, module.frozen.reference))
    expected = module.scores(module.frozen.reward, rollout).total - 0.5 * (policy - reference).sum(1)
    torch.testing.assert_close(experience.scores, expected.to(experience.scores), rtol=1e-5, atol=1e-5)
    assert metrics["reward"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert float((policy - reference).sum(1).abs().min()) > 1e-4


def test_grp_4_unscored_completions_teach_nothing(world: Any, options: dict[str, Any]) -> None:
    (world.root / "holes.py").write_text(
        "def holes(prompts, completions, **_):\n"
        "    return [None if index % 4 == 1 else float(index % 3) for index in range(len(prompts))]\n"
    )
    module = world.ready({**options, "model.reward": "@holes.py:holes"})
    experience, metrics = module.experience(rollout_of(module))
    unscored = torch.arange(16) % 4 == 1
    assert experience.scores.isnan().equal(unscored)
    assert not experience.advantages[unscored].any()
    assert not experience.completion_mask[unscored].any()
    assert experience.completion_mask[~unscored].any(1).all()
    assert experience.advantages.view(4, 4).sum(1).abs().max() < 1e-6
    assert metrics["frac_reward_zero_std"] < 1


def test_equal_rewards_of_a_group_leave_the_policy_as_it_is(world: Any, options: dict[str, Any]) -> None:
    (world.root / "same.py").write_text("def same(prompts, completions, **_):\n    return [0.3] * len(prompts)\n")
    still = {"model.reward": "@same.py:same", "model.kl": "none", "model.weight_decay": 0.0}
    run = world.fit({**options, **still})
    assert all(row["frac_reward_zero_std"] == 1 and row["policy/grad_norm"] == 0 for row in run.rows)
    before = world.root / "sft"
    start = type(run)(before).weights
    assert all(torch.equal(values, start[name]) for name, values in run.weights.items())


def test_truncated_completions_count_but_are_not_learnt(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "model.mask_truncated_completions": True, "model.max_new_tokens": 5})
    rollout = rollout_of(module)
    experience, _ = module.experience(rollout)
    cut = torch.tensor([reason == "length" for reason in rollout.finish_reason])
    assert cut.any()
    assert not cut.all()
    assert not experience.completion_mask[cut].any()
    assert experience.completion_mask[~cut].any(1).all()
    plain, _ = world.ready({**options, "model.max_new_tokens": 5}).experience(rollout)
    assert torch.equal(experience.advantages, plain.advantages)


def test_overlong_completions_lose_reward(world: Any, options: dict[str, Any]) -> None:
    plain, soft = (world.ready({**options, "model.overlong_buffer": size}) for size in (0, 4))
    rollout = rollout_of(plain)
    lost = soft.experience(rollout)[0].scores - plain.experience(rollout)[0].scores
    expected = -((rollout.completion_lengths - 4).clamp(min=0) / 4)
    torch.testing.assert_close(lost, expected)
    assert len(expected.unique()) > 2


def test_a_completion_without_a_score_leaves_its_siblings_as_they_are(world: Any, options: dict[str, Any]) -> None:
    """The first of a prompt, behind which the others are encoded, and one in between."""
    module = world.ready({**options, "trainer.precision": "64-true"})
    rollout = rollout_of(module)
    left = torch.arange(16) % 4 % 2 == 0
    mask = rollout.completion_mask & ~left[:, None]
    shared = module.completion_stats(module.model, replace(rollout, completion_mask=mask)).logp
    torch.testing.assert_close(shared, alone(module.model, rollout).logp * mask, rtol=1e-9, atol=1e-9)
    assert not shared[left].any()


def test_lengths_are_those_of_the_completions(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    everything = rollout_of(module)
    seen = set()
    for rows in (slice(0, 16), slice(4, 8), slice(8, 10)):
        rollout = everything.select(rows)
        lengths = rollout.completion_lengths.tolist()
        found = module.length_metrics(rollout)
        expected = {"completions/min_length": min(lengths), "completions/max_length": max(lengths)}
        pairs = zip(lengths, rollout.finish_reason, strict=True)
        if ended := [length for length, why in pairs if why != "length"]:
            expected |= {"completions/min_terminated_length": min(ended)}
            expected |= {"completions/max_terminated_length": max(ended)}
        assert found == expected
        seen.add(tuple(found.values()))
    assert len(seen) > 1


def test_differences_from_the_engine_are_measured(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    rollout = rollout_of(module)
    count = int(rollout.completion_mask.sum())
    for size in (0.0, 0.5, 2.0):
        logp = rollout.engine_logp.clone()
        row, slot = rollout.completion_mask.nonzero()[3].tolist()
        logp[row, slot] -= size
        logp[0, 0] += 9.0  # of the prompt
        found = module.engine_metrics(rollout, logp)
        assert found["sampling/sampling_logp_difference/max"] == pytest.approx(size)
        assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(size / count)


@pytest.mark.parametrize("preset", ["reinforce", "grpo", "dr_grpo", "dapo"])  # one of each reduction
def test_grp_5_micro_batches_are_divided_by_what_the_whole_step_holds(
    world: Any, options: dict[str, Any], preset: str
) -> None:
    still = {"trainer.precision": "64-true", "model.micro_batch_size": 3, "model.dynamic_sampling": False}
    module = world.ready({**options, **still, "model.preset": preset, "model.kl": "none"})
    whole, _ = module.experience(rollout_of(module))
    for rows in (slice(0, 16), slice(4, 12)):
        part = whole.select(rows)
        module.zero_grad()
        module.step_gradients(part)
        logp = alone(module.model, part.rollout).logp
        settings = module.settings
        loss, _ = group_policy_loss(
            logp,
            logp.detach(),
            part.advantages,
            part.completion_mask,
            ratio=settings.ratio,
            loss=settings.loss,
            reduction=settings.reduction,
            max_completion_length=8,
        )
        expected = torch.autograd.grad(loss, list(module.model.parameters()))
        size = torch.stack([gradient.norm() for gradient in expected]).norm()
        for parameter, gradient in zip(module.model.parameters(), expected, strict=True):
            assert float((parameter.grad - gradient).norm()) < 1e-6 * size


# ---------------------------------------------------------------------------------------------------- dynamic sampling
SOME = """
def some(prompts, completions, **_):  # all answers to two prompts of three are worth the same
    return [float(len(c) % 2) if len(p) % 3 == 0 else 0.0 for p, c in zip(prompts, completions)]
"""


def test_grp_8_dynamic_sampling_learns_from_mixed_groups_only(
    world: Any, options: dict[str, Any], experiences: list[Any]
) -> None:
    (world.root / "some.py").write_text(SOME)
    run = world.fit({**options, "model.preset": "dapo", "model.reward": "@some.py:some", "model.iterations": 3})
    assert len(experiences) == 3
    for experience, row in zip(experiences, run.rows, strict=True):
        rows = experience.rollout.rows_of_prompts()
        assert all(len(group) == 4 and len(experience.scores[group].unique()) == 2 for group in rows)
        draws = (row["episode"] - sum(r["episode"] for r in run.rows if r["step"] == row["step"] - 1)) / 16
        assert 1 < draws <= 3
        assert len(rows) == 4 or draws == 3
        assert row["sampling/generations_per_group"] == draws * 16 / len(rows)
        assert row["sampling/groups_dropped"] >= draws * 4 - 4 - 3
        assert row["frac_reward_zero_std"] > 0  # of all that was drawn
    assert experiences[0].rollout.completions != experiences[1].rollout.completions


def test_nothing_to_learn_from_is_one_clear_line(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "same.py").write_text("def same(prompts, completions, **_):\n    return [0.3] * len(prompts)\n")
    world.fit({**options, "model.preset": "dapo", "model.reward": "@same.py:same"}, code=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "all 48 completions of iteration 1 have the reward of the others of their prompt (mean reward 0.3)" in last


def test_dynamic_sampling_resumes_bit_for_bit(world: Any, options: dict[str, Any]) -> None:
    (world.root / "some.py").write_text(SOME)
    options = {**options, "model.preset": "dapo", "model.reward": "@some.py:some", "model.iterations": 5}
    whole = world.fork(options)
    stopped = world.fork(options, name="dynamic", stop_at=2, code=130)
    assert stopped.status["status"] == "interrupted"
    again = world.fork(options, "--resume", name="dynamic")
    assert repr(again.rows) == repr(whole.rows)
    assert all(torch.equal(values, whole.weights[name]) for name, values in again.weights.items())


FEW = """
def few(prompts, completions, **_):  # only what the first process sees is worth anything
    import os
    return [float(len(c) % 2) * (os.environ.get("LOCAL_RANK", "0") == "0") for c in completions]
"""


def test_grp_11_a_process_without_mixed_groups_takes_part(world: Any, options: dict[str, Any]) -> None:
    (world.root / "few.py").write_text(FEW)
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 2}
    run = world.fork({**options, **two, "model.preset": "dapo", "model.reward": "@few.py:few"}, processes=2)
    assert [row["step"] for row in run.rows if "policy/grad_norm" in row] == [1, 2]
    assert all(row["policy/grad_norm"] > 0 for row in run.rows)


# ------------------------------------------------------------------------------------------------------------- options
def test_presets_are_as_published_and_options_replace_their_parts() -> None:
    assert adjusted("gspo", {}) == PRESETS["gspo"]
    changed = adjusted("grpo", {"advantage": "rloo", "kl": "reward"})
    assert (changed.advantage, changed.kl, changed.beta, changed.ratio) == ("rloo", "reward", 0.04, "token")
    assert adjusted("grpo", {"loss": "reinforce"}).ratio is None
    assert adjusted("reinforce", {"loss": "clip"}).ratio == "token"


@pytest.mark.parametrize(
    ("preset", "given", "said"),
    [
        ("dapo", {"beta": 0.1}, "preset dapo has no KL: give model.kl reward or loss"),
        ("dapo", {"kl": "loss"}, "model.kl is loss: give its weight, model.beta, above 0"),
        ("grpo", {"loss": "reinforce", "ratio": "token"}, "model.ratio is for the losses clip and cispo"),
    ],
)
def test_settings_without_effect_are_refused(preset: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adjusted(preset, given)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("samples_per_prompt", 1, "model.samples_per_prompt is 1: give at least 2"),
        ("overlong_buffer", 9, "model.overlong_buffer is 9: give 0 to max_new_tokens, 8"),
        ("delta", 1.1, "model.delta is 1.1: give more than 1.2, or null"),
        ("epsilon", 1.0, "model.epsilon is 1.0: give a number between 0 and 1"),
    ],
)
def test_impossible_options_are_named(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str, value: Any, said: str
) -> None:
    world.fit({**options, f"model.{name}": value}, code=2)
    assert said in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- bandit
@pytest.mark.parametrize("preset", PRESETS)
def test_grp_10_bandit_finds_the_best_arm(world: Any, bandit: dict[str, Any], preset: str) -> None:
    options = {**bandit, "model": "GRPOModule", "model.preset": preset, "model.kl": "none"}
    options |= {"model.dynamic_sampling": False, "model.iterations": 100, "model.learning_rate": 1e-2}
    module = world.fit({**options, "data.batch_size": 4}).module
    best = module.tokenizer.convert_tokens_to_ids("a")
    assert probability(module.frozen.reference, module.tokenizer, best) < 0.3
    assert probability(module.model, module.tokenizer, best) > 0.95


def probability(model: Any, tokenizer: Any, token: int) -> float:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokenizer("say")["input_ids"]])).logits
    return float(logits[0, -1].double().softmax(-1)[token])
