"""What every part of a reward is: something that scores text."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# A prompt or a conversation, as it stands in the record.
Prompt = str | list[dict[str, str]]


class Scorer(Protocol):
    """Scores completions as text, so that policy and reward may use different tokenizers."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One float32 score per completion ``[B]``; NaN where this scorer does not apply.

        Args:
            prompts: Prompt of each completion.
            completions: Text without special tokens.
            finished: Whether the completion ended by itself (EOS or a stop string).
            records: The prompts' records, with any further columns.
        """

    def to(self, device: torch.device) -> None:
        """Move what there is to move."""
