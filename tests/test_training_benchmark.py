"""The training benchmark runs both sides, times what trains the same, refuses the rest, and writes what it found.

TRL is not here: in its place stands the run that ours just did.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import common, sides, training, training_cases
from benchmarks.sides import OURS, THEIRS, Run
from benchmarks.training_cases import EQUAL, METHODS, UNEQUAL, World, build_world
from benchmarks.training_run import check_same, run_ours

TINY = {"size": 24, "vocabulary": 400, "hidden": 32, "layers": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made of generated text, as where hh is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_cases, "HH", Path("not there"))
        return build_world(tmp_path_factory.mktemp("training"), **TINY)


def run(loss: float, logp: float = -50.0, tokens: Sequence[float] = (10.0, 30.0)) -> Run:
    rows = [{"loss": loss, "logps/chosen": logp, "logps/rejected": logp, "num_tokens": number} for number in tokens]
    steps = [{"step": 1.0, "began": 105.0, "ended": 106.0, "cpu": 4.0}, {"began": 106.0, "ended": 108.0, "cpu": 5.5}]
    return Run(100.0, steps, rows, peak_mib=50.0)


def test_it_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(training_cases, "HH", Path("not there"))
    runs: list[Run] = []
    monkeypatch.setitem(training.SIDES, OURS, lambda *case: runs.append(run_ours(*case)) or runs[-1])
    monkeypatch.setitem(training.SIDES, THEIRS, lambda *_: runs[-1])
    monkeypatch.setattr(sides, "trl_versions", lambda python: {"trl": "none"})
    for name, value in TINY.items():
        monkeypatch.setattr(training, name.upper(), value)
    training.main(["--rounds", "1", "--steps", "3", "--methods", "DPO", "--lengths", UNEQUAL])
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"training.csv", "training.json", "training.png"}
    rows = list(csv.DictReader((folder / "training.csv").open()))
    assert [row["variant"] for row in rows] == [OURS, THEIRS]
    assert all(float(row["samples_per_second"]) > 0 for row in rows)
    assert all(float(row["peak_mib"]) > 100 for row in rows)
    found = json.loads((folder / "training.json").read_text())
    ours, theirs = (side["losses"] for side in found["runs"])
    assert len(ours) == 3
    assert ours == theirs
    assert {"rounds", "batch", "steps_not_timed", "parameters"} <= found["settings"].keys()
    assert {"trl", "processor", "git_commit"} <= found["machine"].keys()
    assert Image.open(folder / "training.png").width == 1400
    assert "generated text" in capsys.readouterr().out


def test_sides_that_train_something_else_are_not_timed() -> None:
    case, method = ("DPO", UNEQUAL), METHODS["DPO"]
    check_same(case, method, run(0.6931), run(0.6931 * 1.0009))
    with pytest.raises(SystemExit, match=r"DPO unequal: loss of the first step is 0\.7 here and 0\.6931 in TRL"):
        check_same(case, method, run(0.7), run(0.6931))
    with pytest.raises(SystemExit, match="logps/chosen of the first step"):  # equal models have the same loss
        check_same(case, method, run(0.6931, logp=-51.0), run(0.6931))
    with pytest.raises(SystemExit, match="loss of the first step is nan"):
        check_same(case, method, run(float("nan")), run(0.6931))
    with pytest.raises(SystemExit, match="30 tokens were seen here and 31 in TRL"):
        check_same(case, method, run(0.6931), run(0.6931, tokens=(10.0, 31.0)))


def test_the_first_steps_are_not_timed() -> None:
    two = run(0.5)
    assert two.timed(1) == (2.0, 1.5)
    side = sides.Side()
    side.add(replace(two, steps=[*two.steps, {"began": 108.0, "ended": 110.0, "cpu": 7.0}]), skipped=2, batch=8)
    assert side.summary()["samples_per_second"] == 4.0
    assert side.summary()["first_step_seconds"] == 6.0
    assert side.summary()["first_step_cpu_seconds"] == 4.0


def test_an_environment_without_trl_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such interpreter"):
        training.main(["--trl-python", str(tmp_path / "python")])
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'PackageNotFoundError: trl' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has no TRL \(PackageNotFoundError: trl\): give --trl-python"):
        training.main(["--trl-python", str(broken)])


def test_a_run_that_fails_stops_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no such thing(.|\n)*failed: nothing is reported"):
        sides.execute(["/bin/sh", "-c", "echo no such thing; exit 3"], tmp_path, 1)


def test_records_are_of_one_length_or_of_very_different_ones(world: World) -> None:
    assert set(world.tokens[EQUAL]) == {training_cases.PROMPT_TOKENS + training_cases.ANSWER_TOKENS}
    lengths = world.tokens[UNEQUAL]
    assert max(lengths) > 3 * min(lengths)
    assert max(lengths) <= training_cases.LONGEST
    rows = [json.loads(line) for line in world.data("KTO", EQUAL).read_text().splitlines()]
    assert {row["label"] for row in rows} == {True, False}
    assert world.data("SFT", EQUAL).read_text().count("completion") == len(rows)


@pytest.mark.skipif(not training_cases.HH.exists(), reason="hh is not there")
def test_real_pairs_share_their_prompt() -> None:
    pairs = training_cases.real_pairs(50)
    assert len(pairs) == 50
    assert all(pair["prompt"].endswith("\n\nAssistant:") and pair["chosen"] != "" for pair in pairs)
