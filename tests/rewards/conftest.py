"""How rewards are called, with the plumbing left out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from lightning_align.rewards.base import Prompt, Scorer

Ask = Callable[..., Tensor]


@pytest.fixture
def ask() -> Ask:
    """Scores of completions, to ``x`` as the prompt, finished and without further columns unless given."""

    def scores(
        scorer: Scorer,
        completions: Sequence[str],
        prompts: Sequence[Prompt] | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        prompts = ["x"] * len(completions) if prompts is None else prompts
        records = [{"prompt": prompt} for prompt in prompts] if records is None else records
        return scorer.score(prompts, completions, finished=[True] * len(completions), records=records)

    return scores
