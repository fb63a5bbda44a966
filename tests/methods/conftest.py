"""A tiny world, made once: records, an architecture, trained runs, and the real command line to train more."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_align.cli import fit
from lightning_align.cli.main import run
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.playground import records

ARCHITECTURE = """
architecture: llama
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 96
tie_word_embeddings: true
tokenizer: {train: {vocab_size: 512, algorithm: words}}
"""
# reward functions, as a user writes them
REWARDS = """
def length(completions, **columns):
    return [float(len(text.split())) for text in completions]

def commas(completions, **columns):
    return [float(text.split().count(",")) for text in completions]

def long_prompts_only(prompts, completions, **columns):
    return [float(len(text.split())) if len(prompt) > 57 else None for prompt, text in zip(prompts, completions)]

def nothing(completions, **columns):
    return [None] * len(completions)

def every_third(completions, calls=[], **columns):
    calls.append(1)
    return [float(len(text)) if len(calls) % 3 == 0 else None for text in completions]

def first_letter(completions, **columns):
    return [float(text.strip() == "a") for text in completions]

def turns(prompts, completions, **columns):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(answer["content"])) for (answer,) in completions]
"""
BANDIT = """
architecture: llama
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 1
num_attention_heads: 4
max_position_embeddings: 16
tie_word_embeddings: false
tokenizer: {train: {vocab_size: 64, algorithm: words}}
"""
# seventeen records in batches of eight: the last window of an epoch has one
SIZES = {"text": 17, "sft": 17, "preference": 17, "ranked": 17, "scored": 17, "unpaired": 17, "prompt": 12}
ALWAYS = {
    **{"seed_everything": 0, "run.wandb": "disabled", "run.checkpoint_every": 100},
    **{"trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.log_every_n_steps": 1},
}
# a run of each kind that later ones start from; more would not make the tests any stricter
TRAINED: dict[str, dict[str, Any]] = {
    "pretrain": {
        **{"model": "PretrainModule", "model.model": "@model.yaml", "model.learning_rate": 3e-3},
        **{"data": "TextDataModule", "data.path": "playground", "data.playground.size": 300, "data.max_length": 64},
        **{"data.val_path": "@text_val.jsonl", "data.batch_size": 16, "trainer.max_epochs": 3},
    },
    "sft": {
        **{"model": "SFTModule", "model.model": "@pretrain", "model.learning_rate": 3e-3, "data": "SFTDataModule"},
        **{"data.path": "playground", "data.playground.size": 300, "data.val_path": "@sft_val.jsonl"},
        **{"data.batch_size": 16, "trainer.max_epochs": 2},
    },
    "reward": {
        **{"model": "RewardModule", "model.model": "@sft", "model.learning_rate": 3e-3, "data": "PreferenceDataModule"},
        **{"data.path": "playground", "data.playground.size": 200, "data.val_path": "@preference_val.jsonl"},
        **{"data.batch_size": 16, "trainer.max_epochs": 1},
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind.

    Args:
        path: The run directory.
        module: The module that trained, where it did so in this process.
    """

    path: Path
    module: Any = None

    @property
    def rows(self) -> list[dict[str, float]]:
        """Rows of ``metrics.csv`` without what the clock says, and without empty cells."""
        with (self.path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{n: float(v) for n, v in row.items() if v != "" and n != "eps" and "time/" not in n} for row in rows]

    def row(self, step: int, name: str) -> dict[str, float]:
        """The row of a step that has a metric of this name."""
        return next(row for row in self.rows if row["step"] == step and name in row)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of ``samples.jsonl``."""
        return [json.loads(line) for line in (self.path / "samples.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The exported model."""
        return load_file(self.path / "model" / "model.safetensors")

    @property
    def status(self) -> dict[str, Any]:
        """``run.json``."""
        return json.loads((self.path / "run.json").read_text())

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        """A checkpoint; ``name`` may be the beginning of its name."""
        (file,) = (self.path / "checkpoints").glob(f"{name}*.ckpt")
        return torch.load(file, weights_only=True)


