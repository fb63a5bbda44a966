"""PPO with a KL penalty: reinforcement learning from a reward model."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.losses.advantages import gae, scored_mask, shaped_rewards
from lightning_align.losses.kl import kl_estimate
from lightning_align.losses.kl_control import AdaptiveKL, FixedKL
from lightning_align.losses.masked import explained_variance, masked_sum, moments, whiten
from lightning_align.losses.policy import ppo_policy_loss
from lightning_align.losses.value import clipped_value_loss
from lightning_align.methods.base import Sums, decay_groups
from lightning_align.methods.online import OnlineModule, rollout_slices
from lightning_align.models.heads import ValueModel
from lightning_align.models.logprobs import token_stats
from lightning_align.rewards.base import Reward
from lightning_align.rewards.learned import LearnedReward
from lightning_align.rollout.types import Experience, Rollout


class PPOModule(OnlineModule):
    """Proximal policy optimisation on a learned reward (InstructGPT; "The N+ implementation details", Huang et al. 2024).

    The KL to the initial policy is a per-token reward (k1, detached), the score lands on the last token of the completion,
    advantages are GAE, whitened over the global batch. Defaults are the N+ study's, at temperature 1.

    Args:
        learning_rate: Peak rate of the policy.
        value_lr: Peak rate of the value model; the policy's when not given.
        adam_epsilon: 1e-5, as in the studies above.
        lr_scheduler_type: Shape of the learning rate over iterations.
        warmup_ratio: Share of the iterations that warm up.
        min_lr_ratio: With ``cosine``, the share of the peak left at the end.
        num_ppo_epochs: Passes over the samples of an iteration.
        kl_coef: Weight of the KL penalty; with ``kl_control: adaptive`` its first value.
        kl_estimator: ``k1`` (unbiased gradient in a reward), ``k2`` or ``k3``.
        kl_control: ``fixed``, or ``adaptive`` (Ziegler et al. 2019) towards ``kl_target``.
        kl_target: Sequence KL in nats that the adaptive controller aims at.
        kl_horizon: Episodes over which the adaptive controller reacts.
        cliprange: ε of the clipped policy objective.
        dual_clip: Bound c on the ratio where the advantage is negative; 0 switches it off.
        cliprange_value: ε of the clipped value loss.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of an entropy bonus.
        gamma: Discount.
        lam: λ of GAE.
        whiten_rewards: Whiten per-token rewards (without shifting the mean).
        whiten_scope: Whiten advantages over the ``batch`` or over each ``minibatch``.
        score_clip: Clip scores to ± this; 0 switches it off.
        whiten_scores: Whiten scores over the batch.
        missing_eos_penalty: Subtract this from the score of a completion that hit the length limit.
        missing_eos_score: Or replace its score by this.
        bootstrap_truncated: Bootstrap a truncated completion with the value of its last state.
        target_kl_update: Leave the inner epochs when a step's approximate KL to the sampling policy exceeds this.
        value_init: Where the value model starts: the ``reward`` model, the ``policy``, or ``auto`` (the reward model when
            it has the policy's tokenizer).
        kwargs: The settings of :class:`OnlineModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 3e-6,
        value_lr: float | None = None,
        adam_epsilon: float = 1e-5,
        lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear",
        warmup_ratio: float = 0.0,
        min_lr_ratio: float = 0.0,
        num_ppo_epochs: int = 4,
        kl_coef: float = 0.05,
        kl_estimator: Literal["k1", "k2", "k3"] = "k1",
        kl_control: Literal["fixed", "adaptive"] = "fixed",
        kl_target: float = 6.0,
        kl_horizon: int = 10_000,
        cliprange: float = 0.2,
        dual_clip: float = 0.0,
        cliprange_value: float = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_rewards: bool = False,
        whiten_scope: Literal["batch", "minibatch"] = "batch",
        score_clip: float = 0.0,
        whiten_scores: bool = False,
        missing_eos_penalty: float | None = None,
        missing_eos_score: float | None = None,
        bootstrap_truncated: bool = False,
        target_kl_update: float | None = None,
        value_init: Literal["auto", "reward", "policy"] = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            adam_epsilon=adam_epsilon,
            lr_scheduler_type=lr_scheduler_type,
            warmup_ratio=warmup_ratio,
            min_lr_ratio=min_lr_ratio,
            num_epochs=num_ppo_epochs,
            **kwargs,
        )
        if missing_eos_penalty is not None and missing_eos_score is not None:
            raise UserError("model.missing_eos_penalty and model.missing_eos_score exclude each other: give one")
        self.value_lr = learning_rate if value_lr is None else value_lr
        self.kl_controller = (
            FixedKL(kl_coef) if kl_control == "fixed" else AdaptiveKL(kl_coef, target=kl_target, horizon=kl_horizon)
        )
        self.kl_estimator = kl_estimator
        self.cliprange = cliprange
        self.dual_clip = dual_clip or None
        self.cliprange_value = cliprange_value
        self.vf_coef = vf_coef
        self.entropy_coef = entropy_coef
        self.gamma = gamma
        self.lam = lam
        self.whiten_rewards = whiten_rewards
        self.whiten_scope = whiten_scope
        self.score_clip = score_clip
        self.whiten_scores = whiten_scores
        self.missing_eos_penalty = missing_eos_penalty
        self.missing_eos_score = missing_eos_score
        self.bootstrap_truncated = bootstrap_truncated
        self.target_kl_update = target_kl_update
        self.value_init = value_init

    # ------------------------------------------------------------------ models
    def configure_model(self) -> None:
        """Policy and frozen models, then the value model on a trunk of its own."""
        super().configure_model()
        if not hasattr(self, "value_model"):
            self.value_model, self.value_source = self.build_value_model()

    def build_value_model(self) -> tuple[ValueModel, str]:
        """The value model, and where it starts from."""
        learned = trunk_for_values(self.frozen.reward, self.tokenizer)
        if self.value_init == "reward" and learned is None:
            raise UserError(
                "model.value_init is reward, but model.reward is no reward model with the policy's tokenizer: "
                "give auto or policy"
            )
        if self.value_init == "policy" or learned is None:
            return ValueModel.from_policy(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype), "policy"
        return ValueModel.from_reward(learned, dtype=self.model_dtype), "reward"

    def parameter_roles(self) -> dict[str, int]:
        """Policy, reference and a value model of about the policy's size."""
        roles = super().parameter_roles()
        return {**roles, "value": roles["policy"]}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimiser with the groups of policy and value model."""
        return super().parameter_groups() + decay_groups(self.value_model, self.value_lr, self.weight_decay)

    # ------------------------------------------------------------------ samples to experience
    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Log-probs, values, rewards and advantages of a batch of samples; nothing here carries a gradient."""
        policy = self.stats(self.model, rollout, entropy=True)
        reference = self.stats(self.frozen.reference, rollout)
        values = self.values(rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        scores = self.shape_scores(proxy.total, rollout)
        mask = scored_mask(rollout.completion_mask, scores)
        kl = kl_estimate(policy.logp, reference.logp, self.kl_estimator)
        kl_coef = self.kl_controller.value
        rewards = shaped_rewards(kl, mask, scores, kl_coef=kl_coef)
        if self.whiten_rewards:
            rewards = self.whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(
            rewards, values, mask, gamma=self.gamma, lam=self.lam, bootstrap=self.bootstrap(rollout)
        )
        metrics = self.sample_metrics(rollout, proxy, policy, reference)
        sequence_kl = torch.where(mask, kl, 0.0).sum(1)
        sums: Sums = {
            "objective/scores": (scores.nansum(), (~scores.isnan()).sum()),
            "objective/non_score_reward": (-kl_coef * sequence_kl.sum(), mask.any(1).sum()),
        }
        metrics |= self._ratios(sums)
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
        metrics["objective/kl_coef"] = kl_coef
        metrics["val/explained_variance"] = float(explained_variance(returns, values, mask))
        self.kl_controller.update(metrics["objective/kl"], len(rollout) * self.trainer.world_size)
        if self.whiten_scope == "batch":
            advantages = self.whiten(advantages, mask)
        experience = Experience(
            replace(rollout, completion_mask=mask),
            scores,
            proxy.parts,
            logp=policy.logp,
            ref_logp=reference.logp,
            values=values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
        )
        return experience, metrics

    def whiten(self, values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        """Whitened over the batches of all ranks."""
        return whiten(values, mask, shift_mean=shift_mean, global_moments=self._all_reduce(moments(values, mask)))

    def values(self, rollout: Rollout) -> Tensor:
        """Value of the state before every token, ``[B, T]``."""
        return torch.cat(
            [
                self.value_model(rollout.input_ids[rows], rollout.attention_mask[rows])
                for rows in rollout_slices(len(rollout), self.micro_batch_size)
            ]
        )

    def bootstrap(self, rollout: Rollout) -> Tensor | None:
        """Value of the last state of truncated completions, if asked for; finished ones end with 0."""
        if not self.bootstrap_truncated:
            return None
        last = torch.cat(
            [
                self.value_model.last_value(rollout.input_ids[rows], rollout.attention_mask[rows])
                for rows in rollout_slices(len(rollout), self.micro_batch_size)
            ]
        )
        return torch.where(self.truncated(rollout), last, 0.0)

    def shape_scores(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Score after the missing-EOS rule, clipping and whitening, in this order."""
        scores = scores.to(self.device)
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * self.truncated(rollout)
        if self.missing_eos_score is not None:
            scores = torch.where(self.truncated(rollout), self.missing_eos_score, scores)
        if self.score_clip:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        if self.whiten_scores:
            scored = ~scores.isnan()
            scores = torch.where(scored, self.whiten(scores, scored), torch.nan)
        return scores

    # ------------------------------------------------------------------ loss
    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Sums]:
        """Clipped policy loss, clipped value loss and entropy bonus of one micro-batch."""
        mask = experience.completion_mask
        advantages, old_logp, old_values, returns = (
            experience.advantages,
            experience.logp,
            experience.values,
            experience.returns,
        )
        assert advantages is not None
        assert old_logp is not None
        assert old_values is not None
        assert returns is not None
        stats = token_stats(
            self.model,
            experience.input_ids,
            experience.attention_mask,
            mask=mask,
            temperature=self.temperature,
            entropy=True,
        )
        assert stats.entropy is not None
        if self.whiten_scope == "minibatch":
            advantages = self.whiten(advantages, mask)
        policy, sums = ppo_policy_loss(
            stats.logp,
            old_logp,
            advantages,
            mask,
            cliprange=self.cliprange,
            dual_clip=self.dual_clip,
            normaliser=normaliser,
        )
        value, value_sums = clipped_value_loss(
            self.value_model(experience.input_ids, experience.attention_mask),
            old_values,
            returns,
            mask,
            cliprange_value=self.cliprange_value,
            normaliser=normaliser,
        )
        entropy = masked_sum(stats.entropy, mask)
        loss = policy + self.vf_coef * value - self.entropy_coef * entropy / normaliser
        sums |= value_sums
        sums["policy/entropy_avg"] = (entropy, mask.sum())
        return loss, sums

    def skip_step(self, sums: Sums) -> bool:
        """Whether this step's policy has moved too far from the one that sampled."""
        if self.target_kl_update is None:
            return False
        return self._ratios(sums).get("policy/approxkl_avg", 0.0) > self.target_kl_update

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The KL controller is part of what the next iteration depends on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"]["kl_controller"] = self.kl_controller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the controller's β."""
        super().on_load_checkpoint(checkpoint)
        self.kl_controller.load_state_dict(checkpoint["method"]["kl_controller"])


def trunk_for_values(reward: Reward, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first reward model among the parts whose tokenizer is the policy's: the value model can start from it."""
    for part in reward.parts:
        if isinstance(part.scorer, LearnedReward) and part.scorer.tokenizer.get_vocab() == tokenizer.get_vocab():
            return part.source
    return None
