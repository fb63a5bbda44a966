"""Supervised fine-tuning: imitate demonstrations."""

from typing import Any

from lightning_align.methods.language_model import LanguageModelModule


class SFTModule(LanguageModelModule):
    """Supervised fine-tuning (InstructGPT, Ouyang et al. 2022, step 1). Reads ``sft`` records.

    The loss is the token-weighted mean over the completions' tokens, the one that ends the turn included.

    Args:
        learning_rate: 2e-5 for billions of parameters, up to 1e-3 for a few millions.
        weight_decay: On matrices only.
        kwargs: The settings of :class:`AlignModule`.
    """

    def __init__(self, *, learning_rate: float = 2e-5, weight_decay: float = 0.1, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
