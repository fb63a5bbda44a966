"""Rewards that are trained models, with their own tokenizer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.data.encode import encode_pairs
from lightning_align.models.heads import Normalisation, RewardModel
from lightning_align.models.loading import load_tokenizer, max_positions
from lightning_align.rewards.base import Prompt

_LOGGER = logging.getLogger(__name__)


class LearnedReward:
    """Scores of a reward model, read at the last token; normalised as it says (r − mean of its reference set), or else.

    Texts are encoded by the reward model's own tokenizer and template. What is longer than its context loses tokens
    from the left of the prompt, and is counted in ``num_truncated``. The model computes in the type in which it is
    stored; scores are float32.

    Args:
        source: Run directory, path or hub id of a reward model.
        normalisation: Another way to normalise than the model's own, see ``RewardModel.normalise``.
        max_batch_tokens: Padded tokens per forward pass.
    """

    def __init__(
        self, source: str, *, normalisation: Normalisation | None = None, max_batch_tokens: int = 16_384
    ) -> None:
        self.source = source
        self.normalisation = normalisation
        self.model = RewardModel.from_pretrained(source, dtype="auto", merge=False).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(source)
        self.max_batch_tokens = max_batch_tokens
        self.max_length = self._context_length()
        self.num_truncated = 0

    def _context_length(self) -> int:
        most = int(self.tokenizer.model_max_length)
        limit = max_positions(self.model.config)
        return most if limit is None else min(limit, most)

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One normalised score per completion ``[B]``; an unfinished one is read at its last token, without EOS."""
        encoded = self._encode(prompts, completions, finished)
        scores = torch.empty(len(encoded), dtype=torch.float32)  # whatever the default dtype of the training is
        for rows in _batches([len(ids) for ids in encoded], self.max_batch_tokens):
            scores[rows] = self._forward([encoded[row] for row in rows])
        return scores

    def _encode(
        self, prompts: Sequence[Prompt], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        for ended in (True, False):
            group = [row for row, value in enumerate(finished) if bool(value) is ended]
            pairs = encode_pairs(
                self.tokenizer, [prompts[row] for row in group], [completions[row] for row in group], finished=ended
            )
            for row, pair in zip(group, pairs, strict=True):
                rows[row] = self._fit(pair.input_ids)
        return rows

    def _fit(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        if self.num_truncated == 0:
            _LOGGER.warning(
                "a prompt with its completion has %d tokens, reward model %s reads %d: the start is cut off; "
                "later cases are counted silently",
                len(ids),
                self.source,
                self.max_length,
            )
        self.num_truncated += 1
        start = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
        return start + ids[len(ids) - self.max_length + len(start) :]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        longest = max(len(ids) for ids in rows)
        # the mask, not the id, says what is padding
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=device)
        lengths = torch.tensor([len(ids) for ids in rows], device=device)
        attention_mask = torch.arange(longest, device=device) < lengths[:, None]
        return self.model.normalised_scores(input_ids, attention_mask, self.normalisation).float().cpu()


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows grouped by similar length, longest first, so that rows × longest stays within ``max_tokens``."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
