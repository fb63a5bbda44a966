"""Real runs that are killed, interrupted and orphaned, and then go on, leave what an undisturbed run leaves.

The children are forked by a driver (see ``tests/methods/fork_driver.py``), where everything is imported already.
"""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_align.lab.runs import find_checkpoints
from lightning_align.playground import records

DRIVER = Path(__file__).parents[1] / "methods" / "fork_driver.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MODEL = """
architecture: llama
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 2
num_attention_heads: 4
max_position_embeddings: 96
tokenizer: {train: {vocab_size: 512, algorithm: words}}
"""
# the third call of a process sleeps, unless it was done before
REWARD = """
import pathlib, time

calls = 0
asleep = pathlib.Path(__file__).with_name("asleep")

def words(completions, **columns):
    return [float(len(text.split())) for text in completions]

def sleepy(completions, **columns):
    global calls
    calls += 1
    if calls == 3 and not asleep.exists():
        asleep.touch()
        time.sleep(100)
    return words(completions)
"""


class Place:
    """A folder with records, a trained start and the driver."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = itertools.count()
        self.driver = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        (root / "model.yaml").write_text(MODEL)
        (root / "reward.py").write_text(REWARD)
        for kind in ("sft", "prompt", "text", "preference"):
            for name, made in ((kind, records(kind, size=18)), (f"{kind}_val", records(kind, split="val", size=4))):
                (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
        always = {
            **{"seed_everything": 0, "run.root": str(root), "run.wandb": "disabled", "run.checkpoint_every": 1},
            **{"trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": False},
        }
        self.sft = {
            **{**always, "model": "SFTModule", "model.model": f"{root}/start", "model.dropout": 0.1},
            **{"model.learning_rate": 1e-3, "data": "SFTDataModule", "data.path": f"{root}/sft.jsonl"},
            **{"data.val_path": f"{root}/sft_val.jsonl", "data.batch_size": 2, "trainer.accumulate_grad_batches": 2},
            **{"trainer.max_epochs": 5, "run.checkpoint_every": 3},
        }
        self.ppo = {
            **{**always, "model": "PPOModule", "model.model": f"{root}/start", "model.learning_rate": 1e-3},
            **{"model.reward": f"{root}/reward.py:words", "model.gold": "playground", "model.iterations": 8},
            **{"model.max_new_tokens": 6, "model.eval_every": 2, "model.num_ppo_epochs": 2},
            **{"model.kl_control": "adaptive", "model.score_scaling": "running", "model.ptx_coef": 0.5},
            **{"model.ptx_path": f"{root}/text.jsonl", "model.ptx_batch_size": 2, "data": "PromptDataModule"},
            **{"data.path": f"{root}/prompt.jsonl", "data.val_path": f"{root}/prompt_val.jsonl", "data.batch_size": 4},
        }
        self.preference = {
            **{**always, "model.model": f"{root}/start", "model.learning_rate": 1e-3, "trainer.max_epochs": 3},
            **{"data": "PreferenceDataModule", "data.path": f"{root}/preference.jsonl"},
            **{"data.val_path": f"{root}/preference_val.jsonl", "data.batch_size": 2},
        }
        start = {**self.sft, "model.model": f"{root}/model.yaml", "trainer.max_epochs": 2, "run.checkpoint_every": 100}
        assert self.run(start, "start")["code"] == 0

    def run(self, options: dict[str, Any], name: str, *flags: str, **request: Any) -> dict[str, Any]:
        """One attempt; what the driver says of it."""
        argv = ["fit", *words({**options, "run.name": name}), *flags]
        request |= {"argv": argv, "log": str(self.root / f"{name}.log")}
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps(request) + "\n")
        self.driver.stdin.flush()
        return json.loads(self.driver.stdout.readline())

    def log(self, name: str) -> str:
        """The end of what a run said."""
        return (self.root / f"{name}.log").read_text()[-3000:]

    def killed_at_random(self, options: dict[str, Any], whole: str, seed: int, kills: int) -> None:
        """``kill -9`` at random moments, resume, compare with the run ``whole``; until it was killed often enough."""
        chance = random.Random(seed)
        seconds = self.run(options, whole)["seconds"]
        done = 0
        while done < kills:
            name = f"{whole}{next(self.names)}"
            code = -signal.SIGKILL
            while code == -signal.SIGKILL:
                limit = {"kill_after": seconds * chance.uniform(0.1, 1.0)} if done < kills else {}
                flags = ["--resume"] if (self.root / name / "run.json").exists() else []
                code = self.run(options, name, *flags, **limit)["code"]
                done += code == -signal.SIGKILL
            assert code == 0, self.log(name)
            self.compare(whole, name)

    def compare(self, whole: str, other: str) -> None:
        """Two runs left the same, the clock aside."""
        first, second = self.root / whole, self.root / other
        assert measured(first) == measured(second)
        for name in ("samples.jsonl", "config.yaml", "model/model.safetensors", "model/tokenizer.json"):
            if (first / name).exists():
                assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert files(first) == files(second)
        for checkpoint in (first / "checkpoints").iterdir():
            one, two = (torch.load(run / "checkpoints" / checkpoint.name, weights_only=True) for run in (first, second))
            assert all(torch.equal(values, two["state_dict"][key]) for key, values in one["state_dict"].items())
        status = json.loads((second / "run.json").read_text())
        assert status["status"] == "finished"


