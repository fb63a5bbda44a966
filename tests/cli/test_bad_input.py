"""Models, rewards, runs and checkpoints that cannot be used: one line, exit code 2, nothing left behind."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.playground import records
from lightning_align.run.directory import RunDirectory

REWARDS = """
def raises(completions):
    raise ValueError("no\\nway")

def short(completions):
    return [1.0]

def texts(completions):
    return ["good" for _ in completions]

def no_list(completions):
    return None

def asks(answer):
    return [1.0 for _ in answer]

def nothing(completions):
    return [None for _ in completions]

def infinite(completions):
    return [float("inf") for _ in completions]

number = 3
"""
LATE = """
calls = []

def late(completions):
    calls.append(1)
    return [1.0] * (8 if len(calls) < 3 else 1)
"""


# ---------------------------------------------------------------------------------------------------- models
def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: dict[Callable[[Path], None], str] = {
    without_weights: "broken: there is no model.safetensors in broken: restore it",
    pickled_weights: "broken: there is no model.safetensors in broken: the weights there are pickled, which can run "
    "code, and are not read: where you trust them, load them with transformers' from_pretrained and write them with "
    "save_pretrained",
    cut_weights: "broken: the model cannot be loaded: Error while deserializing header: incomplete metadata, file not "
    "fully covered",
    without_tokenizer: "broken: there is no tokenizer (tokenizer.json) in broken",
    broken_tokenizer: "broken/tokenizer.json is damaged: Expecting property name enclosed in double quotes: line 1 "
    "column 2 (char 1)",
    without_config: "broken is neither a run directory nor a model folder: it has no config.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_model_folders(scratch: Any, make_model: Any, make_tokenizer: Any, damage: Callable[[Path], None]) -> None:
    make_model(scratch.root / "broken", tokenizer=make_tokenizer(template=None))
    damage(scratch.root / "broken")
    line = scratch.refused(*scratch.fit_words("sft"), "--run.name=new", "--model.model=broken")
    assert line == DAMAGES[damage]
    if damage is not cut_weights:  # what can be known without loading weights, the plan knows
        assert scratch.refused(*scratch.fit_words("sft"), "--model.model=broken", "--dry-run") == line


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_is_told(
    scratch: Any, make_model: Any, make_tokenizer: Any
) -> None:
    make_model(scratch.root / "endless", tokenizer=make_tokenizer(template=None, eos=None))
    words = [*scratch.fit_words("sft"), "--run.name=new", "--model.model"]
    assert scratch.refused(*words, "endless") == (
        "endless: its tokenizer has no EOS token: a model needs one to end its answers"
    )
    make_model(scratch.root / "padless", tokenizer=make_tokenizer(template=None, pad=None))
    # most pre-trained models have no pad token, so that is said and worked around
    with pytest.warns(UserWarning, match=r"padless: its tokenizer has no pad token; EOS is used .* exported"):
        scratch.done(*words, "padless")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["sft", "--model.model=runs/reward"],
            "runs/reward is a reward model (it has a score head), but a language model",
        ),
        (["ppo", "--model.reward=runs/sft"], "runs/sft has no score head: it is a language model, not a reward model"),
        (["ppo", "--model.gold=runs/sft"], "runs/sft has no score head: it is a language model, not a reward model"),
        (["sft", "--model.model=tiny.jsonl"], "tiny.jsonl: there is no such local folder, and the model hub cannot be"),
        (["sft", "--model.model=none.yaml"], "none.yaml: there is no such architecture file"),
        (["sft", "--model.model=docs"], "docs is neither a run directory nor a model folder: it has no config.json"),
        (["sft", "--model.model=a/b/c"], "a/b/c: there is no such folder, and it cannot be a hub id (owner/name)"),
    ],
)
def test_model_of_another_sort(desk: Any, words: list[str], line: str, offline: None) -> None:
    assert desk.refused(*desk.fit_words(words[0]), "--run.name=new", *words[1:]).startswith(line)
    assert desk.refused(*desk.fit_words(words[0]), "--dry-run", *words[1:]).startswith(line)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("option", ["--model.model", "--data.path", "--model.gold"])
def test_hub_ids_without_a_network_fail_fast(desk: Any, option: str, offline: None) -> None:
    started = time.monotonic()
    words = [*desk.fit_words("ppo"), f"{option}=owner/name"]
    if option == "--data.path":
        words = desk.fit_words_on("owner/name", "ppo")
    line = desk.refused(*words, "--run.name=new")
    assert line.startswith("owner/name: there is no such")
    assert line.endswith("check the spelling, or the network")
    assert time.monotonic() - started < 10


# ---------------------------------------------------------------------------------------------------- rewards
@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("good", "rewards.py has no 'good'; its functions are: raises, short, texts, no_list, asks, nothing, infinite"),
        ("number", "is int, not a function"),
        ("raises", "failed on all 8 completions of a batch: ValueError: no way"),
        ("short", "returned 1 scores for 8 completions: one each is needed"),
        ("texts", "returned 'good' as a score: it must be a number or None"),
        ("no_list", "returned NoneType: it must return a list of numbers"),
        (
            "asks",
            "asks for 'answer', which the records lack; there is: completions, family, finished, is_safety, "
            "prompt, prompts",
        ),
        ("nothing", "gave none of the first 64 completions a finite number: there is nothing to learn from"),
        ("infinite", "gave none of the first 64 completions a finite number: there is nothing to learn from"),
    ],
)
def test_reward_functions(scratch: Any, function: str, line: str) -> None:
    scratch.write("rewards.py", REWARDS)
    words = ["--run.name=new", f"--model.reward=rewards.py:{function}"]
    if "64" in line:  # a reward may have nothing to say of a few
        words += ["--data.batch_size=64", "--model.eval_every=0"]
    said = scratch.refused(*scratch.fit_words("ppo"), *words)
    assert said in (f"reward rewards.py:{function} {line}", f"reward rewards.py:{function}: {line}")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (
            "reward=nowhere.function",
            "reward nowhere.function cannot be imported: No module named 'nowhere'; it is neither",
        ),
        ("reward=none.py:f", "reward none.py:f: there is no file none.py"),
        (
            "reward={a: {source: playground, wieght: 1}}",
            "reward part 'a' has an unknown key 'wieght'; did you mean 'weight'? (it takes source, weight,",
        ),
        (
            "reward={combine: gate, parts: {helpfulness: runs/reward}}",
            "reward combine gate chooses between helpfulness and safety, but no part safety counts",
        ),
        (
            "reward={combine: uow, parts: {a: runs/reward, b: playground}}",
            "reward has combine 'uow'; did you mean 'uwo'? (there are sum, min, mean, uwo, gate)",
        ),
        (
            "reward={combine: min, parts: {a: runs/reward, b: playground}}",
            "reward combine min compares scores of different scales: give standardise true, or assume_comparable",
        ),
        (
            "reward={a: {source: [runs/reward, none/here], combine: uwo}}",
            "none/here",
        ),
        ("reward=[1]", "model.reward is [1]: give a text or a mapping"),
        (
            "gold=playground:helpful",
            "reward playground:helpful is unknown: the playground has gold, helpfulness, safety",
        ),
    ],
)
def test_rewards(desk: Any, option: str, line: str) -> None:
    assert desk.refused(*desk.fit_words("ppo"), "--run.name=new", f"--model.{option}").startswith(line)


def test_a_reward_file_that_is_not_there_is_found_out_by_the_plan(desk: Any) -> None:
    line = "reward none.py:score: there is no file none.py"
    for option in ("reward=none.py:score", "gold=none.py:score", "reward={a: playground, b: none.py:score}"):
        assert desk.refused(*desk.fit_words("ppo"), f"--model.{option}", "--dry-run") == line


# ------------------------------------------------------------------------------------------ runs and checkpoints
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--run.name=sft"], "the run runs/sft exists: give --resume, --overwrite or another --run.name"),
        (["--run.name=.."], "run.name is '..': give a folder name, relative to run.root"),
        (["--run.name=a/../../b"], "run.name is 'a/../../b': give a folder name, relative to run.root"),
        (
            ["--run.name=sft", "--resume", "--overwrite"],
            "--resume and --overwrite contradict each other: give one of them",
        ),
        (
            ["--run.name=new", "--resume"],
            "nothing to resume: runs/new does not exist (check --run.name and --run.root)",
        ),
        (
            ["--run.name=x", "--run.root=tiny.yaml"],
            "cannot create the run directory tiny.yaml/x: tiny.yaml is not a folder",
        ),
        (["--run.name=docs", "--run.root=.", "--overwrite"], "will not overwrite docs: it is not a run directory"),
        (["--run.name=new", "--ckpt_path=lst"], "there is no checkpoint lst; did you mean 'last'?"),
        (
            ["--run.name=new", "--ckpt_path=tiny.yaml"],
            "tiny.yaml is not a whole checkpoint: it is cut off, or something else; give another one",
        ),
        (
            ["--run.name=new", "--ckpt_path=runs/reward/checkpoints/last.ckpt"],
            "the checkpoint is of RewardModule, not of SFTModule: give one of the same method",
        ),
        (
            ["--run.name=sft", "--resume", "--ckpt_path=a.ckpt"],
            "--resume continues from runs/sft/checkpoints/last.ckpt, --ckpt_path is a.ckpt: give one of them",
        ),
        (
            ["--run.name=sft", "--resume", "--model.learning_rate=1"],
            "model.learning_rate is 1.0, but the run began with 0.001 (runs/sft/config.yaml): leave the option out to "
            "resume, or give another --run.name",
        ),
        (
            ["--run.name=sft", "--resume", "--model.model=runs/ppo"],
            "model.model is runs/ppo, but the run began with runs/pretrain (runs/sft/config.yaml): leave",
        ),
        (
            ["--run.name=sft", "--resume", "--data.playground.size=30"],
            "data.playground is {'size': 30}, but the run began with {'size': 60} (runs/sft/config.yaml): leave",
        ),
    ],
)
def test_runs(desk: Any, words: list[str], line: str) -> None:
    assert desk.refused(*desk.fit_words("sft"), *words).startswith(line)


def test_a_run_is_not_resumed_on_another_start_than_it_began_with(scratch: Any) -> None:
    scratch.fit("pretrain", "start")
    scratch.fit("sft", "next", "--model.model=runs/start")
    before = scratch.status("start")["created"]
    scratch.done("fit", "--resume", "--run.name=next", "--trainer.max_steps=4")
    scratch.done("fit", "--resume", "--run.name=start", "--trainer.max_steps=4")  # the same run with another model
    assert scratch.refused("fit", "--resume", "--run.name=next", "--trainer.max_steps=5") == (
        "model.model reads runs/start/model, which has changed since runs/next began "
        "(model.safetensors): restore it to resume, or start another run with another --run.name or --overwrite"
    )
    scratch.fit("pretrain", "start", "--overwrite")
    assert scratch.refused("fit", "--resume", "--run.name=next", "--trainer.max_steps=5") == (
        f"runs/start was replaced since runs/next began: it was created {before}, what lies there now "
        f"{scratch.status('start')['created']}; resuming would mix the two: give --overwrite or another --run.name"
    )


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_run_that_is_going_on_is_left_alone(desk: Any, flag: str) -> None:
    run = RunDirectory(desk.root / "runs", "sft")
    run.hold()
    try:
        assert desk.refused(*desk.fit_words("sft"), "--run.name=sft", flag) == (
            "the run runs/sft is going on in another process: wait for it or stop it, or give another --run.name"
        )
    finally:
        run.close()


@pytest.mark.parametrize(("room", "file"), [(60_000, "checkpoints/last.ckpt"), (100, "")])
def test_a_full_disk(scratch: Any, room: int, file: str) -> None:
    """Files may not grow beyond ``room`` bytes, as if the disk were full; what a run needs to say so is smaller."""
    before, limits = scratch.files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        answer = scratch.run(*scratch.fit_words("sft"), "--run.name=full", "--run.checkpoint_every=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    last = answer.err.splitlines()[-1]
    assert not [path for path in scratch.files() if path.endswith((".tmp", ".new"))]
    if not file:
        assert last == "error: cannot write the run directory runs/full: File too large (change --run.root)"
        assert scratch.files() == before
        return
    assert last == (
        f"error: cannot write runs/full/{file}: File too large; make room or mend this, then go on with --resume"
    )
    assert scratch.status("full")["status"] == "failed"
    scratch.done("fit", "--resume", "--run.name=full")
    assert scratch.metrics("full") == scratch.metrics("sft")


@pytest.mark.parametrize("config", ["sft", "ppo"])
def test_a_run_is_not_resumed_on_other_records_under_the_same_name(scratch: Any, config: str) -> None:
    rows = records("sft" if config == "sft" else "prompt", size=40)
    rows = [{**row, "note": "old"} for row in rows] if config == "ppo" else rows
    scratch.write("own.jsonl", rows)
    further = ["--model.reward=playground"] if config == "ppo" else []
    scratch.done(*scratch.fit_words_on("own.jsonl", config), "--run.name=new", *further)
    longer = "--model.iterations=3" if config == "ppo" else "--trainer.max_steps=4"
    # one record takes the place of another, or a field that only a reward could read changes: as many as before
    changed = [*rows[:5], {**rows[5], "note": "new"} if config == "ppo" else rows[4], *rows[6:]]
    scratch.write("own.jsonl", changed)
    assert scratch.refused("fit", "--resume", "--run.name=new", longer) == (
        "own.jsonl gives other training data than the run began with (its records, or how the tokenizer reads them, "
        "have changed): restore them, or give --overwrite or another --run.name"
    )
    scratch.write("own.jsonl", rows)
    scratch.done("fit", "--resume", "--run.name=new", longer)


def test_a_directory_that_cannot_be_written(desk: Any) -> None:
    """A folder where nobody may write, root included."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    line = desk.refused(*desk.fit_words("sft"), "--run.name=new", "--run.root=/proc/runs")
    assert line.startswith("cannot write the run directory /proc/runs/new: ")
    assert line.endswith("(change --run.root)")


