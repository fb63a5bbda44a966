"""Axes: one run for every combination of values; and several stages at a time."""

import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli import pipeline
from lightning_align.cli.stage_jobs import Children
from lightning_align.errors import UserError
from lightning_align.lab.grid import cell_of, load_grid

ARGS = ["--config", "p.yaml"]
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
def sweep(recorder: Any) -> Any:
    Path("p.yaml").write_text(SWEEP)
    return recorder


def test_a_stage_runs_once_for_every_combination_of_what_it_depends_on(sweep: Any) -> None:
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


def test_the_grid_knows_the_labels_of_its_runs(sweep: Any) -> None:
    pipeline.main(ARGS)
    cells = load_grid(Path("runs/demo"))
    assert len(cells) == 14
    (cell,) = [cell for cell in cells if cell.run == Path("runs/demo/ppo/seed=1,size=small")]
    assert (cell.stage, cell.axes, cell.method) == ("ppo", {"seed": "1", "size": "small"}, "ppo size=small")
    again = cell_of(cell.run)
    assert again is not None
    assert (again.stage, again.axes) == (cell.stage, cell.axes)
    assert cell_of(Path("runs/demo/small")) is None


def test_axes_can_be_narrowed_and_widened(sweep: Any) -> None:
    pipeline.main([*ARGS, "--set", "axes.seed=[1]", "--only", "control"])
    assert sweep.stages() == ["seed=1"]
    pipeline.main(ARGS)
    assert sweep.stages().count("seed=1") == 0


def test_an_axis_with_names_is_narrowed_by_them(sweep: Any) -> None:
    only = [*ARGS, "--only", "reward"]
    assert pipeline.main([*ARGS, "--set", "axes.size=[small]"]) == 0
    assert not any("large" in name for name in sweep.stages() if "=" in name)
    with pytest.raises(
        UserError, match=r"axes\.size: there is no 'smal'; did you mean 'small'\? \(names: small, large\)"
    ):
        pipeline.main([*only, "--set", "axes.size=[smal]"])
    assert not sweep.commands
    pipeline.main([*only, "--set", "axes.size={other: elsewhere}", "--set", "axes.seed=[0]"])
    assert sweep.stages() == ["seed=0,size=other"]


def test_a_cell_that_fails_takes_only_those_with_it_that_need_it(
    sweep: Any, capsys: pytest.CaptureFixture[str]
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


def test_a_stage_that_is_left_out_stops_no_other_cell(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    both = '  both: {config: stage.yaml, model.reward: {rm: {source: "${control.models}", combine: mean}}}\n'
    more = '  more: {config: stage.yaml, model.model: "${both.model}"}\n'
    Path("p.yaml").write_text(SWEEP.replace("  ppo:\n", f"{both}{more}  ppo:\n"))
    sweep.outcome["seed=0"] = 3
    assert pipeline.main(ARGS) == 3
    names = sweep.stages()
    assert names.count("seed=1,size=small") == names.count("seed=1,size=large") == 2
    told = capsys.readouterr().err
    assert "stage 'both' is left out: 'control/seed=0' failed" in told
    assert "stage 'more' is left out: 'both' is left out" in told


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
def test_mistakes_with_axes(sweep: Any, before: str, after: str, message: str) -> None:
    assert before in SWEEP
    Path("p.yaml").write_text(SWEEP.replace(before, after))
    with pytest.raises(UserError, match=re.escape(message)):
        pipeline.main(ARGS)
    assert not sweep.commands


def test_stages_run_at_the_same_time(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
