"""PPO on a judge's ratings: what it learns from is what the judge says."""

from typing import Any

import pytest
import torch

from lightning_align.rewards.judge import JudgeReward

REWARD = {"rater": {"source": "@pretrain", "judge": "playground"}}


def test_ppo_learns_from_the_ratings_of_a_judge(
    world: Any, ppo_options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**ppo_options, "model.reward": REWARD, "model.iterations": 2})
    judge = JudgeReward.load(str(world.root / "pretrain"), "playground")
    assert len(experiences) == 2
    for experience, row in zip(experiences, run.rows, strict=True):
        rollout = experience.rollout
        prompts = [record["prompt"] for record in rollout.records]
        rating = judge.score(prompts, rollout.completions, finished=[True] * len(prompts), records=rollout.records)
        torch.testing.assert_close(experience.scores, rating, rtol=1e-4, atol=1e-5)
        assert experience.scores.abs().max() <= 1
        assert len(set(experience.scores.tolist())) > 1
        assert row["rewards/rater/mean"] == pytest.approx(float(rating.mean()), abs=1e-5)
    parents = {parent["run"] for parent in run.status["parents"]}
    assert str(world.root / "pretrain") in parents
