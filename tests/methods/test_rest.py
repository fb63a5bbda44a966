"""ReST: what Grow writes, what each Improve step keeps and learns, where it goes on, and what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.data.readers import load_records
from lightning_align.methods.rest import quantile

SCORES = """
import os
import signal

def length(completions, **_):
    return [float(len(text)) for text in completions]

def dies_at_the_third_batch(completions, **_):
    path = os.environ["REST_CALLS"]
    with open(path, "a") as file:
        file.write(f"{len(completions)}\\n")
    if len(open(path).readlines()) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)

def never_alike(completions, **_):
    return [len(text) + index / 1000 for index, text in enumerate(completions)]

def holes(completions, **_):
    return [None if index % 2 else float(len(text)) for index, text in enumerate(completions)]

def none_of_the_first(completions, **_):
    return [None if index < 4 else float(len(text)) for index, text in enumerate(completions)]

def nothing_new(completions, **_):
    return [float(index % 4) for index in range(len(completions))]
"""


@pytest.fixture
def options(world: Any) -> dict[str, Any]:
    """Two Grow steps of two batches of three prompts with four completions, and two Improve steps each."""
    (world.root / "rest_scores.py").write_text(SCORES)
    return {
        **{"model": "ReSTModule", "model.model": "@sft", "model.reward": "@rest_scores.py:length"},
        **{"model.learning_rate": 1e-3, "model.grow_steps": 2, "model.grow_batches": 2, "model.max_new_tokens": 8},
        **{"model.samples_per_prompt": 4, "model.quantiles": [0.5, 0.75], "model.min_kept": 1, "data.batch_size": 3},
        **{"model.stop_when_worse": False, "data": "PromptDataModule"},
        **{"data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
    }


def grown(run: Any, step: int) -> list[dict[str, Any]]:
    """Rows of a Grow step's file."""
    return [json.loads(line) for line in (run.path / "grown" / f"grow={step:02d}.jsonl").read_text().splitlines()]


def learnt(experience: Any) -> set[tuple[Any, ...]]:
    rollout = experience.rollout
    starts = rollout.prompt_lengths.tolist()
    return {
        (tuple(rollout.input_ids[row, : starts[row]].tolist()), tuple(ids))
        for row, ids in enumerate(rollout.completion_ids())
    }


