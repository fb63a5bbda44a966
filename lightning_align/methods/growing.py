"""Samples that are drawn once, kept in a file, and learnt from several times."""

from pathlib import Path
from typing import Any

import torch

from lightning_align.data.loader import endless
from lightning_align.errors import UserError, check_options
from lightning_align.feedback.journal import Journal
from lightning_align.methods.grown import experience_of, rows_of
from lightning_align.methods.imitation import ImitationModule
from lightning_align.rollout.types import Experience

FOLDER = "grown"  # of the run, with one file of samples for each Grow step


class GrowingModule(ImitationModule):
    """Draws the prompts of a Grow step itself; whoever is killed goes on with the batches that are in the file.

    Args:
        grow_batches: Batches of ``data.batch_size`` prompts in a Grow step; each is written when it is there.
        kwargs: The settings of :class:`~lightning_align.methods.online.OnlineModule`.
    """

    def __init__(self, *, grow_batches: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_options("model", ("grow_batches", grow_batches, grow_batches >= 1, "at least 1"))
        self.grow_batches = grow_batches
        self.grow = 0  # Grow steps that are over
        self.grown: Experience | None = None  # samples of this process

    def setup(self, stage: str) -> None:
        """The prompts that Grow steps draw; what the trainer's loop brings is not used."""
        if stage == "fit":
            self.grow_loader = self.trainer.datamodule.further_loader()  # type: ignore[attr-defined]
            self.grow_prompts = endless(self.grow_loader)

    def journal(self) -> Journal:
        """The file of this process's samples of the Grow step under way."""
        rank = "" if self.trainer.world_size == 1 else f"-rank={self.trainer.global_rank}"
        return Journal(Path(self.trainer.default_root_dir) / FOLDER / f"grow={self.grow + 1:02d}{rank}.jsonl")

    def have_samples(self, *, draw: bool) -> dict[str, float]:
        """Have the Grow step's samples, those in its file and (``draw``) those that are missing; their metrics."""
        journal = self.journal()
        if draw:
            self.draw_samples(journal)
        keys = [f"{chunk}-{row}" for chunk in range(self.grow_batches) for row in range(self.rows_of_batch())]
        if any(key not in journal for key in keys):
            raise UserError(
                f"{journal.path} lacks samples that the run has learnt from: put the file back, or start again with "
                "--overwrite"
            )
        self.grown, proxy = experience_of([journal[key] for key in keys], self.sampling.num_samples, self.device)
        assert self.grown.logp is not None
        assert self.grown.ref_logp is not None
        kl = self.grown.logp - self.grown.ref_logp
        return self.completion_metrics(self.grown.rollout, proxy, self.grown.logp, kl)

    def rows_of_batch(self) -> int:
        """Completions of a batch of prompts."""
        return self.trainer.datamodule.batch_size * self.sampling.num_samples  # type: ignore[attr-defined]

    def draw_samples(self, journal: Journal) -> None:
        """Draw, score and write a batch of prompts at a time; what the file has is not drawn again."""
        for chunk in range(self.grow_batches):
            batch = next(self.grow_prompts)
            keys = [f"{chunk}-{row}" for row in range(self.rows_of_batch())]
            known = torch.tensor(all(key in journal for key in keys), device=self.device).float()
            if int(self.all_reduce(known)) == self.trainer.world_size:
                self.draws += 1
                continue
            rollout = self.sample(batch)
            proxy = self.scores(self.frozen.reward, rollout)
            reference = self.stats(self.frozen.reference, rollout)
            rows = rows_of(rollout, proxy, rollout.engine_logp.sum(1), reference.logp.sum(1))
            journal.add({key: row for key, row in zip(keys, rows, strict=True) if key not in journal})

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The Grow step, and the place among the prompts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= {"grow": self.grow, "prompts": self.grow_loader.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there; samples come from their file."""
        super().on_load_checkpoint(checkpoint)
        self.grow = checkpoint["method"]["grow"]
        if hasattr(self, "grow_loader"):  # not for validate and test
            self.grow_loader.load_state_dict(checkpoint["method"]["prompts"])
