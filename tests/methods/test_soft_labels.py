"""Soft labels of pairs, as a judge gives them: mixtures of the losses of both sides."""

from typing import Any

import pytest
import torch

from lightning_align.models.heads import RewardModel
from lightning_align.playground import records
from lightning_align.rewards.learned import LearnedReward

DATA = {"data": "PreferenceDataModule", "data.val_fraction": 0.0, "data.batch_size": 8}
METHODS: dict[str, dict[str, Any]] = {
    "reward": {"model": "RewardModule"},
    **{f"dpo {loss}": {"model": "DPOModule", "model.loss_type": loss} for loss in ("sigmoid", "ipo", "hinge")},
}


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_mixture_of_both_sides(world: Any, method: str) -> None:
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in records("preference", size=8)]
    files = {
        "clear": pairs,
        "turned": [swapped(row) for row in pairs],
        "soft": [{**row, "soft_label": 0.7} for row in pairs],
    }
    losses = {}
    for name, rows in files.items():
        options = {"model.model": "@sft", "data.path": world.write(f"{name}.jsonl", rows), **DATA, **METHODS[method]}
        options |= {"trainer.max_steps": 1, "trainer.precision": "64-true"}
        losses[name] = world.fit(options).row(1, "loss")["loss"]
    if method == "reward":  # a policy that is still its reference has no preference
        assert losses["clear"] != pytest.approx(losses["turned"], abs=1e-3)
    assert losses["soft"] == pytest.approx(0.7 * losses["clear"] + 0.3 * losses["turned"], rel=1e-6)


def test_aif_4_a_reward_model_finds_the_log_odds_of_soft_labels(world: Any) -> None:
    rows = [
        {"prompt": "list two animals . answer :", "chosen": " cat , dog .", "rejected": " dog .", "soft_label": 0.8},
        {
            "prompt": "count to three . answer :",
            "chosen": " one , two , three .",
            "rejected": " one .",
            "soft_label": 0.6,
        },
    ]
    options = {"model": "RewardModule", "model.model": "@sft", "model.learning_rate": 3e-3, **DATA}
    options |= {"data.path": world.write("two_items.jsonl", rows), "trainer.max_steps": 80, "trainer.max_epochs": 80}
    reward = LearnedReward(str(world.fit(options).path), normalisation="none")
    prompts = [row["prompt"] for row in rows]
    score = {
        side: reward.score(prompts, [row[side] for row in rows], finished=[True] * 2, records=[{}] * 2)
        for side in ("chosen", "rejected")
    }
    expected = torch.logit(torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(score["chosen"] - score["rejected"], expected, rtol=0, atol=0.1)


def test_cai_2_a_label_of_a_half_has_no_gradient_where_scores_are_equal(world: Any) -> None:
    rows = [{**row, "soft_label": 0.5} for row in records("preference", size=8, strength=False)]
    options = {"model": "RewardModule", "model.model": "@sft", "data.path": world.write("half.jsonl", rows), **DATA}
    module = world.ready({**options, "data.ties": "soft"})
    batch = module.trainer.datamodule.datasets["train"].collate(range(8), 8.0)
    scores = torch.zeros(16, requires_grad=True)
    assert isinstance(module.model, RewardModel)
    (slope,) = torch.autograd.grad(module.loss_of_scores(scores, batch)[0], scores)
    assert not slope.any()
