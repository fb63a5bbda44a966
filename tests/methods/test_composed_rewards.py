"""PPO on gated rewards and on ensembles: what is learnt from, what is logged, two processes, resuming."""

import math
import shutil
from typing import Any

import pytest
import torch

GATE: dict[str, Any] = {
    "combine": "gate",
    "parts": {"helpfulness": "@rewards.py:length", "safety": "@rewards.py:commas"},
    "threshold": 0.5,
}
ENSEMBLE = {"rm": {"source": ["@rewards.py:length", "@rewards.py:commas"], "combine": "uwo", "uwo_coef": 0.5}}


def columns(experience: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and commas of each completion."""
    texts = [text.split() for text in experience.rollout.completions]
    words = torch.tensor([float(len(text)) for text in texts])
    return words, torch.tensor([float(text.count(",")) for text in texts])


def test_comp_1_comp_4_a_gated_reward_is_whitened_to_learn_and_logged_as_it_is(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**ppo_options, "model.reward": GATE})
    for experience, row in zip(experiences, run.rows, strict=True):
        words, commas = columns(experience)
        is_safety = torch.tensor([record["is_safety"] for record in experience.rollout.records])
        gated = torch.where(is_safety, commas, words).clamp(
            max=math.log((1 - 1e-6) / 1e-6)
        )  # no comma count is below 0
        white = (gated - gated.mean()) / (gated.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(experience.scores, white, rtol=1e-4, atol=1e-5)
        assert row["lab/proxy"] == pytest.approx(float(gated.mean()), rel=1e-5)
        assert abs(row["objective/scores"]) < 1e-5
        assert row["rewards/helpfulness/mean"] == pytest.approx(float(words.mean()), rel=1e-6)
        assert row["rewards/safety/std"] == pytest.approx(float(commas.std(correction=0)), rel=1e-5)


def test_evaluations_are_not_whitened_and_know_every_part(world: Any, ppo_options: dict[str, Any]) -> None:
    penalty = {"length_penalty": {"coef": 0.25, "max_length": 3}}
    run = world.fit({**ppo_options, "model.reward": {**GATE, **penalty}, "model.eval_every": 1})
    rows = [row for row in run.rows if "eval/lab/proxy" in row]
    for row in rows:
        samples = [sample for sample in run.samples if sample["step"] == row["step"]]
        assert len(samples) == 5
        for name in ("helpfulness", "safety", "length_penalty"):
            values = torch.tensor([sample[f"reward_{name}"] for sample in samples], dtype=torch.float64)
            assert row[f"eval/rewards/{name}/mean"] == pytest.approx(float(values.mean()), rel=1e-5)
            assert row[f"eval/rewards/{name}/std"] == pytest.approx(float(values.std(correction=0)), rel=1e-4, abs=1e-6)
        proxies = [sample["proxy"] for sample in samples]
        assert row["eval/lab/proxy"] == pytest.approx(sum(proxies) / 5, rel=1e-5)
        for sample in samples:
            gated = {sample["reward_helpfulness"], sample["reward_safety"]}
            assert any(sample["proxy"] == pytest.approx(part + sample["reward_length_penalty"]) for part in gated)
            assert sample["reward_length_penalty"] <= 0


def test_an_ensemble_logs_how_far_its_members_are_apart(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**ppo_options, "model.reward": ENSEMBLE})
    for experience, row in zip(experiences, run.rows, strict=True):
        words, commas = columns(experience)
        spread = (words - commas).abs() / 2
        torch.testing.assert_close(experience.scores, (words + commas) / 2 - 0.5 * spread**2)
        assert row["rewards/ensemble_std"] == pytest.approx(float(spread.double().pow(2).mean().sqrt()), rel=1e-6)
        assert row["rewards/rm/mean"] == pytest.approx(row["lab/proxy"], rel=1e-6)


def test_an_ensemble_of_models_is_planned_and_trained(world: Any, ppo_options: dict[str, Any]) -> None:
    members = {"rm": ["@reward", "@reward/model"]}  # the same model by two names
    run = world.fit({**ppo_options, "model.reward": members})
    assert all(row["rewards/ensemble_std"] == 0 for row in run.rows if "rewards/ensemble_std" in row)
    parents = {parent["run"] for parent in run.status["parents"]}
    assert str(world.root / "reward") in parents


RUNNING = {"model.reward": {**GATE, "whiten": "running"}, "model.iterations": 4}


def test_running_whitening_goes_on_after_a_stop(world: Any, ppo_options: dict[str, Any]) -> None:
    options = {**ppo_options, **RUNNING}
    whole = world.fork(options)
    stopped = world.fork(options, stop_at=2, code=130)
    shutil.copytree(stopped.path, world.root / "resumed_gate")
    resumed = world.fork(options, "--resume", name="resumed_gate")
    assert repr(resumed.rows) == repr(whole.rows)
    assert resumed.checkpoint()["method"]["reward"] == whole.checkpoint()["method"]["reward"]
    assert whole.checkpoint()["method"]["reward"]["whitening"][0] == pytest.approx(1 - 0.99**4)


@pytest.mark.parametrize("whiten", ["batch", "running"])
def test_comp_4_two_processes_whiten_as_one(world: Any, ppo_options: dict[str, Any], whiten: str) -> None:
    options = {
        **{**ppo_options, "model.reward": {**GATE, "whiten": whiten}, "model.iterations": 2},
        **{"trainer.precision": "64-true", "data.batch_size": 8},
    }
    one = world.fork(options)
    halves = {**options, "data.batch_size": 4, "trainer.devices": 2, "trainer.strategy": "ddp"}
    two = world.fork(halves, processes=2)
    for first, second in zip(one.rows, two.rows, strict=True):
        for name in ("lab/proxy", "objective/scores", "objective/kl", "rewards/safety/std", "loss/policy_avg"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-8), name
    for name, values in one.weights.items():
        torch.testing.assert_close(two.weights[name], values, rtol=1e-6, atol=1e-7)
