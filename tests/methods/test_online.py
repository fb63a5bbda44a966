"""What all online methods share, tried on PPO: rewards, prompts, evaluation, checkpoints, engines, precision."""

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_align.models.heads import RewardModel
from lightning_align.playground import gold


def test_reward_parts_are_logged_and_weighted(world: Any, ppo_options: dict[str, Any], experiences: list[Any]) -> None:
    parts = {
        "long": {"source": "@rewards.py:length", "weight": 0.5},
        "commas": {"source": "@rewards.py:commas", "weight": -2.0},
        "only_measured": {"source": "@rewards.py:length", "weight": 0.0},
    }
    run = world.fit({**ppo_options, "model.reward": parts})
    for experience, row in zip(experiences, run.rows, strict=True):
        words = torch.tensor([float(len(text.split())) for text in experience.rollout.completions])
        commas = torch.tensor([float(text.split().count(",")) for text in experience.rollout.completions])
        torch.testing.assert_close(experience.scores, 0.5 * words - 2 * commas)
        assert row["lab/proxy"] == pytest.approx(float(experience.scores.mean()))
        assert row["rewards/long/mean"] == row["rewards/only_measured/mean"] == pytest.approx(float(words.mean()))
        assert row["rewards/commas/mean"] == pytest.approx(float(commas.mean()))


def test_a_prompt_without_a_score_teaches_nothing_and_counts_nowhere(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**ppo_options, "model.reward": "@rewards.py:long_prompts_only"})
    for experience, row in zip(experiences, run.rows, strict=True):
        scored = torch.tensor([len(record["prompt"]) > 57 for record in experience.rollout.records])
        assert scored.any()
        assert not scored.all()
        assert not experience.completion_mask[~scored].any()
        assert not experience.advantages[~scored].any()
        kept = experience.advantages[experience.completion_mask].double()
        assert abs(float(kept.mean())) < 1e-5
        assert float(kept.var(correction=0)) == pytest.approx(1, abs=1e-3)
        assert row["objective/scores"] == pytest.approx(float(experience.scores[scored].mean()))
        assert row["lab/proxy"] == row["objective/scores"]


def test_without_any_score_nothing_moves(world: Any, ppo_options: dict[str, Any]) -> None:
    run = world.fit(
        {**ppo_options, "model.reward": "@rewards.py:nothing", "model.weight_decay": 0.1, "model.iterations": 2}
    )
    before = load_file(world.root / "sft" / "model" / "model.safetensors")
    for name, values in run.weights.items():
        # weight decay alone
        torch.testing.assert_close(values, before[name], rtol=1e-2, atol=1e-6)
    assert "lab/proxy" not in run.rows[0]
    assert "objective/scores" not in run.rows[0]
    assert run.rows[0]["empty_batches"] == 1


@pytest.mark.parametrize("method", ["PPOModule", "GRPOModule"])
def test_a_reward_that_scores_nothing_is_said_and_stops_the_run(
    world: Any, ppo_options: dict[str, Any], capsys: pytest.CaptureFixture[str], method: str
) -> None:
    parts = {"a": "@rewards.py:nothing", "b": {"source": "@rewards.py:length", "weight": 0.0}}
    options = {**ppo_options, "model": method, "model.reward": parts, "data.batch_size": 4, "model.iterations": 5}
    samples = {"PPOModule": 1, "GRPOModule": 2}[method]
    run = world.fit({**options, "model.samples_per_prompt": samples}, code=2)
    said = capsys.readouterr().err
    source = f"{world.root}/rewards.py:nothing"
    assert said.count(f"reward {source} gave none of {4 * samples} completions a score, and nothing is learnt") == 1
    stop = (
        f"reward {source} gave none of {12 * samples} completions a score, in 3 batches in a row: there is nothing to"
    )
    assert said.count(stop) == 1
    assert [row["step"] for row in run.rows] == [1, 2]


