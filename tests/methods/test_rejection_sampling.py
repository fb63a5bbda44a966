"""Rejection sampling: what is kept, the pool, what is learnt from it, and what is said where nothing is left."""

from typing import Any

import pytest
import torch

from lightning_align.methods.imitation import said_of_scores

LENGTH = """
def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]
"""
HOLES = """
def holes(prompts, completions, **_):
    return [None if index % 2 else float(index % 8) for index in range(len(prompts))]
"""


@pytest.fixture
def options(world: Any) -> dict[str, Any]:
    """Three iterations of best of four on four prompts."""
    (world.root / "length.py").write_text(LENGTH)
    (world.root / "holes.py").write_text(HOLES)
    return {
        **{"model": "RejectionSamplingModule", "model.model": "@sft", "model.reward": "@length.py:length"},
        **{"model.learning_rate": 1e-3, "model.iterations": 3, "model.max_new_tokens": 8, "model.eval_every": 0},
        **{"model.samples_per_prompt": 4, "data.batch_size": 4},
        **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    }


def drawn(module: Any) -> Any:
    return module.sample(next(iter(module.trainer.datamodule.train_dataloader())))


def test_rs_4_what_is_learnt_from_is_exactly_the_best_of_each_prompt(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    rollout = drawn(module)
    experience, metrics = module.experience(rollout)
    lengths = [len(text) for text in rollout.completions]
    best = [max(range(4 * p, 4 * p + 4), key=lambda row: (lengths[row], -row)) for p in range(4)]
    ids = rollout.completion_ids()
    assert experience.rollout.completion_ids() == [ids[row] for row in best]
    assert experience.scores.tolist() == [lengths[row] for row in best]
    assert metrics["rs/best_score"] == pytest.approx(sum(lengths[row] for row in best) / 4)
    assert metrics["rs/mean_score"] == pytest.approx(sum(lengths) / 16)
    assert metrics["rs/gain"] == pytest.approx(metrics["rs/best_score"] - metrics["rs/mean_score"])
    assert metrics["rs/kept"] == 0.25
    assert metrics["rs/unique_fraction"] == sum(len(set(rollout.completions[i : i + 4])) for i in (0, 4, 8, 12)) / 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"keep": "top_k", "top_k_kept": 1, "pool": "last"}, [2, 6, 10, 14]),
        ({"keep": "top_k", "top_k_kept": 3, "pool": "last"}, [0, 2, 4, 6, 8, 10, 12, 14]),
        ({"keep": "threshold", "threshold": 2.0, "pool": "last"}, [4, 6, 12, 14]),  # strictly above
        ({"min_score": 2.0, "pool": "last"}, [6, 14]),
    ],
)
def test_other_ways_to_keep(world: Any, options: dict[str, Any], changes: dict[str, Any], expected: list[int]) -> None:
    options = {**options, "model.reward": "@holes.py:holes", **{f"model.{name}": v for name, v in changes.items()}}
    module = world.ready(options)
    rollout = drawn(module)
    scores = torch.tensor([float("nan") if row % 2 else float(row % 8) for row in range(16)])
    # scored are 0, 2 | 4, 6 | 0, 2 | 4, 6
    assert module.kept_rows(scores, rollout) == expected


def test_rs_3_the_best_score_of_a_prompt_never_falls(
    world: Any, options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**options, "model.iterations": 6, "data.path": "@prompt_val.jsonl", "data.batch_size": 5})
    best: dict[str, float] = {}
    for experience in experiences:
        for record, score in zip(experience.rollout.records, experience.scores.tolist(), strict=True):
            assert score >= best.get(record["prompt"], -1.0)
            best[record["prompt"]] = score
    assert len(best) == 5
    assert max(row["rs/pool_age"] for row in run.rows) > 0
    pool = run.checkpoint()["method"]["pool"]
    assert sorted(score for ((_, score, _),) in pool.values()) == sorted(best.values())


