"""Reward models: learn a score from comparisons."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_align.errors import check_options
from lightning_align.losses.masked import Metrics
from lightning_align.losses.reward_metrics import calibration_metrics, pair_metrics
from lightning_align.losses.reward_model import preference_loss
from lightning_align.methods.base import AlignModule, check_trainable
from lightning_align.models.export import save_model
from lightning_align.models.heads import RewardModel
from lightning_align.models.loading import count_parameters

REFERENCE_BATCHES = 64  # at most this many training batches fix the zero and the scale of the scores


class RewardModule(AlignModule):
    """Bradley–Terry reward model with a linear head on the SFT backbone. Reads ``preference`` or ``ranked`` records.

    One *prompt* is one batch element: with K ranked responses each is encoded once and every untied pair counts
    1/#pairs (InstructGPT, eq. 1); with two it is the pairwise loss. Margins by strength (LLaMA-2) come from
    ``data.margin``. The exported model carries mean and standard deviation of its scores on training responses, so that
    scores start at 0.

    Args:
        learning_rate: 1e-5 for billions of parameters; 1e-4 to 3e-4 for a few millions.
        label_smoothing: Probability that a label is wrong.
        center_rewards_coefficient: Weight of the squared sum of a pair's scores, which keeps them near 0; 0.01 when on.
        kwargs: The settings of :class:`AlignModule`.
    """

    model: RewardModel
    kinds = ("preference",)
    trained_roles = ("reward",)

    def __init__(
        self,
        *,
        learning_rate: float = 1e-5,
        label_smoothing: float = 0.0,
        center_rewards_coefficient: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        centre = center_rewards_coefficient
        check_options(
            "model",
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a probability from 0 to below 0.5"),
            ("center_rewards_coefficient", centre, centre >= 0, "0 or more"),
        )
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient
        self._eval_pairs: list[dict[str, Tensor]] = []
        self.normalised = False

    def build_model(self) -> nn.Module:
        """The backbone of ``model`` under a fresh score head."""
        model = RewardModel.from_backbone(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype)
        check_trainable(model.network)
        self.with_checkpointing(model.network)
        return model

    def parameter_roles(self) -> dict[str, int]:
        """The reward model's parameters."""
        return {"reward": count_parameters(self.source, self.tokenizer, AutoModelForSequenceClassification)}

    # ------------------------------------------------------------------ objective
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Weighted sum of pair losses, and the sums behind TRL's metrics."""
        return self.loss_of_scores(self.model(batch["input_ids"], batch["attention_mask"]), batch)

    def loss_of_scores(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """:meth:`loss` of scores that are there already ``[R]``."""
        loss, sums = preference_loss(
            scores,
            batch["pair_chosen"],
            batch["pair_rejected"],
            weight=batch["pair_weight"],
            margin=batch["pair_margin"],
            label=batch["pair_label"],
            label_smoothing=self.label_smoothing,
            center_coef=self.center_rewards_coefficient,
        )
        # the stand-in for an empty batch (a process with nothing to do) weighs nothing
        real = (batch["pair_weight"] > 0).any()
        sums["num_tokens"] = (batch["attention_mask"].sum() * real, loss.new_ones(()))
        return loss, sums

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss sums, and the decided pairs themselves: calibration is a property of the whole set."""
        scores = self.model(batch["input_ids"], batch["attention_mask"])
        self.add_eval_sums(self.loss_of_scores(scores, batch)[1])
        self._eval_pairs.append(pair_metrics(scores, batch))

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Accuracy by strength, calibration, dependence on length, over all pairs of all ranks."""
        metrics.pop("num_tokens", None)
        pairs, self._eval_pairs = self.gather(self._eval_pairs), []
        return metrics | calibration_metrics(pairs)

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

    def normalise(self) -> None:
        """Store mean and standard deviation of the reference scores beside the weights."""
        self.model.set_normalisation(self.reference_scores())

    def on_train_end(self) -> None:
        """Normalise while the model is still on its device; the Trainer takes it off before the export."""
        self.normalise()
        self.normalised = True

    def export(self, folder: Path) -> None:
        """Save, normalised; a checkpoint that is exported by itself is normalised first."""
        if not self.normalised:
            self.normalise()
        save_model(self.model.network, self.tokenizer, folder)
