"""The token-weighted language-modelling step that pre-training and SFT share."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_align.losses.lm import token_cross_entropy
from lightning_align.methods.base import Sums
from lightning_align.models.logprobs import token_stats


def language_model_sums(model: nn.Module, batch: Mapping[str, Tensor], *, entropy: bool) -> tuple[Tensor, Sums]:
    """Σ w·(−log p) over the learnt tokens of a batch, and the sums behind the logged metrics."""
    weights = batch["loss_weights"]
    mask = weights > 0
    stats = token_stats(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        mask=mask,
        position_ids=batch["position_ids"],
        document_ids=batch["document_ids"],
        entropy=entropy,
        correct=True,
    )
    loss, sums = token_cross_entropy(stats.logp, weights)
    count = mask.sum()
    assert stats.correct is not None
    sums["mean_token_accuracy"] = (stats.correct.sum(), count)
    sums["num_tokens"] = (batch["attention_mask"].sum(), count.new_ones(()))
    if stats.entropy is not None:
        sums["entropy"] = (stats.entropy.sum(), count)
    return loss, sums


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """Add exp of the token-weighted mean (never a mean of per-batch exponentials)."""
    metrics.pop("num_tokens", None)
    if "loss" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    return metrics