def test_all_best_learns_each_iterations_best_once(world: Any, options: dict[str, Any], experiences: list[Any]) -> None:
    changes = {"model.iterations": 4, "model.pool": "all_best", "data.path": "@prompt_val.jsonl", "data.batch_size": 5}
    run = world.fit({**options, **changes})
    seen: dict[str, list[tuple[int, ...]]] = {}
    for experience in experiences:
        now: dict[str, list[tuple[int, ...]]] = {}
        for record, ids in zip(experience.rollout.records, experience.rollout.completion_ids(), strict=True):
            now.setdefault(record["prompt"], []).append(tuple(ids))
        for prompt, learnt in now.items():
            earlier = seen.get(prompt, [])
            assert learnt[: len(earlier)] == earlier  # all that was the best of an iteration, in its order
            assert len(learnt) <= len(earlier) + 1  # and the best of this one
            assert len(set(learnt)) == len(learnt)
            seen[prompt] = learnt
    assert max(map(len, seen.values())) > 1
    assert sum(map(len, seen.values())) == sum(map(len, run.checkpoint()["method"]["pool"].values()))


def test_earlier_completions_are_learnt_with_their_own_tokens(world: Any, options: dict[str, Any]) -> None:
    module = world.ready(options)
    rollout = drawn(module)
    first, _ = module.experience(rollout)
    module.iteration = 3
    module.frozen.reward.parts[0].scorer.function = lambda completions, **_: [-1.0] * len(completions)
    second, metrics = module.experience(rollout.select(slice(8, 16)))
    assert second.rollout.completion_ids() == first.rollout.completion_ids()[2:]
    assert second.scores.tolist() == first.scores.tolist()[2:]
    assert metrics["rs/pool_age"] == 3
    for row in range(2):
        length = int(second.rollout.prompt_lengths[row])
        assert torch.equal(second.input_ids[row, :length], rollout.input_ids[8 + 4 * row, :length])


def test_the_loss_is_that_of_supervised_fine_tuning(world: Any, options: dict[str, Any]) -> None:
    module = world.ready({**options, "trainer.precision": "64-true", "model.temperature": 0.7})
    experience, _ = module.experience(drawn(module))
    loss, _ = module.minibatch_loss(experience, experience.completion_mask.sum())
    logps = []
    for row in range(len(experience)):
        ids = experience.input_ids[row][experience.attention_mask[row]]
        start = int(experience.rollout.prompt_lengths[row])
        logp = module.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
        logps.append(logp[start - 1 :])
    torch.testing.assert_close(loss, -torch.cat(logps).mean(), rtol=1e-6, atol=1e-6)


def test_rs_5_without_a_learning_rate_nothing_moves(world: Any, options: dict[str, Any]) -> None:
    run = world.fit({**options, "model.learning_rate": 0.0, "model.samples_per_prompt": 1})
    start = type(run)(world.root / "sft").weights
    assert all(torch.equal(values, start[name]) for name, values in run.weights.items())
    assert all(row["rs/kept"] == 1 and row["rs/gain"] == 0 for row in run.rows)


def test_nothing_left_is_one_line_with_the_scores(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world.fit({**options, "model.min_score": 1e6}, code=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nothing is left of the completions of iteration 1 (scores: least" in last
    assert "lower model.threshold or model.min_score" in last


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.0, 1.0, 2.0, 3.0, float("nan")], "scores: least 0, median 1.5, 90 % below 2.7, best 3"),
        ([-2.5], "scores: least -2.5, median -2.5, 90 % below -2.5, best -2.5"),
        ([float("nan")] * 2, "none has a score"),
        ([], "none has a score"),
    ],
)
def test_how_scores_lie_is_said(scores: list[float], said: str) -> None:
    assert said_of_scores(torch.tensor(scores)) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": 1.0}, "model.threshold is 1.0: give a score with keep threshold alone"),
        ({"keep": "threshold"}, "model.threshold is None: give a score with keep threshold alone"),
        ({"keep": "top_k"}, "model.pool is best_per_prompt: give last, or keep best"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    world.fit({**options, **{f"model.{name}": value for name, value in changes.items()}}, code=2)
    assert said in capsys.readouterr().err
