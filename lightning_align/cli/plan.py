"""What follows from the configuration, said before the first step: batch, tokens, steps, parameters, memory."""

from collections.abc import Callable

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_align.data.datamodules import BaseDataModule
from lightning_align.errors import UserError
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.optimizers import state_bytes
from lightning_align.models.loading import Parameters, load_config
from lightning_align.models.masks import can_pack
from lightning_align.models.memory import estimate_memory
from lightning_align.models.sources import resolve_source
from lightning_align.rollout.memory import sampler_memory

GIB = 2**30


class PlanOnly(BaseException):
    """The plan was all that was asked for. Not an ``Exception``: nothing has gone wrong."""


class Plan(Callback):
    """Prints the plan once data are read and before any weights are loaded; with ``dry_run`` it stops there.

    Args:
        dry_run: Whether the plan is all that was asked for.
        record: Called with ``data``, the report on the data, and ``data_hash`` once there is a run that can keep them.
        data_hash: Of the data that a resumed run began with; others are refused.
    """

    def __init__(self, *, dry_run: bool, record: Callable[..., None], data_hash: str | None = None) -> None:
        self.dry_run = dry_run
        self.record = record
        self.data_hash = data_hash

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print on the first process."""
        assert isinstance(pl_module, AlignModule)
        check_validation(trainer)
        check_same_data(trainer, self.data_hash)
        rows = plan(trainer, pl_module)  # on every process: they agree on the number of steps, and wait for each other
        if trainer.is_global_zero:
            show(rows)
        if self.dry_run:
            raise PlanOnly

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was said of the data."""
        if trainer.is_global_zero:
            datamodule = trainer.datamodule  # type: ignore[attr-defined]
            self.record(data=datamodule.report.to_dict(), data_hash=datamodule.train_hash)


def check_same_data(trainer: Trainer, before: str | None) -> None:
    """Raise :class:`UserError` if a resumed run would go on in the middle of other data than it began with."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if before is not None and datamodule.train_hash != before:
        raise UserError(
            f"{datamodule.path} gives other training data than the run began with (its records, or how the tokenizer "
            "reads them, have changed): restore them, or give --overwrite or another --run.name"
        )


def check_validation(trainer: Trainer) -> None:
    """Raise :class:`UserError` if validation would never come; Lightning says so only once the run has begun."""
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or not trainer.limit_val_batches:
        return
    batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
    if interval > batches:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches: lower it, or count on over "
            "epochs with trainer.check_val_every_n_epoch null"
        )


def plan(trainer: Trainer, module: AlignModule) -> list[tuple[str, str]]:
    """Rows of the plan: name and value."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, BaseDataModule)
    if datamodule.packs and not can_pack(load_config(resolve_source(module.source), module.tokenizer)):
        datamodule.report.note(
            "packing", "undone, as this model cannot keep the documents of a row apart: each gets a row of its own"
        )
    rows = [("data", line) for line in datamodule.report.lines()]
    rows += (
        online_rows(trainer, module, datamodule)
        if isinstance(module, OnlineModule)
        else offline_rows(trainer, datamodule)
    )
    roles = module.parameter_roles()
    rows.append(("parameters", ", ".join(f"{role} {found.number / 1e6:,.2f} M" for role, found in roles.items())))
    return rows + memory_rows(trainer, module, datamodule, roles)


def online_rows(trainer: Trainer, module: OnlineModule, datamodule: BaseDataModule) -> list[tuple[str, str]]:
    """Batch and steps of an online method."""
    prompts = datamodule.batch_size * trainer.world_size
    samples = prompts * module.sampling.num_samples
    steps = module.iterations * module.num_epochs * module.num_mini_batches
    new_tokens = module.sampling.max_new_tokens
    different = len(datamodule.datasets["train"])
    repeated = f" (there are {different} different ones, so they repeat)" if different < prompts else ""
    return [
        ("iteration", f"{prompts} prompts{repeated}, {samples} completions of at most {new_tokens} tokens"),
        ("tokens an iteration", f"{samples * (datamodule.mean_tokens + new_tokens):,.0f} at most, prompts included"),
        ("iterations", f"{module.iterations} ({steps:,} optimiser steps at most)"),
    ]


