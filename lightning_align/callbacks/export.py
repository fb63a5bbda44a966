"""When training ends: the model in Hugging Face format, and a run that says it is finished."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_align.run.directory import RunDirectory


class ExportModel(Callback):
    """Writes ``model/`` through ``export`` (a module's method) and marks the run finished."""

    def __init__(self, run: RunDirectory, export: Callable[[Path], None]) -> None:
        self.run = run
        self.export = export

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export under another name, then rename, so that ``model/`` is whole whenever it is there."""
        if trainer.is_global_zero:
            temporary = self.run.path / ".model.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.export(temporary)
            shutil.rmtree(self.run.model, ignore_errors=True)
            os.replace(temporary, self.run.model)
            self.run.update(status="finished", error=None)
