"""Pipelines: order, references, skipping, resuming; the stages' processes are replaced by a recorder."""

import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_align.cli import pipeline
from lightning_align.cli.main import run
from lightning_align.cli.stage_jobs import Children
from lightning_align.errors import UserError
from lightning_align.lab.grid import cell_of, load_grid
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

STAGE = """
model: {class_path: PPOModule, init_args: {model: m, reward: playground}}
data: {class_path: PromptDataModule, init_args: {path: data.txt}}
trainer: {max_steps: 3}
"""


class Recorder:
    """Stands in for the stages' processes: writes what a stage would leave, and remembers the command lines."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.outcome: dict[str, int] = {}
        self.runs = 0
        self.records = "{}"

    def __call__(self, command: list[str]) -> int:
        words = command[3:]
        self.commands.append(words)
        if words[0] == "label":
            (out,) = (Path(word.removeprefix("--out=")) for word in words if word.startswith("--out="))
            code = self.outcome.get("label", 0)
            if code == 0:
                assert out.exists() <= ("--overwrite" in words)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(self.records)
            return code
        if words[0] != "fit":
            (Path("runs/demo") / f"{words[1]}.json").write_text("{}")
            return self.outcome.get(words[0], 0)
        folder = Path(words[words.index("--run.root") + 1]) / words[words.index("--run.name") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        code = self.outcome.get(folder.name, 0)
        self.runs += 1
        status = {"status": "finished" if code == 0 else "interrupted", "created": "t", "updated": str(self.runs)}
        (folder / "run.json").write_text(json.dumps(status))
        return code

    def stages(self) -> list[str]:
        others = {"lab": "picture", "label": "label"}
        names = [others.get(words[0]) or words[words.index("--run.name") + 1] for words in self.commands]
        self.commands.clear()
        return names


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(FILE)
    (tmp_path / "stage.yaml").write_text(STAGE)
    (tmp_path / "data.txt").write_text("hello")
    recorder = Recorder()
    monkeypatch.setattr(Children, "run", lambda self, command, **options: recorder(command))
    return recorder


ARGS = ["--config", "p.yaml"]
ALL = ["pretrain", "sft", "ppo", "picture"]


def test_commands_of_the_stages(recorder: Recorder) -> None:
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


def test_a_lab_stage_can_read_several_runs(recorder: Recorder) -> None:
    both = FILE.replace('lab: overopt, run: "${ppo.run}"', 'lab: frontier, run: ["${ppo.run}", "${sft.run}"], kl: 2')
    Path("p.yaml").write_text(both)
    assert pipeline.main(ARGS) == 0
    assert recorder.commands[-1] == ["lab", "frontier", "runs/demo/ppo", "runs/demo/sft", "--kl=2", "--out=runs/demo"]


def test_finished_stages_are_skipped_until_an_input_changes(recorder: Recorder) -> None:
    pipeline.main(ARGS)
    assert recorder.stages() == ALL
    pipeline.main(ARGS)
    assert recorder.stages() == []
    Path("data.txt").write_text("changed")  # every stage reads it
    pipeline.main(ARGS)
    assert recorder.stages() == ALL
    pipeline.main([*ARGS, "--set", "sft.trainer.max_steps=5"])
    assert recorder.stages() == ["sft", "ppo", "picture"]


def test_lab_stage_runs_again_when_its_result_is_gone(recorder: Recorder) -> None:
    pipeline.main(ARGS)
    recorder.stages()
    Path("runs/demo/overopt.json").unlink()
    pipeline.main(ARGS)
    assert recorder.stages() == ["picture"]


def test_changed_stage_overwrites_and_interrupted_stage_resumes(recorder: Recorder) -> None:
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


def test_failure_stops_with_its_code(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.outcome["sft"] = 2
    assert pipeline.main(ARGS) == 2
    assert recorder.stages() == ["pretrain", "sft"]
    assert "stage 'sft' failed with exit code 2" in capsys.readouterr().err


def test_from_only_and_dry_run(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
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
    recorder: Recorder, content: str, arguments: list[str], message: str
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
    recorder: Recorder, words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        pipeline.main([*ARGS, *words])
    assert str(caught.value) == message
    assert recorder.commands == []


def test_missing_pipeline_file(recorder: Recorder) -> None:
    with pytest.raises(UserError, match=r"pipeline file none.yaml does not exist"):
        pipeline.main(["--config", "none.yaml"])


# ------------------------------------------------------------------ members
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


def test_members_differ_in_their_seed_and_are_read_as_a_list(recorder: Recorder) -> None:
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


def test_members_of_folds_leave_out_another_part_each(recorder: Recorder) -> None:
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
def test_mistakes_with_members(recorder: Recorder, before: str, after: str, message: str) -> None:
    Path("p.yaml").write_text(MEMBERS.replace(before, after))
    with pytest.raises(UserError) as caught:
        pipeline.main(ARGS)
    assert message in str(caught.value)
    assert recorder.commands == []


def test_the_number_of_members_can_be_set(recorder: Recorder) -> None:
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


# ------------------------------------------------------------------ stages that make records
LABELS = """
name: demo
defaults: {seed_everything: 3}
stages:
  pretrain: {config: stage.yaml}
  label:
    label: ai
    judge: ${pretrain.model}
    data: data.txt
    wording: wording.yaml
    cot: true
    clamp: [0.4, 0.6]
    columns: {prompt: question}
  reward: {config: stage.yaml, data.path: "${label.out}"}
