"""The token-weighted language-modelling step that pre-training and SFT share."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.errors import UserError
from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.masked import Metrics
from lightning_align.methods.base import AlignModule
from lightning_align.models.logprobs import token_stats
from lightning_align.models.masks import documents_apart

MOST_NATS = 700.0  # e^709 is the largest double


class LanguageModelModule(AlignModule):
    """Next-token prediction on the weighted tokens of a batch; a method adds its defaults and what it measures.

    Args:
        dropout: Every dropout of the network, while it trains.
        kwargs: The settings of :class:`AlignModule`.
    """

    kinds = ("text", "sft")
    may_drop = True

    def __init__(self, *, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout is {dropout}: give a probability from 0 up to (not including) 1")
        self.dropout = dropout

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Token-weighted negative log-likelihood, and the sums behind the logged metrics."""
        assert isinstance(self.model, PreTrainedModel)
        batch = documents_apart(self.model, batch)
        weights = batch["loss_weights"]
        mask = weights > 0
        with self.noise(batch):
            stats = token_stats(
                self.model,
                batch["input_ids"],
                batch["attention_mask"],
                mask=mask,
                position_ids=batch["position_ids"],
                document_ids=batch["document_ids"],
                entropy=self.logs_this_step(),
                correct=self.logs_this_step(),
            )
        loss, sums = token_cross_entropy(stats.logp, weights)
        count = mask.sum()
        # what stands in for an empty batch (a process with nothing to do) is nobody's token
        sums["num_tokens"] = (batch["attention_mask"].sum() * mask.any(), count.new_ones(()))
        if stats.correct is not None:
            sums["mean_token_accuracy"] = (stats.correct.sum(), count)
        if stats.entropy is not None:
            sums["entropy"] = (stats.entropy.sum(), count)
        return loss, sums

    def noise(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Hook: what is added to the embeddings of a batch's tokens."""
        return nullcontext()

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add exp of the token-weighted mean (never a mean of per-batch exponentials)."""
        metrics.pop("num_tokens", None)
        if "loss" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["loss"], MOST_NATS))
        return metrics
