"""Online DPO: which samples become pairs, what is learnt from them, and what is left out."""

from typing import Any

import pytest
import torch

from lightning_align.losses.preference import LOSSES, Pairs
from lightning_align.methods.online_pairs import best_and_worst

SCORES = """
def shorter(prompts, first, second):
    return [0.5 if len(a) == len(b) else 0.9 if len(a) < len(b) else 0.1 for a, b in zip(first, second)]

def shown_first(prompts, first, second):
    return [0.8] * len(first)

def silent(prompts, first, second):
    return [None] * len(first)

def length(completions, **_):
    return [float(len(text)) for text in completions]

def holes(completions, **_):
    return [None if i < 3 else float(i % 4 // 2) if i < 8 else 1.0 for i in range(len(completions))]

def alike(completions, **_):
    return [1.0] * len(completions)
"""


@pytest.fixture
def options(world: Any) -> dict[str, Any]:
    """Three iterations on four prompts with four completions each."""
    (world.root / "scores.py").write_text(SCORES)
    return {
        **{"model": "OnlineDPOModule", "model.model": "@sft", "model.reward": "@scores.py:length"},
        **{"model.learning_rate": 1e-3, "model.iterations": 3, "model.max_new_tokens": 8, "model.eval_every": 0},
        **{"model.samples_per_prompt": 4, "data.batch_size": 4, "data": "PromptDataModule"},
        **{"data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    }


def drawn(module: Any) -> Any:
    return module.sample(next(iter(module.trainer.datamodule.train_dataloader())))


def test_pairs_are_the_best_and_the_worst_of_a_prompt(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    rollout = drawn(module)
    experience, metrics = module.experience(rollout)
    lengths = [len(text) for text in rollout.completions]
    groups = [range(4 * p, 4 * p + 4) for p in range(4)]
    expected = []
    for group in groups:
        best, worst = max(group, key=lengths.__getitem__), min(group, key=lengths.__getitem__)
        expected += [best, worst] if lengths[best] > lengths[worst] else []
    ids = rollout.completion_ids()
    assert experience.rollout.completion_ids() == [ids[row] for row in expected]
    assert experience.scores.tolist() == [lengths[row] for row in expected]
    gaps = [lengths[a] - lengths[b] for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert metrics["objective/scores_margin"] == pytest.approx(sum(gaps) / len(gaps))
    assert metrics["pairs/dropped"] == 1 - len(gaps) / 4


def test_ties_and_completions_without_a_score_make_no_pair(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "model.reward": "@scores.py:holes"})
    rollout = drawn(module)
    # scores: none none none 1 | 0 0 1 1 | 1 1 1 1 | 1 1 1 1
    assert best_and_worst(module.scores(module.frozen.reward, rollout).total, rollout) == ([6, 4], 3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "odpo"])
def test_the_loss_is_that_of_the_pairs_own_log_probs(world: Any, options: dict[str, Any], loss_type: str) -> None:
    changes = {"trainer.precision": "64-true", "model.loss_type": loss_type, "model.beta": 0.3}
    module = world.ready({**options, **changes})
    experience, _ = module.experience(drawn(module))
    with torch.no_grad():  # away from the reference
        for parameter in module.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    loss, sums = module.minibatch_loss(experience, module.divisor(experience))
    sides: dict[str, list[list[Any]]] = {"policy": [[], []], "reference": [[], []]}
    for row in range(len(experience)):
        ids = experience.input_ids[row][experience.attention_mask[row]]
        start = int(experience.rollout.prompt_lengths[row])
        for name, network in (("policy", module.model), ("reference", module.frozen.reference)):
            logp = network(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[start - 1 :].sum()
            sides[name][row % 2].append(logp)
    lengths = experience.rollout.completion_lengths.double()
    gap = experience.scores[::2] - experience.scores[1::2]
    policy, reference = ([torch.stack(side) for side in sides[name]] for name in ("policy", "reference"))
    pairs = Pairs(*policy, lengths[::2], lengths[1::2], *reference, torch.zeros(len(gap)).double(), gap.double())
    expected = LOSSES[loss_type](pairs, beta=0.3).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-8)
    accuracies = (policy[0] - reference[0] > policy[1] - reference[1]).double().mean()
    assert float(sums["rewards/accuracies"][0] / sums["rewards/accuracies"][1]) == pytest.approx(float(accuracies))


def test_what_the_loss_is_divided_by_is_the_pairs_of_the_minibatch(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    experience, _ = module.experience(drawn(module))
    for pairs in range(1, len(experience) // 2 + 1):
        assert int(module.divisor(experience.select(range(2 * pairs)))) == pairs
    assert int(module.divisor(experience.select([0, 1]).without_learning())) == 0


def test_cut_off_completions_are_penalised_before_they_are_ordered(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "model.missing_eos_penalty": 1e6, "model.reward": "@scores.py:length"})
    rollout = drawn(module)
    experience, _ = module.experience(rollout)
    cut = [reason == "length" for reason in rollout.finish_reason]
    mixed = [p for p in range(4) if 0 < sum(cut[4 * p : 4 * p + 4]) < 4]
    assert mixed, "some prompt needs both"
    for row, index in enumerate(experience.rollout.prompt_index.tolist()):
        if index in mixed:
            assert (experience.rollout.finish_reason[row] == "length") == (row % 2 == 1)


def test_nothing_is_learnt_where_all_score_alike(world: Any, options: dict[str, Any]) -> None:
    run = world.fit({**options, "model.reward": "@scores.py:alike"})
    start = type(run)(world.root / "sft").weights
    assert all(torch.equal(values, start[name]) for name, values in run.weights.items())
    assert all(row["pairs/dropped"] == 1 for row in run.rows)
    assert all(value == value for row in run.rows for value in row.values())


def test_fewer_pairs_than_minibatches_are_learnt_all_the_same(world: Any, options: dict[str, Any]) -> None:
    changes = {"model.reward": "@scores.py:holes", "model.num_mini_batches": 4}  # one pair in an iteration
    run = world.fit({**options, **changes})
    assert [row["pairs/dropped"] for row in run.rows] == [0.75] * 3
    start = type(run)(world.root / "sft").weights
    assert not all(torch.equal(values, start[name]) for name, values in run.weights.items())


def test_what_the_reward_likes_becomes_likelier(world: Any, bandit: dict[str, Any]) -> None:
    options = {**bandit, "model": "OnlineDPOModule", "model.samples_per_prompt": 8, "data.batch_size": 4}
    module = world.fit({**options, "model.iterations": 100, "model.learning_rate": 1e-2, "model.beta": 0.1}).module
    best = module.tokenizer.convert_tokens_to_ids("a")
    with torch.no_grad():
        ids = torch.tensor([module.tokenizer("say")["input_ids"]])
        before, after = (
            float(network(ids).logits[0, -1].softmax(-1)[best]) for network in (module.frozen.reference, module.model)
        )
    assert before < 0.3
    assert after > 0.95


def test_a_judge_orders_pairs_against_the_reward(world: Any, options: dict[str, Any]) -> None:
    judged = {**options, "model.samples_per_prompt": 2, "model.judge": "@scores.py:shorter"}
    module = world.ready(judged)  # the reward likes long completions
    rollout = drawn(module)
    experience, metrics = module.experience(rollout)
    ids, lengths = rollout.completion_ids(), [len(text) for text in rollout.completions]
    expected = []
    for row in range(0, 8, 2):
        if lengths[row] != lengths[row + 1]:
            expected += [ids[row], ids[row + 1]][:: 1 if lengths[row] < lengths[row + 1] else -1]
    assert experience.rollout.completion_ids() == expected
    assert metrics["pairs/dropped"] == 1 - len(expected) / 8
    assert metrics["ai/position_bias"] == 0
    assert metrics["lab/proxy"] == pytest.approx(sum(lengths) / 8)
    loss, sums = module.minibatch_loss(experience, module.divisor(experience))
    (gradient,) = torch.autograd.grad(loss, module.model.lm_head.weight)
    with torch.no_grad():
        module.model.lm_head.weight -= 1e-3 * gradient / gradient.norm()
    # the shorter ones have become likelier beside the longer ones
    after = module.minibatch_loss(experience, module.divisor(experience))[1]["rewards/margins"]
    assert float(after[0]) > float(sums["rewards/margins"][0])


@pytest.mark.parametrize("judge", ["shown_first", "silent"])
def test_a_judge_that_decides_nothing_teaches_nothing(world: Any, options: dict[str, Any], judge: str) -> None:
    run = world.fit({**options, "model.samples_per_prompt": 2, "model.judge": f"@scores.py:{judge}"})
    start = type(run)(world.root / "sft").weights
    assert all(torch.equal(values, start[name]) for name, values in run.weights.items())
    assert all(row["pairs/dropped"] == 1 for row in run.rows)


def test_a_language_model_judges(world: Any, options: dict[str, Any]) -> None:
    judge = {"model.samples_per_prompt": 2, "model.judge": "@pretrain", "model.judge_wording": "playground"}
    run = world.fit({**options, **judge})
    assert all(0 < row["ai/mass"] < 1 and 0.5 <= row["ai/mean_confidence"] <= 1 for row in run.rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_type": "kto"}, "the loss kto is not of pairs alone"),
        ({"loss_type": "orpo"}, "the loss orpo is not of pairs alone"),
        ({"loss_type": "sigmoyd"}, "did you mean"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "loss_type ipo does not use it"),
        ({"samples_per_prompt": 1}, "model.samples_per_prompt is 1: give at least 2"),
        ({"micro_batch_size": 1}, "model.micro_batch_size is 1: give at least 2, a pair"),
        ({"judge": "@scores.py:shorter"}, "model.samples_per_prompt is 4: give 2 with a judge"),
        ({"judge": "@nowhere.py:shorter", "samples_per_prompt": 2}, "there is no file"),
        ({"missing_eos_penalty": -1.0}, "above 0: it is subtracted"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    world.fit({**options, **{f"model.{name}": value for name, value in changes.items()}}, code=2)
    assert said in capsys.readouterr().err
