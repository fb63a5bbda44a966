"""Members of a stage: other seeds, other folds, read as a list."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli import pipeline
from lightning_align.errors import UserError

ARGS = ["--config", "p.yaml"]
MEMBERS = """
name: demo
defaults: {seed_everything: 3}
stages:
  sft: {config: stage.yaml}
  reward: {members: 3, config: stage.yaml, model.model: "${sft.model}"}
  ppo:
    config: stage.yaml
    model.reward: {rm: {source: "${reward.models}", combine: uwo}, first: "${reward_1.model}"}
  picture:
    lab: overopt
    run: ${ppo.run}
    against: ["${ppo.run}", "${sft.run}"]
    aspects: true
    out: ${pipeline.run}
"""


def test_members_differ_in_their_seed_and_are_read_as_a_list(recorder: Any) -> None:
    Path("p.yaml").write_text(MEMBERS)
    assert pipeline.main([*ARGS, "--set", "reward.trainer.max_steps=7"]) == 0
    _, *members, ppo, picture = recorder.commands
    assert [words[words.index("--run.name") + 1] for words in members] == ["reward_1", "reward_2", "reward_3"]
    for number, words in enumerate(members):
        assert words[-3:] == [
            f"--seed_everything={3 + 1000 * number}",
            "--model.model=runs/demo/sft",
            "--trainer.max_steps=7",
        ]
    (reward,) = (word for word in ppo if word.startswith("--model.reward="))
    assert json.loads(reward.partition("=")[2]) == {
        "rm": {"source": ["runs/demo/reward_1", "runs/demo/reward_2", "runs/demo/reward_3"], "combine": "uwo"},
        "first": "runs/demo/reward_1",
    }
    assert picture[3:] == ["--against=runs/demo/ppo", "--against=runs/demo/sft", "--aspects", "--out=runs/demo"]
    recorder.commands.clear()
    assert pipeline.main([*ARGS, "--set", "reward.trainer.max_steps=7"]) == 0
    assert recorder.commands == []
    (Path("runs/demo/reward_2") / "run.json").write_text(json.dumps({"status": "failed"}))  # of one member alone
    pipeline.main([*ARGS, "--set", "reward.trainer.max_steps=7"])
    assert recorder.stages()[:2] == ["reward_2", "ppo"]


def test_members_of_folds_leave_out_another_part_each(recorder: Any) -> None:
    Path("p.yaml").write_text(MEMBERS.replace("members: 3", "members: 3, folds: true"))
    assert pipeline.main(ARGS) == 0
    _, *members, _, _ = recorder.commands
    for number, words in enumerate(members, 1):
        assert f"--data.leave_out={number}/3" in words
        assert f"--seed_everything={3 + 1000 * (number - 1)}" in words


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("members: 3", "folds: true", "stage 'reward' has folds, which are for stages with 'members'"),
        ("members: 3", "members: 3, folds: 4", "stage 'reward' has folds 4: give true"),
        ("members: 3", "members: 1", "stage 'reward' has members 1: give a number of runs, at least 2"),
        ("members: 3", "members: 3, seed_everything: x", "stage 'reward' has seed_everything 'x': give a whole number"),
        ("${reward.models}", "${sft.models}", "${sft.models} needs an earlier stage 'sft' with 'members'"),
        ("${reward.models}", "${reward.model}", "'reward' has 3 members; use ${reward.models}, or one of them: ${rewa"),
        ("${reward_1.model}", "${reward_4.model}", "refers to 'reward_4', which is not an earlier stage; did you mean"),
        (
            "  reward:",
            "  reward_2: {config: stage.yaml}\n  reward:",
            "stage 'reward' has a member 'reward_2', which is a",
        ),
    ],
)
def test_mistakes_with_members(recorder: Any, before: str, after: str, message: str) -> None:
    Path("p.yaml").write_text(MEMBERS.replace(before, after))
    with pytest.raises(UserError) as caught:
        pipeline.main(ARGS)
    assert message in str(caught.value)
    assert recorder.commands == []


def test_the_number_of_members_can_be_set(recorder: Any) -> None:
    Path("p.yaml").write_text(MEMBERS)
    changes = ["--set", "reward.members=2", "--set", "reward.folds=true", "--set", "reward.trainer.max_steps=7"]
    assert pipeline.main([*ARGS, *changes]) == 0
    assert "--data.leave_out=2/2" in recorder.commands[2]
    assert not any(word.startswith("--members") for words in recorder.commands for word in words)
    assert recorder.stages() == ["sft", "reward_1", "reward_2", "ppo", "picture"]
    for change, message in {
        "reward.members=1": "stage 'reward' has members 1: give a number of runs, at least 2",
        "picture.members=2": "stage 'picture' has members, which are for stages with a 'config'",
        "reward_1.trainer.max_steps=7": "'reward_1' is a member of stage 'reward', whose members are set together: "
        "give reward.trainer.max_steps=7",
        "sft_1.trainer.max_steps=7": "there is no stage 'sft_1'; did you mean 'sft'?",
    }.items():
        with pytest.raises(UserError) as caught:
            pipeline.main([*ARGS, "--set", change])
        assert message in str(caught.value)
