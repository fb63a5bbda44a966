"""transformers' ``generate`` behind the engine protocol: slower, for every architecture, and the reference for ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_align.errors import UserError
from lightning_align.models.masks import evaluation_mode
from lightning_align.rollout.ledger import Ledger, pad_id
from lightning_align.rollout.types import Rollout, SamplingParams


class GenerateEngine:
    """Samples with ``model.generate``; it runs the model and its cache, the tokens are chosen as in the static engine.

    So the same seed gives the same completion from both engines (up to rounding), and the global random state is not
    used.

    Args:
        model: A causal language model.
        tokenizer: Ends sequences and turns tokens into text.
        max_batch: Most sequences in one call of ``generate``.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch: int = 128) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}: must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch

    def refresh(self) -> None:
        """Nothing to do: ``generate`` reads the module itself."""

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        records: Sequence[dict[str, Any]] | None = None,
    ) -> Rollout:
        """Draw ``params.num_samples`` completions of every prompt; see ``Engine.generate``."""
        ledger = Ledger(prompt_ids, params, seeds, records, self.model, self.tokenizer)
        prompts = [ids for ids in prompt_ids for _ in range(params.num_samples)]
        order = sorted(range(ledger.num_sequences), key=lambda sequence: len(prompts[sequence]))
        with _plain_generation(self.model):
            for first in range(0, len(order), self.max_batch):
                sequences = order[first : first + self.max_batch]
                self._run(ledger, sequences, [prompts[sequence] for sequence in sequences])
        return ledger.rollout()

    def _run(self, ledger: Ledger, sequences: list[int], prompts: list[Sequence[int]]) -> None:
        """One call of ``generate`` on prompts padded on the left."""
        device = self.model.device
        width = max(len(ids) for ids in prompts)
        pad = pad_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        chooser = _Chooser(ledger, torch.tensor(sequences, device=device))
        cast(GenerationMixin, self.model).generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=ledger.params.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([_Ended(chooser)]),
        )


class _Chooser(LogitsProcessor):
    """Draws the token itself and leaves ``generate`` no other choice."""

    def __init__(self, ledger: Ledger, sequences: Tensor) -> None:
        self.ledger = ledger
        self.sequences = sequences
        self.ended = torch.zeros_like(sequences, dtype=torch.bool)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        running = (~self.ended).nonzero().squeeze(1)
        sequences = self.sequences[running]
        tokens, ended = self.ledger.draw(scores[running].float(), sequences, torch.full_like(sequences, self.step))
        self.step += 1
        self.ended[running] = ended
        chosen = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        chosen[running] = tokens
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Which sequences have ended, as the chooser knows."""

    def __init__(self, chooser: _Chooser) -> None:
        self.chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.chooser.ended


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without its own generation defaults (penalties, temperature, …)."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluation_mode(model):
            yield
    finally:
        model.generation_config = defaults
