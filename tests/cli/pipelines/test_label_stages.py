"""Stages that make records, which later ones read."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli import pipeline
from lightning_align.cli.main import run
from lightning_align.cli.stage_jobs import Children
from lightning_align.errors import UserError

ARGS = ["--config", "p.yaml"]
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
def labels(recorder: Any) -> Any:
    Path("p.yaml").write_text(LABELS)
    Path("wording.yaml").write_text("preamble: Choose.")
    return recorder


def test_a_label_stage_makes_what_later_ones_read(labels: Any) -> None:
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


def test_label_stages_are_skipped_until_an_input_changes(labels: Any) -> None:
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


def test_an_interrupted_label_stage_goes_on_by_the_same_command(labels: Any) -> None:
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
def test_mistakes_in_label_stages(labels: Any, before: str, after: str, message: str) -> None:
    assert before in LABELS
    Path("p.yaml").write_text(LABELS.replace(before, after))
    with pytest.raises(UserError) as caught:
        pipeline.main(ARGS)
    assert message in str(caught.value)
    assert labels.commands == []


def test_a_stage_alone_needs_the_records_it_reads(labels: Any) -> None:
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
