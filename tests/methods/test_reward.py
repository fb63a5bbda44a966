"""Reward models through their module and the command line."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_align.data.answer_rows import packed_rows
from lightning_align.errors import UserError
from lightning_align.losses.ranking import plackett_luce_loss
from lightning_align.losses.reward_metrics import differences, hits
from lightning_align.losses.tie_models import TIE_MODELS
from lightning_align.methods.base import add_sums
from lightning_align.models.answers import AnswerRows
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
    score = RewardModel.answer_scores

    def counted(self: RewardModel, rows: AnswerRows) -> Tensor:
        seen.append(len(rows.slots))
        return score(self, rows)

    monkeypatch.setattr(RewardModel, "answer_scores", counted)
    monkeypatch.setattr(RewardModel, "forward", None)  # whose rows are padded
    world.fit({**REWARD, "data.path": data, "data.val_fraction": 0.0, "data.val_path": None, "trainer.max_steps": 1})
    assert seen[0] == 8 * 5  # and no more, for 8 · 10 pairs; the rest is the export's reference set
    assert sum(seen) == 2 * 8 * 5


def test_rm_5_scores_of_packed_answers_are_those_of_rows_of_their_own(world: Any) -> None:
    data = world.write("ranked.jsonl", records("ranked", size=8, k=5))
    module = world.ready({**REWARD, **DOUBLE, "data.path": data, "data.val_path": None, "data.val_fraction": 0.0})
    batch = module.trainer.datamodule.datasets["train"].collate(range(8), 1.0)
    alone = module.model(batch["input_ids"], batch["attention_mask"])
    rows = packed_rows(batch, module.model.config.hidden_size)
    assert rows.input_ids.numel() < 0.7 * batch["input_ids"].numel(), "prompts are shared"
    torch.testing.assert_close(module.scores(batch), alone, rtol=1e-9, atol=1e-9)
    single = {name: values[:1, :1] if values.ndim == 2 else values[:1] for name, values in batch.items() if values.ndim}
    torch.testing.assert_close(module.scores(single), module.model(single["input_ids"], single["attention_mask"]))


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


def test_labels_that_may_be_wrong_are_smoothed(world: Any) -> None:
    module = world.ready({**REWARD, **DOUBLE, "data.margin": "small", "model.label_smoothing": 0.2})
    batch = module.trainer.datamodule.datasets["train"].collate(range(8), 1.0)
    scores = module.scores(batch).detach()
    ahead = scores[batch["pair_chosen"]] - scores[batch["pair_rejected"]] - batch["pair_margin"]
    expected = -(batch["pair_weight"] * (0.8 * logsigmoid(ahead) + 0.2 * logsigmoid(-ahead))).sum()
    assert float(module.loss(batch)[0].detach()) == pytest.approx(float(expected), rel=1e-6)


def test_scores_start_at_order_one(world: Any) -> None:
    module = world.ready(REWARD)
    data = module.trainer.datamodule.datasets["train"]
    batch = data.collate(range(17), 1.0)
    assert 0.1 < float(module.model(batch["input_ids"], batch["attention_mask"]).abs().mean()) < 10
    norm = float(module.model.head.weight.norm())
    assert 0.5 < norm < 1.5  # 32 numbers of standard deviation 1/√33


def ranked(size: int = 12, **options: Any) -> list[dict[str, Any]]:
    """Rankings of the playground."""
    return records("ranked", size=size, **{"k": 4, "ties": 0.8, **options})


def test_rm_6_rankings_as_a_whole(world: Any) -> None:
    """The module's loss is the mean over prompts of the loss of each ranking, of whatever length."""
    rows = [*ranked(3, k=5), *ranked(2, k=3)]
    options = {"data.path": world.write("mixed.jsonl", rows), "data.val_fraction": 0.0, "data.val_path": None}
    module = world.ready({**REWARD, **DOUBLE, **options, "model.objective": "plackett_luce"})
    data = module.trainer.datamodule.datasets["train"]
    batch = data.collate(range(len(data)), 5.0)
    scores = module.model(batch["input_ids"], batch["attention_mask"]).detach()
    loss, sums = module.loss(batch)
    expected, start = 0.0, 0
    for row in rows:
        count = len(row["ranks"])
        own = scores[start : start + count]
        alone, _ = plackett_luce_loss(own, torch.arange(count)[None], torch.tensor([row["ranks"]]))
        expected, start = expected + float(alone), start + count
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert float(sums["loss"][1]) == 5
    assert {"accuracy", "margin", "mean_reward", "num_tokens"} <= set(sums)


