"""One tiny model, one tokenizer, a few records, and a way to run one of TRL's trainers on them beside our module.

TRL is imported inside functions only: without it, the files of this folder are skipped.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

Records = Sequence[Mapping[str, Any]]
Gradients = dict[str, Tensor]
NO_LIMIT = 1e9  # of the gradient's norm
# Arguments of TRL's trainers: nothing but the loss, on the CPU; the norm is logged only where there is a limit
PLAIN = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": []},
    **{"max_grad_norm": NO_LIMIT, "logging_steps": 1, "disable_tqdm": True},
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
DIFFERENCES = pytest.StashKey[dict[str, float]]()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# ChatML as Qwen writes it, but for the line break behind <|im_end|>, which a test adds
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' -%}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ m['content'] + '<|im_end|>' }}{%- endif -%}{{ BREAK }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# answers of one to nine words, so that a mean of means over micro-batches is not the mean over tokens
DEMONSTRATIONS = [
    {"prompt": "list three animals", "completion": " cat , dog and bird"},
    {"prompt": "say something kind about rain", "completion": " rain is good"},
    {"prompt": "count to nine", "completion": " one two three four five six seven eight nine"},
    {"prompt": "complete : the sun is", "completion": " hot"},
    {"prompt": "say it twice : rain", "completion": " rain rain"},
    {"prompt": "sort dog cat", "completion": " cat dog"},
]


# ---------------------------------------------------------------------- what is compared
def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two numbers, tensors, or mappings of these: absolute, or relative to what exceeds 1."""
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        return max(difference(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``agree(what, ours, theirs, dtype)``: equal within the dtype's tolerance; the summary shows by how much."""

    def check(what: str, ours: Any, theirs: Any, dtype: torch.dtype) -> None:
        found = difference(ours, theirs)
        test = f"{request.path.stem}::{request.node.name.partition('[')[0]}"
        name = f"{test}: {what}, {str(dtype).removeprefix('torch.')}"
        table = request.config.stash.setdefault(DIFFERENCES, {})
        table[name] = max(found, table.get(name, 0.0))
        assert found <= TOLERANCE[dtype], f"{what}: off by {found:.2g}"

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The numbers behind the dots."""
    table = config.stash.get(DIFFERENCES, {})
    if table:
        terminalreporter.section("largest difference from TRL")
        for name, value in sorted(table.items()):
            terminalreporter.write_line(f"{value:8.1e}  {name}")


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of parameters and everything computed from them."""
    return request.param


# ---------------------------------------------------------------------- a tiny world
def make_tokenizer(end_of_turn: str = "") -> PreTrainedTokenizerFast:
    """BPE of few tokens with ChatML, ``end_of_turn`` behind every turn; EOS is the turn's end, as for Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=SPECIAL, show_progress=False)
    texts = [row["prompt"] + row["completion"] for row in DEMONSTRATIONS]
    core.train_from_iterator([*texts, "user\nassistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML.replace("BREAK", repr(end_of_turn))
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a line break between turns."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def with_breaks() -> PreTrainedTokenizerFast:
    """With a line break behind every turn."""
    return make_tokenizer("\n")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a language model ``policy`` and a reward model ``reward``, random and in float32."""
    root = tmp_path_factory.mktemp("parity")
    config = AutoConfig.for_model(
        "gpt_neox",  # keeps float64 throughout, where Llama's norm goes through float32
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,  # the likeliest token is then often the one before: some hits, many misses
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, auto_class in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
            network = auto_class.from_config(config)
            for parameter in network.parameters():  # or gradients are small, and all tokens equally likely
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            network.get_input_embeddings().weight.data.mul_(3)
            network.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def demonstrations() -> Records:
    """Six prompts with completions."""
    return DEMONSTRATIONS


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Records], str]:
    """``write(records)``: a file of them."""

    def to_file(records: Records) -> str:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in records))
        return str(path)

    return to_file


