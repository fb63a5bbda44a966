"""The spine of online methods: one training step is one iteration of sample, score, learn."""

import copy
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_align.data.answer_rows import packed_rows
from lightning_align.errors import UserError, check_options
from lightning_align.losses.kl import k1, sequence_kl
from lightning_align.losses.masked import Metrics
from lightning_align.methods.adapters import learned_networks, shares_base, stored_adapter
from lightning_align.methods.base import AlignModule, add_sums
from lightning_align.methods.evaluation import SAMPLE_ROWS, Evaluation, evaluation_seeds, with_standard_errors
from lightning_align.methods.measures import (
    column_sums,
    length_columns,
    part_columns,
    score_columns,
    truncated,
    with_deviations,
)
from lightning_align.models.answers import answer_token_stats
from lightning_align.models.heads import RewardModel
from lightning_align.models.loading import Parameters
from lightning_align.models.logprobs import TokenStats, token_stats
from lightning_align.models.lora import WithoutAdapter, share_frozen
from lightning_align.models.masks import keeps_documents_apart
from lightning_align.rewards.base import Reward, Scores
from lightning_align.rewards.build import build_reward, learned_sources, parse_reward
from lightning_align.rewards.spec import check_files
from lightning_align.rollout.engine import Engine, build_engine
from lightning_align.rollout.types import Experience, Rollout, SamplingParams, by_length
from lightning_align.run.logging import log_samples

RewardSpec = str | dict[str, Any]
# Sampling seeds: runs are 2^40 apart, iterations a prime.
RUN_STRIDE, ITERATION_STRIDE = 1 << 40, 1_000_003
ENGINE_DIFFERENCE = "sampling/sampling_logp_difference"
GUARD_WINDOW = 3  # iterations whose mean KL the hard limit looks at
Objective = Callable[[], tuple[Tensor, Metrics]]


@dataclass
class Frozen:
    """Models that are asked and never trained; the reference is a copy of the policy, or the policy without adapter."""

    reference: nn.Module | WithoutAdapter
    reward: Reward
    gold: Reward | None

    def to(self, device: torch.device) -> None:
        """Move them all."""
        if isinstance(self.reference, nn.Module):
            self.reference.to(device)
        for reward in (self.reward, self.gold):
            if reward is not None:
                reward.to(device)


