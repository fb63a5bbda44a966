"""A folder like a checkout with four tiny finished runs in it, and the real command line in this process."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_align.cli.main import run
from lightning_align.playground import records

REPOSITORY = Path(__file__).parents[2]
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
# The playground's own configurations, cut to seconds; a later word wins.
SHORT: dict[str, list[str]] = {
    "pretrain": [
        *("--model.model=tiny.yaml", "--trainer.max_steps=3", "--trainer.val_check_interval=3"),
        *("--data.playground.size=100", "--data.max_length=64", "--data.batch_size=8", "--data.val_path=text.jsonl"),
        "--trainer.check_val_every_n_epoch=null",
    ],
    "sft": [
        *("--trainer.max_steps=3", "--trainer.val_check_interval=3"),
        *("--data.playground.size=60", "--data.max_length=64", "--data.batch_size=8", "--data.val_path=sft.jsonl"),
        "--trainer.check_val_every_n_epoch=null",
    ],
    "reward": [
        *("--data.playground.size=40", "--data.max_length=64", "--data.batch_size=16"),
        "--data.val_path=preference.jsonl",
    ],
    "dpo": [
        *("--data.playground.size=40", "--data.max_length=64", "--data.batch_size=16"),
        "--data.val_path=preference.jsonl",
    ],
    "ppo": [
        *("--model.iterations=2", "--model.eval_every=2", "--model.max_new_tokens=6", "--model.num_ppo_epochs=1"),
        *("--data.playground.size=40", "--data.batch_size=8", "--data.val_path=prompt.jsonl"),
    ],
    "hir": [
        *("--model.iterations=2", "--model.eval_every=2", "--model.max_new_tokens=6"),
        *("--data.playground.size=40", "--data.batch_size=4", "--data.val_path=prompt.jsonl"),
    ],
    "constitutional": [
        *("--model.iterations=2", "--model.eval_every=2", "--model.max_new_tokens=12", "--model.revisions=1"),
        *("--data.playground.size=40", "--data.batch_size=16", "--data.val_path=prompt.jsonl"),
    ],
    **{
        name: [
            *("--model.iterations=2", "--model.eval_every=2", "--model.max_new_tokens=6"),
            *("--data.playground.size=40", "--data.batch_size=4", "--data.val_path=prompt.jsonl"),
        ]
        for name in ("grpo", "rejection_sampling", "online_dpo")
    },
    "rest": [
        *("--model.grow_steps=1", "--model.grow_batches=1", "--model.min_kept=1", "--model.max_new_tokens=6"),
        *("--data.playground.size=40", "--data.batch_size=4", "--data.val_path=prompt.jsonl"),
    ],
}
QUICK = [
    *("--run.wandb=disabled", "--data.cache_dir=null", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
]
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SMALL = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128},
}


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


class Desk:
    """A user's folder: ``configs`` and ``docs`` of the repository, an architecture, runs under ``runs``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("configs", "docs"):
            (root / name).symlink_to(REPOSITORY / name)
        self.write("tiny.yaml", ARCHITECTURE)
        for kind in ("text", "sft", "preference", "prompt"):
            self.write(f"{kind}.jsonl", records(kind, split="val", size=16))  # validation takes no time

    def write(self, name: str, content: str | Sequence[Mapping[str, Any]]) -> str:
        """A file with this text, or with these records; returns its name."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
        return name

    def run(self, *argv: str) -> Answer:
        """One command, as a user in this folder would start it."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.root),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("PL_GLOBAL_SEED", "0")  # Lightning's own, given back afterwards
            patch.delenv("LIGHTNING_ALIGN_RUN_NAME", raising=False)
            code = run(list(argv))
        return Answer(code, out.getvalue(), err.getvalue())

    def done(self, *argv: str) -> Answer:
        """:meth:`run`, of a command that must succeed."""
        answer = self.run(*argv)
        assert answer.code == 0, answer.err
        return answer

    def fit(self, config: str, name: str, *words: str) -> Path:
        """A short run of one of the playground's configurations; returns its directory."""
        self.done(*self.fit_words(config), "--run.name", name, *words)
        return self.root / "runs" / name

    def fit_words(self, config: str) -> list[str]:
        """The command line of such a run, without its name."""
        return ["fit", "--config", f"configs/playground/{config}.yaml", *SHORT[config], *QUICK]

    def fit_words_on(self, path: str, config: str) -> list[str]:
        """The same on other data than the playground."""
        ours = ("--data.playground", "--data.val_path")
        kept = [word for word in self.fit_words(config) if not word.startswith(ours)]
        return [*kept, "--data.playground=null", f"--data.path={path}"]

    def refused(self, *argv: str) -> str:
        """The one line of a command that must be refused, with nothing left behind."""
        before = self.files()
        answer = self.run(*argv)
        assert answer.code == 2, answer
        assert self.files() == before
        lines = answer.err.splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], answer.err
        assert "Traceback" not in answer.err + answer.out
        assert "warning: " not in answer.err
        return lines[-1].removeprefix("error: ")

    def files(self) -> set[str]:
        """Everything that lies here."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}

    def metrics(self, name: str) -> list[dict[str, str]]:
        """Rows of a run's ``metrics.csv``, without what the clock says."""
        with (self.root / "runs" / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: value for key, value in row.items() if "time/" not in key and key != "eps"} for row in rows]

    def status(self, name: str) -> dict[str, Any]:
        """``run.json`` of a run."""
        return json.loads((self.root / "runs" / name / "run.json").read_text())


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The folder, with runs ``pretrain``, ``sft``, ``reward``, ``dpo`` and ``ppo``."""
    torch.set_num_threads(1)
    desk = Desk(tmp_path_factory.mktemp("desk"))
    for name in SHORT:
        desk.fit(name, name)
    yield desk
    os.environ.pop("LIGHTNING_ALIGN_RUN_NAME", None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


def byte_level(*, template: str | None, eos: str | None = "</s>", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer, trained on a few sentences."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["list three animals . answer : cat , dog and bird ."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{"unk_token": "<unk>", "eos_token": eos, "pad_token": pad},
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def write_model(
    folder: Path,
    model_type: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast,
    auto_class: Any = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    shards: str | None = None,
    **fields: Any,
) -> str:
    """A small random model with its tokenizer, as ``save_pretrained`` leaves it; returns the folder's path."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **{**(fields or SMALL), **special}, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto_class.from_config(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """:func:`byte_level`."""
    return byte_level


@pytest.fixture(scope="session")
def make_model() -> Callable[..., str]:
    """:func:`write_model`."""
    return write_model


@pytest.fixture(scope="session")
def chatml() -> str:
    """A chat template."""
    return CHATML


@pytest.fixture
def scratch(desk: Desk) -> Iterator[Desk]:
    """The same folder; runs and files that a test leaves are removed after it."""
    before = {path for path in (desk.root, desk.root / "runs") for path in path.iterdir()}
    yield desk
    for folder in (desk.root / "runs", desk.root):
        for path in folder.iterdir():
            if path not in before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