def words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def measured(run: Path) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` as they are written, without what the clock says."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name != "eps" and not name.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def files(run: Path) -> list[str]:
    """Everything in a run directory; a half-written file would show."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def wait(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    torch.set_num_threads(1)
    place = Place(tmp_path_factory.mktemp("resume"))
    yield place
    assert place.driver.stdin is not None
    place.driver.stdin.close()
    place.driver.wait(timeout=60)


def test_ppo_14_killed_ppo_run(place: Place) -> None:
    place.killed_at_random(place.ppo, "ppo", seed=0, kills=4)


def test_pre_5_killed_sft_run(place: Place) -> None:
    place.killed_at_random(place.sft, "sft", seed=1, kills=4)


def test_killed_dpo_run_keeps_its_checkpoints_for_the_lab(place: Place) -> None:
    options = {**place.preference, "model": "DPOModule", "run.keep_every": 5, "trainer.max_epochs": 2}
    place.killed_at_random(options, "dpo_kept", seed=6, kills=2)
    steps = json.loads((place.root / "dpo_kept" / "run.json").read_text())["step"]
    assert list(find_checkpoints(place.root / "dpo_kept")) == list(range(5, steps + 1, 5))
    assert steps >= 15


@pytest.mark.slow
@pytest.mark.parametrize(("method", "every", "seed"), [("ppo", 1, 2), ("ppo", 3, 3), ("sft", 1, 4), ("sft", 3, 5)])
def test_killed_ten_times(place: Place, method: str, every: int, seed: int) -> None:
    options = {**(place.ppo if method == "ppo" else place.sft), "run.checkpoint_every": every}
    place.killed_at_random(options, f"{method}_every{every}_", seed=seed, kills=10)


def die_at_each_replacement(place: Place, options: dict[str, Any], whole: str, calls: Iterable[int]) -> None:
    """Be killed instead of each of these calls that put a file into its place; go on as a user or pipeline would."""
    assert place.run(options, whole)["code"] == 0
    for call in calls:
        name = f"{whole}_died{call}"
        code = place.run(options, name, die_at=call)["code"]
        run = place.root / name
        if run.exists():  # then it can be resumed
            assert (run / "run.json").exists()
        if code == -signal.SIGKILL:
            assert place.run(options, name, *(["--resume"] if run.exists() else []))["code"] == 0, place.log(name)
        place.compare(whole, name)
        if code == 0:
            return


def test_killed_while_the_run_directory_is_made(place: Place) -> None:
    options = {**place.sft, "trainer.max_epochs": 1, "run.checkpoint_every": 100}
    die_at_each_replacement(place, options, "made", (1, 2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_killed_before_every_replacement(place: Place, method: str) -> None:
    options = {**(place.ppo if method == "ppo" else place.sft), "run.checkpoint_every": 2}
    options |= {"model.iterations": 4} if method == "ppo" else {"trainer.max_epochs": 2}
    die_at_each_replacement(place, options, f"{method}_replaced", itertools.count(1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_saves_the_step_and_exits_130(place: Place, number: signal.Signals) -> None:
    name = f"signal{number}"
    last = place.root / name / "checkpoints" / "last.ckpt"
    assert place.run(place.ppo, f"{name}_whole")["code"] == 0
    assert place.run(place.ppo, name, signals=[number], when=str(last))["code"] == 130
    status = json.loads((place.root / name / "run.json").read_text())
    assert status["status"] == "interrupted"
    assert 1 <= status["step"] < 8
    assert torch.load(last, weights_only=True)["method"]["iteration"] == status["step"]
    log = place.log(name)
    assert f"{number.name}: stopping after this step" in log
    assert f"stopped after step {status['step']}; --resume continues" in log
    assert "Traceback" not in log
    assert place.run(place.ppo, name, "--resume")["code"] == 0
    place.compare(f"{name}_whole", name)


def test_a_second_signal_does_not_wait_for_the_step(place: Place) -> None:
    options = {**place.ppo, "model.reward": f"{place.root}/reward.py:sleepy"}
    asleep = place.root / "asleep"
    answer = place.run(options, "twice", signals=[signal.SIGINT, signal.SIGINT], when=str(asleep))
    assert answer["code"] == 130
    assert answer["seconds"] < 60  # the step would have slept for longer
    assert json.loads((place.root / "twice" / "run.json").read_text())["status"] == "interrupted"
    assert "interrupted by SIGINT" in place.log("twice")
    assert place.run(options, "twice", "--resume")["code"] == 0
    assert place.run(options, "twice_whole")["code"] == 0
    place.compare("twice_whole", "twice")


def perturb(folder: Path) -> None:
    """Other weights of the same names, shapes and file sizes."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = min(name for name, values in weights.items() if values.ndim == 2)
    weights[name][-1, -1] += 1.0
    save_file(weights, path, metadata={"format": "pt"})


def refused_until_restored(place: Place, options: dict[str, Any], name: str, option: str, folder: Path) -> None:
    """A stopped run goes on only with the model that it began with; then as if nothing had been."""
    last = place.root / name / "checkpoints" / "last.ckpt"
    assert place.run(options, f"{name}_whole")["code"] == 0, place.log(f"{name}_whole")
    assert place.run(options, name, signals=[signal.SIGTERM], when=str(last))["code"] == 130, place.log(name)
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    perturb(folder)
    before = (place.root / name / "run.json").read_bytes()
    assert place.run(options, name, "--resume")["code"] == 2
    (error,) = (line for line in place.log(name).splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {option} reads {folder}, which has changed since ")
    assert "(model.safetensors): restore it to resume, or start another run with another --run.name" in error
    assert (place.root / name / "run.json").read_bytes() == before
    weights.write_bytes(original)
    assert place.run(options, name, "--resume")["code"] == 0, place.log(name)
    place.compare(f"{name}_whole", name)


@pytest.mark.parametrize("reference", ["model", "cached"])
def test_another_reference_is_no_way_to_go_on(place: Place, reference: str) -> None:
    folder = place.root / f"{reference}_folder"
    shutil.copytree(place.root / "start" / "model", folder)
    options = {"model": "DPOModule", **place.preference, "model.model": str(folder), "model.reference": reference}
    refused_until_restored(place, options, f"dpo_{reference}", "model.model", folder)


def test_another_reward_model_is_no_way_to_go_on(place: Place) -> None:
    options = {"model": "RewardModule", **place.preference, "trainer.max_epochs": 1}
    assert place.run(options, "reward")["code"] == 0, place.log("reward")
    folder = place.root / "reward_folder"
    shutil.copytree(place.root / "reward" / "model", folder)
    reward = {"good": {"source": str(folder), "weight": 0.5}, "long": f"{place.root}/reward.py:words"}
    options = {**place.ppo, "model.reward": reward}
    refused_until_restored(place, options, "ppo_reward", "model.reward.good.source", folder)


def test_a_run_that_did_not_record_its_models_goes_on(place: Place) -> None:
    options = {**place.sft, "trainer.max_epochs": 1, "run.checkpoint_every": 1}
    assert place.run(options, "old")["code"] == 0
    path = place.root / "old" / "run.json"
    status = json.loads(path.read_text())
    (model,) = status.pop("models")
    assert (model["option"], model["folder"]) == ("model.model", f"{place.root}/start/model")
    path.write_text(json.dumps(status))
    assert place.run({**options, "trainer.max_epochs": 2}, "old", "--resume")["code"] == 0, place.log("old")
    assert json.loads(path.read_text())["models"] == [model]


def chain(place: Place, options: dict[str, Any], name: str) -> list[str]:
    """The command of a pipeline of one stage, ``sft``."""
    config = place.root / "stage.yaml"
    config.write_text("seed_everything: 0\n")
    own = {key: value for key, value in options.items() if key != "run.root"}
    stages = {"name": name, "root": str(place.root), "stages": {"sft": {"config": str(config), **own}}}
    (place.root / f"{name}.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    return [sys.executable, "-m", "lightning_align", "pipeline", "--config", str(place.root / f"{name}.yaml")]


def test_a_stage_without_its_pipeline_stops_and_the_next_pipeline_continues_it(place: Place) -> None:
    options = {**place.sft, "trainer.max_epochs": 30, "run.checkpoint_every": 1}
    assert place.run(options, "stage_whole")["code"] == 0
    command = chain(place, options, "chain")
    run = place.root / "chain" / "sft"
    with (place.root / "chain.log").open("w") as log:
        pipeline = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        wait(lambda: (run / "checkpoints" / "last.ckpt").exists() or pipeline.poll() is not None)
        assert pipeline.poll() is None, place.log("chain")
        pipeline.kill()
        pipeline.wait()
        wait(lambda: json.loads((run / "run.json").read_text())["status"] != "running")
        status = json.loads((run / "run.json").read_text())
        assert status["status"] == "interrupted"
        again = subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=log, check=False)
    assert again.returncode == 0, place.log("chain")
    assert json.loads((run / "run.json").read_text())["resumed"] == 1
    assert measured(run) == measured(place.root / "stage_whole")
    models = [path / "model" / "model.safetensors" for path in (run, place.root / "stage_whole")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_stage_whose_pipeline_has_gone_makes_no_run_that_the_next_pipeline_would_find(place: Place) -> None:
    command = chain(place, {**place.sft, "trainer.max_epochs": 30, "run.checkpoint_every": 1}, "at_once")
    run = place.root / "at_once" / "sft"
    with (place.root / "at_once.log").open("w") as log:
        pipeline = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        wait(lambda: "sft: running" in place.log("at_once") or pipeline.poll() is not None)
        assert pipeline.poll() is None, place.log("at_once")
        time.sleep(0.5)  # the stage is importing
        pipeline.kill()
        pipeline.wait()
        again = subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=log, check=False)
    assert again.returncode == 0, place.log("at_once")
    status = json.loads((run / "run.json").read_text())
    assert (status["status"], status["resumed"]) == ("finished", 0)
