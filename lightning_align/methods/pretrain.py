"""Pre-training: predict every next token."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_align.methods.language_model import LanguageModelModule


class PretrainModule(LanguageModelModule):
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

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Also nats and bytes of text, which compare models with different vocabularies."""
        _, sums = self.loss(batch)
        nats, _ = sums["loss"]
        rows = zip(batch["input_ids"], batch["document_ids"], strict=True)
        # each by itself: a tokenizer may put something between the documents of a row
        documents = [ids[inside == number] for ids, inside in rows for number in range(int(inside.max()) + 1)]
        texts = self.tokenizer.batch_decode(documents, skip_special_tokens=True)
        sums["bits_per_byte"] = (nats / math.log(2), nats.new_tensor(sum(len(text.encode()) for text in texts)))
        self.add_eval_sums(sums)