"""


@pytest.fixture
def labels(recorder: Recorder) -> Recorder:
    Path("p.yaml").write_text(LABELS)
    Path("wording.yaml").write_text("preamble: Choose.")
    return recorder


def test_a_label_stage_makes_what_later_ones_read(labels: Recorder) -> None:
    assert pipeline.main(ARGS) == 0
    _, label, reward = labels.commands
    assert label == [
        *("label", "ai", "--out=runs/demo/label/records.jsonl", "--seed=3", "--judge=runs/demo/pretrain"),
        *(
            "--data=data.txt",
            "--wording=wording.yaml",
            "--cot",
            "--clamp",
            "0.4",
            "0.6",
            "--columns",
            "prompt=question",
        ),
    ]
    assert "--data.path=runs/demo/label/records.jsonl" in reward


def test_label_stages_are_skipped_until_an_input_changes(labels: Recorder) -> None:
    pipeline.main(ARGS)
    assert labels.stages() == ["pretrain", "label", "reward"]
    pipeline.main(ARGS)
    assert labels.stages() == []
    Path("wording.yaml").write_text("preamble: Choose well.")
    pipeline.main(ARGS)  # the records come out as they were, so the reward model stands
    assert labels.stages() == ["label"]
    labels.records = '{"other": 1}'
    pipeline.main([*ARGS, "--set", "label.limit=5"])
    assert labels.stages() == ["label", "reward"]
    Path("runs/demo/label/records.jsonl").unlink()
    pipeline.main([*ARGS, "--set", "label.limit=5"])
    assert labels.stages() == ["label"]
    pipeline.main([*ARGS, "--set", "label.limit=5", "--only", "label"])
    assert labels.commands[0][-1] == "--overwrite"


def test_an_interrupted_label_stage_goes_on_by_the_same_command(labels: Recorder) -> None:
    labels.outcome["label"] = 130
    assert pipeline.main(ARGS) == 130
    before = labels.commands[-1]
    assert labels.stages() == ["pretrain", "label"]
    labels.outcome.clear()
    assert pipeline.main(ARGS) == 0
    assert labels.commands[0] == before
    assert labels.stages() == ["label", "reward"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("cot: true", "cott: true", "stage 'label': unknown option --cott; did you mean '--cot'?"),
        ("label: ai", "label: aii", "stage 'label': unknown label command 'aii'"),
        ("clamp: [0.4, 0.6]", "clamp: [0.6, 0.4]", "stage 'label': labels are clamped to 0.6 and 0.4"),
        ("cot: true", "limit: 0", "stage 'label': --limit is 0: give at least 1"),
        ("wording: wording.yaml", "wording: none.yaml", "stage 'label': wording none.yaml: there is no such file"),
        ("    data: data.txt\n", "", "stage 'label': the following arguments are required: --data"),
        ("label: ai", "label: revise", "stage 'label': the following arguments are required: --model, --constitution"),
        ("judge: ${pretrain.model}", "judge: http://host/v1", "write http://host:port/v1#model-name"),
        ("${label.out}", "${label.model}", "${label.model} is not known; use ${label.out}"),
        ("${label.out}", "${pretrain.out}", "${pretrain.out} is not known; use ${pretrain.model} or ${pretrain.run}"),
        ("label: ai", "label: ai\n    lab: overopt", "needs either 'config'"),
        ("label: ai", "label: ai\n    members: 2", "has members, which are for stages with a 'config'"),
    ],
)
def test_mistakes_in_label_stages(labels: Recorder, before: str, after: str, message: str) -> None:
    assert before in LABELS
    Path("p.yaml").write_text(LABELS.replace(before, after))
    with pytest.raises(UserError) as caught:
        pipeline.main(ARGS)
    assert message in str(caught.value)
    assert labels.commands == []


def test_a_stage_alone_needs_the_records_it_reads(labels: Recorder) -> None:
    with pytest.raises(UserError, match="stage 'reward' needs stage 'label', which has not run"):
        pipeline.main([*ARGS, "--only", "reward"])
    with pytest.raises(UserError, match="stage 'label' needs stage 'pretrain', which has not run"):
        pipeline.main([*ARGS, "--only", "label"])


JUDGE = """
def longer(prompts, first, second):
    return [0.8 if len(a) > len(b) else 0.3 for a, b in zip(first, second)]
