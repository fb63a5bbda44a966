"""Stop at the first loss that is not a number, before it reaches the weights, and keep the batch that caused it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.run.files import replacing, write_atomically


class NanGuard(Callback):
    """Looks at every loss before its backward pass; saves the batch in ``folder`` and raises :class:`UserError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._batch: Mapping[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss on every process: all of them stop, or none."""
        bad = not bool(torch.isfinite(loss).all())
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            path = save_batch(self._batch, self.folder, f"nan_batch_rank{trainer.global_rank}")
            raise UserError(
                f"the loss is {float(loss.detach())} at step {trainer.global_step + 1}: stopped before the update, the "
                f"batch is in {path} (try a lower learning rate, model.max_grad_norm, or look at that batch)"
            )


def save_batch(batch: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write the tensors of a batch as safetensors and the rest as JSON; returns the file (or the folder, if both)."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in batch.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in batch.items() if key not in tensors}
    written = []
    if tensors:
        written.append(folder / f"{name}.safetensors")
        with replacing(written[0]) as file:
            file.write(save(tensors))
    if rest:
        written.append(folder / f"{name}.json")
        write_atomically(written[-1], json.dumps(rest, ensure_ascii=False, indent=1, default=str))
    return written[0] if len(written) == 1 else folder