def offline_rows(trainer: Trainer, datamodule: BaseDataModule) -> list[tuple[str, str]]:
    """Batch and steps of an offline method."""
    accumulated, devices = trainer.accumulate_grad_batches, trainer.world_size
    batch = datamodule.batch_size * accumulated * devices
    return [
        (
            "global batch",
            f"{batch} = {datamodule.batch_size} a device × {accumulated} accumulated × {devices} device(s)",
        ),
        ("tokens a step", f"{datamodule.mean_tokens * batch:,.0f} on average"),
        ("optimiser steps", f"{int(trainer.estimated_stepping_batches):,}"),
    ]


def memory_rows(
    trainer: Trainer, module: AlignModule, datamodule: BaseDataModule, roles: dict[str, Parameters]
) -> list[tuple[str, str]]:
    """Estimated peak by part, beside what the machine has."""
    trained = [found for role, found in roles.items() if role in module.trained_roles]
    frozen = [found for role, found in roles.items() if role not in module.trained_roles]
    network = roles.get("base", trained[0])  # that activations flow through
    dtype_bytes = network.size // network.number
    config = load_config(resolve_source(module.source), module.tokenizer).get_text_config()
    if isinstance(module, OnlineModule):
        sequences: float = min(module.micro_batch_size, datamodule.batch_size * module.sampling.num_samples)
        length = datamodule.max_tokens_seen + module.sampling.max_new_tokens
    else:
        sequences, length = datamodule.sequences_per_batch, datamodule.max_tokens_seen
    parts = estimate_memory(
        trained_bytes=sum(found.size for found in trained),
        frozen_bytes=sum(found.size for found in frozen),
        tokens_per_microbatch=int(sequences * length),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        optimizer_bytes=state_bytes(module.optimizer_name, trained),
        dtype_bytes=dtype_bytes,
        gradient_checkpointing=module.gradient_checkpointing,
    )
    remedy = "the batch or its length"
    if isinstance(module, OnlineModule):
        remedy = "model.micro_batch_size, model.rollout_batch_size or the lengths"
        parts["sampler"] = sampler_part(trainer, module, datamodule, length, dtype_bytes)
    if trainer.strategy.root_device.type == "cpu":
        parts |= {"program and data": psutil.Process().memory_info().rss}
    parts.pop("total")
    total = sum(parts.values())
    available, what = device_memory(trainer)
    rows = [
        ("memory", f"about {gib(total)} a device, of {gib(available)} {what}"),
        ("", ", ".join(f"{name} {gib(size)}" for name, size in parts.items())),
    ]
    if total > available:
        rows.append(("", f"more than there is: lower {remedy}, or set model.gradient_checkpointing"))
    return rows


def sampler_part(
    trainer: Trainer, module: OnlineModule, datamodule: BaseDataModule, length: int, dtype_bytes: int
) -> int:
    """Bytes of the sampler; ``length`` is that of the longest prompt with its completion."""
    most = max(datamodule.batch_size * module.sampling.num_samples, datamodule.eval_batch_size)
    return sampler_memory(
        module.engine_name,
        module.empty_model(),
        trainer.strategy.root_device,
        rows=min(module.rollout_batch_size, most),
        slots=length,
        dtype_bytes=dtype_bytes,
    )


def device_memory(trainer: Trainer) -> tuple[int, str]:
    """Bytes that are free, and of what."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}"
    return psutil.virtual_memory().available, "free memory"


def gib(size: float) -> str:
    """Bytes for people."""
    if size < GIB:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / GIB:,.{1 if size < 100 * GIB else 0}f} GiB"


def show(rows: list[tuple[str, str]]) -> None:
    """Print the plan as two columns; a name is not repeated. Only a terminal's lines are broken, to its width."""
    names = ["" if index and rows[index - 1][0] == name else name for index, (name, _) in enumerate(rows)]
    console = Console()
    if not console.is_terminal:
        width = max(len(name) for name in names)
        for name, (_, value) in zip(names, rows, strict=True):
            print(f"{name:<{width}}  {value}")
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, (_, value) in zip(names, rows, strict=True):
        table.add_row(name, escape(value))
    console.print(table)