def test_rest_1_3_5_each_improve_step_keeps_what_is_above_its_threshold(
    world: Any, options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit(options)
    rows = [row for row in run.rows if "rest/threshold" in row]
    assert [(row["rest/grow"], row["rest/improve"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for number, (row, experience) in enumerate(zip(rows, experiences, strict=True)):
        samples = grown(run, 1 + number // 2)
        assert len(samples) == 24
        scores = sorted(sample["score"] for sample in samples)
        level = (0.5, 0.75)[number % 2]
        place = level * 23
        threshold = scores[int(place)] + (place - int(place)) * (scores[int(place) + 1] - scores[int(place)])
        assert row["rest/threshold"] == pytest.approx(threshold)
        kept = [sample for sample in samples if sample["score"] > threshold]
        assert learnt(experience) == {(tuple(s["prompt_ids"]), tuple(s["completion_ids"])) for s in kept}
        assert row["rest/kept_fraction"] == pytest.approx(len(kept) / 24)
        assert row["rest/mean_reward_kept"] == pytest.approx(sum(s["score"] for s in kept) / len(kept))
        assert row["rest/prompts_covered"] == pytest.approx(len({tuple(s["prompt_ids"]) for s in kept}) / 6)
    assert learnt(experiences[1]) < learnt(experiences[0])
    assert rows[1]["rest/mean_reward_kept"] > rows[0]["rest/mean_reward_kept"]
    assert [row["lr"] for row in rows] == pytest.approx([rows[0]["lr"], rows[1]["lr"], rows[2]["lr"], rows[3]["lr"]])


def test_the_learning_rate_falls_within_a_grow_step_and_not_beyond(world: Any, options: dict[str, Any]) -> None:
    run = world.fit({**options, "model.lr_scheduler_type": "constant", "model.warmup_ratio": 0.0})
    assert [row["lr"] for row in run.rows if "lr" in row] == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4])


def test_samples_are_drawn_once_a_grow_step_and_counted(world: Any, options: dict[str, Any]) -> None:
    run = world.fit(options)
    assert [row["episode"] for row in run.rows if "episode" in row] == [24, 24, 48, 48]
    assert [("lab/kl" in row) for row in run.rows if "episode" in row] == [True, False, True, False]
    first, second = ({tuple(row["completion_ids"]) for row in grown(run, step)} for step in (1, 2))
    assert first != second


def test_what_grow_wrote_is_a_file_of_scored_records(world: Any, options: dict[str, Any]) -> None:
    run = world.fit(options)
    loaded = load_records(str(run.path / "grown" / "grow=01.jsonl"), "scored")
    assert [(record["prompt"], record["completion"], record["score"]) for record in loaded[0]] == [
        (row["prompt"], row["completion"], row["score"]) for row in grown(run, 1)
    ]


def test_rest_4_killed_in_grow_it_goes_on_without_drawing_again(
    world: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    world_options = {**options, "model.grow_batches": 4, "model.eval_every": 0}
    whole = world.fork(world_options)
    killed = {**world_options, "model.reward": "@rest_scores.py:dies_at_the_third_batch"}
    script = world.root / "rest_scores.py"
    script.write_text(SCORES.replace('os.environ["REST_CALLS"]', repr(str(calls))))
    first = world.fork(killed, name="rest_killed", code=-9)
    assert len(grown(first, 1)) == 24  # of 48: two batches are there, and no half one
    again = world.fork(killed, "--resume", name="rest_killed")
    for step in (1, 2):
        assert grown(again, step) == grown(whole, step)
    assert (again.path / "model" / "model.safetensors").read_bytes() == (
        whole.path / "model" / "model.safetensors"
    ).read_bytes()
    assert again.rows == whole.rows
    # of the first Grow step two batches before, the one that was lost, and two after; four of the second
    assert calls.read_text().split() == ["12"] * 9


def test_rest_4_stopped_in_improve_it_goes_on_from_the_file(world: Any, options: dict[str, Any]) -> None:
    stopped = world.fork(options, stop_at=1, code=130, name="rest_improve")
    file = stopped.path / "grown" / "grow=01.jsonl"
    whole = file.read_bytes()
    file.unlink()
    world.fork(options, "--resume", name="rest_improve", code=2)
    assert "grow=01.jsonl lacks samples that the run has learnt from" in world.log(stopped)
    file.write_bytes(whole)
    world.fork(options, "--resume", name="rest_improve")
    assert file.read_bytes() == whole


def test_rest_7_rest_em_begins_each_grow_step_with_the_base_and_keeps_few_of_a_prompt(
    world: Any, options: dict[str, Any], experiences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_align.methods.imitation import ImitationModule
    from lightning_align.methods.rest import ReSTModule

    seen: list[dict[str, torch.Tensor]] = []
    drew: list[dict[str, torch.Tensor]] = []
    went: list[dict[str, torch.Tensor]] = []
    collect, draw, learn = ReSTModule.collect, ReSTModule.draw_samples, ReSTModule.learn

    def now(self: Any) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.trainable().items()}

    def watched(self: Any, batch: Any) -> Any:
        result = collect(self, batch)
        seen.append(now(self))
        return result

    def drawn(self: Any, journal: Any) -> None:
        drew.append(now(self))
        draw(self, journal)

    def learned(self: Any, experience: Any) -> Any:
        result = learn(self, experience)
        went.append(now(self))
        return result

    monkeypatch.setattr(ReSTModule, "collect", watched)
    monkeypatch.setattr(ReSTModule, "draw_samples", drawn)
    monkeypatch.setattr(ReSTModule, "learn", learned)
    assert issubclass(ReSTModule, ImitationModule)
    em = {"model.thresholds": [1.0], "model.init": "base", "model.max_per_prompt": 2, "model.grow_steps": 3}
    run = world.fit({**options, **em})
    start = type(run)(world.root / "sft").weights
    for weights in seen:  # one Improve step for each Grow step
        assert all(torch.equal(weights[name], start[name]) for name in weights if name in start)
    assert len(seen) == 3
    # but what is learnt is drawn from the policy as the step before left it
    for after, weights in zip(went, drew[1:], strict=False):
        assert all(torch.equal(weights[name], after[name]) for name in weights)
        assert not all(torch.equal(weights[name], start[name]) for name in weights if name in start)
    for number, experience in enumerate(experiences):
        groups = experience.rollout.rows_of_prompts()
        assert max(map(len, groups)) == 2
        samples = grown(run, number + 1)
        for group in groups:
            prompt = experience.rollout.records[group[0]]["prompt"]
            own = sorted((s["score"] for s in samples if s["prompt"] == prompt), reverse=True)
            assert sorted((float(experience.scores[row]) for row in group), reverse=True) == own[: len(group)]


def test_the_previous_weights_are_gone_on_from(
    world: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_align.methods.rest import ReSTModule

    changed: list[bool] = []
    collect = ReSTModule.collect

    def watched(self: Any, batch: Any) -> Any:
        before = [value.detach().clone() for value in self.trainable().values()]
        result = collect(self, batch)
        after = self.trainable().values()
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return result

    monkeypatch.setattr(ReSTModule, "collect", watched)
    world.fit(options)
    assert changed == [False] * 4


def test_rest_8_one_step_that_keeps_the_best_is_rejection_sampling(world: Any, options: dict[str, Any]) -> None:
    common = {**options, "trainer.precision": "64-true", "model.eval_every": 0, "data.path": "@prompt_val.jsonl"}
    common |= {"data.batch_size": 5, "model.samples_per_prompt": 4}
    common["model.reward"] = "@rest_scores.py:never_alike"
    rest = {"model.grow_steps": 1, "model.grow_batches": 1, "model.quantiles": [0.99], "model.scope": "per_prompt"}
    grow = ("grow_steps", "grow_batches", "quantiles", "min_kept", "stop_when_worse")
    other = {name: value for name, value in common.items() if name.removeprefix("model.") not in grow}
    other |= {"model": "RejectionSamplingModule", "model.iterations": 1, "model.pool": "last"}
    # the same prompts in both: ReST takes them in another order, so a sample's seed is made to depend on its prompt
    module, rival = world.ready({**common, **rest}), world.ready(other)
    rollout = rival.sample(next(iter(rival.trainer.datamodule.train_dataloader())))
    module.sample = lambda batch: setattr(module, "draws", module.draws + 1) or rollout
    module.grown = None
    chosen, _ = module.collect({})
    expected, _ = rival.experience(rollout)
    assert learnt(chosen) == learnt(expected)
    ours, theirs = (m.minibatch_loss(e, m.divisor(e))[0] for m, e in ((module, chosen), (rival, expected)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_completions_without_a_score_are_above_no_threshold(world: Any, options: dict[str, Any]) -> None:
    run = world.fit({**options, "model.reward": "@rest_scores.py:holes", "model.quantiles": [0.0, 0.5]})
    samples = grown(run, 1)
    assert [sample["score"] is None for sample in samples] == [bool(i % 2) for i in range(24)]
    row = next(row for row in run.rows if row.get("rest/improve") == 1)
    known = [sample["score"] for sample in samples if sample["score"] is not None]
    assert row["rest/threshold"] == min(known)
    assert row["rest/kept_fraction"] == pytest.approx(sum(score > min(known) for score in known) / 24)


def test_a_prompt_without_any_score_has_no_threshold(world: Any, options: dict[str, Any]) -> None:
    changes = {"model.reward": "@rest_scores.py:none_of_the_first", "model.scope": "per_prompt"}
    run = world.fit({**options, **changes})
    rows = [row for row in run.rows if "rest/kept_fraction" in row]
    assert len(rows) == 4
    assert all(row["rest/threshold"] == row["rest/threshold"] for row in rows)


def test_where_grow_steps_end_early_the_last_policy_is_evaluated(world: Any, options: dict[str, Any]) -> None:
    changes = {"model.reward": "@rest_scores.py:nothing_new", "model.min_kept": 10, "model.quantiles": [0.3, 0.6]}
    run = world.fit({**options, **changes, "model.grow_steps": 1, "model.eval_every": 2})
    assert [row["step"] for row in run.rows if "eval/lab/proxy" in row] == [0, 1]


def test_too_few_for_the_next_step_end_the_grow_step(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model.reward": "@rest_scores.py:nothing_new", "model.min_kept": 10, "model.quantiles": [0.3, 0.6]}
    run = world.fit({**options, **changes})
    assert [(row["rest/grow"], row["rest/improve"]) for row in run.rows if "rest/grow" in row] == [(1, 1), (2, 1)]
    assert "Grow step 1 ends after 1 Improve steps: the next would keep 6 samples, fewer than model.min_kept, 10" in (
        capsys.readouterr().err
    )


def test_nothing_above_the_first_threshold_is_one_line_with_the_scores(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world.fit({**options, "model.thresholds": [1e6]}, code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "nothing of Grow step 1 is above the first threshold, 1e+06 (scores: least" in said


def test_where_the_held_out_reward_does_not_rise_the_best_weights_are_gone_on_from_and_exported(
    world: Any, options: dict[str, Any]
) -> None:
    # a learning rate that ruins the policy: no Improve step is better than the start
    ruin = {"model.stop_when_worse": True, "model.learning_rate": 3.0, "model.lr_scheduler_type": "constant"}
    run = world.fit({**options, **ruin, "model.reward": "playground", "model.quantiles": [0.1, 0.2]})
    assert [(row["rest/grow"], row["rest/improve"]) for row in run.rows if "rest/grow" in row] == [(1, 1), (2, 1)]
    start = type(run)(world.root / "sft").weights
    assert all(torch.equal(value, start[name]) for name, value in run.weights.items())
    assert not torch.equal(run.checkpoint()["state_dict"]["model.model.norm.weight"], start["model.norm.weight"])


def test_a_loss_of_pairs_sets_the_best_that_is_kept_against_the_worst(
    world: Any, options: dict[str, Any], experiences: list[Any]
) -> None:
    run = world.fit({**options, "model.loss": "sigmoid", "model.beta": 0.5})
    for number, (experience, row) in enumerate(
        zip(experiences, [row for row in run.rows if "rest/threshold" in row], strict=True)
    ):
        samples = grown(run, 1 + number // 2)
        expected = []
        for start in range(0, 24, 4):
            group = samples[start : start + 4]
            best, worst = (pick(group, key=lambda sample: sample["score"]) for pick in (max, min))
            if best["score"] > worst["score"] and best["score"] > row["rest/threshold"]:
                expected += [best["completion_ids"], worst["completion_ids"]]
        assert experience.rollout.completion_ids() == expected
    first, second = (row for row in run.rows if row.get("rest/grow") == 1)
    # reference and policy are the same before the first step: ln 2, and then the margins rise
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert second["rewards/margins"] > first["rewards/margins"]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.99])
def test_quantile_is_torchs(count: int, level: float) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    assert quantile(values, level) == pytest.approx(float(values.quantile(level)))
    assert quantile(values[:0], level) != quantile(values[:0], level)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantiles": [0.5, 0.5]}, "give rising numbers"),
        ({"quantiles": []}, "give rising numbers"),
        ({"quantiles": [0.5, 1.0]}, "model.quantiles is [0.5, 1.0]: give numbers from 0 to below 1"),
        ({"thresholds": [2.0, 1.0]}, "give rising numbers"),
        ({"thresholds": [0.5], "scope": "per_prompt"}, "model.scope is per_prompt: give global with thresholds"),
        ({"grow_batches": 0}, "model.grow_batches is 0"),
        ({"max_per_prompt": 0}, "model.max_per_prompt is 0"),
        ({"stop_when_worse": True, "eval_every": 2}, "model.stop_when_worse is True: give false, or eval_every 1"),
        ({"beta": 0.1}, "model.beta is 0.1, but loss bc does not use it"),
        ({"loss": "orpo"}, "the loss orpo is not of pairs alone"),
        ({"loss": "cloning"}, "unknown model.loss 'cloning'"),
        ({"loss": "ipo", "samples_per_prompt": 1}, "model.samples_per_prompt is 1: give at least 2"),
        ({"loss": "ipo", "micro_batch_size": 1}, "model.micro_batch_size is 1: give at least 2, a pair"),
        ({"loss_temperature": 0.0}, "model.loss_temperature is 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    world: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    world.fit({**options, **{f"model.{name}": value for name, value in changes.items()}}, code=2)
    assert said in capsys.readouterr().err