def test_resuming_nothing(desk: Any) -> None:
    assert desk.refused("fit", "--resume", "--run.name=new") == (
        "nothing to resume: runs/new does not exist (check --run.name and --run.root)"
    )
    assert desk.refused("fit", "--resume") == "--resume and --ckpt_path last need --run.name, the run to take up"


def test_checkpoints_that_are_cut_or_of_another_model(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    whole = (scratch.root / "runs" / "sft" / "checkpoints" / "last.ckpt").read_bytes()
    words = [*scratch.fit_words("sft"), "--run.name=new"]
    for kept in (100, len(whole) // 2, len(whole) - 1):
        (scratch.root / "cut.ckpt").write_bytes(whole[:kept])
        assert scratch.refused(*words, "--ckpt_path=cut.ckpt") == (
            "cut.ckpt is not a whole checkpoint: it is cut off, or something else; give another one"
        )
    torch.save({"state_dict": {}}, scratch.root / "foreign.ckpt")
    assert scratch.refused(*words, "--ckpt_path=foreign.ckpt") == (
        "foreign.ckpt is not a checkpoint of this program: it has no method"
    )
    make_model(scratch.root / "other", tokenizer=make_tokenizer(template=None))
    checkpoint = "runs/sft/checkpoints/last.ckpt"
    line = scratch.refused(*words, "--model.model=other", f"--ckpt_path={checkpoint}")
    assert line.startswith(f"{checkpoint} is a checkpoint of another model: ")


def test_a_damaged_run_is_not_resumed(scratch: Any) -> None:
    run = scratch.root / "runs" / "hurt"
    shutil.copytree(scratch.root / "runs" / "sft", run)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert scratch.refused("fit", "--resume", "--run.name=hurt").startswith(
        "runs/hurt/checkpoints/last.ckpt is not a whole checkpoint"
    )


@pytest.mark.parametrize(("config", "batch"), [("sft", "nan_batch_rank0.safetensors"), ("ppo", "nan_batch_rank0.json")])
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_batch(scratch: Any, config: str, batch: str) -> None:
    words = ["--model.learning_rate=1e30", "--model.lr_scheduler_type=constant", "--run.name=nan"]
    words += ["--trainer.max_steps=9"] if config == "sft" else ["--model.iterations=9"]
    answer = scratch.run(*scratch.fit_words(config), *words)
    assert answer.code == 2
    assert f"stopped before the update, the batch is in runs/nan/{batch} (try a lower learning rate" in answer.err
    assert (scratch.root / "runs" / "nan" / batch).is_file()
    status = scratch.status("nan")
    assert status["status"] == "failed"
    assert "the loss is nan" in status["error"]
    assert not (scratch.root / "runs" / "nan" / "model").exists()


def test_a_run_that_fails_later_stays(scratch: Any) -> None:
    """Only what holds nothing is removed: rows that were logged are kept, and the run says that it failed."""
    scratch.write("late.py", LATE)
    words = ["--run.name=late", "--model.reward=late.py:late", "--model.eval_every=0", "--model.iterations=4"]
    answer = scratch.run(*scratch.fit_words("ppo"), *words)
    assert (answer.code, scratch.status("late")["status"]) == (2, "failed")
    assert len(scratch.metrics("late")) == 2


# ---------------------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data.path=none.jsonl"], "error: none.jsonl: there is no such file or folder"),
        (["--model.learning_rate=-1"], "error: model.learning_rate is -1.0: give 0 or more"),
    ],
)
def test_the_same_in_a_process_of_its_own(desk: Any, words: list[str], line: str) -> None:
    argv = desk.fit_words_on("playground", "sft")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_align", *argv, "--run.name=new", *words],
        cwd=desk.root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not (desk.root / "runs" / "new").exists()