"""


def test_a_label_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Children, "run", lambda self, command, **options: run(command[3:]))
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": " a b", "rejected": " c"}) + "\n")
    Path("p.yaml").write_text(
        "name: demo\nstages: {label: {label: ai, judge: 'judge.py:longer', data: pairs.jsonl, orders: given}}"
    )
    assert pipeline.main(ARGS) == 0
    (record,) = Path("runs/demo/label/records.jsonl").read_text().splitlines()
    assert json.loads(record)["chosen"] == " a b"
    assert pipeline.main(ARGS) == 0
    assert "nothing has changed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["ensemble", "llama2", "rlaif", "constitutional_rl"])
def test_the_playgrounds_own_pipelines_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert pipeline.main(["--config", f"configs/playground/{name}.yaml", "--run.root", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {"ensemble": 10, "llama2": 8, "rlaif": 8, "constitutional_rl": 7}[name]
    for line in lines:
        if "--model.reward=" in line:
            spec = line.partition("--model.reward=")[2].split(" --")[0]
            assert parse_reward(json.loads(spec) if spec.startswith("{") else spec)


# ---------------------------------------------------------------------------------------------------------- axes
SWEEP = """
name: demo
axes:
  seed: [0, 1]
  size: {small: "${small.model}", large: "${large.model}"}
stages:
  small: {config: stage.yaml}
  large: {config: stage.yaml}
  reward:
    config: stage.yaml
    model.model: ${axes.size}
    seed_everything: ${axes.seed}
  control: {config: stage.yaml, seed_everything: "${axes.seed}"}
  ppo:
    config: stage.yaml
    model.model: ${control.model}
    model.reward: ${reward.model}
  last:
    config: stage.yaml
    model.model: ${axes.size}
    model.reward: {rm: {source: "${ppo.models}", combine: mean}}
  picture: {lab: overopt, run: "${pipeline.run}", out: "${pipeline.run}"}