# ---------------------------------------------------------------------- running both
class Recorder(torch.optim.SGD):
    """Gradient descent that keeps the gradients of every step, by name."""

    def __init__(self, network: nn.Module, learning_rate: float = 0.0) -> None:
        self.steps: list[Gradients] = []
        self.network = network
        super().__init__(network.parameters(), lr=learning_rate)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Compute gradients where that is left to the optimiser, keep them, move."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        named = self.network.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        super().step()
        return loss

    def with_schedule(self) -> tuple["Recorder", torch.optim.lr_scheduler.LRScheduler]:
        """As TRL's trainers take it."""
        return self, torch.optim.lr_scheduler.LambdaLR(self, lambda _: 1.0)


class Logs(TrainerCallback):
    """What a trainer of TRL logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the rows of steps; the last row sums up the run."""
        if logs is not None and "train_runtime" not in logs:
            self.rows.append(dict(logs))


@dataclass(frozen=True)
class Trained:
    """A row of metrics and the gradients of every optimiser step."""

    rows: list[dict[str, float]]
    gradients: list[Gradients]


@pytest.fixture(scope="session")
def plain_arguments() -> dict[str, Any]:
    """Of every trainer of TRL."""
    return PLAIN


@pytest.fixture(scope="session")
def recorder() -> type[Recorder]:
    """The class."""
    return Recorder


@pytest.fixture
def logs() -> Logs:
    """Without rows so far."""
    return Logs()


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """``quiet_trainer(**options)``: Lightning's, which writes nothing."""

    def make(**options: Any) -> L.Trainer:
        off = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return L.Trainer(
            accelerator="cpu", logger=False, log_every_n_steps=1, default_root_dir=tmp_path, **off, **options
        )

    return make


@pytest.fixture
def make_theirs(tmp_path: Path) -> Callable[..., Any]:
    """``make_theirs((trainer_class, config_class), network, tokenizer, records, **options)``: a trainer of TRL."""

    def make(
        classes: tuple[Any, Any], network: PreTrainedModel, tokenizer: Any, records: Records, **options: Any
    ) -> Any:
        from datasets import Dataset

        trainer_class, config_class = classes
        arguments = config_class(str(tmp_path / "trl"), train_sampling_strategy="sequential", **PLAIN, **options)
        return trainer_class(
            model=network,
            args=arguments,
            train_dataset=Dataset.from_list([dict(row) for row in records]),
            processing_class=copy.deepcopy(tokenizer),
            optimizers=Recorder(network).with_schedule(),
            callbacks=[Logs()],
        )

    return make


@pytest.fixture
def train_theirs(make_theirs: Callable[..., Any]) -> Callable[..., Trained]:
    """The same, and it trains a copy of the network, which does not move."""

    def train(classes: tuple[Any, Any], network: PreTrainedModel, *data: Any, **options: Any) -> Trained:
        trainer = make_theirs(classes, copy.deepcopy(network), *data, **options)
        recorder = trainer.optimizer
        trainer.train()
        (logs,) = (found for found in trainer.callback_handler.callbacks if isinstance(found, Logs))
        return Trained(logs.rows, recorder.steps)

    return train


@pytest.fixture
def train_ours(quiet_trainer: Callable[..., L.Trainer]) -> Callable[..., Trained]:
    """``train_ours(module_class, network_of, start, settings, datamodule, **trainer_options)``: without moving it.

    ``start`` is a network as it was loaded, in the wanted dtype.
    """

    def train(
        module_class: Any,
        network_of: Callable[[Any], PreTrainedModel],
        start: PreTrainedModel,
        settings: Mapping[str, Any],
        datamodule: L.LightningDataModule,
        **options: Any,
    ) -> Trained:
        rows: list[dict[str, float]] = []

        class Recorded(module_class):  # type: ignore[misc]
            def configure_model(self) -> None:
                super().configure_model()
                network_of(self).to(start.dtype).load_state_dict(start.state_dict())

            def configure_optimizers(self) -> Recorder:
                return Recorder(network_of(self))

            def report(self, metrics: Mapping[str, float], *, step: int) -> None:
                rows.append(dict(metrics))

        trainer = quiet_trainer(**options)
        trainer.fit(Recorded(model=start.name_or_path, max_grad_norm=NO_LIMIT, **settings), datamodule=datamodule)
        return Trained(rows, trainer.optimizers[0].steps)  # type: ignore[attr-defined]

    return train