class World:
    """Records and trained runs in a folder. In options, ``@name`` is the file or run of that name there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.driver: subprocess.Popen[str] | None = None
        self.runs = 0
        (root / "model.yaml").write_text(ARCHITECTURE)
        (root / "rewards.py").write_text(REWARDS)
        for kind, size in SIZES.items():
            self.write(f"{kind}.jsonl", weighted(records(kind, size=size)))
            self.write(f"{kind}_val.jsonl", records(kind, split="val", size=5))

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Records as a file; returns ``@name``."""
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"@{name}"

    def words(self, options: Mapping[str, Any]) -> list[str]:
        """Options as words of a command line."""
        return [f"--{name}={self._word(value)}" for name, value in options.items()]

    def _word(self, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.replace("@", f"{self.root}/")

    def command(self, options: Mapping[str, Any], name: str | None = None) -> tuple[list[str], Path]:
        """A whole ``fit`` command line, and its run directory."""
        self.runs += 1
        name = name or f"run{self.runs}"
        place = {"run.root": str(self.root), "run.name": name}
        return ["fit", *self.words({**ALWAYS, **options, **place})], self.root / name

    def fit(self, options: Mapping[str, Any], *, name: str | None = None, code: int = 0) -> Run:
        """Train in this process."""
        argv, path = self.command(options, name)
        built: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            build = fit.build
            patch.setattr(fit, "build", lambda *arguments: built.append(build(*arguments)) or built[-1])
            patch.setenv("PL_GLOBAL_SEED", "0")  # Lightning's own, which seeds sampling and data: given back afterwards
            assert run(argv) == code
        return Run(path, built[0].model if built else None)

    def ready(self, options: Mapping[str, Any]) -> Any:
        """A module with data and weights, as at the start of a run that then trains nothing."""
        return self.fit({**options, "trainer.limit_train_batches": 0}).module

    def fork(
        self, options: Mapping[str, Any], *flags: str, name: str | None = None, code: int = 0, **request: Any
    ) -> Run:
        """Train in a child of the driver; ``request`` goes to it. ``code`` is what the child must end with."""
        if self.driver is None:
            self.driver = start_driver()
        argv, path = self.command(options, name)
        log = self.root / f"{path.name}.log"
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps({"argv": [*argv, *flags], "log": str(log), **request}) + "\n")
        self.driver.stdin.flush()
        answer = json.loads(self.driver.stdout.readline())
        assert answer["code"] == code, f"{answer}\n{log.read_text()[-4000:]}"
        return Run(path)

    def validated(self, options: Mapping[str, Any]) -> dict[str, float]:
        """The metrics that ``validate`` prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run(["validate", *self.words({**options, "trainer.accelerator": "cpu"})]) == 0
        lines = [line.split() for line in out.getvalue().splitlines()]
        return {name: float(value) for name, value in (line for line in lines if line and line[0].startswith("eval/"))}

    def log(self, run: Run) -> str:
        """What a forked run said."""
        return (self.root / f"{run.path.name}.log").read_text()


def start_driver() -> subprocess.Popen[str]:
    """The process that forks the children."""
    file = Path(__file__).with_name("fork_driver.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def weighted(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of which some count more than others, where the kind has weights."""
    if "completion" not in rows[0] and "chosen" not in rows[0]:
        return list(rows)
    return [{**row, "weight": (1.0, 0.25, 3.0)[index % 3]} for index, row in enumerate(rows)]


@pytest.fixture(scope="session")
def run_type() -> type[Run]:
    """How to read a run directory."""
    return Run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world, with the runs of :data:`TRAINED`."""
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("world"))
    for name, options in TRAINED.items():
        world.fit(options, name=name)
    yield world
    if world.driver is not None:
        assert world.driver.stdin is not None
        world.driver.stdin.close()
        world.driver.wait(timeout=30)


@pytest.fixture(scope="session")
def bandit(world: World) -> dict[str, Any]:
    """Options of an online method on one prompt with completions of one token; letter ``a`` is worth 1."""
    (world.root / "bandit.yaml").write_text(BANDIT)
    letters = world.write("letters.jsonl", [{"text": f"say {letter}"} for letter in "abcdef"])
    start = {"model": "PretrainModule", "model.model": "@bandit.yaml", "model.learning_rate": 1e-3}
    start |= {"data": "TextDataModule", "data.path": letters, "data.val_fraction": 0.0, "trainer.max_steps": 3}
    world.fit(start, name="bandit")
    return {
        **{"model.model": "@bandit", "model.reward": "@rewards.py:first_letter"},
        **{"model.max_new_tokens": 1, "model.eval_every": 0, "model.micro_batch_size": 512},
        **{"data": "PromptDataModule", "data.path": world.write("say.jsonl", [{"prompt": "say"}])},
        **{"data.val_fraction": 0.0, "run.checkpoint_every": 1000, "trainer.log_every_n_steps": 100},
    }


@pytest.fixture
def ppo_options() -> dict[str, Any]:
    """A run of three iterations of PPO against the learned reward."""
    return {
        **{"model": "PPOModule", "model.model": "@sft", "model.reward": "@reward", "model.gold": "playground"},
        **{"model.learning_rate": 3e-3, "model.iterations": 3, "model.max_new_tokens": 8, "model.eval_every": 0},
        **{"data": "PromptDataModule", "data.path": "@prompt.jsonl", "data.val_path": "@prompt_val.jsonl"},
        **{"data.batch_size": 8},
    }


@pytest.fixture
def ppo(world: Any, ppo_options: dict[str, Any]) -> Callable[..., Any]:
    """``ppo(**changes)``: a run of three iterations, with ``ready`` its module; model options without their prefix."""

    def fit(*, ready: bool = False, **changes: Any) -> Any:
        options = {**ppo_options, **{name if "." in name else f"model.{name}": v for name, v in changes.items()}}
        return world.ready(options) if ready else world.fit(options)

    return fit


@pytest.fixture
def experiences(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every online iteration in this process learns from, as it happens."""
    seen: list[Any] = []
    learn = OnlineModule.learn

    def watched(self: OnlineModule, experience: Any) -> dict[str, float]:
        seen.append(experience)
        return learn(self, experience)

    monkeypatch.setattr(OnlineModule, "learn", watched)
    return seen


@pytest.fixture(scope="session")
def gradients() -> Callable[[AlignModule, Tensor], dict[str, Tensor]]:
    """``gradients(module, loss)``: of everything that is trained, by name; zeros where there is none."""

    def compute(module: AlignModule, loss: Tensor) -> dict[str, Tensor]:
        learning = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        names, parameters = zip(*learning, strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for name, parameter, gradient in zip(names, parameters, found, strict=True)
        }

    return compute
