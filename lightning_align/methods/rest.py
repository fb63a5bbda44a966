"""Reinforced self-training (ReST): sample once, learn several times from ever better parts of the samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_align.errors import UserError, check_options, nearest
from lightning_align.losses.masked import Metrics
from lightning_align.losses.preference import LOSSES
from lightning_align.losses.rest import ImproveLoss, improve_loss, reward_weights
from lightning_align.methods.dpo_options import pair_objective
from lightning_align.methods.growing import GrowingModule
from lightning_align.methods.imitation import said_of_scores
from lightning_align.methods.measures import column_sums
from lightning_align.methods.online_pairs import as_pairs, best_and_worst, number_of_pairs, pair_loss
from lightning_align.rollout.types import Experience


class ReSTModule(GrowingModule):
    """Reinforced self-training (Gulcehre et al. 2023, 2308.08998), and ReST-EM (2312.06585); docs/rest.md.

    A Grow step draws ``samples_per_prompt`` completions of ``grow_batches`` batches of prompts, scores them, and writes
    them to ``grown/grow=….jsonl`` in the run. Each of its Improve steps, which are the iterations, learns those above a
    threshold that rises from step to step, at a learning rate that falls.

    Args:
        learning_rate: Of the first Improve step of a Grow.
        lr_decay: Factor of the learning rate from one Improve step to the next.
        grow_steps: G.
        samples_per_prompt: Completions of each prompt.
        quantiles: One Improve step for each: it keeps what scores above this quantile of the Grow step's scores.
        thresholds: Or one for each of these: it keeps what scores above. Null: the quantiles decide.
        scope: Quantiles of the scores of all prompts (``global``), or of each prompt's own (``per_prompt``).
        max_per_prompt: Keep at most so many completions of a prompt, the best; null for all. ReST-EM: 10.
        min_kept: An Improve step that would keep fewer is left out, with those after it.
        loss: ``bc`` (supervised fine-tuning), ``weighted_bc`` (weights exp((R − τ)/T)), ``v_mpo`` (the better half,
            weights exp(R/T)), ``gold`` (tokens that the policy finds unlikely weigh less), or a loss of pairs, such as
            ``sigmoid`` or ``ipo``: each prompt's best completion, if it is kept, against its worst.
        loss_temperature: T, in units of the reward.
        gold_power: Power of the probability in ``gold``.
        beta: Strength of the pull to the reference in a loss of pairs; null is the loss's own.
        improve_batch_size: Completions in an optimiser step, over all processes.
        init: Whether a Grow step's first Improve begins with the ``previous`` weights or with those of the ``base``,
            the model at the start (ReST-EM). Samples are always drawn from the previous ones.
        stop_when_worse: End a Grow step's Improve steps when the held-out reward does not rise, and go on with the best
            weights of them.
        kwargs: The settings of :class:`~lightning_align.methods.growing.GrowingModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 2e-5,
        lr_decay: float = 0.5,
        grow_steps: int = 2,
        samples_per_prompt: int = 16,
        quantiles: Sequence[float] = (0.5, 0.75, 0.9),
        thresholds: list[float] | None = None,
        scope: Literal["global", "per_prompt"] = "global",
        max_per_prompt: int | None = None,
        min_kept: int = 64,
        loss: str = "bc",
        loss_temperature: float = 1.0,
        gold_power: float = 1.0,
        beta: float | None = None,
        improve_batch_size: int = 64,
        init: Literal["previous", "base"] = "previous",
        stop_when_worse: bool = True,
        eval_every: int = 1,
        **kwargs: Any,
    ) -> None:
        self.levels = tuple(quantiles if thresholds is None else thresholds)
        super().__init__(
            learning_rate=learning_rate,
            samples_per_prompt=samples_per_prompt,
            iterations=max(1, grow_steps) * max(1, len(self.levels)),
            num_mini_batches=1,
            eval_every=eval_every,
            **kwargs,
        )
        rising = all(low < high for low, high in zip(self.levels, self.levels[1:], strict=False))
        within = thresholds is not None or all(0 <= level < 1 for level in self.levels)
        check_options(
            "model",
            ("lr_decay", lr_decay, 0 < lr_decay <= 1, "a factor above 0 and up to 1"),
            ("grow_steps", grow_steps, grow_steps >= 1, "at least 1"),
            ("quantiles", list(quantiles), within, "numbers from 0 to below 1"),
            (
                "thresholds" if thresholds else "quantiles",
                self.levels,
                rising and len(self.levels) > 0,
                "rising numbers",
            ),
            ("scope", scope, thresholds is None or scope == "global", "global with thresholds"),
            ("max_per_prompt", max_per_prompt, max_per_prompt is None or max_per_prompt >= 1, "at least 1, or null"),
            ("min_kept", min_kept, min_kept >= 1, "at least 1"),
            ("loss_temperature", loss_temperature, 0 < loss_temperature < math.inf, "a number above 0"),
            ("beta", beta, beta is None or 0 < beta < math.inf, "a number above 0"),
            (
                "samples_per_prompt",
                samples_per_prompt,
                samples_per_prompt >= 2 or loss in get_args(ImproveLoss),
                "at least 2",
            ),
            (
                "micro_batch_size",
                self.micro_batch_size,
                self.micro_batch_size >= 2 or loss in get_args(ImproveLoss),
                "at least 2, a pair",
            ),
            ("gold_power", gold_power, 0 < gold_power < math.inf, "a number above 0"),
            ("improve_batch_size", improve_batch_size, improve_batch_size >= 1, "at least 1"),
            ("stop_when_worse", stop_when_worse, not stop_when_worse or eval_every <= 1, "false, or eval_every 1"),
        )
        self.absolute = thresholds is not None
        self.lr_decay = lr_decay
        self.grow_steps = grow_steps
        self.scope = scope
        self.max_per_prompt = max_per_prompt
        self.min_kept = min_kept
        known = [*get_args(ImproveLoss), *LOSSES]
        if loss not in known:
            raise UserError(f"unknown model.loss '{loss}'{nearest(loss, known)} (there are {', '.join(known)})")
        self.pairs = None if loss in get_args(ImproveLoss) else pair_objective(loss, beta=beta)
        if self.pairs is None and beta is not None:
            raise UserError(f"model.beta is {beta}, but loss {loss} does not use it: leave it out")
        self.loss_name: Any = loss
        self.loss_temperature = loss_temperature
        self.gold_power = gold_power if loss == "gold" else 0.0
        self.improve_batch_size = improve_batch_size
        self.init = init
        self.stop_when_worse = stop_when_worse
        self.improve = 0
        self.best_reward: float | None = None  # on held-out prompts, of the Improve steps so far
        self.best_weights: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ Improve
    @torch.no_grad()
    def collect(self, batch: Mapping[str, Any]) -> tuple[Experience, dict[str, float]]:
        """What this Improve step learns; the samples were drawn by the Grow step before it."""
        if self.improve == 0 and self.best_weights:
            self.load_weights(self.best_weights)
        metrics: dict[str, float] = {}
        if self.grown is None:
            of_samples = self.have_samples(draw=self.improve == 0)
            metrics = of_samples if self.improve == 0 else {}  # they are about the policy that Grow began with
        if self.improve == 0 and self.grow and self.init == "base":
            self.begin_anew()
        assert self.grown is not None
        scores = self.grown.scores
        rows, thresholds = self.kept(self.improve)
        kept = scores[rows]
        everyone = torch.tensor(self.gather(kept.tolist()))
        if not len(everyone):
            level = "threshold" if self.absolute else "quantile"
            remedy = "lower it, or raise model.samples_per_prompt"
            known = scores[~scores.isnan()]
            if len(known) and bool((known == known[0]).all()):
                remedy = "all of them score the same, and there is nothing to choose by: look at the reward"
            raise UserError(
                f"nothing of Grow step {self.grow + 1} is above the first {level}, {self.levels[0]:g} "
                f"({said_of_scores(scores)}): {remedy}"
            )
        weights = reward_weights(
            kept,
            "bc" if self.pairs is not None else self.loss_name,
            everyone=everyone,
            threshold=thresholds[rows],
            temperature=self.loss_temperature,
        )
        covered = len(self.grown.rollout.prompt_index[rows].unique())
        metrics |= self.ratios(
            {
                **column_sums({"rest/threshold": thresholds}),
                "rest/kept_fraction": (kept.new_tensor(len(kept)), kept.new_tensor(len(scores))),
                "rest/mean_reward_kept": (kept.sum(), kept.new_tensor(len(kept))),
                "rest/prompts_covered": (
                    kept.new_tensor(covered),
                    kept.new_tensor(len(scores) // self.sampling.num_samples),
                ),
            }
        )
        metrics |= {"rest/grow": float(self.grow + 1), "rest/improve": float(self.improve + 1)}
        if self.pairs is not None:
            rows, _ = best_and_worst(scores, self.grown.rollout, above=thresholds)
            return as_pairs(self.grown, rows), metrics
        if not rows:
            return replace(self.grown, advantages=torch.zeros_like(scores)).without_learning(), metrics
        return replace(self.grown.select(rows), advantages=weights), metrics

    def kept(self, improve: int) -> tuple[list[int], Tensor]:
        """Rows above an Improve step's threshold, and the threshold of every row ``[B]``; NaN is above none."""
        assert self.grown is not None
        scores, groups = self.grown.scores, self.grown.rollout.rows_of_prompts()
        level = self.levels[improve]
        thresholds = torch.full_like(scores, level)
        if not self.absolute and self.scope == "per_prompt":
            for group in groups:
                thresholds[group] = scores[group].nanquantile(level)
        elif not self.absolute:
            everyone = torch.tensor([value for value in self.gather(scores.tolist()) if value == value])
            thresholds[:] = quantile(everyone, level)
        above = (scores > thresholds).tolist()
        rows = []
        for group in groups:
            best = sorted((row for row in group if above[row]), key=lambda row: -float(scores[row]))
            rows += sorted(best[: self.max_per_prompt])
        return rows, thresholds

    def learn(self, experience: Experience) -> dict[str, float]:
        """Supervised steps of about ``improve_batch_size`` completions, at the learning rate of this Improve step."""
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] *= self.lr_decay**self.improve  # the schedule sets it anew after every iteration
        wanted = round(self.on_every_rank(len(experience)) / self.improve_batch_size)
        # a minibatch has whole prompts, and every rank takes part in every step
        fewest = -self.all_reduce(torch.tensor(-len(experience.rollout.rows_of_prompts()), device=self.device), "max")
        self.num_mini_batches = max(1, min(wanted, int(fewest)))
        return super().learn(experience)

    def divisor(self, minibatch: Experience) -> Tensor:
        """Σ of the weights over tokens; with a loss of pairs their number."""
        if self.pairs is not None:
            return number_of_pairs(minibatch)
        assert minibatch.advantages is not None
        return (minibatch.advantages * minibatch.completion_mask.sum(1)).sum()

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """Weighted supervised fine-tuning, or a preference loss."""
        if self.pairs is not None:
            return pair_loss(self, self.pairs, experience, normaliser)
        assert experience.advantages is not None
        mask = experience.completion_mask
        stats = self.completion_stats(self.model, experience.rollout, entropy=True)
        assert stats.entropy is not None
        loss, sums = improve_loss(stats.logp, mask, experience.advantages, gold_power=self.gold_power)
        sums["entropy"] = (stats.entropy.detach().sum(), mask.sum())
        return loss / normaliser, sums

    # ------------------------------------------------------------------ from step to step
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """One Improve step, before the first one of a Grow step its samples; then decide what comes next."""
        if self.iteration == 0:
            self.is_better()  # than nothing: the start is the first to be kept
        super().training_step(batch, batch_idx)
        better = self.is_better()
        if better and self.improve + 1 < len(self.levels) and self.leaves_enough():
            self.improve += 1
        else:
            self.grow, self.improve, self.grown = self.grow + 1, 0, None
        if self.grow == self.grow_steps:
            if self.eval_every and self.label is None:  # a Grow step that ended early made this the last iteration
                self.evaluate_policy()
            self.trainer.should_stop = True

    def finished(self) -> bool:
        """All Grow steps, or the hard limit of the KL."""
        return super().finished() or self.grow == self.grow_steps

    def held_out_reward(self) -> float | None:
        """Mean reward on held-out prompts, as evaluated last; None where it decides nothing."""
        value = self.trainer.callback_metrics.get("eval/lab/proxy")
        return None if value is None or not (self.stop_when_worse and self.eval_every) else float(value)

    def is_better(self) -> bool:
        """Whether the held-out reward has risen; what has it is kept."""
        reward = self.held_out_reward()
        if reward is None:
            return True
        if self.best_reward is not None and reward <= self.best_reward:
            return False
        self.best_reward = reward
        self.best_weights = {name: value.detach().cpu().clone() for name, value in self.trainable().items()}
        return True

    def leaves_enough(self) -> bool:
        """Whether the next Improve step has ``min_kept`` samples."""
        count = self.on_every_rank(len(self.kept(self.improve + 1)[0]))
        if count < self.min_kept:
            self.say(
                f"Grow step {self.grow + 1} ends after {self.improve + 1} Improve steps: the next would keep {count:,} "
                f"samples, fewer than model.min_kept, {self.min_kept:,}"
            )
        return count >= self.min_kept

    def begin_anew(self) -> None:
        """Learn what was drawn from the base on: its weights, and an optimiser that knows nothing."""
        self.load_weights(self.base_weights)
        self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]
        self.best_reward, self.best_weights = None, {}

    def on_train_end(self) -> None:
        """What is exported are the best weights; ``last.ckpt``, to go on from, has the last."""
        if self.best_weights:
            self.load_weights(self.best_weights)

    def trainable(self) -> dict[str, Tensor]:
        """Parameters that learn, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put other values in their place."""
        for name, parameter in self.trainable().items():
            parameter.copy_(weights[name])
        self.sampler.refresh()

    def configure_model(self) -> None:
        """Also keep the weights of the start, where Grow steps begin with them."""
        super().configure_model()
        if self.init == "base" and not hasattr(self, "base_weights"):
            self.base_weights = {name: value.detach().cpu().clone() for name, value in self.trainable().items()}

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which step comes next, and the weights to go back to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= {"improve": self.improve, "best_reward": self.best_reward}
        checkpoint["method"]["best_weights"] = self.best_weights
        if self.init == "base" and self.lora is not None:  # adapters begin with random numbers
            checkpoint["method"]["base_weights"] = self.base_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        method = checkpoint["method"]
        self.improve, self.best_reward = method["improve"], method["best_reward"]
        self.best_weights = method["best_weights"]
        if "base_weights" in method:
            self.base_weights = method["base_weights"]


def quantile(values: Tensor, level: float) -> float:
    """The quantile with linear interpolation, of any number of values; NaN of none."""
    if not len(values):
        return math.nan
    return float(np.quantile(values.double().cpu().numpy(), level))  # torch's takes 16 million at most