def test_rm_6_on_pairs_it_is_the_pairwise_loss(world: Any, gradients: Callable[..., dict[str, Tensor]]) -> None:
    found = []
    for objective in ("bradley_terry", "plackett_luce"):
        plain = {"data.margin": "none", "model.objective": objective, "model.center_rewards_coefficient": 0.05}
        module = world.ready({**REWARD, **DOUBLE, **plain})
        data = module.trainer.datamodule.datasets["train"]
        loss, sums = module.loss(data.collate(range(17), 1.0))
        found.append((loss, sums["accuracy"], gradients(module, loss)))
    (loss, accuracy, first), (same, same_accuracy, second) = found
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=1e-6)
    assert same_accuracy == accuracy
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-5, atol=1e-7)


def test_margins_that_a_ranking_has_no_use_for_are_refused(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.fit({**REWARD, "model.objective": "plackett_luce", "data.margin": "small"}, code=2)
    assert "data.margin is small, but this loss has no margins: leave it out" in capsys.readouterr().err
    assert not run.path.exists()
    rows = [{**row, "margin": 1.0} for row in records("preference", size=8)]
    options = {"data.path": world.write("own_margins.jsonl", rows), "model.objective": "plackett_luce"}
    notes = world.ready({**REWARD, **options}).trainer.datamodule.report.notes
    assert "margin by strength" not in notes
    assert notes["pairs with a margin of their own"] == "8, which this loss has no use for"


def test_a_soft_tie_is_pulled_together_whatever_its_margin(world: Any) -> None:
    rows = [{**row, "tie": True, "margin": 3.0} for row in records("preference", size=8)]
    file = {"data.path": world.write("margin_ties.jsonl", rows), "data.ties": "soft", "data.val_fraction": 0.0}
    module = world.ready({**REWARD, **file, "data.val_path": None})
    batch = module.trainer.datamodule.datasets["train"].collate(range(8), 8.0)
    scores = torch.zeros(len(batch["input_ids"]), requires_grad=True)
    (slope,) = torch.autograd.grad(module.loss_of_scores(scores, batch)[0], scores)
    assert not slope.any(), "equal scores are where a tie wants them"


def test_accuracy_of_an_evaluation_is_weighted_as_in_training(world: Any) -> None:
    rows = [{**row, "weight": 20.0 if index == 0 else 0.5} for index, row in enumerate(records("preference", size=7))]
    module = world.ready({**REWARD, "data.val_path": world.write("weighty.jsonl", rows)})
    data = module.trainer.datamodule.datasets["val"]
    module.validation_step(data.collate(range(len(data)), 1.0), 0)
    sums = module._eval_sums["accuracy"]
    plain = float(hits(differences(module._evaluated)).mean())
    found = module.eval_metrics(module.ratios(module._eval_sums))["accuracy"]
    assert found == pytest.approx(float(sums[0] / sums[1]))
    assert abs(found - plain) > 0.05


def test_extremes_of_scores_are_those_of_the_whole_step_and_evaluation(world: Any) -> None:
    module = world.ready({**REWARD, **DOUBLE})
    data = module.trainer.datamodule.datasets["train"]
    parts = [data.collate(rows, 1.0) for rows in (range(3), range(3, 7), [], range(7, 17))]
    scores = torch.cat([module.scores(batch) for batch in (parts[0], parts[1], parts[3])]).detach()
    sums: Any = {}
    for batch in parts:
        add_sums(sums, module.loss(batch)[1])
    found = module.ratios(sums)
    assert [found["min_reward"], found["max_reward"]] == pytest.approx([float(scores.min()), float(scores.max())])
    assert found["mean_reward"] == pytest.approx(float(scores.mean()))


def test_a_score_that_is_no_number_is_said_in_one_line(world: Any) -> None:
    module = world.ready(REWARD)
    data = module.trainer.datamodule.datasets["val"]
    module.model.head.weight.data.fill_(math.nan)
    module.validation_step(data.collate(range(len(data)), 1.0), 0)
    with pytest.raises(
        UserError, match="5 of 5 held-out pairs have a score that is not finite: the model has diverged"
    ):
        module.eval_metrics({})


@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_rm_7_a_tie_model_learns_how_often_answers_tie(world: Any, name: str) -> None:
    pairs = world.write("tied.jsonl", records("preference", size=120, ties=0.8))
    run = world.fit({**REWARD, "data.path": pairs, "data.ties": name, "trainer.max_epochs": 4})
    rows = [row for row in run.rows if "ties/parameter" in row]
    assert rows[-1]["ties/parameter"] > rows[0]["ties/parameter"] + 0.1  # ties are more common than it starts with
    assert 0.1 < rows[-1]["ties/observed"] < 0.9
    assert 0 < rows[0]["ties/predicted"] < rows[-1]["ties/predicted"] < 1
    stored = AutoModelForSequenceClassification.from_pretrained(run.path / "model").config.tie_model
    assert stored == {"name": name, "parameter": pytest.approx(rows[-1]["ties/parameter"], abs=0.1)}
    assert any(key.endswith("free_tie_parameter") for key in run.checkpoint()["state_dict"])
    # the network's parameters are those of any reward model
    assert scored(LearnedReward(str(run.path)), texts(records("preference", size=3))).isfinite().all()


def test_rm_7_a_tie_model_goes_on_from_the_one_stored_and_leaves_with_its_ties(world: Any) -> None:
    pairs = world.write("some_ties.jsonl", records("preference", size=60, ties=0.8))
    ties = {**REWARD, "data.path": pairs, "data.ties": "davidson"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Converting a tensor with requires_grad=True")
        first = world.fit({**ties, "trainer.max_epochs": 2})

    def stored(run: Any) -> Any:
        config = AutoModelForSequenceClassification.from_pretrained(run.path / "model").config
        return getattr(config, "tie_model", None)

    module = world.ready({**ties, "model.model": str(first.path)})
    assert float(module.free_tie_parameter) == pytest.approx(stored(first)["parameter"])
    assert stored(first)["parameter"] > TIE_MODELS["davidson"].start + 0.05
    other = world.ready({**ties, "model.model": str(first.path), "data.ties": "rao_kupper"})
    assert float(TIE_MODELS["rao_kupper"].from_free(other.free_tie_parameter)) == pytest.approx(0.1)
    again = world.fit({**ties, "model.model": str(first.path), "data.ties": "drop", "trainer.max_steps": 1})
    assert stored(again) is None


def test_the_parameter_of_ties_does_not_decay(world: Any) -> None:
    runs = [
        world.fit({**REWARD, "data.ties": "davidson", "model.weight_decay": decay, "trainer.max_steps": 2}).rows
        for decay in (0.0, 0.5)
    ]
    first, second = ([row["ties/parameter"] for row in rows if "ties/parameter" in row] for rows in runs)
    assert second[1] == first[1] != first[0]  # of the second step, before weights that did decay act on it


def test_rm_7_ties_are_counted_and_need_a_pairwise_loss(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tied = world.write(
        "all_tied.jsonl", [{**row, "tie": True} for row in records("preference", size=8, strength=False)]
    )
    run = world.fit({**REWARD, "data.path": tied}, code=2)
    assert "its answers tie" in capsys.readouterr().err
    run = world.fit({**REWARD, "data.ties": "davidson", "model.objective": "plackett_luce"}, code=2)
    said = capsys.readouterr().err
    assert "data.ties is davidson, which RewardModule cannot learn here: give drop, soft" in said
    assert not run.path.exists()


SCORED: dict[str, Any] = {
    **{**REWARD, "data.path": "@scored.jsonl", "data.val_path": "@scored.jsonl", "data.batch_size": 16},
    **{"model.learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def scores_file(world: Any) -> list[dict[str, Any]]:
    """Scores far from mean 0 and deviation 1; what is learnt is evaluated on the same records."""
    rows = [{**row, "score": 50 + 10 * row["score"]} for row in records("scored", size=200, temperature=0.1)]
    world.write("scored.jsonl", rows)
    return rows


@pytest.mark.parametrize("objective", ["squared_error", "huber"])
def test_regression_predicts_in_the_unit_of_the_scores(
    world: Any, scores_file: list[dict[str, Any]], objective: str
) -> None:
    run = world.fit({**SCORED, "model.objective": objective, "trainer.max_epochs": 6})
    target = torch.tensor([row["score"] for row in scores_file])
    found = scored(LearnedReward(str(run.path)), [(row["prompt"], row["completion"]) for row in scores_file])
    last = [row for row in run.rows if "eval/rmse" in row][-1]
    assert last["eval/rmse"] == pytest.approx(float((found - target).pow(2).mean().sqrt()), rel=1e-4)
    assert last["eval/mae"] == pytest.approx(float((found - target).abs().mean()), rel=1e-4)
    assert last["eval/r2"] > 0.2
    assert last["eval/spearman"] > 0.4
    config = AutoModelForSequenceClassification.from_pretrained(run.path / "model").config
    assert config.target_mean == pytest.approx(float(target.mean()), rel=1e-5)
    assert config.target_std == pytest.approx(float(target.std(correction=0)), rel=1e-4)
    assert config.reward_normalize == "target"


def test_a_checkpoint_is_evaluated_in_the_unit_of_the_scores_it_learnt(
    world: Any, scores_file: list[dict[str, Any]]
) -> None:
    options = {**SCORED, "model.objective": "squared_error"}
    run = world.fit({**options, "trainer.max_epochs": 1})
    found = world.validated({**options, "ckpt_path": str(run.path / "checkpoints" / "last.ckpt")})
    last = [row for row in run.rows if "eval/rmse" in row][-1]
    for name in ("loss", "rmse", "mean"):
        assert found[f"eval/{name}"] == pytest.approx(last[f"eval/{name}"], rel=1e-4)


def test_regression_scores_can_also_start_at_zero(world: Any, scores_file: list[dict[str, Any]]) -> None:
    run = world.fit({**SCORED, "model.objective": "squared_error", "model.normalize": "full"})
    found = scored(LearnedReward(str(run.path)), [(row["prompt"], row["completion"]) for row in scores_file])
    assert abs(float(found.mean())) < 1e-4
    assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_scores_train_a_ranking_too_and_comparisons_no_regression(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [{**row, "score": row["score"] + 1} for row in records("scored", size=30)]
    rows = [{**row, "prompt": "the same :"} for row in [*records("scored", size=3), *again]]
    run = world.fit(
        {**REWARD, "data.path": world.write("same.jsonl", rows), "data.val_path": None, "data.val_fraction": 0}
    )
    assert {"kind": "ranked", "kept": 1}.items() <= run.status["data"].items()
    world.fit({**REWARD, "model.objective": "huber"}, code=2)
    assert "a record of kind scored needs prompt and completion and score" in capsys.readouterr().err
    world.fit({**REWARD, "model.objective": "huber", "data.kind": "ranked"}, code=2)
    assert "data.kind is ranked, but the model learns from scored records" in capsys.readouterr().err


def test_aspects_of_one_file_are_trained_apart(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for aspect in ("helpfulness", "safety") for row in records("preference", size=20, aspect=aspect)]
    rankings = [row for aspect in ("helpfulness", "safety") for row in records("ranked", size=10, aspect=aspect)]
    files = {"preference": world.write("both.jsonl", rows), "ranked": world.write("both_ranked.jsonl", rankings)}
    for kind, file in files.items():
        kept = {}
        for aspect in ("helpfulness", "safety"):
            module = world.ready(
                {**REWARD, "data.path": file, "data.aspect": aspect, "data.val_path": None, "data.val_fraction": 0.0}
            )
            kept[aspect] = len(module.trainer.datamodule.datasets["train"])
            assert module.trainer.datamodule.report.dropped[f"not of aspect {aspect}"] == (
                20 if kind == "preference" else 10
            )
        assert kept == {"helpfulness": 20 if kind == "preference" else 10, "safety": 20 if kind == "preference" else 10}


def test_the_playground_ranks_where_it_is_asked_to(world: Any) -> None:
    options = {"data.path": "playground", "data.kind": "ranked", "data.val_path": None}
    module = world.ready({**REWARD, **options, "data.playground": {"size": 6, "k": 5}})
    assert len(module.trainer.datamodule.datasets["train"].collate(range(6), 1.0)["input_ids"]) == 30


def test_reliability_is_drawn_and_kept_up_to_date(world: Any) -> None:
    run = world.fit({**REWARD, "trainer.max_epochs": 1})
    picture = (run.path / "reliability.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert not list(run.path.glob(".reliability*"))


def test_options_out_of_range_are_refused(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    refused = (("label_smoothing", 0.5), ("center_rewards_coefficient", -1.0), ("dropout", 0.1), ("objective", "elo"))
    for option, value in refused:
        run = world.fit({**REWARD, f"model.{option}": value}, code=2)
        assert option in capsys.readouterr().err
        assert not run.path.exists()
