"""Samples of a policy on fixed prompts: what they score, and how far they are from the reference.

Axes: P prompts, M samples of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.data.encode import encode_prompts
from lightning_align.errors import UserError
from lightning_align.lab.overopt import Array
from lightning_align.losses.kl import k1, k3, sequence_kl
from lightning_align.models.loading import load_causal_lm, load_tokenizer, max_positions
from lightning_align.models.logprobs import token_stats
from lightning_align.rewards.base import Reward
from lightning_align.rollout.engine import EngineName, build_engine
from lightning_align.rollout.types import Rollout, SamplingParams, by_length

RUN_STRIDE, STREAM_STRIDE = 1 << 40, 1 << 39  # seeds of two seeds, and of two sides of a comparison, never meet


@dataclass(frozen=True)
class Prompts:
    """What every policy answers.

    Attributes:
        records: Records with ``prompt`` and further columns, which rewards may read.
        places: Where each comes from, for messages.
    """

    records: list[dict[str, Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Settings:
    """How answers are drawn and computed; the same for every policy."""

    params: SamplingParams
    seed: int = 0
    engine: EngineName = "auto"
    batch_size: int = 128
    dtype: str = "float32"

    @property
    def measures_kl(self) -> bool:
        """Whether samples come from the policy's own distribution, as the KL needs."""
        return self.params.temperature == 1 and not self.params.truncates and not self.params.greedy


@dataclass(frozen=True)
class Samples:
    """What was drawn from a policy.

    Attributes:
        texts: Completions of each prompt, ``[P][M]``.
        columns: Numbers of each completion ``[P, M]``: ``length``, ``truncated``, ``entropy`` (summed over tokens),
            ``kl``, ``kl_k1`` and ``kl_k3`` where there is a reference, scores by their name.
    """

    texts: list[list[str]]
    columns: dict[str, Array]

    def select(self, rows: Sequence[int]) -> "Samples":
        """Those of some prompts."""
        return Samples([self.texts[row] for row in rows], {name: column[rows] for name, column in self.columns.items()})


class Policy:
    """A loaded policy with its tokenizer; the reference joins it where the KL is wanted."""

    def __init__(self, source: str, settings: Settings) -> None:
        self.source = source
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(source)
        self.model = self._load(source)

    def _load(self, source: str) -> PreTrainedModel:
        model = load_causal_lm(source, tokenizer=self.tokenizer, dtype=self.settings.dtype).eval().requires_grad_(False)
        model.to(self.device)
        return model

    def load_reference(self, source: str) -> PreTrainedModel:
        """A model with the same tokens; :class:`UserError` for one with others, whose KL has no meaning."""
        if load_tokenizer(source).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(f"{source} has another vocabulary than {self.source}: there is no KL between them")
        return self._load(source)

    def draw(self, prompts: Prompts, *, stream: int = 0) -> Rollout:
        """``num_samples`` completions of every prompt; seeds follow from the prompt's position alone.

        Args:
            prompts: What to answer.
            stream: 0, or 1 for the other side of a comparison, whose samples are to be independent.
        """
        params = self.settings.params
        ids = encode_prompts(self.tokenizer, [r["prompt"] for r in prompts.records], places=prompts.places)
        self._check_lengths(ids, prompts.places)
        first = self.settings.seed * RUN_STRIDE + stream * STREAM_STRIDE
        seeds = range(first, first + len(ids) * params.num_samples)
        engine = build_engine(self.settings.engine, self.model, self.tokenizer, max_batch=self.settings.batch_size)
        return engine.generate(ids, params, seeds=seeds, records=prompts.records).to(self.device)

    def _check_lengths(self, ids: Sequence[Sequence[int]], places: Sequence[str]) -> None:
        limit = max_positions(self.model.config)
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        tokens, new = len(ids[longest]), self.settings.params.max_new_tokens
        if limit is not None and tokens + new > limit:
            raise UserError(
                f"{places[longest]}: the prompt has {tokens} tokens, with --max_new_tokens {new} more than the {limit} "
                f"that {self.source} can take: lower --max_new_tokens or leave the record out"
            )

    @torch.no_grad()
    def token_columns(self, rollout: Rollout, reference: PreTrainedModel | None) -> dict[str, Tensor]:
        """Sums over the tokens of each completion ``[B]``: entropy, and three estimates of the KL to the reference."""
        columns: dict[str, Tensor] = {}
        for rows in by_length(rollout, self.settings.batch_size):
            part = rollout.select(rows).cropped()
            for name, values in self._sums(part, reference).items():
                columns.setdefault(name, values.new_zeros(len(rollout)))[rows] = values
        return columns

    def _sums(self, part: Rollout, reference: PreTrainedModel | None) -> dict[str, Tensor]:
        mask = part.completion_mask
        inputs = (part.input_ids, part.attention_mask)
        stats = token_stats(self.model, *inputs, mask=mask, entropy=True, ref_model=reference)
        assert stats.entropy is not None
        sums = {"entropy": stats.entropy.sum(1)}
        if reference is not None:
            assert stats.kl is not None
            # both by one path: the one that also gives entropies may round otherwise
            logp, ref_logp = (token_stats(model, *inputs, mask=mask).logp for model in (self.model, reference))
            estimates = {"kl": stats.kl, "kl_k1": k1(logp, ref_logp), "kl_k3": k3(logp, ref_logp)}
            sums |= {name: sequence_kl(values, mask) for name, values in estimates.items()}
        return sums


def score_columns(name: str, reward: Reward, rollout: Rollout) -> dict[str, Tensor]:
    """Scores of completions ``[B]`` under ``name``; of several parts, each under ``name_part`` too."""
    scores = reward.score(
        [record["prompt"] for record in rollout.records],
        rollout.completions,
        finished=[reason != "length" for reason in rollout.finish_reason],
        records=rollout.records,
        lengths=rollout.completion_lengths,
        held_out=True,
    )
    parts = {f"{name}_{part}": values for part, values in scores.parts.items() if part != name}
    return {name: scores.proxy, **(parts if len(scores.parts) > 1 else {})}


def gathered(rollout: Rollout, columns: dict[str, Tensor], num_samples: int) -> Samples:
    """Columns ``[B]`` and texts as ``[P, M]``; lengths are added."""
    truncated = torch.tensor([reason == "length" for reason in rollout.finish_reason])
    columns = {"length": rollout.completion_lengths, "truncated": truncated, **columns}
    shape = (-1, num_samples)
    arrays = {name: np.asarray(values.double().cpu()).reshape(shape) for name, values in columns.items()}
    texts = rollout.completions
    groups = [list(texts[start : start + num_samples]) for start in range(0, len(texts), num_samples)]
    return Samples(groups, arrays)
