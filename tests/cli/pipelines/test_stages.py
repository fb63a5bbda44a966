"""Stages of a pipeline: order, references, skipping, resuming; one process in a folder."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli import pipeline
from lightning_align.errors import UserError
from lightning_align.rewards.build import parse_reward
from lightning_align.run.lock import take_lock

FILE = """
name: demo
defaults: {seed_everything: 0}
stages:
  pretrain: {config: stage.yaml}
  sft:
    config: stage.yaml
    model: {model: "${pretrain.model}"}
  ppo:
    config: stage.yaml
    model.model: ${sft.model}
    model.reward: {gold: {source: playground, weight: 1.0}}
  picture: {lab: overopt, run: "${ppo.run}", out: "${pipeline.run}"}
"""

ARGS = ["--config", "p.yaml"]
ALL = ["pretrain", "sft", "ppo", "picture"]


@pytest.fixture(autouse=True)
def file(recorder: Any) -> None:
    Path("p.yaml").write_text(FILE)


def test_commands_of_the_stages(recorder: Any) -> None:
    assert pipeline.main(ARGS) == 0
    pretrain, sft, ppo, picture = recorder.commands
    assert pretrain == [
        "fit",
        "--config",
        "stage.yaml",
        "--run.root",
        "runs/demo",
        "--run.name",
        "pretrain",
        "--seed_everything=0",
    ]
    assert sft[-2:] == ["--seed_everything=0", "--model.model=runs/demo/pretrain"]
    assert ppo[-2:] == [
        "--model.model=runs/demo/sft",
        '--model.reward={"gold": {"source": "playground", "weight": 1.0}}',
    ]
    assert picture == ["lab", "overopt", "runs/demo/ppo", "--out=runs/demo"]


def test_a_lab_stage_can_read_several_runs(recorder: Any) -> None:
    both = FILE.replace('lab: overopt, run: "${ppo.run}"', 'lab: frontier, run: ["${ppo.run}", "${sft.run}"], kl: 2')
    Path("p.yaml").write_text(both)
    assert pipeline.main(ARGS) == 0
    assert recorder.commands[-1] == ["lab", "frontier", "runs/demo/ppo", "runs/demo/sft", "--kl=2", "--out=runs/demo"]


def test_finished_stages_are_skipped_until_an_input_changes(recorder: Any) -> None:
    pipeline.main(ARGS)
    assert recorder.stages() == ALL
    pipeline.main(ARGS)
    assert recorder.stages() == []
    Path("data.txt").write_text("changed")  # every stage reads it
    pipeline.main(ARGS)
    assert recorder.stages() == ALL
    pipeline.main([*ARGS, "--set", "sft.trainer.max_steps=5"])
    assert recorder.stages() == ["sft", "ppo", "picture"]


def test_a_stage_runs_again_when_its_reward_function_was_edited(recorder: Any) -> None:
    Path("rewards.py").write_text("def words(completions):\n    return [1.0]\n")
    words = [*ARGS, "--set", "ppo.model.reward=rewards.py:words"]
    pipeline.main(words)
    recorder.stages()
    pipeline.main(words)
    assert recorder.stages() == []
    Path("rewards.py").write_text("def words(completions):\n    return [2.0]\n")
    pipeline.main(words)
    assert recorder.stages() == ["ppo", "picture"]


def test_lab_stage_runs_again_when_its_result_is_gone(recorder: Any) -> None:
    pipeline.main(ARGS)
    recorder.stages()
    Path("runs/demo/overopt.json").unlink()
    pipeline.main(ARGS)
    assert recorder.stages() == ["picture"]


def test_changed_stage_overwrites_and_interrupted_stage_resumes(recorder: Any) -> None:
    recorder.outcome["sft"] = 130
    assert pipeline.main(ARGS) == 130
    assert recorder.stages() == ["pretrain", "sft"]
    recorder.outcome.clear()
    assert pipeline.main(ARGS) == 0
    assert recorder.commands[0][-1] == "--resume"
    assert recorder.stages() == ["sft", "ppo", "picture"]
    pipeline.main([*ARGS, "--seed_everything", "1"])
    assert recorder.commands[0][-2:] == ["--seed_everything=1", "--overwrite"]
    assert recorder.stages() == ALL


def test_failure_stops_with_its_code(recorder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.outcome["sft"] = 2
    assert pipeline.main(ARGS) == 2
    assert recorder.stages() == ["pretrain", "sft"]
    assert "stage 'sft' failed with exit code 2" in capsys.readouterr().err


def test_from_only_and_dry_run(recorder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([*ARGS, "--dry-run"]) == 0
    assert recorder.stages() == []
    assert not Path("runs").exists()
    assert "--model.model=runs/demo/pretrain" in capsys.readouterr().out
    pipeline.main(ARGS)
    recorder.stages()
    pipeline.main([*ARGS, "--from", "ppo"])
    assert recorder.stages() == ["ppo", "picture"]
    pipeline.main([*ARGS, "--only", "sft"])
    assert recorder.stages() == ["sft"]
    pipeline.main(ARGS)  # sft is another run now, so what reads it is stale
    assert recorder.stages() == ["ppo", "picture"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("stages: {a: {config: none.yaml}}", [], "config file none.yaml does not exist"),
        ("stages: {a: {x: 1}}", [], "needs either 'config'"),
        (
            "stages: {a: {config: stage.yaml, m: '${b.model}'}, b: {config: stage.yaml}}",
            [],
            "refers to 'b', which is not an earlier",
        ),
        ("stages: {a: {config: stage.yaml, m: '${a.weights}'}}", [], r"use \$\{a.model\}"),
        ("stages: {a: {lab: overopt}}", [], "needs 'run'"),
        ("stages: {a: {lab: frontier, run: [x, y]}}", [], "and 'out', the folder to write to"),
        ("stages: {a: {lab: frontier, run: [], out: x}}", [], "needs a run in it"),
        ("stage: {a: {config: stage.yaml}}", [], "needs a mapping 'stages'"),
        ("stages: {a: {config: stage.yaml}}\nnam: x", [], "did you mean 'name'"),
        ("stages: [", [], "cannot read the pipeline file"),
        (FILE, ["--from", "sftt"], "no stage 'sftt'; did you mean 'sft'"),
        (FILE, ["--set", "sft=1"], "expected STAGE.OPTION=VALUE"),
        (FILE, ["--set", "rm.model.x=1"], "no stage 'rm'"),
        (FILE, ["--zzz"], r"unknown option --zzz \(see"),
    ],
)
def test_bad_pipelines_are_refused_before_anything_runs(
    recorder: Any, content: str, arguments: list[str], message: str
) -> None:
    Path("p.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        pipeline.main([*ARGS, *arguments])
    assert recorder.stages() == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "ppo.kl_coef=0.1"], "stage 'ppo': unknown option --kl_coef=0.1; did you mean '--model.kl_coef'?"),
        (["--only", "ppo"], "stage 'ppo' needs stage 'sft', which has not run (runs/demo/sft): run that first"),
    ],
)
def test_what_a_later_stage_would_refuse_is_said_before_the_first_runs(
    recorder: Any, words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        pipeline.main([*ARGS, *words])
    assert str(caught.value) == message
    assert recorder.commands == []


def test_missing_pipeline_file(recorder: Any) -> None:
    with pytest.raises(UserError, match=r"pipeline file none.yaml does not exist"):
        pipeline.main(["--config", "none.yaml"])


def test_a_stage_waits_for_a_process_that_is_in_its_run(recorder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It was left by a pipeline that was killed: without waiting the stage would be refused."""
    folder = Path("runs/demo/ppo")
    folder.mkdir(parents=True)
    lock = take_lock(folder)
    assert lock is not None
    seen: list[bool] = []

    def leave() -> None:
        seen.append("ppo" in recorder.stages())
        lock.close()

    timer = threading.Timer(1.0, leave)
    timer.start()
    assert pipeline.main(ARGS) == 0
    timer.join()
    assert seen == [False]
    assert "ppo waits: runs/demo/ppo is going on in another process" in capsys.readouterr().err
    assert "ppo" in recorder.stages()


def test_a_second_process_is_told_of_the_first(recorder: Any) -> None:
    Path("runs/demo").mkdir(parents=True)
    lock = take_lock(Path("runs/demo"))
    assert lock is not None
    with lock, pytest.raises(UserError, match="another process is running the pipeline in runs/demo"):
        pipeline.main(ARGS)
    assert pipeline.main(ARGS) == 0


@pytest.mark.parametrize("name", ["ensemble", "llama2", "rlaif", "constitutional_rl"])
def test_the_playgrounds_own_pipelines_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert pipeline.main(["--config", f"configs/playground/{name}.yaml", "--run.root", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {"ensemble": 10, "llama2": 8, "rlaif": 8, "constitutional_rl": 7}[name]
    for line in lines:
        if "--model.reward=" in line:
            spec = line.partition("--model.reward=")[2].split(" --")[0]
            assert parse_reward(json.loads(spec) if spec.startswith("{") else spec)
