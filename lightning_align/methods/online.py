"""The spine of online methods: one training step is one iteration of sample, score, learn."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_align.errors import UserError, check_options
from lightning_align.losses.masked import Metrics
from lightning_align.methods.base import add_sums
from lightning_align.methods.evaluation import SAMPLE_ROWS, Evaluation, evaluation_seeds, with_standard_errors
from lightning_align.methods.sampling import RUN_STRIDE, SamplingModule
from lightning_align.rewards.base import Reward, Scores
from lightning_align.rollout.types import Experience, Rollout, SamplingParams, by_length
from lightning_align.run.logging import log_samples

ITERATION_STRIDE = 1_000_003  # sampling seeds of iterations are this far apart, a prime
GUARD_WINDOW = 3  # iterations whose mean KL the hard limit looks at
UNSCORED_BATCHES = 3  # in a row, before a reward is taken to be broken
Objective = Callable[[], tuple[Tensor, Metrics]]


class OnlineModule(SamplingModule):
    """Sample from the policy, score the samples, learn from them.

    One ``training_step`` is one iteration: :meth:`collect`, then inner epochs of minibatches. Optimisation is manual
    because an iteration takes many optimiser steps on data that exist only after sampling. A method implements
    :meth:`experience` and :meth:`minibatch_loss`.

    Args:
        iterations: Number of iterations; each draws ``data.batch_size`` prompts per process.
        num_epochs: Passes over the samples of an iteration.
        num_mini_batches: Optimiser steps in each pass.
        eval_every: Evaluate on the held-out prompts every so many iterations, before the first and after the last; 0
            never does.
        stop_at_kl: Stop training when the moving average of three iterations' sequence KL exceeds this.
        kwargs: The settings of :class:`SamplingModule`.
    """

    def __init__(
        self,
        *,
        iterations: int = 100,
        num_epochs: int = 1,
        num_mini_batches: int = 1,
        eval_every: int = 10,
        stop_at_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        check_options(
            "model",
            ("iterations", iterations, iterations >= 1, "at least 1"),
            ("num_epochs", num_epochs, num_epochs >= 1, "at least 1"),
            ("num_mini_batches", num_mini_batches, num_mini_batches >= 1, "at least 1"),
            ("eval_every", eval_every, eval_every >= 0, "a number of iterations, or 0 for never"),
            ("stop_at_kl", stop_at_kl, stop_at_kl is None or stop_at_kl > 0, "a KL above 0 in nats, or null"),
        )
        self.iterations = iterations
        self.iteration = 0
        self.draws = 0  # batches of prompts sampled in this iteration
        self.episodes = 0
        self.num_epochs = num_epochs
        self.num_mini_batches = num_mini_batches
        self.eval_every = eval_every
        self.stop_at_kl = stop_at_kl
        self.recent_kl: list[float] = []
        self.unscored: list[int] = []  # completions of the latest batches, as long as none of them got a score
        self.label: str | None = None
        self.evaluation = Evaluation()

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
        if "objective/kl" in metrics:  # not where others wrote what is learnt
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

    def sample(self, batch: Mapping[str, Any]) -> Rollout:
        """Completions of a batch of prompts.

        Seeds depend on the run's, the iteration, the batches drawn in it before, and the row among all ranks.
        """
        rows = len(batch["prompt_ids"]) * self.sampling.num_samples
        place = self.draws * self.trainer.world_size + self.trainer.global_rank
        first = self.seed() + ITERATION_STRIDE * self.iteration + place * rows
        self.draws += 1
        return self.draw(batch, self.sampling, range(first, first + rows))

    def scores(self, reward: Reward, rollout: Rollout, *, held_out: bool = False) -> Scores:
        """Scores of completions; raises :class:`UserError` where three batches in a row to learn from have none."""
        scores = super().scores(reward, rollout, held_out=held_out)
        if not held_out:
            self._check_scored(reward, scores)
        return scores

    def _check_scored(self, reward: Reward, scores: Scores) -> None:
        """Say that a batch has no score on any rank; a reward that goes on like that teaches nothing."""
        counts = torch.tensor([len(scores.total), int((~scores.total.isnan()).sum())], device=self.device)
        total, scored = self.all_reduce(counts).tolist()
        self.unscored = [] if scored else [*self.unscored, int(total)]
        if not self.unscored:
            return
        parts = [part for part in reward.parts if part.weight]
        silent = [part for part in parts if scores.parts[part.name].isnan().all()] or parts
        names = ", ".join(part.source for part in silent)
        check = "check that it returns numbers for these prompts, and that they have the columns that it reads"
        if len(self.unscored) == UNSCORED_BATCHES:
            raise UserError(
                f"reward {names} gave none of {sum(self.unscored):,} completions a score, in {UNSCORED_BATCHES} "
                f"batches in a row: there is nothing to learn from; {check}"
            )
        if len(self.unscored) == 1:
            self.say(
                f"iteration {self.iteration + 1}: reward {names} gave none of {total:,} completions a score, "
                f"and nothing is learnt from them; {check}"
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
        normaliser = self.all_reduce(self.divisor(minibatch).float())
        normaliser = normaliser.where(normaliser > 0, 1.0)  # weights may sum to less than 1
        objectives = self.further_objectives()
        for rows in by_length(minibatch.rollout, self.rows_per_pass()):
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

    def rows_per_pass(self) -> int:
        """Completions in a micro-batch that is learnt from."""
        return self.micro_batch_size

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
        stats = self.stats(self.model, rollout, temperature=1.0, against=self.frozen.origin, entropy=True)
        proxy = self.scores(self.frozen.reward, rollout, held_out=True)
        gold = self.scores(self.frozen.gold, rollout, held_out=True) if self.frozen.gold is not None else None
        self.evaluation.add(rollout, stats, proxy, gold, self.held_out_columns(rollout, proxy))

    def held_out_columns(self, rollout: Rollout, proxy: Scores) -> dict[str, Tensor]:
        """Hook: what else is measured of held-out prompts' completions, by name, each ``[B]``."""
        return {}

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
