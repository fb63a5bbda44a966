"""Runs a tiny training whole and, elsewhere, killed at random points and resumed; the test compares what is left.

One process imports everything once and forks a child for each attempt, so that ``kill -9`` is real and cheap.
"""

import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Trainer

from lightning_align.callbacks.export import ExportModel
from lightning_align.callbacks.nan_guard import NanGuard
from lightning_align.run.checkpoints import RunCheckpoints, check_checkpoint
from lightning_align.run.directory import RunDirectory
from lightning_align.run.logging import FileLogger, log_samples
from lightning_align.run.resume import RandomState, use_boundary_loop
from lightning_align.run.signals import StopRequest

STEPS = 23
EPOCH = 7


class Loader:
    """Seven batches an epoch in an order that depends on the epoch; stateful as the project's loaders are."""

    def __init__(self) -> None:
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.position >= EPOCH:
            self.epoch, self.position = self.epoch + 1, 0
        order = random.Random(self.epoch).sample(range(EPOCH), EPOCH)
        while self.position < EPOCH:
            index = order[self.position]
            self.position += 1
            yield {"x": torch.full((4,), float(index) + self.epoch / 10)}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Loader:
        return Loader()

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader([{"x": torch.ones(4)}], batch_size=None)


class Tiny(L.LightningModule):
    """Draws from every global generator in each step, logs to the loggers by itself, may accumulate."""

    def __init__(self, kill_at: float | None) -> None:
        super().__init__()
        self.kill_at = kill_at
        self.calls = 0

    def configure_model(self) -> None:
        self.layer = torch.nn.Linear(4, 1)

    def die(self, point: float) -> None:
        """Kill this process (at a call number of this attempt, so that different places are hit)."""
        self.calls += 1
        if self.kill_at is not None and self.calls >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.die(0)
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return (self.layer(batch["x"] + noise) ** 2).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step + 1
        for logger in self.loggers:
            logger.log_metrics(
                {"weight": float(self.layer.weight.detach()[0, 0]), f"late/{step // 8}": torch.tensor(0.1)}, step=step
            )
        self.die(1)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.die(2)
        value = self.layer(batch["x"]).item()
        for logger in self.loggers:
            logger.log_metrics({"eval/value": value}, step=self.trainer.global_step)
        log_samples(self.loggers, [{"prompt": "p", "completion": "c", "score": value}], step=self.trainer.global_step)
        self.die(3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["method"] = {"name": "Tiny"}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def export(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")


def train(root: Path, name: str, *, resume: bool, kill_at: float | None, accumulate: int, every: int) -> None:
    """One attempt."""
    L.seed_everything(0, verbose=False)
    run = RunDirectory(root, name, resume=resume)
    run.check()
    files = FileLogger(run.path)
    module = Tiny(kill_at)
    with StopRequest() as stop:
        checkpoints = RunCheckpoints(
            run,
            files,
            config="tiny: true\n",
            facts={"seed": 0, "parents": []},
            every=every,
            keep_every=4,
            label=lambda: None,
            stop=stop,
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            logger=[files],
            callbacks=[RandomState(), NanGuard(run.path), checkpoints, ExportModel(run, module.export)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            accumulate_grad_batches=accumulate,
            val_check_interval=3,
            check_val_every_n_epoch=None,
        )
        use_boundary_loop(trainer)
        path = str(run.last_checkpoint) if resume and run.last_checkpoint.exists() else None
        if path is not None:
            check_checkpoint(run.last_checkpoint)
            torch.rand(random.Random(kill_at).randrange(1, 9))  # start-up of a resumed run draws other numbers
        trainer.fit(module, datamodule=Data(), ckpt_path=path, weights_only=True)


def attempt(*args: Any, **kwargs: Any) -> int:
    """``train`` in a child; returns its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(*args, **kwargs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """``ROOT SEED ACCUMULATE EVERY``"""
    torch.set_num_threads(1)
    root, seed, accumulate, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    settings = {"accumulate": accumulate, "every": every}
    assert attempt(root, "whole", resume=False, kill_at=None, **settings) == 0
    chance = random.Random(seed)
    kills = 0
    while True:
        kill_at = chance.randrange(3, 20 * accumulate) if kills < 10 else None
        started = (root / "killed" / "run.json").exists()
        status = attempt(root, "killed", resume=started, kill_at=kill_at, **settings)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the child failed by itself: {status}"
        kills += 1
    print(kills)


if __name__ == "__main__":
    main()
