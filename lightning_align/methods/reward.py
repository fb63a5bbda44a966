"""Reward models: learn a score from comparisons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.errors import UserError
from lightning_align.losses.reward_metrics import summary
from lightning_align.losses.reward_model import pairwise_loss
from lightning_align.methods.base import AlignModule, Sums
from lightning_align.models.export import save_model
from lightning_align.models.heads import RewardModel
from lightning_align.models.loading import count_parameters

REFERENCE_BATCHES = 64  # at most this many training batches fix the zero and the scale of the scores


class RewardModule(AlignModule):
    """Bradley–Terry reward model with a linear head on the SFT backbone. Reads ``preference`` or ``ranked`` records.

    One *prompt* is one batch element: with K ranked responses each is encoded once and every untied pair counts 1/#pairs
    (InstructGPT, eq. 1); with two it is the pairwise loss. Margins by strength (LLaMA-2) come from ``data.margin``. The
    exported model carries the mean and standard deviation of its scores on training responses, so that scores start at 0.

    Args:
        learning_rate: 1e-5 for billions of parameters; 1e-4 to 3e-4 for a few millions.
        label_smoothing: Probability that a label is wrong.
        center_rewards_coefficient: Weight of the squared sum of a pair's scores, which keeps scores near 0; 0.01 when used.
        kwargs: The settings of :class:`AlignModule`.
    """

    model: RewardModel

    def __init__(
        self,
        *,
        learning_rate: float = 1e-5,
        label_smoothing: float = 0.0,
        center_rewards_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing is {label_smoothing}: give a probability from 0 to below 0.5")
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient
        self._eval_pairs: list[dict[str, Tensor]] = []

    def build_model(self) -> nn.Module:
        """The backbone of ``model`` under a fresh score head."""
        return RewardModel.from_backbone(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype)

    def parameter_roles(self) -> dict[str, int]:
        """The reward model's parameters."""
        return {"reward": count_parameters(self.source, self.tokenizer)}

    # ------------------------------------------------------------------ objective
    def _loss(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Sums]:
        loss, sums = pairwise_loss(
            scores,
            batch["pair_chosen"],
            batch["pair_rejected"],
            pair_weight=batch["pair_weight"],
            pair_margin=batch["pair_margin"],
            pair_label=batch["pair_label"],
            label_smoothing=self.label_smoothing,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        sums["num_tokens"] = (batch["attention_mask"].sum(), loss.new_ones(()))
        return loss, sums

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Sums]:
        """Weighted sum of pair losses, and the sums behind TRL's metrics."""
        return self._loss(self.model(batch["input_ids"], batch["attention_mask"]), batch)

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss sums, and the decided pairs themselves: calibration is a property of the whole set."""
        scores = self.model(batch["input_ids"], batch["attention_mask"])
        self.add_eval_sums(self._loss(scores, batch)[1])
        decided = (batch["pair_weight"] > 0) & (batch["pair_label"] > 0.5)
        chosen, rejected = batch["pair_chosen"][decided], batch["pair_rejected"][decided]
        lengths = batch["completion_mask"].sum(1)
        self._eval_pairs.append(
            {
                "chosen": scores[chosen],
                "rejected": scores[rejected],
                "chosen_length": lengths[chosen],
                "rejected_length": lengths[rejected],
                "strength": batch["pair_strength"][decided],
            }
        )

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Accuracy by strength, calibration, dependence on length, over all pairs of all ranks."""
        metrics.pop("num_tokens", None)
        pairs, self._eval_pairs = self._eval_pairs, []
        columns = {name: torch.cat([pair[name] for pair in pairs]) for name in pairs[0]}
        if self.trainer.world_size > 1:
            columns = {name: self.gather_rows(column) for name, column in columns.items()}
        columns = {name: column.cpu() for name, column in columns.items()}
        delta = columns["chosen"] - columns["rejected"]
        return metrics | (dict(summary(delta, **columns)) if len(delta) else {})

    # ------------------------------------------------------------------ normalisation and export
    @torch.no_grad()
    def reference_scores(self) -> Tensor:
        """Raw scores of training responses, which define the zero and the scale."""
        self.model.eval()
        scores = []
        for index, batch in enumerate(self.trainer.datamodule.reference_dataloader()):  # type: ignore[attr-defined]
            if index >= REFERENCE_BATCHES:
                break
            batch = {name: value.to(self.device) for name, value in batch.items()}
            scores.append(self.model(batch["input_ids"], batch["attention_mask"]))
        return torch.cat(scores)

    def export(self, folder: Path) -> None:
        """Store mean and standard deviation of the reference scores beside the weights, then save."""
        self.model.set_normalisation(self.reference_scores())
        save_model(self.model.network, self.tokenizer, folder)
