"""Reward models: learn a score from comparisons, rankings or scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_align.data.answer_rows import packed_rows
from lightning_align.data.records import STRENGTHS
from lightning_align.errors import UserError, check_options
from lightning_align.losses.masked import Metrics
from lightning_align.losses.ranking import plackett_luce_loss
from lightning_align.losses.reward_metrics import (
    ReliabilityBin,
    calibration_metrics,
    differences,
    pair_metrics,
    regression_metrics,
    reliability_bins,
    score_metrics,
)
from lightning_align.losses.reward_model import centring, comparison_metrics, pairs_of, preference_loss, regression_loss
from lightning_align.losses.tie_models import TIE_MODELS, TieModel, tied_preference_loss
from lightning_align.methods.base import AlignModule
from lightning_align.models.heads import Normalisation, RewardModel, moments_of
from lightning_align.models.loading import Parameters
from lightning_align.models.masks import keeps_documents_apart

REFERENCE_BATCHES = 64  # at most this many training batches fix the zero and the scale of the scores, but for
REFERENCE_RESPONSES = 256  # this many responses
TIE_LEARNING_RATE = 0.05  # of one number of order 1, which at a network's rate would stay where it starts
HUBER_DELTA = 1.0
RELIABILITY_BINS, PAIRS_IN_A_BIN = 10, 30  # at most so many bins, with at least so many pairs where there are more
REGRESSIONS: dict[str, float | None] = {"squared_error": None, "huber": HUBER_DELTA}


class RewardModule(AlignModule):
    """Reward model with a linear head on the SFT backbone. Reads ``preference``, ``ranked`` or ``scored`` records.

    One *prompt* is one batch element: with K ranked responses each is encoded once and every untied pair counts
    1/#pairs (InstructGPT, eq. 1); with two it is the pairwise loss. Margins by strength (LLaMA-2) come from
    ``data.margin``, and what becomes of ties from ``data.ties``. The exported model carries mean and standard deviation
    of its scores on training responses, so that scores start at 0.

    Args:
        learning_rate: 1e-5 for billions of parameters; 1e-4 to 5e-4 for a few millions.
        objective: Of comparisons ``bradley_terry``, pair by pair, or ``plackett_luce``, a ranking as a whole; of scores
            ``squared_error`` or ``huber``, on scores standardised to mean 0 and deviation 1.
        label_smoothing: Probability that a label is wrong (``bradley_terry``).
        center_rewards_coefficient: Weight of the squared sum of a pair's scores, which keeps them near 0; 0.01 when on.
        normalize: What the exported model's scores are: ``mean`` (minus that of the training responses' scores),
            ``full`` (divided by their deviation too); null is ``mean``, and for scores their own unit.
        kwargs: The settings of :class:`AlignModule`.
    """

    model: RewardModel
    kinds = ("preference",)
    trained_roles = ("reward",)
    tie_models = tuple(TIE_MODELS)

    def __init__(
        self,
        *,
        learning_rate: float = 1e-5,
        objective: Literal["bradley_terry", "plackett_luce", "squared_error", "huber"] = "bradley_terry",
        label_smoothing: float = 0.0,
        center_rewards_coefficient: float = 0.0,
        normalize: Literal["mean", "full"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        centre, pairwise = center_rewards_coefficient, objective == "bradley_terry"
        compares = objective not in REGRESSIONS
        check_options(
            "model",
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a probability from 0 to below 0.5"),
            ("label_smoothing", label_smoothing, pairwise or not label_smoothing, f"0 with objective {objective}"),
            ("center_rewards_coefficient", centre, centre >= 0, "0 or more"),
            ("center_rewards_coefficient", centre, compares or not centre, f"0 with objective {objective}"),
        )
        self.uses_margins = pairwise
        self.objective = objective
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient
        own: Normalisation = "mean" if compares else "target"
        self.normalisation: Normalisation = normalize or own
        if not compares:
            self.record_kind = "scored"
        if not pairwise:
            self.tie_models = ()
        self.tie_model: TieModel | None = None
        self.reliability: list[ReliabilityBin] = []  # of the last evaluation
        self.normalised = False
        self._evaluated: list[dict[str, Tensor]] = []

    # ------------------------------------------------------------------ model
    def build_model(self) -> nn.Module:
        """The backbone of ``model`` under a fresh score head."""
        model = RewardModel.from_backbone(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype)
        self.prepared(model.network)
        model.head.requires_grad_(True)
        return model

    def configure_model(self) -> None:
        """The reward model; beside it the parameter of a tie model, and what scores are standardised by."""
        super().configure_model()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule.ties in TIE_MODELS and self.tie_model is None:
            self.tie_model = TIE_MODELS[datamodule.ties]
            stored = getattr(self.model.config, "tie_model", None) or {}
            known = stored.get("name") == self.tie_model.name  # of a reward model that goes on
            parameter = stored["parameter"] if known else self.tie_model.start
            self.free_tie_parameter = nn.Parameter(torch.tensor(self.tie_model.to_free(parameter)))
        if "train" in datamodule.datasets and self.objective in REGRESSIONS:
            table = datamodule.datasets["train"].table
            self.model.set_target(*moments_of(torch.from_numpy(table["score"])))

    def parameter_roles(self) -> dict[str, Parameters]:
        """The reward model's parameters."""
        return self.count("reward", AutoModelForSequenceClassification)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameter of a tie model learns at a rate of its own, without decay."""
        groups = super().parameter_groups()
        if self.tie_model is not None:
            groups.append({"params": [self.free_tie_parameter], "weight_decay": 0.0, "lr": TIE_LEARNING_RATE})
        return groups

    # ------------------------------------------------------------------ objective
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Weighted sum of the losses of prompts, and the sums behind TRL's metrics."""
        return self.loss_of_scores(self.scores(batch), batch)

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Raw scores of a batch's answers ``[R]``, in as little space as the model can tell them apart in."""
        if keeps_documents_apart(self.model.network, "every answer gets a row of its own, with its prompt"):
            rows = packed_rows(batch, self.model.config.get_text_config().hidden_size)
            if bool(rows.mask.any(1).all()):  # a sequence of one token has no slot that is predicted
                return self.model.answer_scores(rows)
        return self.model(batch["input_ids"], batch["attention_mask"])

    def loss_of_scores(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """:meth:`loss` of raw scores that are there already ``[R]``."""
        if self.objective in REGRESSIONS:
            loss, sums = self.regression(scores, batch)
        elif self.objective == "plackett_luce":
            loss, sums = self.plackett_luce(scores, batch)
        else:
            loss, sums = self.pairwise(scores, batch)
        # the stand-in for an empty batch (a process with nothing to do) weighs nothing
        real = (batch["group_weight"] > 0).any()
        sums["num_tokens"] = (batch["attention_mask"].sum() * real, loss.new_ones(()))
        return loss, sums

    def pairwise(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Bradley–Terry, or a model in which answers may tie."""
        sides = scores, batch["pair_chosen"], batch["pair_rejected"]
        options: dict[str, Any] = {
            **{name: batch[f"pair_{name}"] for name in ("weight", "margin", "label")},
            "label_smoothing": self.label_smoothing,
            "center_coef": self.center_rewards_coefficient,
        }
        if self.tie_model is None:
            return preference_loss(*sides, **options)
        parameter = self.tie_model.from_free(self.free_tie_parameter)  # η of Rao and Kupper, κ of Davidson
        loss, sums = tied_preference_loss(
            *sides, parameter, log_probabilities=self.tie_model.log_probabilities, **options
        )
        return loss, sums | {"ties/parameter": (parameter.detach().clone(), torch.ones_like(parameter))}

    def plackett_luce(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Whole rankings; centring and metrics are those of their pairs."""
        sides = scores, batch["pair_chosen"], batch["pair_rejected"]
        labels = {name: batch[f"pair_{name}"] for name in ("weight", "label")}
        loss, sums = plackett_luce_loss(scores, batch["group_rows"], batch["group_ranks"], weight=batch["group_weight"])
        loss = loss + centring(pairs_of(*sides, **labels), self.center_rewards_coefficient)
        return loss, {"loss": (loss.detach(), sums["loss"][1]), **comparison_metrics(*sides, **labels)}

    def regression(self, scores: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Standardised scores."""
        targets = (batch["score"] - self.model.target_mean) / self.model.target_std
        return regression_loss(scores, targets, weight=batch["response_weight"], delta=REGRESSIONS[self.objective])

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss sums, and the decided pairs (or scores) themselves: calibration is a property of the whole set."""
        scores = self.scores(batch)
        self.add_eval_sums(self.loss_of_scores(scores, batch)[1])
        if self.objective in REGRESSIONS:
            self._evaluated.append(score_metrics(self.model.normalise(scores, "target"), batch))
        else:
            self._evaluated.append(pair_metrics(scores, batch))

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Accuracy by strength, calibration, dependence on length, over all pairs of all ranks; or errors of scores."""
        metrics.pop("num_tokens", None)
        evaluated, self._evaluated = self.gather(self._evaluated), []
        if self.objective in REGRESSIONS:
            return metrics | regression_metrics(evaluated)
        delta = differences(evaluated)
        if not delta.isfinite().all():
            raise UserError(
                f"{int((~delta.isfinite()).sum()):,} of {len(delta):,} held-out pairs have a score that is not finite: "
                "the model has diverged, give a lower model.learning_rate"
            )
        bins = min(RELIABILITY_BINS, max(1, len(delta) // PAIRS_IN_A_BIN))
        self.reliability = reliability_bins(delta, num_bins=bins)
        return metrics | calibration_metrics(evaluated, STRENGTHS)

    # ------------------------------------------------------------------ normalisation and export
    @torch.no_grad()
    def reference_scores(self) -> Tensor:
        """Raw scores of training responses, which define the zero and the scale."""
        self.model.eval()
        scores: list[Tensor] = []
        for index, batch in enumerate(self.trainer.datamodule.reference_dataloader()):  # type: ignore[attr-defined]
            if index >= REFERENCE_BATCHES and sum(map(len, scores)) >= REFERENCE_RESPONSES:
                break
            batch = {name: value.to(self.device) for name, value in batch.items()}
            scores.append(self.scores(batch))
        return torch.cat(scores)

    def normalise(self) -> None:
        """Store mean and standard deviation of the reference scores beside the weights, and the tie model."""
        self.model.set_normalisation(self.reference_scores(), self.normalisation)
        if self.tie_model is not None:
            parameter = float(self.tie_model.from_free(self.free_tie_parameter.detach()))
            self.model.config.tie_model = {"name": self.tie_model.name, "parameter": parameter}
        elif hasattr(self.model.config, "tie_model"):  # of the reward model that it began with
            del self.model.config.tie_model

    def on_train_end(self) -> None:
        """Normalise while the model is still on its device; the Trainer takes it off before the export."""
        self.normalise()
        self.normalised = True

    def export(self, folder: Path) -> None:
        """Save, normalised; a checkpoint that is exported by itself is normalised first."""
        if not self.normalised:
            self.normalise()
        self.save(self.model.network, folder)

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What scores were standardised by: an evaluation alone does not read the training data."""
        super().on_save_checkpoint(checkpoint)
        if self.objective in REGRESSIONS:
            checkpoint["method"]["target"] = [self.model.target_mean, self.model.target_std]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Standardise by the same."""
        super().on_load_checkpoint(checkpoint)
        if self.objective in REGRESSIONS:
            if "target" not in checkpoint["method"]:
                raise UserError(
                    f"the checkpoint learnt from comparisons, not from scores ({self.objective}): give another"
                )
            self.model.set_target(*checkpoint["method"]["target"])
