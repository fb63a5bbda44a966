"""The spine of online methods: one training step is one iteration of sample, score, learn."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_align.errors import UserError
from lightning_align.methods.base import AlignModule, Sums, add_sums
from lightning_align.models.loading import load_causal_lm
from lightning_align.models.logprobs import TokenStats, token_stats
from lightning_align.rewards.base import Reward, Scores
from lightning_align.rewards.build import build_reward
from lightning_align.rollout.engine import Engine, build_engine
from lightning_align.rollout.types import Experience, Rollout, SamplingParams
from lightning_align.run.logging import log_samples

RewardSpec = str | dict[str, Any]
SEED_STRIDE = 1_000_003  # a prime, so that iterations and rows do not share sampling seeds
SAMPLE_ROWS = 16  # rows of the sample table at each evaluation
EVAL_SEED = 1 << 40  # far beyond any seed that training reaches


@dataclass
class Frozen:
    """Models that are asked and never trained."""

    reference: nn.Module
    reward: Reward
    gold: Reward | None

    def to(self, device: torch.device) -> None:
        """Move them all."""
        self.reference.to(device)
        for reward in (self.reward, self.gold):
            if reward is not None:
                reward.to(device)


def rollout_slices(rows: int, size: int) -> Iterator[slice]:
    """``rows`` in slices of at most ``size``."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class OnlineModule(AlignModule):
    """Sample from the policy, score the samples, learn from them; reads ``prompt`` records.

    One ``training_step`` is one iteration. Optimisation is manual because an iteration takes many optimiser steps on data
    that exist only after sampling. A method implements :meth:`experience` and :meth:`minibatch_loss`.

    Args:
        reward: What scores a completion: a run, path, hub id, ``package.module.function``, ``playground``, or a mapping of
            name to ``{source, weight}``.
        gold: What is measured but never trained on; the same forms as ``reward``.
        iterations: Number of iterations; each draws ``data.batch_size`` prompts per process.
        max_new_tokens: Longest completion in tokens.
        temperature: Sampling temperature; log-probs of policy and reference use the same.
        top_k: Keep the k likeliest tokens when sampling; 0 keeps all.
        top_p: Nucleus sampling; 1 keeps all.
        min_p: Keep tokens at least this likely relative to the likeliest; 0 keeps all.
        samples_per_prompt: Completions drawn for each prompt.
        stop_strings: Texts that end a completion (after the token that completes them).
        engine: Sampler: our ``static`` cache, transformers' ``generate``, or ``auto`` for the first that fits the model.
        num_epochs: Passes over the samples of an iteration.
        num_mini_batches: Optimiser steps in each pass.
        micro_batch_size: Sequences per forward pass; lower it to save memory, the gradient stays the same.
        eval_every: Evaluate on the held-out prompts every so many iterations, and before the first and after the last.
        stop_at_kl: Stop training when the moving average of three iterations' sequence KL exceeds this.
        kwargs: The settings of :class:`AlignModule`.
    """

    def __init__(
        self,
        *,
        reward: RewardSpec,
        gold: RewardSpec | None = None,
        iterations: int = 100,
        max_new_tokens: int = 53,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        samples_per_prompt: int = 1,
        stop_strings: Sequence[str] = (),
        engine: Literal["auto", "static", "generate"] = "auto",
        num_epochs: int = 1,
        num_mini_batches: int = 1,
        micro_batch_size: int = 64,
        eval_every: int = 10,
        stop_at_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        if iterations < 1:
            raise UserError(f"model.iterations is {iterations}: give at least 1")
        self.iterations = iterations
        self.iteration = 0
        self.episodes = 0
        self.reward_spec = reward
        self.gold_spec = gold
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
        self.num_epochs = num_epochs
        self.num_mini_batches = num_mini_batches
        self.micro_batch_size = micro_batch_size
        self.eval_every = eval_every
        self.stop_at_kl = stop_at_kl
        self.recent_kl: list[float] = []
        self.base_seed = 0
        self.label: str | None = None
        self._eval_rows = 0
        self._eval_samples: list[dict[str, Any]] = []

    # ------------------------------------------------------------------ models
    def configure_model(self) -> None:
        """The policy, and what stays frozen: reference, reward, gold."""
        super().configure_model()
        if not hasattr(self, "frozen"):
            reference = load_causal_lm(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype)
            # kept outside the module tree: frozen models belong neither in the checkpoint nor in the optimiser
            self.frozen = Frozen(
                reference.eval().requires_grad_(False),
                build_reward(self.reward_spec),
                build_reward(self.gold_spec, default_name="gold") if self.gold_spec is not None else None,
            )

    def parameter_roles(self) -> dict[str, int]:
        """Policy and the frozen reference; rewards report their own size once loaded."""
        policy = super().parameter_roles()["policy"]
        return {"policy": policy, "reference": policy}

    def on_fit_start(self) -> None:
        """Move the frozen models to the device and build the sampler."""
        self.frozen.to(self.device)
        self.base_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        assert isinstance(self.model, nn.Module)
        self.sampler: Engine = build_engine(self.engine_name, self.model, self.tokenizer)

    def on_train_start(self) -> None:
        """Evaluate the policy before it is changed: the curve over KL begins at KL 0."""
        self.set_modes()
        if self.iteration == 0 and self.eval_every:
            self.evaluate_policy()

    def set_modes(self) -> None:
        """Dropout stays off: the sampler, old and new log-probs must be one distribution."""
        self.eval()

    # ------------------------------------------------------------------ one iteration
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Score the samples and prepare what the loss needs; also metrics of the samples."""
        raise NotImplementedError(f"{type(self).__name__} must implement experience")

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Sums]:
        """Loss of a micro-batch, already divided by the minibatch's global ``normaliser``."""
        raise NotImplementedError(f"{type(self).__name__} must implement minibatch_loss")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Sample, score, learn, log; evaluate when it is due."""
        started = time.perf_counter()
        self.set_modes()
        rollout = self.sample(batch)
        sampled = time.perf_counter()
        experience, metrics = self.experience(rollout)
        scored = time.perf_counter()
        metrics |= self.learn(experience)
        finished = time.perf_counter()
        self.iteration += 1
        self.episodes += len(rollout) * self.trainer.world_size
        metrics |= {
            "time/rollout": sampled - started,
            "time/score": scored - sampled,
            "time/train": finished - scored,
            "eps": len(rollout) * self.trainer.world_size / (finished - started),
            "episode": float(self.episodes),
            "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.report(metrics, step=self.iteration)
        last = self.iteration >= self.iterations or self.kl_guard(metrics["objective/kl"])
        if self.eval_every and (self.iteration % self.eval_every == 0 or last):
            self.evaluate_policy()
        if last:
            self.trainer.should_stop = True

    def kl_guard(self, kl: float) -> bool:
        """Whether the hard KL limit is reached, by the moving average of three iterations."""
        self.recent_kl = [*self.recent_kl, kl][-3:]
        return self.stop_at_kl is not None and sum(self.recent_kl) / len(self.recent_kl) > self.stop_at_kl

    def sample(self, batch: Mapping[str, Any]) -> Rollout:
        """Completions of a batch of prompts; seeds depend on run seed, iteration, rank and row only."""
        first = self.base_seed + SEED_STRIDE * (self.iteration * self.trainer.world_size + self.trainer.global_rank + 1)
        return self.draw(batch, self.sampling, first)

    def draw(self, batch: Mapping[str, Any], params: SamplingParams, first_seed: int) -> Rollout:
        """Completions from the current weights, row i with seed ``first_seed + i``."""
        rows = len(batch["prompt_ids"]) * params.num_samples
        self.sampler.refresh()
        seeds = range(first_seed, first_seed + rows)
        return self.sampler.generate(batch["prompt_ids"], params, seeds=seeds, records=batch["records"]).to(self.device)

    @torch.no_grad()
    def stats(self, model: nn.Module, rollout: Rollout, *, entropy: bool = False, temperature: float | None = None,
              against: nn.Module | None = None) -> TokenStats:
        """Token statistics of a whole rollout without gradient, a micro-batch at a time."""
        parts = []
        for rows in rollout_slices(len(rollout), self.micro_batch_size):
            parts.append(
                token_stats(
                    model,
                    rollout.input_ids[rows],
                    rollout.attention_mask[rows],
                    mask=rollout.completion_mask[rows],
                    temperature=self.temperature if temperature is None else temperature,
                    entropy=entropy,
                    ref_model=against,
                )
            )
        return TokenStats(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))

    def scores(self, reward: Reward, rollout: Rollout) -> Scores:
        """Scores of completions as text: the reward model may use another tokenizer."""
        return reward.score(
            [record["prompt"] for record in rollout.records],
            rollout.completions,
            finished=[reason != "length" for reason in rollout.finish_reason],
            records=rollout.records,
        )

    def learn(self, experience: Experience) -> dict[str, float]:
        """Inner epochs of shuffled minibatches; one optimiser step each."""
        optimizer = self.optimizers()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(self.base_seed + SEED_STRIDE * self.iteration)
        sums: Sums = {}
        for _ in range(self.num_epochs):
            for minibatch in experience.minibatches(self.num_mini_batches, generator):
                normaliser = self._all_reduce(minibatch.completion_mask.sum().float()).clamp(min=1)
                slices = list(rollout_slices(len(minibatch), self.micro_batch_size))
                step_sums: Sums = {}
                for index, rows in enumerate(slices):
                    with self.sync_only_if(index == len(slices) - 1):
                        # gradients are averaged over ranks, the normaliser is global: undo the average
                        loss, micro = self.minibatch_loss(minibatch.select(rows), normaliser)
                        self.manual_backward(loss * self.trainer.world_size)
                    add_sums(step_sums, micro)
                if self.skip_step(step_sums):
                    optimizer.zero_grad()  # type: ignore[union-attr]
                    return self._ratios(sums)
                norm = self.clip_gradients_(parameters)
                add_sums(step_sums, {"policy/grad_norm": (norm, torch.ones_like(norm))})
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]
                add_sums(sums, step_sums)
        return self._ratios(sums)

    def skip_step(self, sums: Sums) -> bool:
        """Hook: leave the inner epochs before this step is taken."""
        return False

    def sync_only_if(self, last: bool) -> AbstractContextManager[None]:
        """Reduce gradients over ranks only with the last micro-batch of a step."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, DDPStrategy):
            return nullcontext()
        assert strategy.model is not None
        return strategy.model.no_sync()  # type: ignore[operator,no-any-return,union-attr]

    # ------------------------------------------------------------------ evaluation
    def evaluate_policy(self) -> None:
        """Sample once for every held-out prompt, at temperature 1, with seeds that no training sample uses."""
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.validation_step(batch, 0)
        self.on_validation_epoch_end()

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Proxy, gold, and exact sequence KL of one batch of held-out prompts."""
        params = SamplingParams(
            max_new_tokens=self.sampling.max_new_tokens, stop_strings=self.sampling.stop_strings, temperature=1.0
        )
        rollout = self.draw(batch, params, EVAL_SEED + self._eval_rows)
        self._eval_rows += len(rollout)
        stats = self.stats(self.model, rollout, temperature=1.0, against=self.frozen.reference, entropy=True)
        assert stats.kl is not None
        assert stats.entropy is not None
        kl = stats.kl.sum(1)
        proxy = self.scores(self.frozen.reward, rollout)
        columns = {"lab/proxy": proxy.total, "lab/kl": kl}
        gold = self.scores(self.frozen.gold, rollout) if self.frozen.gold is not None else None
        if gold is not None:
            columns["lab/gold"] = gold.total
            columns |= {f"lab/gold_{name}": part for name, part in gold.parts.items()}
        columns |= self.length_columns(rollout)
        sums: Sums = {name: (value.nansum(), (~value.isnan()).sum()) for name, value in columns.items()}
        sums["entropy"] = (stats.entropy.sum(), rollout.completion_mask.sum())
        self.add_eval_sums(sums)
        self._eval_samples += sample_rows(rollout, proxy, gold, kl)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out evaluation and its first samples; the step is the iteration."""
        metrics = self._ratios(self._eval_sums)
        samples = self._eval_samples[:SAMPLE_ROWS]
        self._eval_sums, self._eval_samples, self._eval_rows = {}, [], 0
        self.label = f"step={self.iteration:05d}-kl={metrics['lab/kl']:.3f}"
        self.report({f"eval/{name}": value for name, value in metrics.items()}, step=self.iteration)
        log_samples(self.loggers, samples, step=self.iteration)

    def checkpoint_label(self) -> str | None:
        """Name of the checkpoint to keep at this point: one for each evaluation, with its KL for the lab."""
        label, self.label = self.label, None
        return label

    # ------------------------------------------------------------------ metrics of samples
    def truncated(self, rollout: Rollout) -> Tensor:
        """Which completions hit the length limit ``[B]``."""
        return torch.tensor([reason == "length" for reason in rollout.finish_reason], device=self.device)

    def length_columns(self, rollout: Rollout) -> dict[str, Tensor]:
        """Per-completion numbers behind ``completions/…``."""
        return {
            "completions/mean_length": rollout.completion_lengths.float(),
            "completions/clipped_ratio": self.truncated(rollout).float(),
        }

    def sample_metrics(
        self, rollout: Rollout, proxy: Scores, policy: TokenStats, reference: TokenStats
    ) -> dict[str, float]:
        """What every online method logs about an iteration's samples, averaged over all ranks."""
        mask = rollout.completion_mask
        kl = (policy.logp - reference.logp).sum(1)
        columns = {
            "objective/kl": kl,
            "objective/entropy": -policy.logp.sum(1),
            "lab/proxy": proxy.total,
            **self.length_columns(rollout),
        }
        columns |= {f"rewards/{name}/mean": part for name, part in proxy.parts.items()}
        if self.temperature == 1.0 and not self.sampling.truncates:  # otherwise only the evaluation measures it
            columns["lab/kl"] = kl
        if self.frozen.gold is not None:
            gold = self.scores(self.frozen.gold, rollout)
            columns["lab/gold"] = gold.total
            columns |= {f"lab/gold_{name}": part for name, part in gold.parts.items()}
        sums: Sums = {name: (value.nansum(), (~value.isnan()).sum()) for name, value in columns.items()}
        difference = (policy.logp - rollout.engine_logp).abs()
        sums["sampling/sampling_logp_difference/mean"] = (torch.where(mask, difference, 0.0).sum(), mask.sum())
        ended = torch.tensor([reason == "eos" for reason in rollout.finish_reason], device=self.device)
        sums["val/num_eos_tokens"] = (ended.sum(), torch.ones_like(ended.sum()))
        metrics = self._ratios(sums)
        metrics["sampling/sampling_logp_difference/max"] = float(torch.where(mask, difference, 0.0).max())
        metrics["kl/per_token"] = metrics["objective/kl"] / max(metrics["completions/mean_length"], 1.0)
        return metrics

    # ------------------------------------------------------------------ state
    def total_steps(self) -> int:
        """The schedule runs over iterations."""
        return self.iterations

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters and the KL guard's memory."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "recent_kl": self.recent_kl,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue after the last whole iteration."""
        super().on_load_checkpoint(checkpoint)
        method = checkpoint["method"]
        self.iteration, self.episodes = method["iteration"], method["episodes"]
        self.recent_kl = list(method["recent_kl"])


def sample_rows(rollout: Rollout, proxy: Scores, gold: Scores | None, kl: Tensor) -> list[dict[str, Any]]:
    """One row for the sample table per completion."""
    totals = torch.full_like(proxy.total, torch.nan) if gold is None else gold.total
    columns = zip(
        rollout.records, rollout.completions, proxy.total.tolist(), totals.tolist(), kl.tolist(), rollout.finish_reason,
        strict=True,
    )
    return [
        {"prompt": r["prompt"], "completion": text, "proxy": p, "gold": g, "kl": k, "finish_reason": reason}
        for r, text, p, g, k, reason in columns
    ]
