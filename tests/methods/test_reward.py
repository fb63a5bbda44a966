"""Reward models through their module and the command line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_align.models.heads import RewardModel
from lightning_align.playground import records
from lightning_align.rewards.learned import LearnedReward

REWARD = {
    **{"model": "RewardModule", "model.model": "@sft", "model.learning_rate": 1e-2, "data": "PreferenceDataModule"},
    **{"data.path": "@preference.jsonl", "data.val_path": "@preference_val.jsonl", "data.batch_size": 8},
}
DOUBLE = {"trainer.precision": "64-true"}


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Prompt and answer of every answer."""
    return [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def scored(reward: LearnedReward, pairs: list[tuple[str, str]]) -> Tensor:
    """Normalised scores of finished answers."""
    prompts, answers = zip(*pairs, strict=True)
    return reward.score(prompts, answers, finished=[True] * len(pairs), records=[{}] * len(pairs))


def test_rm_5_each_answer_is_forwarded_once(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = world.write("ranked.jsonl", records("ranked", size=8, k=5))
    seen: list[int] = []
    forward = RewardModel.forward

    def counted(self: RewardModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(len(input_ids))
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(RewardModel, "forward", counted)
    world.fit({**REWARD, "data.path": data, "data.val_fraction": 0.0, "data.val_path": None, "trainer.max_steps": 1})
    assert seen[0] == 8 * 5  # and no more, for 8 · 10 pairs; the rest is the export's reference set
    assert sum(seen) == 2 * 8 * 5


def test_rm_5_two_ranked_answers_are_a_pair(world: Any, gradients: Callable[..., dict[str, Tensor]]) -> None:
    ranked = records("ranked", size=6, k=2, ties=0.0)
    pairs = []
    for row in ranked:
        best, worst = sorted(range(2), key=row["ranks"].__getitem__)
        chosen, rejected = row["completions"][best], row["completions"][worst]
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    found = []
    for name, rows in (("two_ranked.jsonl", ranked), ("two.jsonl", pairs)):
        module = world.ready({**REWARD, **DOUBLE, "data.path": world.write(name, rows)})
        data = module.trainer.datamodule.datasets["train"]
        torch.manual_seed(0)
        torch.nn.init.normal_(module.model.head.weight)
        loss, _ = module.loss(data.collate(range(len(data)), 1.0))
        found.append((loss, float(data.weights.sum()), gradients(module, loss)))
    (loss, weight, first), (same, same_weight, second) = found
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=1e-6)
    assert weight == same_weight
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-5, atol=1e-7)


def test_rm_5_a_prompt_of_nine_answers_weighs_as_much_as_one_of_two(world: Any) -> None:
    rows = [*records("ranked", size=1, k=9, ties=0.0), *records("ranked", size=2, k=2, ties=0.0)]
    module = world.ready({**REWARD, **DOUBLE, "data.path": world.write("nine.jsonl", rows), "data.val_fraction": 0.0})
    data = module.trainer.datamodule.datasets["train"]
    assert data.weights.tolist() == [1.0, 1.0, 1.0]
    alone = [float(module.loss(data.collate([index], 1.0))[0].detach()) for index in range(3)]
    together = float(module.loss(data.collate(range(3), 3.0))[0].detach())
    assert math.isclose(together, sum(alone), rel_tol=1e-6)
    batch = data.collate([0], 1.0)
    scores = module.model(batch["input_ids"], batch["attention_mask"])
    terms = -logsigmoid(scores[batch["pair_chosen"]] - scores[batch["pair_rejected"]])
    assert len(terms) == 36
    assert math.isclose(alone[0], float(terms.mean()), rel_tol=1e-6)


def test_rm_8_normalised_scores_have_mean_zero_on_the_reference_set_and_survive_loading(world: Any) -> None:
    pairs = texts(records("preference", size=200))
    reward = LearnedReward(str(world.root / "reward"))
    scores = scored(reward, pairs)
    assert abs(float(scores.mean())) < 1e-4
    assert math.isclose(float(scores.std(correction=0)), reward.model.reward_std, rel_tol=1e-4)
    folder = world.root / "reward" / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (prompt, answer), score in zip(pairs[:6], scores[:6], strict=True):
        ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            raw = float(plain(ids).logits)
        assert math.isclose(raw - plain.config.reward_mean, float(score), rel_tol=1e-4, abs_tol=1e-5)


def test_evaluation_counts_what_the_exported_model_gets_right(world: Any) -> None:
    run = world.fit({**REWARD, "trainer.max_epochs": 1})
    scores = scored(LearnedReward(str(run.path)), texts(records("preference", split="val", size=5))).view(-1, 2)
    delta = scores[:, 0] - scores[:, 1]
    metrics = run.row(3, "eval/accuracy")
    assert metrics["eval/accuracy"] == pytest.approx(float((delta > 0).float().mean()))
    assert metrics["eval/brier"] == pytest.approx(float(((1 - delta.sigmoid()) ** 2).mean()), rel=1e-4)


def test_scores_start_at_order_one(world: Any) -> None:
    module = world.ready(REWARD)
    data = module.trainer.datamodule.datasets["train"]
    batch = data.collate(range(17), 1.0)
    assert 0.1 < float(module.model(batch["input_ids"], batch["attention_mask"]).abs().mean()) < 10
    norm = float(module.model.head.weight.norm())
    assert 0.5 < norm < 1.5  # 32 numbers of standard deviation 1/√33


def test_options_out_of_range_are_refused(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("label_smoothing", 0.5), ("center_rewards_coefficient", -1.0), ("dropout", 0.1)):
        run = world.fit({**REWARD, f"model.{option}": value}, code=2)
        assert option in capsys.readouterr().err
        assert not run.path.exists()
