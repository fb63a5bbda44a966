"""What follows from the configuration, said before the first step: batch, tokens, steps, parameters, memory."""

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lightning_align.data.datamodules import BaseDataModule
from lightning_align.methods.base import AlignModule
from lightning_align.methods.online import OnlineModule
from lightning_align.models.memory import estimate_memory


class PlanOnly(BaseException):
    """The plan was all that was asked for. Not an ``Exception``: nothing has gone wrong."""


class Plan(Callback):
    """Prints the plan once data are read and before any weights are loaded; with ``dry_run`` it stops there."""

    def __init__(self, *, dry_run: bool) -> None:
        self.dry_run = dry_run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print on the first process."""
        assert isinstance(pl_module, AlignModule)
        if trainer.is_global_zero:
            show(plan(trainer, pl_module))
        if self.dry_run:
            raise PlanOnly


def plan(trainer: Trainer, module: AlignModule) -> list[tuple[str, str]]:
    """Rows of the plan: name and value."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, BaseDataModule)
    rows = [("data", line) for line in datamodule.report.lines()]
    if isinstance(module, OnlineModule):
        prompts = datamodule.batch_size * trainer.world_size
        samples = prompts * module.sampling.num_samples
        steps = module.iterations * module.num_epochs * module.num_mini_batches
        rows += [
            ("iteration", f"{prompts} prompts, {samples} completions of at most {module.sampling.max_new_tokens} tokens"),
            ("iterations", f"{module.iterations} ({steps:,} optimiser steps at most)"),
        ]
    else:
        batch = datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        rows += [
            (
                "global batch",
                f"{batch} = {datamodule.batch_size} a device × {trainer.accumulate_grad_batches} accumulated × "
                f"{trainer.world_size} device(s)",
            ),
            ("tokens a step", f"{tokens_per_step(datamodule, batch):,.0f} on average"),
            ("optimiser steps", f"{int(trainer.estimated_stepping_batches):,}"),
        ]
    roles = module.parameter_roles()
    rows.append(("parameters", ", ".join(f"{role} {count / 1e6:,.2f} M" for role, count in roles.items())))
    return rows + memory_rows(trainer, module, datamodule)


def show(rows: list[tuple[str, str]]) -> None:
    """Print the plan as two columns; a name is not repeated."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    previous = ""
    for name, value in rows:
        table.add_row("" if name == previous else name, escape(value))
        previous = name
    Console().print(table)
