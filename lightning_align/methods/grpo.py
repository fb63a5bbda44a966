"""Policy gradients without a value function: several completions of a prompt are each other's baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align.data.loader import endless
from lightning_align.errors import UserError, check_options
from lightning_align.losses.advantages import scored_mask
from lightning_align.losses.group import (
    ADVANTAGES,
    PRESETS,
    Preset,
    group_policy_loss,
    overlong_penalty,
    reduction_count,
)
from lightning_align.losses.kl import k1, sequence_kl
from lightning_align.losses.masked import Metrics, mean_and_var, moments
from lightning_align.methods.measures import truncated
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.sampling import ENGINE_DIFFERENCE
from lightning_align.rollout.types import Experience, Rollout, concatenate

PresetName = Literal["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "cispo", "gspo"]
# Batches of prompts that one iteration may draw, in batches.
MAX_DRAWS = 3


class GRPOModule(OnlineModule):
    """Group methods: REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, CISPO and GSPO; docs/grpo.md has their formulas.

    A preset is a method as published; what is given beside it replaces one of its settings.

    Args:
        preset: ``reinforce``, ``rloo``, ``grpo``, ``dr_grpo``, ``dapo``, ``cispo`` or ``gspo``.
        learning_rate: 1e-6 for billions of parameters; up to 1e-4 for a few millions.
        samples_per_prompt: Completions of a prompt, G.
        advantage: ``reinforce`` (less the mean of the batch's others), ``rloo`` (of the group's others), ``grpo`` (less
            the group's mean, by its standard deviation), ``dr_grpo`` (not divided), ``batch_std`` (by the batch's).
        ratio: Probability ratio of a ``token``, of a ``sequence`` (geometric mean), ``sequence_sum`` (product).
        loss: ``reinforce`` (without ratio), ``clip`` or ``cispo``.
        reduction: ``token`` (mean over all tokens), ``sequence`` (over completions, of their token means),
            ``sum_sequence`` (of their sums), ``constant`` (of their sums by ``max_new_tokens``).
        kl: Where the KL to the initial policy goes: into the ``reward``, the ``loss``, or ``none``.
        beta: Its weight.
        epsilon: The ratio is clipped below 1 − ε.
        epsilon_high: And above 1 + this.
        delta: Cap of the ratio where the advantage is negative; null for none.
        mask_truncated_completions: Learn nothing from completions that hit the length limit; their rewards count.
        overlong_buffer: Tokens before the length limit within which rewards fall by up to 1 (DAPO); 0 for none.
        dynamic_sampling: Leave out groups of equal rewards, and draw further prompts until the batch is full (DAPO).
        kwargs: The settings of :class:`OnlineModule`.
    """

    def __init__(
        self,
        *,
        preset: PresetName = "grpo",
        learning_rate: float = 1e-6,
        samples_per_prompt: int = 8,
        advantage: Literal["reinforce", "rloo", "grpo", "dr_grpo", "batch_std"] | None = None,
        ratio: Literal["token", "sequence", "sequence_sum"] | None = None,
        loss: Literal["reinforce", "clip", "cispo"] | None = None,
        reduction: Literal["token", "sequence", "sum_sequence", "constant"] | None = None,
        kl: Literal["reward", "loss", "none"] | None = None,
        beta: float | None = None,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        delta: float | None = None,
        mask_truncated_completions: bool = False,
        overlong_buffer: int = 0,
        dynamic_sampling: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, samples_per_prompt=samples_per_prompt, **kwargs)
        given = {
            **{"advantage": advantage, "ratio": ratio, "loss": loss, "reduction": reduction, "kl": kl, "beta": beta},
            **{"epsilon": epsilon, "epsilon_high": epsilon_high},
        }
        self.settings = adjusted(preset, {name: value for name, value in given.items() if value is not None})
        high = self.settings.epsilon if self.settings.epsilon_high is None else self.settings.epsilon_high
        longest = self.sampling.max_new_tokens
        alone = self.settings.advantage == "reinforce"
        check_options(
            "model",
            (
                "samples_per_prompt",
                samples_per_prompt,
                samples_per_prompt >= 2 or alone,
                "at least 2: they are compared",
            ),
            ("beta", beta, beta is None or beta >= 0, "0 or more"),
            ("epsilon", epsilon, epsilon is None or 0 < epsilon < 1, "a number between 0 and 1"),
            ("epsilon_high", epsilon_high, epsilon_high is None or epsilon_high > 0, "a number above 0"),
            ("delta", delta, delta is None or delta > 1 + high, f"more than {1 + high}, or null"),
            ("delta", delta, delta is None or self.settings.loss == "clip", "null, or loss clip"),
            ("overlong_buffer", overlong_buffer, 0 <= overlong_buffer <= longest, f"0 to max_new_tokens, {longest}"),
        )
        self.warn_of_truncation()
        self.delta = delta
        self.mask_truncated_completions = mask_truncated_completions
        self.overlong_buffer = overlong_buffer
        self.dynamic_sampling = self.settings.filter == "zero_std" if dynamic_sampling is None else dynamic_sampling
        self.largest_difference = torch.zeros(())
        # One step on the samples: the policy that learns is the one that sampled, and every ratio is 1.
        self.on_policy = self.num_epochs == self.num_mini_batches == 1

    # ------------------------------------------------------------------ samples to experience
    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Log-probs and one advantage a completion."""
        # on-policy, the training forward itself has the log-probs; until then the engine's will do
        logp = rollout.engine_logp if self.on_policy else self.stats(self.model, rollout).logp
        reference = self.stats(self.frozen.reference, rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, logp, reference.logp)
        if not self.on_policy:
            metrics |= self.engine_metrics(rollout, logp)
        rewards = proxy.total
        if self.overlong_buffer:
            limit = self.sampling.max_new_tokens
            rewards = rewards + overlong_penalty(rollout.completion_lengths, limit, self.overlong_buffer)
        if self.settings.kl == "reward":
            kl = sequence_kl(k1(logp, reference.logp), rollout.completion_mask)
            rewards = rewards - self.settings.beta * kl
        advantages, spread = self.advantages(rewards, rollout.prompt_index)
        metrics |= self.reward_metrics(rewards, spread)
        mask = scored_mask(rollout.completion_mask, rewards)
        if self.mask_truncated_completions:
            mask = mask & ~truncated(rollout)[:, None]
        experience = Experience(
            replace(rollout, completion_mask=mask),
            rewards,
            proxy.parts,
            logp=None if self.on_policy else logp,
            ref_logp=reference.logp if self.settings.kl == "loss" else None,
            advantages=advantages,
        )
        return experience, metrics

    def advantages(self, rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and standard deviations of the groups, each ``[B]``; those that compare with the batch ask all."""
        name = self.settings.advantage
        if name not in ("reinforce", "batch_std"):
            return ADVANTAGES[name](rewards, group)
        total = self.all_reduce(moments(rewards, ~rewards.isnan()))
        return ADVANTAGES[name](rewards, group, batch_moments=total)

    def reward_metrics(self, rewards: Tensor, spread: Tensor) -> dict[str, float]:
        """TRL's ``reward``, ``reward_std`` and ``frac_reward_zero_std`` over all ranks."""
        scored = ~rewards.isnan()
        mean, variance = mean_and_var(self.all_reduce(moments(rewards, scored)), unbiased=True)
        count = scored.sum()
        equal = self.ratios({"frac_reward_zero_std": (((spread == 0) & scored).sum(), count)})
        return equal | {"reward": float(mean), "reward_std": float(variance.sqrt())} if equal else {}

    # ------------------------------------------------------------------ dynamic sampling
    def collect(self, batch: Mapping[str, Any]) -> tuple[Experience, dict[str, float]]:
        """Samples of a batch of prompts; under dynamic sampling of as many as it takes to fill it with mixed groups."""
        experience, metrics = super().collect(batch)
        if not self.dynamic_sampling:
            return experience, metrics
        drawn, parts = [metrics], [experience.select(mixed_rows(experience))]
        wanted = len(experience) * self.trainer.world_size
        while self.together(parts) < wanted and self.draws < MAX_DRAWS:
            further, metrics = super().collect(next(self.further_prompts))
            drawn.append(metrics)
            parts.append(further.select(mixed_rows(further)))
        metrics = means(drawn)
        if self.together(parts) == 0:
            raise UserError(
                f"all {self.draws * wanted:,} completions of iteration {self.iteration + 1} have the reward of the "
                f"others of their prompt (mean reward {metrics['reward']:.3g}): nothing to learn from. Raise "
                "model.samples_per_prompt or model.temperature, or leave model.dynamic_sampling off"
            )
        size = self.sampling.num_samples
        groups = self.together(parts) // size
        metrics["sampling/groups_dropped"] = self.draws * wanted / size - groups
        metrics["sampling/generations_per_group"] = self.draws * wanted / min(groups, wanted // size)
        own = concatenate(parts) if any(len(part) for part in parts) else experience.without_learning()
        return own.select(slice(len(experience))), metrics

    def together(self, parts: list[Experience]) -> int:
        """Completions in the parts of all ranks."""
        return int(self.all_reduce(torch.tensor(sum(len(part) for part in parts), device=self.device)))

    def setup(self, stage: str) -> None:
        """Also the prompts that dynamic sampling draws beyond the batch."""
        if self.dynamic_sampling and stage == "fit":
            self.further_loader = self.trainer.datamodule.further_loader()  # type: ignore[attr-defined]
            self.further_prompts = endless(self.further_loader)

    # ------------------------------------------------------------------ loss
    def divisor(self, minibatch: Experience) -> Tensor:
        """Tokens or completions, as the reduction has it."""
        return reduction_count(minibatch.completion_mask, self.settings.reduction)

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """The policy-gradient loss of one micro-batch."""
        assert experience.advantages is not None
        mask, settings = experience.completion_mask, self.settings
        stats = self.completion_stats(self.model, experience.rollout, temperature=self.temperature, entropy=True)
        assert stats.entropy is not None
        loss, sums = group_policy_loss(
            stats.logp,
            stats.logp.detach() if experience.logp is None else experience.logp,
            experience.advantages,
            mask,
            ratio=settings.ratio,
            loss=settings.loss,
            reduction=settings.reduction,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            delta=self.delta,
            beta=settings.beta if settings.kl == "loss" else 0.0,
            ref_logp=experience.ref_logp,
            max_completion_length=self.sampling.max_new_tokens,
            normaliser=normaliser,
        )
        sums["entropy"] = (stats.entropy.detach().sum(), mask.sum())
        if self.on_policy:
            difference = (stats.logp.detach() - experience.rollout.engine_logp).abs().where(mask, 0.0)
            sums[f"{ENGINE_DIFFERENCE}/mean"] = (difference.sum(), mask.sum())
            self.largest_difference = torch.maximum(self.largest_difference.to(difference), difference.max())
        return loss, sums

    def learn(self, experience: Experience) -> dict[str, float]:
        """As every online method; on-policy the engine's log-probs are compared with the training forward's here."""
        self.largest_difference = torch.zeros(())
        metrics = super().learn(experience)
        if self.on_policy:
            metrics[f"{ENGINE_DIFFERENCE}/max"] = float(self.all_reduce(self.largest_difference, "max"))
        return metrics

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The place among the prompts that dynamic sampling draws from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"]["further"] = self.further_loader.state_dict() if self.dynamic_sampling else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        super().on_load_checkpoint(checkpoint)
        if hasattr(self, "further_loader"):  # not for validate and test
            self.further_loader.load_state_dict(checkpoint["method"]["further"])


def adjusted(preset: PresetName, given: Mapping[str, Any]) -> Preset:
    """A preset with other settings; REINFORCE's loss has no ratio, and a weight of the KL needs a place for it."""
    settings = replace(PRESETS[preset], **given)
    if settings.loss == "reinforce":
        if given.get("ratio") is not None:
            raise UserError("model.ratio is for the losses clip and cispo: leave it out with loss reinforce")
        settings = replace(settings, ratio=None)
    elif settings.ratio is None:
        settings = replace(settings, ratio="token")
    if given.get("beta") and settings.kl == "none":
        raise UserError(f"model.beta is {given['beta']}, but preset {preset} has no KL: give model.kl reward or loss")
    if given.get("kl") in ("reward", "loss") and not settings.beta:
        raise UserError(f"model.kl is {settings.kl}: give its weight, model.beta, above 0")
    return settings


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in columns.items()}


def mixed_rows(experience: Experience) -> Tensor:
    """Rows of groups whose rewards differ ``[B]`` bool."""
    _, spread = ADVANTAGES["dr_grpo"](experience.scores, experience.rollout.prompt_index)
    return spread > 0
