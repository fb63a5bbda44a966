"""``lab frontier`` on real runs: what is measured of checkpoints, going on after a kill, best-of-n, what is refused."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli.lab_measure import MEASURING_LOCK
from lightning_align.lab.measured import read_measured
from lightning_align.lab.runs import find_checkpoints, load_curve
from lightning_align.run.lock import take_lock

PROMPTS = ("--data=prompt.jsonl", "--limit=6", "--num_samples=2", "--max_new_tokens=6", "--gold=playground", "--seed=3")
# does not return once a checkpoint of a run is measured, while there is a file "hold"
HELD = """
import pathlib, time

def words(completions):
    if pathlib.Path("hold").exists() and pathlib.Path("runs/killed/measured.jsonl").exists():
        pathlib.Path("holding").touch()
        time.sleep(600)
    return [float(len(text.split())) for text in completions]
"""
WORDS = "def words(completions):\n    return [float(len(text.split())) for text in completions]\n"


@pytest.fixture(scope="module")
def measured(desk: Any) -> Any:
    """Runs ``seen/ppo`` and ``seen/dpo``, measured with an ensemble of two held-out rewards, and ``out/frontier.*``."""
    desk.write("words.py", WORDS)
    desk.fit("dpo", "seen/dpo", "--run.keep_every=1")
    shutil.copytree(desk.root / "runs" / "ppo", desk.root / "runs" / "seen" / "ppo")
    held = ("--heldout", "runs/reward", "words.py:words")
    runs = ("runs/seen/ppo", "runs/seen/dpo")
    answer = desk.done("lab", "frontier", *runs, "--recompute", *PROMPTS, *held, "--out=out")
    assert "s left" in answer.err
    return desk


def test_every_kept_checkpoint_and_the_start_are_measured(measured: Any) -> None:
    for name in ("ppo", "dpo"):
        run = measured.root / "runs" / "seen" / name
        rows = read_measured(run)
        assert [row["step"] for row in rows] == sorted({0, *find_checkpoints(run)})
        assert len(rows) > 1
        with (run / "measured.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [float(line["kl"]) for line in table] == [row["metrics"]["kl"]["value"] for row in rows]
        assert load_curve(run).source == "measured"
        assert load_curve(run).points[-1].heldout == rows[-1]["metrics"]["heldout"]["value"]
    assert list(find_checkpoints(measured.root / "runs" / "seen" / "dpo")) == [1, 2, 3]


def test_the_start_is_at_no_distance_from_itself_and_the_others_are_not(measured: Any) -> None:
    for name in ("ppo", "dpo"):
        first, *rest = read_measured(measured.root / "runs" / "seen" / name)
        assert first["metrics"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
        assert first["per_prompt"]["kl"] == pytest.approx([0] * 6, abs=1e-9)
        assert all(row["metrics"]["kl"]["value"] > 0 for row in rest)
    one, two = (read_measured(measured.root / "runs" / "seen" / name)[0] for name in ("ppo", "dpo"))
    assert one["per_prompt"]["gold"] == two["per_prompt"]["gold"]  # of the same start on the same seeds


def test_a_checkpoint_has_the_numbers_of_evaluate(measured: Any) -> None:
    run = measured.root / "runs" / "seen" / "ppo"
    for step, checkpoint in find_checkpoints(run).items():
        against = ("--reward=runs/reward", "--against=runs/sft", "--judge=gold", "--out=told.json", "--overwrite")
        measured.done("evaluate", "--model", str(checkpoint.relative_to(measured.root)), *PROMPTS, *against)
        told = json.loads((measured.root / "told.json").read_text())["policies"][0]
        row = next(row for row in read_measured(run) if row["step"] == step)["metrics"]
        assert {"kl", "proxy", "gold", "gold_helpfulness", "gold_safety", "length", "self_bleu"} <= set(told["metrics"])
        for name, estimate in told["metrics"].items():
            assert row[name] == estimate, (step, name)
        assert row["win_rate"]["value"] == told["against"]["win_rate"]["value"]
        assert row["length_controlled_win_rate"]["value"] == told["against"]["length_controlled_win_rate"]["value"]


def test_an_ensemble_judges_by_its_mean_and_a_lower_bound(measured: Any) -> None:
    for row in read_measured(measured.root / "runs" / "seen" / "ppo"):
        for answer in row["answers"]:
            one, two = answer["heldout_1"], answer["heldout_2"]
            assert one == pytest.approx(answer["proxy"], abs=1e-5)  # the same reward model
            assert two == len(answer["completion"].split())
            assert answer["heldout"] == pytest.approx((one + two) / 2, abs=1e-5)
            assert answer["heldout_lower"] == pytest.approx(min(one, two), abs=1e-5)  # mean − deviation, of two


def test_the_page_has_answers_settings_and_nothing_that_runs(measured: Any) -> None:
    page = (measured.root / "out" / "frontier.html").read_text()
    assert "Answers side by side" in page
    assert "prompts_hash" in page
    assert "<script" not in page
    assert (measured.root / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((measured.root / "out" / "frontier.json").read_text())
    assert set(summary["methods"]) == {"ppo", "dpo"}
    assert summary["pareto"]


def test_killed_and_taken_up_again_it_leaves_the_same_files(desk: Any, measured: Any) -> None:
    whole, killed = desk.root / "runs" / "whole", desk.root / "runs" / "killed"
    for run in (whole, killed):
        shutil.copytree(desk.root / "runs" / "seen" / "dpo", run, ignore=shutil.ignore_patterns("measured.*"))
    desk.write("held.py", HELD)
    words = ["--recompute", *PROMPTS, "--reward=held.py:words", "--out=killed_out"]
    desk.done("lab", "frontier", "runs/whole", *words)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_align", "lab", "frontier", "runs/killed", *words]
    log, hold = desk.root / "killed.log", desk.root / "hold"
    hold.touch()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=desk.root, env=environment, stderr=file)
    end = time.monotonic() + 200
    while not (desk.root / "holding").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hold.unlink()
    done = len(read_measured(killed))
    assert done == 1
    with (killed / "measured.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "metr')  # a row that was cut off
    answer = desk.done("lab", "frontier", "runs/killed", *words)
    assert answer.err.count(" step ") == 4 - done  # nothing twice
    for name in ("measured.jsonl", "measured.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    again = desk.done("lab", "frontier", "runs/killed", *words)
    assert " step " not in again.err


def test_other_prompts_or_settings_are_refused(scratch: Any, measured: Any) -> None:
    for name, limit in (("one", 4), ("two", 5)):
        shutil.copytree(scratch.root / "runs" / "dpo", scratch.root / "runs" / name)
        words = (*PROMPTS, f"--limit={limit}", "--reward=words.py:words")
        scratch.done("lab", "frontier", f"runs/{name}", "--recompute", *words, "--out=other_out")
    refused = scratch.refused("lab", "frontier", "runs/one", "runs/two", "--out=out")
    assert refused.startswith(
        "runs/one and runs/two were measured with different prompts (4 of prompt.jsonl, val; 5 of"
    )
    words = ("lab", "frontier", "runs/one", "--recompute", *PROMPTS, "--reward=words.py:words", "--out=other_out")
    assert "measured.jsonl was measured with other prompts, prompts_hash: give --overwrite" in scratch.refused(*words)
    scratch.done(*words, "--overwrite")
    text = (scratch.root / "words.py").read_text()
    scratch.write("words.py", f"{text}\n# another reward\n")
    assert "words.py has changed since runs/one/measured.jsonl was measured: give --overw" in scratch.refused(*words)
    scratch.write("words.py", text)
    scratch.done(*words)
    assert {row["settings"]["prompts"] for row in read_measured(scratch.root / "runs" / "one")} == {6}
    mixed = scratch.refused("lab", "frontier", "runs/one", "runs/ppo", "--out=out")
    assert "runs/one was measured afterwards and runs/ppo was not: give --recompute" in mixed


def test_rows_of_earlier_versions_go_on(scratch: Any, measured: Any) -> None:
    """They did not record what the scorers were."""
    run = scratch.root / "runs" / "earlier"
    shutil.copytree(scratch.root / "runs" / "seen" / "dpo", run)
    rows = [json.loads(line) for line in (run / "measured.jsonl").read_text().splitlines()]
    for row in rows:
        del row["settings"]["scorers"]
        row["fingerprint"] = "of fewer settings"
    (run / "measured.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    held = ("--heldout", "runs/reward", "words.py:words")
    answer = scratch.done("lab", "frontier", "runs/earlier", "--recompute", *PROMPTS, *held, "--out=earlier_out")
    assert answer.err.count(" step ") == 1


def test_one_process_at_a_time_measures_a_run(scratch: Any, measured: Any) -> None:
    run = scratch.root / "runs" / "locked"
    shutil.copytree(scratch.root / "runs" / "dpo", run)
    words = ("lab", "frontier", "runs/locked", "--recompute", *PROMPTS, "--reward=words.py:words")
    lock = take_lock(run, MEASURING_LOCK)
    assert lock is not None
    with lock:
        assert "another process is measuring runs/locked: wait for it" in scratch.refused(*words)
    assert not (run / "measured.jsonl").exists()
    assert "runs/locked is given twice" in scratch.refused(*words[:3], *words[2:])
    scratch.done(*words, "--out=locked_out")
    assert len((run / "measured.jsonl").read_text().splitlines()) == len(read_measured(run))


def test_a_damaged_checkpoint_is_named_before_anything_is_measured(scratch: Any, measured: Any) -> None:
    run = scratch.root / "runs" / "cut"
    shutil.copytree(scratch.root / "runs" / "seen" / "dpo", run)
    words = ("lab", "frontier", "runs/cut", "--recompute", *PROMPTS, "--reward=words.py:words", "--overwrite")
    checkpoint = find_checkpoints(run)[2]
    before = (run / "measured.jsonl").read_bytes()
    for content in (checkpoint.read_bytes()[:-200], b""):
        checkpoint.write_bytes(content)
        refused = scratch.refused(*words)
        assert "step=00002.ckpt is not a whole checkpoint" in refused
        assert "remove the file to go on without it" in refused
    assert (run / "measured.jsonl").read_bytes() == before
    checkpoint.unlink()
    answer = scratch.done(*words, "--out=cut_out")
    assert "runs/cut: 1 of 3 checkpoints of run.keep_every are not there (steps 2)" in answer.err
    assert [row["step"] for row in read_measured(run)] == [0, 1, 3]


def test_runs_of_other_data_are_not_measured_on_their_own_prompts(desk: Any) -> None:
    refused = desk.refused("lab", "frontier", "runs/ppo", "runs/dpo", "--recompute", "--limit=4", "--gold=playground")
    assert "runs/ppo and runs/dpo would be measured with different prompts (4 of prompt.jsonl, val; 4 of" in refused
    assert "--data for prompts" in refused


def test_best_of_n_is_that_of_evaluate_with_the_analytic_kl(scratch: Any, measured: Any) -> None:
    words = [word for word in PROMPTS if not word.startswith("--num_samples")]
    runs = ("runs/seen/ppo", "runs/seen/dpo")
    scratch.done("lab", "frontier", *runs, "--best-of=4", *words, "--reward=words.py:words", "--out=best")
    assert not (scratch.root / "best" / "best_of_2.csv").exists()  # one start, one reward: sampled once
    with (scratch.root / "best" / "best_of.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 4]
    evaluated = ("--num_samples=4", "--reward=words.py:words", "--out=best.json")
    scratch.done("evaluate", "--model", "runs/sft", *words, *evaluated)
    (policy,) = json.loads((scratch.root / "best.json").read_text())["policies"]
    for row, told in zip(rows, policy["best_of"], strict=True):
        n = int(row["step"])
        assert float(row["kl"]) == pytest.approx(math.log(n) - (n - 1) / n)
        for name in ("proxy", "gold"):
            assert float(row[name]) == told[name]["value"]
            assert float(row[f"{name}_se"]) == told[name]["se"]
    with (scratch.root / "best" / "frontier.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == "best-of-n"]
    assert [line["step"] for line in lines] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--limit=3"], "--limit is for measuring: add --recompute, or leave it out"),
        (["--best-of=4", "--heldout=runs/reward"], "--heldout is for measuring: add --recompute"),
        (["--best-of=1"], "--best-of is 1: give 2 or more"),
        (["--recompute", "--limit=0"], "--limit is 0: give 1 or more"),
        (["--recompute", "--source=eval"], "give one of them"),
        (["--recompute", "--judge=heldout"], "--judge heldout: nothing scores that of runs/ppo; give --heldout"),
        (["--recompute", "--data=none.jsonl"], "none.jsonl"),
        (["--source=measured"], "runs/ppo has no measured.csv: lab frontier runs/ppo --recompute makes it"),
    ],
)
def test_what_cannot_be_measured(desk: Any, words: list[str], expected: str) -> None:
    assert expected in desk.refused("lab", "frontier", "runs/ppo", *words)


def test_what_is_no_policy_or_has_no_start(desk: Any, tmp_path: Path) -> None:
    assert "runs/reward is a reward model" in desk.refused("lab", "frontier", "runs/reward", "--recompute")
    assert "runs/pretrain began with random weights" in desk.refused(
        "lab", "frontier", "runs/pretrain", "--recompute", "--data=prompt.jsonl"
    )
    assert "is not a run directory" in desk.refused("lab", "frontier", str(tmp_path), "--recompute")
