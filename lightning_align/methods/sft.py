"""Supervised fine-tuning: imitate demonstrations."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.errors import check_options
from lightning_align.methods.language_model import LanguageModelModule
from lightning_align.models.neftune import embedding_noise


class SFTModule(LanguageModelModule):
    """Supervised fine-tuning (InstructGPT, Ouyang et al. 2022, step 1). Reads ``sft`` records.

    The loss is the token-weighted mean over the completions' tokens, the one that ends the turn included.

    Args:
        learning_rate: 2e-5 for billions of parameters, up to 1e-3 for a few millions.
        weight_decay: On matrices only.
        neftune_noise_alpha: Noise on the embeddings while training, uniform within ± this / √(tokens · width) (NEFTune,
            Jain et al. 2023); 5 to 15 when on.
        kwargs: The settings of :class:`AlignModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.1,
        neftune_noise_alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
        alpha = neftune_noise_alpha
        check_options("model", ("neftune_noise_alpha", alpha, 0 <= alpha < float("inf"), "0 or more"))
        self.neftune_noise_alpha = alpha

    def noise(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """NEFTune's, if that was asked for."""
        if not self.neftune_noise_alpha:
            return super().noise(batch)
        assert isinstance(self.model, PreTrainedModel)
        return embedding_noise(self.model, self.neftune_noise_alpha, batch["document_ids"])
