"""When training ends: the model in Hugging Face format, and a run that says it is finished."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_align.run.directory import RunDirectory


class ExportModel(Callback):
    """Writes ``model/`` through ``export`` (a module's method, which replaces it whole) and marks the run finished."""

    def __init__(self, run: RunDirectory, export: Callable[[Path], None]) -> None:
        self.run = run
        self.export = export

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on the first process."""
        if trainer.is_global_zero:
            self.export(self.run.model)
            self.run.update(status="finished", error=None)
