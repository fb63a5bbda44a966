"""A policy that is sampled: its models, its samples with their scores and log-probs, and what is measured of them."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_align.data.answer_rows import packed_rows
from lightning_align.errors import UserError, check_options
from lightning_align.losses.kl import k1, sequence_kl
from lightning_align.methods.frozen import FrozenModule
from lightning_align.methods.measures import (
    column_sums,
    length_columns,
    part_columns,
    score_columns,
    truncated,
    with_deviations,
)
from lightning_align.models.answers import answer_token_stats
from lightning_align.models.logprobs import TokenStats, token_stats
from lightning_align.models.lora import WithoutAdapter
from lightning_align.models.masks import keeps_documents_apart
from lightning_align.rewards.base import Reward, Scores
from lightning_align.rollout.engine import Engine, build_engine
from lightning_align.rollout.types import Rollout, SamplingParams, by_length

RUN_STRIDE = 1 << 40  # sampling seeds of runs are this far apart
ENGINE_DIFFERENCE = "sampling/sampling_logp_difference"


class SamplingModule(FrozenModule):
    """A policy that is sampled and scored; reads ``prompt`` records.

    Args:
        max_new_tokens: Longest completion in tokens.
        temperature: Sampling temperature; log-probs of policy and reference use the same.
        top_k: Keep the k likeliest tokens when sampling; 0 keeps all.
        top_p: Nucleus sampling; 1 keeps all.
        min_p: Keep tokens at least this likely relative to the likeliest; 0 keeps all.
        samples_per_prompt: Completions drawn for each prompt.
        stop_strings: Texts that end a completion (after the token that completes them).
        engine: Sampler: our ``static`` cache, transformers' ``generate``, or ``auto`` for the first that fits.
        rollout_batch_size: Most completions decoded at a time.
        micro_batch_size: Sequences per forward pass; lower it to save memory, the gradient stays the same.
        kwargs: The settings of :class:`~lightning_align.methods.frozen.FrozenModule`.
    """

    kinds = ("prompt",)

    def __init__(
        self,
        *,
        max_new_tokens: int = 53,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        samples_per_prompt: int = 1,
        stop_strings: Sequence[str] = (),
        engine: Literal["auto", "static", "generate"] = "auto",
        rollout_batch_size: int = 128,
        micro_batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_options(
            "model",
            ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1, "at least 1"),
            ("rollout_batch_size", rollout_batch_size, rollout_batch_size >= 1, "at least 1"),
            ("micro_batch_size", micro_batch_size, micro_batch_size >= 1, "at least 1"),
        )
        self.sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            num_samples=samples_per_prompt,
            stop_strings=tuple(stop_strings),
        )
        self.temperature = temperature
        self.engine_name = engine
        self.rollout_batch_size = rollout_batch_size
        self.micro_batch_size = micro_batch_size

    # ------------------------------------------------------------------ models
    def max_tokens(self) -> int | None:
        """Longest prompt: the completion needs room behind it."""
        limit = super().max_tokens()
        if limit is None:
            return None
        if limit <= self.sampling.max_new_tokens:
            raise UserError(
                f"model.max_new_tokens is {self.sampling.max_new_tokens}, but {self.source} has {limit} positions: no "
                "prompt fits before such a completion"
            )
        return limit - self.sampling.max_new_tokens

    def warn_of_truncation(self) -> None:
        """Say that a policy gradient is biased where samples come from less than the whole distribution."""
        if self.sampling.truncates:
            warnings.warn(
                "model.top_k, top_p or min_p cut the distribution that is sampled from, while the ratios of the policy "
                "gradient are of the whole one: expect a biased gradient",
                stacklevel=3,
            )

    def setup_sampling(self) -> None:
        """Move the frozen models to the device and build the sampler."""
        self.frozen.to(self.device)
        assert isinstance(self.model, PreTrainedModel)
        for network in (self.frozen.reference, self.frozen.initial):
            if isinstance(network, PreTrainedModel) and network.dtype != self.model.dtype:
                network.to(dtype=self.model.dtype)  # type: ignore[call-arg] # trainer.precision has converted the policy
        self.sampler: Engine = build_engine(
            self.engine_name, self.model, self.tokenizer, max_batch=self.rollout_batch_size
        )

    # ------------------------------------------------------------------ samples
    def seed(self) -> int:
        """First of the sampling seeds that belong to this run."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) * RUN_STRIDE

    def draw(self, batch: Mapping[str, Any], params: SamplingParams, seeds: Sequence[int]) -> Rollout:
        """Completions from the current weights, one seed for each."""
        return self.sampler.generate(batch["prompt_ids"], params, seeds=seeds, records=batch["records"]).to(self.device)

    @torch.no_grad()
    def stats(
        self,
        model: nn.Module | WithoutAdapter,
        rollout: Rollout,
        *,
        entropy: bool = False,
        temperature: float | None = None,
        against: nn.Module | WithoutAdapter | None = None,
    ) -> TokenStats:
        """Token statistics of a whole rollout without gradient, a micro-batch of similar length at a time."""

        def compute(part: Rollout) -> TokenStats:
            return self.completion_stats(
                model,
                part,
                temperature=self.temperature if temperature is None else temperature,
                entropy=entropy,
                ref_model=against,
            )

        logp, *others = self.in_micro_batches(rollout, compute)
        assert logp is not None
        return TokenStats(logp, *others)

    def completion_stats(self, model: nn.Module | WithoutAdapter, rollout: Rollout, **options: Any) -> TokenStats:
        """Statistics of completions ``[B, T]`` with gradient, in one forward pass.

        A prompt with several completions is encoded once, where that is cheaper and the model can tell them apart.

        Args:
            model: The policy, or its reference.
            rollout: The completions.
            options: Of :func:`token_stats`.
        """
        mask = rollout.completion_mask
        if len(rollout.prompt_index.unique()) == len(rollout) or not self.tells_apart():
            return token_stats(model, rollout.input_ids, rollout.attention_mask, mask=mask, **options)
        assert isinstance(self.model, PreTrainedModel)
        batch = {name: getattr(rollout, name) for name in ("input_ids", "attention_mask", "completion_mask")}
        rows = packed_rows({**batch, "group": rollout.prompt_index}, self.model.config.get_text_config().hidden_size)
        places = mask.flatten().nonzero()[:, 0]

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(mask.numel()).index_copy(0, places, values[rows.mask]).view(mask.shape)

        logp, *others = map(spread, answer_token_stats(model, rows, **options))
        assert logp is not None
        return TokenStats(logp, *others)

    def tells_apart(self) -> bool:
        """Whether the policy can see several completions behind one prompt without mixing them up."""
        assert isinstance(self.model, PreTrainedModel)
        return keeps_documents_apart(self.model, "every completion gets a row of its own, with its prompt")

    def in_micro_batches(
        self, rollout: Rollout, compute: Callable[[Rollout], Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """What ``compute`` returns for micro-batches (tensors ``[n]`` or ``[n, t]``), put together for all rows."""
        columns: list[Tensor | None] = []
        for rows in by_length(rollout, self.micro_batch_size):
            results = compute(rollout.select(rows).cropped())
            if not columns:
                columns = [None if r is None else r.new_zeros(rollout.input_ids.shape[: r.ndim]) for r in results]
            for column, result in zip(columns, results, strict=True):
                if column is not None and result is not None:
                    column[(rows, slice(result.shape[1])) if result.ndim == 2 else rows] = result
        return columns

    def scores(self, reward: Reward, rollout: Rollout, *, held_out: bool = False) -> Scores:
        """Scores of completions as text: the reward model may use another tokenizer."""
        return reward.score(
            [record["prompt"] for record in rollout.records],
            rollout.completions,
            finished=[reason != "length" for reason in rollout.finish_reason],
            records=rollout.records,
            lengths=rollout.completion_lengths,
            all_reduce=self.all_reduce,
            held_out=held_out,
        )

    # ------------------------------------------------------------------ metrics of samples
    def sample_metrics(self, rollout: Rollout, proxy: Scores, logp: Tensor, ref_logp: Tensor) -> dict[str, float]:
        """What every online method logs about an iteration's samples, averaged over all ranks.

        Args:
            rollout: The samples.
            proxy: Their scores.
            logp: Log-probs of their tokens under the policy ``[B, T]``; the engine's will do.
            ref_logp: Under the reference.
        """
        kl = sequence_kl(k1(logp, ref_logp), rollout.completion_mask)
        return self.completion_metrics(rollout, proxy, logp.sum(1), kl)

    def completion_metrics(self, rollout: Rollout, proxy: Scores, logp: Tensor, kl: Tensor) -> dict[str, float]:
        """The same from log-probs and KLs of whole completions ``[B]``."""
        mask = rollout.completion_mask
        gold = self.scores(self.frozen.gold, rollout, held_out=True) if self.frozen.gold is not None else None
        columns = {
            "objective/kl": kl,
            "objective/entropy": -logp,
            **score_columns(proxy, gold),
            **length_columns(rollout),
            **part_columns(proxy),
        }
        if self.temperature == 1.0 and not self.sampling.truncates:  # otherwise only the evaluation measures it
            columns["lab/kl"] = kl
            if self.frozen.initial is not None:
                columns["lab/kl"] = logp - self.stats(self.frozen.initial, rollout).logp.sum(1)
        sums = column_sums(columns)
        sums["kl/per_token"] = (kl.sum(), mask.sum())
        metrics = with_deviations(self.ratios(sums)) | self.length_metrics(rollout)
        ended = torch.tensor(float(rollout.finish_reason.count("eos")), device=self.device)
        metrics["val/num_eos_tokens"] = float(self.all_reduce(ended))
        return metrics

    def length_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Shortest and longest completions, of all and of those that ended by themselves."""
        extremes: dict[str, float] = {}
        for name, rows in (("", slice(None)), ("terminated_", ~truncated(rollout))):
            lengths = rollout.completion_lengths[rows].float()
            ends = torch.stack([lengths.max(), -lengths.min()]) if len(lengths) else lengths.new_full((2,), -torch.inf)
            longest, shortest = self.all_reduce(ends, "max").tolist()
            if longest > -torch.inf:
                extremes |= {f"completions/min_{name}length": -shortest, f"completions/max_{name}length": longest}
        return extremes

    def engine_metrics(self, rollout: Rollout, logp: Tensor) -> dict[str, float]:
        """How far the engine's log-probs are from those ``[B, T]`` of the training forward, over all ranks."""
        mask = rollout.completion_mask
        difference = torch.where(mask, (logp - rollout.engine_logp).abs(), 0.0)
        metrics = self.ratios({f"{ENGINE_DIFFERENCE}/mean": (difference.sum(), mask.sum())})
        return metrics | {f"{ENGINE_DIFFERENCE}/max": float(self.all_reduce(difference.max(), "max"))}