def test_a_reward_that_scores_now_and_then_stops_nothing(
    world: Any, ppo_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world.fit({**ppo_options, "model.iterations": 6, "model.reward": "@rewards.py:every_third"})
    assert capsys.readouterr().err.count("gave none of 8 completions a score") == 2


def test_conversational_prompts(world: Any, ppo_options: dict[str, Any]) -> None:
    prompts = [[{"role": "user", "content": f"list {number} animals ."}] for number in ("two", "three", "four")]
    data = world.write("chats.jsonl", [{"prompt": prompt} for prompt in prompts])
    options = {**ppo_options, "data.path": data, "data.val_path": data, "model.eval_every": 3}
    run = world.fit({**options, "model.reward": "@rewards.py:turns", "model.gold": None})
    assert [sample["prompt"] for sample in run.samples[:3]] == prompts
    assert all(len(sample["completion"]) == sample["proxy"] for sample in run.samples)


def test_gold_and_its_parts_are_measured_and_never_trained_on(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    options = {**ppo_options, "model.eval_every": 1}
    run = world.fit(options)
    for step, experience in enumerate(experiences, 1):
        row = run.row(step, "lab/gold")
        pairs = zip(experience.rollout.records, experience.rollout.completions, strict=True)
        scores = [gold(record["prompt"], text) for record, text in pairs]
        for name in ("gold", "helpfulness", "safety"):
            mean = sum(getattr(score, name) for score in scores) / len(scores)
            assert row["lab/gold" if name == "gold" else f"lab/gold_{name}"] == pytest.approx(mean, abs=1e-6)
    assert {"eval/lab/gold", "eval/lab/gold_helpfulness", "eval/lab/gold_safety"} <= run.row(3, "eval/lab/kl").keys()
    assert {"gold", "gold_helpfulness", "gold_safety", "proxy", "kl", "finish_reason"} <= run.samples[0].keys()
    without = world.fit({**options, "model.gold": None})
    for name, values in run.weights.items():
        assert torch.equal(without.weights[name], values)


def test_checkpoints_carry_their_kl_and_the_first_is_the_start(world: Any, ppo_options: dict[str, Any]) -> None:
    run = world.fit({**ppo_options, "model.eval_every": 2, "run.checkpoint_every": 1})
    names = sorted(file.name for file in (run.path / "checkpoints").iterdir())
    assert names.pop(0) == "last.ckpt"
    for name, step in zip(names, (0, 2, 3), strict=True):  # the last iteration is evaluated whatever eval_every says
        match = re.fullmatch(r"step=(\d{5})-kl=(-?\d+\.\d{3})\.ckpt", name)
        assert match is not None
        assert int(match[1]) == step
        assert float(match[2]) == pytest.approx(run.row(step, "eval/lab/kl")["eval/lab/kl"], abs=6e-4)
    start = run.checkpoint("step=00000")
    assert start["method"]["iteration"] == 0
    for name, values in load_file(world.root / "sft" / "model" / "model.safetensors").items():
        assert torch.equal(start["state_dict"][f"model.{name}"], values)
    assert run.row(0, "eval/lab/kl")["eval/lab/kl"] == 0
    assert {sample["step"] for sample in run.samples} == {0, 2, 3}


def test_evaluation_prompts_are_sampled_alike_whatever_was_trained(world: Any, ppo_options: dict[str, Any]) -> None:
    first = world.fit({**ppo_options, "model.eval_every": 3, "model.learning_rate": 0.0})
    second = world.fit({**ppo_options, "model.eval_every": 1, "model.learning_rate": 0.0, "data.eval_batch_size": 2})
    half = len(first.samples) // 2
    assert [s["completion"] for s in first.samples[:half]] == [s["completion"] for s in first.samples[half:]]
    assert [s["completion"] for s in first.samples[:half]] == [s["completion"] for s in second.samples[:half]]


def test_stop_at_kl_ends_the_run_with_an_evaluation(world: Any, ppo_options: dict[str, Any]) -> None:
    options = {**ppo_options, "model.iterations": 40, "model.kl_coef": 0.0, "model.learning_rate": 5e-4}
    run = world.fit({**options, "model.stop_at_kl": 0.3, "model.eval_every": 100})
    kl = [row["objective/kl"] for row in run.rows if "objective/kl" in row]
    assert 3 <= len(kl) < 40
    means = [sum(kl[max(0, end - 3) : end]) / len(kl[max(0, end - 3) : end]) for end in range(1, len(kl) + 1)]
    assert [mean > 0.3 for mean in means] == [False] * (len(kl) - 1) + [True]
    assert "eval/lab/kl" in run.row(len(kl), "eval/lab/kl")
    assert run.status["status"] == "finished"


def test_both_engines_give_the_same_run(world: Any, ppo_options: dict[str, Any]) -> None:
    runs = [
        world.fit({**ppo_options, "model.engine": engine, "model.eval_every": 3}) for engine in ("static", "generate")
    ]
    assert [s["completion"] for s in runs[0].samples] == [s["completion"] for s in runs[1].samples]
    for one, other in zip(runs[0].rows, runs[1].rows, strict=True):
        other = {name: value for name, value in other.items() if not name.startswith("sampling/")}
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert all(row.get("sampling/sampling_logp_difference/max", 0) < 1e-4 for run in runs for row in run.rows)


@pytest.mark.parametrize(
    ("option", "value", "tolerance"),
    [
        ("trainer.precision", "64-true", 1e-9),
        ("trainer.precision", "bf16-mixed", 1e-3),
        ("model.dtype", "bfloat16", 1e-3),
    ],
)
def test_conventions_1_5_the_reference_computes_as_the_policy_does(
    world: Any, ppo_options: dict[str, Any], option: str, value: str, tolerance: float
) -> None:
    run = world.fit({**ppo_options, "model.eval_every": 3, "model.num_ppo_epochs": 1, option: value})
    assert abs(run.row(0, "eval/lab/kl")["eval/lab/kl"]) < 1e-12
    assert run.row(1, "objective/kl")["objective/kl"] == 0
    assert run.row(1, "val/ratio")["val/ratio"] == pytest.approx(1, abs=tolerance)


def test_precisions_that_would_fail_silently_are_refused(world: Any, ppo_options: dict[str, Any], capsys: Any) -> None:
    for precision in ("bf16-true", "16-mixed"):
        run = world.fit({**ppo_options, "trainer.precision": precision}, code=2)
        assert f"trainer.precision {precision}" in capsys.readouterr().err.replace(" is ", " ")
        assert not run.path.exists()


def test_samples_per_prompt_are_neighbours_and_differ(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**ppo_options, "model.samples_per_prompt": 3, "data.batch_size": 4, "model.iterations": 1})
    prompts = [record["prompt"] for record in experiences[0].rollout.records]
    assert len(prompts) == 12
    assert all(prompts[index] == prompts[index - index % 3] for index in range(12))
    assert len(set(experiences[0].rollout.completions)) > 4
    assert run.rows[0]["episode"] == 12


def test_a_policy_with_dropout_in_its_configuration_has_it_off(
    world: Any, ppo_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = world.ready({**ppo_options}).model
    noisy.config.attention_dropout = 0.5
    noisy.save_pretrained(world.root / "noisy")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (world.root / "noisy" / file).write_text((world.root / "sft" / "model" / file).read_text())
    run = world.fit({**ppo_options, "model.model": "@noisy", "model.num_ppo_epochs": 1})
    assert run.module.model.config.attention_dropout == 0
    assert all(row["val/ratio"] == pytest.approx(1, abs=1e-5) for row in run.rows)
    refused = world.fit({**ppo_options, "model.dropout": 0.1}, code=2)
    assert "dropout" in capsys.readouterr().err
    assert not refused.path.exists()


def test_parameters_take_the_bytes_in_which_a_model_will_lie(world: Any, ppo_options: dict[str, Any]) -> None:
    narrow = RewardModel.from_pretrained(str(world.root / "reward"), dtype="bfloat16")
    narrow.network.save_pretrained(world.root / "narrow")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (world.root / "narrow" / file).write_text((world.root / "reward" / "model" / file).read_text())
    parts = {"wide": "@reward", "narrow": "@narrow", "rule": "@rewards.py:length"}
    roles = world.ready({**ppo_options, "model.reward": parts}).parameter_roles()
    assert set(roles) == {"policy", "value", "reference", "reward"}
    one = sum(parameter.numel() for parameter in narrow.parameters())
    assert roles["reward"] == (2 * one, 4 * one + 2 * one)
    assert all(roles[role].size == 4 * roles[role].number for role in ("policy", "value", "reference"))


def test_nothing_held_out_is_said_and_not_evaluated(
    world: Any, ppo_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.fit({**ppo_options, "data.val_path": None, "data.val_fraction": 0.0, "model.eval_every": 1})
    assert "no prompts are held out" in capsys.readouterr().err
    assert not (run.path / "samples.jsonl").exists()
    assert [file.name for file in (run.path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_recomputed_activations_are_recomputed(
    world: Any, ppo_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts = []
    for on in (False, True):
        calls.clear()
        world.fit({**ppo_options, "model.iterations": 1, "model.gradient_checkpointing": on})
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2 * 2 * 4  # policy and value model, two layers, four steps


def test_kl_can_be_measured_to_another_model_than_the_reference(world: Any, ppo_options: dict[str, Any]) -> None:
    first = world.fit({**ppo_options, "model.eval_every": 3}, name="gone_ahead")
    onward = {**ppo_options, "model.model": "@gone_ahead", "model.eval_every": 3, "model.learning_rate": 0.0}
    own = world.fit(onward)
    run = world.fit({**onward, "model.initial": "@sft"})
    reached = first.row(3, "eval/lab/kl")["eval/lab/kl"]
    assert reached > 1e-3
    # the same samples, the weights that the first run ended with
    assert run.row(0, "eval/lab/kl")["eval/lab/kl"] == pytest.approx(reached, rel=1e-4)
    assert own.row(0, "eval/lab/kl")["eval/lab/kl"] == pytest.approx(0.0, abs=1e-5)
    for row, other in zip(run.rows, own.rows, strict=True):
        if "objective/kl" in row:
            assert row["objective/kl"] == other["objective/kl"] == pytest.approx(0.0, abs=1e-4)
            assert other["lab/kl"] == other["objective/kl"]
            assert abs(row["lab/kl"]) > 1e-3
            assert row["policy/grad_norm"] == other["policy/grad_norm"]  # what is learnt does not depend on it


def test_kl_to_a_model_with_other_tokens_is_refused(
    world: Any, ppo_options: dict[str, Any], bandit: dict[str, Any], capsys: Any
) -> None:
    world.fit({**ppo_options, "model.initial": bandit["model.model"]}, code=2)
    assert "has another vocabulary than" in capsys.readouterr().err
