"""Pre-training: predict every next token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_align.methods.base import AlignModule, Sums
from lightning_align.methods.language_model import language_model_sums, with_perplexity


class PretrainModule(AlignModule):
    """Next-token prediction on documents that are packed without seeing each other. Reads ``text`` records.

    Args:
        learning_rate: About 3e-3 for 1 M parameters, 3e-4 for 1 B.
        weight_decay: On matrices only.
        adam_beta2: 0.95 forgets faster than AdamW's default, as is usual in pre-training.
        warmup_ratio: Share of the steps that warm up linearly.
        kwargs: The settings of :class:`AlignModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        adam_beta2: float = 0.95,
        warmup_ratio: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta2=adam_beta2,
            warmup_ratio=warmup_ratio,
            **kwargs,
        )

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Sums]:
        """Token-weighted negative log-likelihood."""
        return language_model_sums(self.model, batch, entropy=False)

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Perplexity from the global token mean."""
        return with_perplexity(metrics)