class OnlineModule(AlignModule):
    """Sample from the policy, score the samples, learn from them; reads ``prompt`` records.

    One ``training_step`` is one iteration: :meth:`collect`, then inner epochs of minibatches. Optimisation is manual
    because an iteration takes many optimiser steps on data that exist only after sampling. A method implements
    :meth:`experience` and :meth:`minibatch_loss`.

    Args:
        reward: What scores a completion: a run, path, hub id, ``package.module.function``, ``file.py:function``,
            ``playground``; or a mapping of name to ``{source, weight}``; or ``parts``, and how to ``combine`` them.
        gold: What is measured but never trained on; the same forms as ``reward``.
        iterations: Number of iterations; each draws ``data.batch_size`` prompts per process.
        max_new_tokens: Longest completion in tokens.
        temperature: Sampling temperature; log-probs of policy and reference use the same.
        top_k: Keep the k likeliest tokens when sampling; 0 keeps all.
        top_p: Nucleus sampling; 1 keeps all.
        min_p: Keep tokens at least this likely relative to the likeliest; 0 keeps all.
        samples_per_prompt: Completions drawn for each prompt.
        stop_strings: Texts that end a completion (after the token that completes them).
        engine: Sampler: our ``static`` cache, transformers' ``generate``, or ``auto`` for the first that fits.
        rollout_batch_size: Most completions decoded at a time.
        num_epochs: Passes over the samples of an iteration.
        num_mini_batches: Optimiser steps in each pass.
        micro_batch_size: Sequences per forward pass; lower it to save memory, the gradient stays the same.
        eval_every: Evaluate on the held-out prompts every so many iterations, before the first and after the last; 0
            never does.
        stop_at_kl: Stop training when the moving average of three iterations' sequence KL exceeds this.
        kwargs: The settings of :class:`AlignModule`.
    """

    kinds = ("prompt",)

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
        rollout_batch_size: int = 128,
        num_epochs: int = 1,
        num_mini_batches: int = 1,
        micro_batch_size: int = 64,
        eval_every: int = 10,
        stop_at_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        check_options(
            "model",
            ("iterations", iterations, iterations >= 1, "at least 1"),
            ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1, "at least 1"),
            ("rollout_batch_size", rollout_batch_size, rollout_batch_size >= 1, "at least 1"),
            ("num_epochs", num_epochs, num_epochs >= 1, "at least 1"),
            ("num_mini_batches", num_mini_batches, num_mini_batches >= 1, "at least 1"),
            ("micro_batch_size", micro_batch_size, micro_batch_size >= 1, "at least 1"),
            ("eval_every", eval_every, eval_every >= 0, "a number of iterations, or 0 for never"),
            ("stop_at_kl", stop_at_kl, stop_at_kl is None or stop_at_kl > 0, "a KL above 0 in nats, or null"),
        )
        for spec in (reward, gold):
            if spec is not None:
                parse_reward(spec)  # a mistake is said before anything is loaded
        self.iterations = iterations
        self.iteration = 0
        self.draws = 0  # batches of prompts sampled in this iteration
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
        self.rollout_batch_size = rollout_batch_size
        self.num_epochs = num_epochs
        self.num_mini_batches = num_mini_batches
        self.micro_batch_size = micro_batch_size
        self.eval_every = eval_every
        self.stop_at_kl = stop_at_kl
        self.recent_kl: list[float] = []
        self.label: str | None = None
        self.evaluation = Evaluation()

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

    def configure_model(self) -> None:
        """The policy, and what stays frozen: reference, reward, gold."""
        super().configure_model()
        if not hasattr(self, "frozen"):
            # kept outside the module tree: frozen models belong neither in the checkpoint nor in the optimiser
            self.frozen = Frozen(
                self.build_reference(),
                build_reward(self.reward_spec),
                build_reward(self.gold_spec, default_name="gold") if self.gold_spec is not None else None,
            )
            for network in learned_networks(self.frozen.reward, self.frozen.gold):
                self.share_base(network)

    def warn_of_truncation(self) -> None:
        """Say that a policy gradient is biased where samples come from less than the whole distribution."""
        if self.sampling.truncates:
            warnings.warn(
                "model.top_k, top_p or min_p cut the distribution that is sampled from, while the ratios of the policy "
                "gradient are of the whole one: expect a biased gradient",
                stacklevel=3,
            )

    def build_reference(self) -> nn.Module | WithoutAdapter:
        """The policy as it is now: a copy, or its base."""
        assert isinstance(self.model, PreTrainedModel)
        if self.lora is not None:
            return WithoutAdapter(self.model)
        # not read again: an architecture would be drawn anew
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def share_base(self, network: PreTrainedModel) -> None:
        """Hold the weights that a network has in common with the policy's base once."""
        assert isinstance(self.model, PreTrainedModel)
        if self.lora is not None:
            share_frozen(self.model, network)

    def parameter_roles(self) -> dict[str, Parameters]:
        """Policy, the frozen reference, and the trained models among rewards and gold."""
        roles = super().parameter_roles()
        if self.lora is None:
            roles["reference"] = roles["policy"]
        for role, spec in (("reward", self.reward_spec), ("gold", self.gold_spec)):
            if spec is None:
                continue
            check_files(spec)
            models = [self.count_reward(source) for source in learned_sources(spec)]
            if models:
                roles[role] = Parameters(*(sum(column) for column in zip(*models, strict=True)))
        return roles

    def count_reward(self, source: str) -> Parameters:
        """Parameters of a reward model, but for those that it has in common with the policy's base."""
        if self.lora is not None and shares_base(source, self.source):
            return stored_adapter(source)
        return RewardModel.count(source)

    def setup_sampling(self) -> None:
        """Move the frozen models to the device and build the sampler."""
        self.frozen.to(self.device)
        assert isinstance(self.model, PreTrainedModel)
        reference = self.frozen.reference
        if isinstance(reference, PreTrainedModel) and reference.dtype != self.model.dtype:
            reference.to(dtype=self.model.dtype)  # type: ignore[call-arg] # trainer.precision has converted the policy
        self.sampler: Engine = build_engine(
            self.engine_name, self.model, self.tokenizer, max_batch=self.rollout_batch_size
        )

    def on_fit_start(self) -> None:
        """Ready to sample."""
        self.setup_sampling()

    def on_validation_start(self) -> None:
        """The same for ``validate`` and ``test``, which do not fit first."""
        if not hasattr(self, "sampler"):
            self.setup_sampling()

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def on_train_start(self) -> None:
        """Evaluate the policy before it is changed: the curve over KL begins at KL 0."""
        self.eval()
        if self.eval_every and not self.trainer.datamodule.has_validation:  # type: ignore[attr-defined]
            self.say(
                "no prompts are held out, so nothing is evaluated (data.val_path or data.val_fraction holds some out)"
            )
            self.eval_every = 0
        if self.finished():  # a run that is done was resumed
            self.trainer.should_stop = True
        if self.iteration == 0 and self.eval_every:
            self.evaluate_policy()

    # ------------------------------------------------------------------ one iteration
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Score the samples and prepare what the loss needs; also metrics of the samples."""
        raise NotImplementedError(f"{type(self).__name__} must implement experience")

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """Loss of a micro-batch, already divided by the minibatch's global ``normaliser``."""
        raise NotImplementedError(f"{type(self).__name__} must implement minibatch_loss")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """Sample, score, learn, log; evaluate when it is due."""
        started = time.perf_counter()
        self.eval()  # dropout stays off: the sampler, old and new log-probs must be one distribution
        experience, metrics = self.collect(batch)
        collected = time.perf_counter()
        self.train(self.gradient_checkpointing)  # transformers recomputes activations in training mode only
        metrics |= self.learn(experience)
        self.sampler.refresh()  # it cannot see by itself what a fused or an 8-bit optimiser has written
        self.eval()
        finished = time.perf_counter()
        rows = len(batch["prompt_ids"]) * self.sampling.num_samples
        episodes = self.draws * rows * self.trainer.world_size
        self.iteration += 1
        self.draws = 0
        self.episodes += episodes
        metrics |= {
            "time/train": finished - collected,
            "eps": episodes / (finished - started),
            "episode": float(self.episodes),
            "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.report(metrics, step=self.iteration)
        self.recent_kl = [*self.recent_kl, metrics["objective/kl"]][-GUARD_WINDOW:]
        last = self.finished()
        if self.eval_every and (self.iteration % self.eval_every == 0 or last):
            self.evaluate_policy()
        if last:
            self.trainer.should_stop = True

    def collect(self, batch: Mapping[str, Any]) -> tuple[Experience, dict[str, float]]:
        """Samples of a batch of prompts with all that the loss needs, and their metrics."""
        started = time.perf_counter()
        rollout = self.sample(batch)
        sampled = time.perf_counter()
        experience, metrics = self.experience(rollout)
        return experience, metrics | {"time/rollout": sampled - started, "time/score": time.perf_counter() - sampled}

    def finished(self) -> bool:
        """Whether all iterations are done, or the moving average of three iterations' KL exceeds the hard limit."""
        if self.stop_at_kl is not None and sum(self.recent_kl) > self.stop_at_kl * len(self.recent_kl):
            return True
        return self.iteration >= self.iterations

    def seed(self) -> int:
        """First of the sampling seeds that belong to this run."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) * RUN_STRIDE

    def sample(self, batch: Mapping[str, Any]) -> Rollout:
        """Completions of a batch of prompts.

        Seeds depend on the run's, the iteration, the batches drawn in it before, and the row among all ranks.
        """
        rows = len(batch["prompt_ids"]) * self.sampling.num_samples
        place = self.draws * self.trainer.world_size + self.trainer.global_rank
        first = self.seed() + ITERATION_STRIDE * self.iteration + place * rows
        self.draws += 1
        return self.draw(batch, self.sampling, range(first, first + rows))

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

    # ------------------------------------------------------------------ learning
    def learn(self, experience: Experience) -> dict[str, float]:
        """Inner epochs of shuffled minibatches; one optimiser step each."""
        optimizer = self.optimizers()
        generator = torch.Generator().manual_seed(ITERATION_STRIDE * self.iteration + self.seed() // RUN_STRIDE)
        sums: Metrics = {}
        for _ in range(self.num_epochs):
            for minibatch in experience.minibatches(self.num_mini_batches, generator):
                step_sums = self.step_gradients(minibatch)
                if self.skip_step(step_sums):
                    optimizer.zero_grad()  # type: ignore[union-attr]
                    return self.ratios(sums)
                for role, parameters in self.clipped_together().items():
                    norm = self.clip_gradients_(parameters)
                    add_sums(step_sums, {f"{role}/grad_norm": (norm, torch.ones_like(norm))})
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]
                add_sums(sums, step_sums)
        return self.ratios(sums)

    def step_gradients(self, minibatch: Experience) -> Metrics:
        """Gradients of one optimiser step, a micro-batch at a time; returns its metrics."""
        normaliser = self.all_reduce(self.divisor(minibatch).float()).clamp(min=1)
        objectives = self.further_objectives()
        for rows in by_length(minibatch.rollout, self.micro_batch_size):
            objectives.append(partial(self._micro_loss, minibatch, rows, normaliser))
        sums: Metrics = {}
        for index, objective in enumerate(objectives):
            with self.sync_only_if(index == len(objectives) - 1):
                loss, micro = objective()
                # gradients are averaged over ranks, the normaliser is global: undo the average
                self.manual_backward(loss * self.trainer.world_size)
            add_sums(sums, micro)
        return sums

    def _micro_loss(self, minibatch: Experience, rows: Sequence[int], normaliser: Tensor) -> tuple[Tensor, Metrics]:
        return self.minibatch_loss(minibatch.select(rows).cropped(), normaliser)

    def divisor(self, minibatch: Experience) -> Tensor:
        """What the summed loss is divided by, before it is added up over all ranks: here the number of tokens."""
        return minibatch.completion_mask.sum()

    def further_objectives(self) -> list[Objective]:
        """Hook: losses on other data that are added to every optimiser step."""
        return []

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role; the gradient norm is taken and limited for each role by itself."""
        return {"policy": list(self.model.parameters())}

    def skip_step(self, sums: Metrics) -> bool:
        """Hook: leave the inner epochs before this step is taken."""
        return False

    def sync_only_if(self, last: bool) -> AbstractContextManager[None]:
        """Reduce gradients over ranks only with the last micro-batch of a step."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, DDPStrategy):
            return nullcontext()
        assert strategy.model is not None
        return strategy.model.no_sync()  # type: ignore[operator]

    # ------------------------------------------------------------------ evaluation
    def evaluate_policy(self) -> None:
        """Sample once for every held-out prompt, at temperature 1, with seeds that no training sample uses."""
        for index, batch in enumerate(self.trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
            self.validation_step(batch, index)
        self.on_validation_epoch_end()

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Proxy, gold, and exact sequence KL of one batch of held-out prompts."""
        params = SamplingParams(max_new_tokens=self.sampling.max_new_tokens, stop_strings=self.sampling.stop_strings)
        rollout = self.draw(batch, params, evaluation_seeds(batch, self.seed()))
        stats = self.stats(self.model, rollout, temperature=1.0, against=self.frozen.reference, entropy=True)
        proxy = self.scores(self.frozen.reward, rollout, held_out=True)
        gold = self.scores(self.frozen.gold, rollout, held_out=True) if self.frozen.gold is not None else None
        self.evaluation.add(rollout, stats, proxy, gold)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out evaluation and its first samples; the step is the iteration."""
        evaluation, self.evaluation = self.evaluation, Evaluation()
        metrics = with_standard_errors(self.total(evaluation.sums))
        self.label = f"step={self.iteration:05d}-kl={metrics['lab/kl']:.3f}"
        self.report({f"eval/{name}": value for name, value in metrics.items()}, step=self.iteration)
        log_samples(self.trainer.loggers, evaluation.samples[:SAMPLE_ROWS], step=self.iteration)

    def checkpoint_label(self) -> str | None:
        """Name of the checkpoint to keep at this point: one for each evaluation, with its KL for the lab."""
        label, self.label = self.label, None
        return label

    # ------------------------------------------------------------------ metrics of samples
    def sample_metrics(
        self, rollout: Rollout, proxy: Scores, policy: TokenStats, reference: TokenStats
    ) -> dict[str, float]:
        """What every online method logs about an iteration's samples, averaged over all ranks."""
        mask = rollout.completion_mask
        kl = sequence_kl(k1(policy.logp, reference.logp), mask)
        gold = self.scores(self.frozen.gold, rollout, held_out=True) if self.frozen.gold is not None else None
        columns = {
            "objective/kl": kl,
            "objective/entropy": -policy.logp.sum(1),
            **score_columns(proxy, gold),
            **length_columns(rollout),
            **part_columns(proxy),
        }
        if self.temperature == 1.0 and not self.sampling.truncates:  # otherwise only the evaluation measures it
            columns["lab/kl"] = kl
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
            "reward": self.frozen.reward.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue after the last whole iteration."""
        super().on_load_checkpoint(checkpoint)
        method = checkpoint["method"]
        self.iteration, self.episodes = method["iteration"], method["episodes"]
        self.recent_kl = list(method["recent_kl"])
        self.frozen.reward.load_state_dict(method["reward"])
