"""A picture of the last evaluation, kept up to date in the run directory."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_align.run.files import replacing


class EvaluationFigure(Callback):
    """Writes a picture after every evaluation, over the one before.

    Args:
        path: Where to write.
        draw: The picture as bytes; None where there is nothing to show.
    """

    def __init__(self, path: Path, draw: Callable[[], bytes | None]) -> None:
        self.path = path
        self.draw = draw

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw on the first process."""
        if not trainer.is_global_zero:
            return
        content = self.draw()
        if content is not None:
            with replacing(self.path) as file:
                file.write(content)