"""


@pytest.fixture
def sweep(recorder: Recorder) -> Recorder:
    Path("p.yaml").write_text(SWEEP)
    return recorder


def test_a_stage_runs_once_for_every_combination_of_what_it_depends_on(sweep: Recorder) -> None:
    assert pipeline.main(ARGS) == 0
    fits = [words for words in sweep.commands if words[0] == "fit"]
    assert fits[0][3:7:2] == ["--run.root", "--run.name"]
    options = {f"{words[4]}/{words[6]}": words[7:] for words in fits}
    assert options == {
        "runs/demo/small": [],
        "runs/demo/large": [],
        **{
            f"runs/demo/reward/seed={seed},size={size}": [
                f"--model.model=runs/demo/{size}",
                f"--seed_everything={seed}",
            ]
            for seed in (0, 1)
            for size in ("small", "large")
        },
        **{f"runs/demo/control/seed={seed}": [f"--seed_everything={seed}"] for seed in (0, 1)},
        **{
            f"runs/demo/ppo/seed={seed},size={size}": [
                f"--model.model=runs/demo/control/seed={seed}",
                f"--model.reward=runs/demo/reward/seed={seed},size={size}",
            ]
            for seed in (0, 1)
            for size in ("small", "large")
        },
        **{
            f"runs/demo/last/size={size}": [
                f"--model.model=runs/demo/{size}",
                "--model.reward="
                + json.dumps(
                    {"rm": {"source": [f"runs/demo/ppo/seed={i},size={size}" for i in (0, 1)], "combine": "mean"}}
                ),
            ]
            for size in ("small", "large")
        },
    }


def test_the_grid_knows_the_labels_of_its_runs(sweep: Recorder) -> None:
    pipeline.main(ARGS)
    cells = load_grid(Path("runs/demo"))
    assert len(cells) == 14
    (cell,) = [cell for cell in cells if cell.run == Path("runs/demo/ppo/seed=1,size=small")]
    assert (cell.stage, cell.axes, cell.method) == ("ppo", {"seed": "1", "size": "small"}, "ppo size=small")
    again = cell_of(cell.run)
    assert again is not None
    assert (again.stage, again.axes) == (cell.stage, cell.axes)
    assert cell_of(Path("runs/demo/small")) is None


def test_axes_can_be_narrowed_and_widened(sweep: Recorder) -> None:
    pipeline.main([*ARGS, "--set", "axes.seed=[1]", "--only", "control"])
    assert sweep.stages() == ["seed=1"]
    pipeline.main(ARGS)
    assert sweep.stages().count("seed=1") == 0


def test_a_cell_that_fails_takes_only_those_with_it_that_need_it(
    sweep: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.outcome["seed=0"] = 3
    assert pipeline.main(ARGS) == 3
    names = sweep.stages()
    assert names.count("seed=1,size=small") == names.count("seed=1,size=large") == 2
    assert names.count("seed=0,size=small") == 1  # the reward, which needs no control
    assert "size=small" not in names
    told = capsys.readouterr().err
    assert "stage 'ppo/seed=0,size=small' is left out: 'control/seed=0' failed" in told
    sweep.outcome.clear()
    assert pipeline.main(ARGS) == 0
    again = sweep.stages()
    assert again.count("seed=1,size=small") == 0
    assert again.count("seed=0,size=small") == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seed: [0, 1]", "seed: 3", "axis 'seed' is 3: give a list of values"),
        ("seed: [0, 1]", "seed: [0, 0]", "axis 'seed' has a value twice"),
        ("seed: [0, 1]", "seed: [a b]", "'a b' cannot be part of a folder's name"),
        ("seed: [0, 1]", "seed: [0, 1]\n  more: [1]", "no stage uses axis 'more'"),
        ("${axes.seed}", "${axes.sead}", "refers to axis 'sead', which is not in 'axes'; did you mean 'seed'"),
        ("{config: stage.yaml, seed", "{config: stage.yaml, members: 2, seed", "has members and depends on axis"),
        ("${ppo.models}", "${small.models}", "needs an earlier stage 'small' with 'members' or axes"),
    ],
)
def test_mistakes_with_axes(sweep: Recorder, before: str, after: str, message: str) -> None:
    assert before in SWEEP
    Path("p.yaml").write_text(SWEEP.replace(before, after))
    with pytest.raises(UserError, match=re.escape(message)):
        pipeline.main(ARGS)
    assert not sweep.commands


def test_a_second_process_is_told_of_the_first(recorder: Recorder) -> None:
    Path("runs/demo").mkdir(parents=True)
    lock = take_lock(Path("runs/demo"))
    assert lock is not None
    with lock, pytest.raises(UserError, match="another process is running the pipeline in runs/demo"):
        pipeline.main(ARGS)
    assert pipeline.main(ARGS) == 0


def test_stages_run_at_the_same_time(sweep: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at most, no stage before what it reads, and the picture last."""
    guard, at_once, most = threading.Lock(), 0, 0
    together = threading.Barrier(2, timeout=60)  # the first two need nothing: neither ends before both run
    ended: list[str] = []

    def work(self: Children, command: list[str], **options: object) -> int:
        nonlocal at_once, most
        with guard:
            at_once += 1
            most = max(most, at_once)
            for word in command:
                if word.startswith(("--model.model=", "--model.reward=")):
                    assert set(re.findall(r"runs/demo/[\w/=,]+", word)) <= set(ended)
        if command[-1] in ("small", "large"):
            together.wait()
        with guard:
            at_once -= 1
            code = sweep(command)
            words = sweep.commands[-1]
            ended.append("picture" if words[0] == "lab" else str(Path(words[4], words[6])))
        return code

    monkeypatch.setattr(Children, "run", work)
    assert pipeline.main([*ARGS, "--jobs", "2"]) == 0
    assert most == 2
    assert len(ended) == 15
    assert ended[-1] == "picture"


def test_parallel_stages_print_to_files_and_signals_reach_all_of_them(tmp_path: Path) -> None:
    sleeper = [
        sys.executable,
        "-c",
        "import os, time; print(os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(60)",
    ]
    logs = [tmp_path / "logs" / f"{i}.log" for i in range(2)]
    with Children() as children, ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(children.run, sleeper, log=log, threads=3) for log in logs]
        while not all(log.is_file() and log.read_text() for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [run.result(timeout=20) for run in runs] == [-signal.SIGTERM] * 2
        assert children.stopping
    assert all(log.read_text().strip() == os.environ.get("OMP_NUM_THREADS", "3") for log in logs)
