"""PPO with a KL penalty: reinforcement learning from a reward model."""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import align_kernels
from lightning_align.data.datamodules import TextDataModule
from lightning_align.data.loader import endless
from lightning_align.errors import UserError, check_options
from lightning_align.losses.advantages import scored_mask, shaped_rewards
from lightning_align.losses.kl import kl_estimate, sequence_kl
from lightning_align.losses.kl_control import AdaptiveKL, FixedKL, KLController
from lightning_align.losses.lm import token_cross_entropy
from lightning_align.losses.masked import Metrics, explained_variance, masked_sum, masked_whiten, mean_and_var, moments
from lightning_align.losses.policy import ppo_policy_loss
from lightning_align.losses.value import value_loss
from lightning_align.methods.adapters import shares_base
from lightning_align.methods.base import decay_groups
from lightning_align.methods.measures import column_sums, truncated
from lightning_align.methods.online import Objective, OnlineModule
from lightning_align.models.heads import ValueModel
from lightning_align.models.loading import Parameters
from lightning_align.models.logprobs import TokenStats, token_stats
from lightning_align.models.masks import documents_apart
from lightning_align.rewards.base import Reward
from lightning_align.rewards.build import learned_sources
from lightning_align.rewards.learned import LearnedReward
from lightning_align.rollout.types import Experience, Rollout


class PPOModule(OnlineModule):
    """Proximal policy optimisation on a reward (InstructGPT; "The N+ implementation details", Huang et al. 2024).

    The KL to the initial policy is a per-token reward (k1, detached), the score lands on the completion's last token,
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
        kl_estimator: ``k1`` (unbiased gradient in a reward), ``k2``, ``k3``, or ``exact`` over the whole vocabulary.
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
        score_scaling: ``none``, ``whiten`` over the batch, or ``running`` over all scores so far.
        missing_eos_penalty: Subtract this from the score of a completion that hit the length limit.
        missing_eos_score: Or replace its score by this.
        bootstrap_truncated: Bootstrap a truncated completion with the value of its last state.
        target_kl_update: Leave the inner epochs when a step's approximate KL to the sampling policy exceeds this.
        value_init: Where the value model starts: the ``reward`` model with its head, its trunk alone
            (``reward_backbone``), the ``policy``, or ``auto`` (the reward model when it has the policy's tokenizer).
        ptx_coef: Weight γ of a language-modelling loss on ``ptx_path`` in every optimiser step (PPO-ptx, InstructGPT).
        ptx_path: Text records for it: a file, folder, hub id or ``playground``.
        ptx_batch_size: Packed rows of text in each optimiser step and process.
        kwargs: The settings of :class:`OnlineModule`.
    """

    trained_roles = ("policy", "value")

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
        kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1",
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
        score_scaling: Literal["none", "whiten", "running"] = "none",
        missing_eos_penalty: float | None = None,
        missing_eos_score: float | None = None,
        bootstrap_truncated: bool = False,
        target_kl_update: float | None = None,
        value_init: Literal["auto", "reward", "reward_backbone", "policy"] = "auto",
        ptx_coef: float = 0.0,
        ptx_path: str | None = None,
        ptx_batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        check_options(
            "model",
            ("value_lr", value_lr, value_lr is None or 0 <= value_lr < float("inf"), "0 or more"),
            ("num_ppo_epochs", num_ppo_epochs, num_ppo_epochs >= 1, "at least 1"),
            ("kl_coef", kl_coef, kl_coef >= 0, "0 or more"),
            ("kl_coef", kl_coef, kl_coef > 0 or kl_control == "fixed", "more than 0, or kl_control fixed"),
            ("kl_target", kl_target, kl_target > 0, "a KL above 0 in nats"),
            ("kl_horizon", kl_horizon, kl_horizon >= 1, "at least 1 episode"),
            ("cliprange", cliprange, cliprange > 0, "a number above 0"),
            ("cliprange_value", cliprange_value, cliprange_value > 0, "a number above 0"),
            ("dual_clip", dual_clip, dual_clip == 0 or dual_clip > 1 + cliprange, f"0, or more than {1 + cliprange}"),
            ("vf_coef", vf_coef, vf_coef >= 0, "0 or more"),
            ("entropy_coef", entropy_coef, entropy_coef >= 0, "0 or more"),
            ("gamma", gamma, 0 <= gamma <= 1, "a number from 0 to 1"),
            ("lam", lam, 0 <= lam <= 1, "a number from 0 to 1"),
            ("score_clip", score_clip, score_clip >= 0, "a number above 0, or 0 for no clipping"),
            ("target_kl_update", target_kl_update, target_kl_update is None or target_kl_update > 0, "a KL above 0"),
            ("ptx_coef", ptx_coef, ptx_coef >= 0, "0 or more"),
            ("ptx_batch_size", ptx_batch_size, ptx_batch_size >= 1, "at least 1"),
        )
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
        if missing_eos_penalty is not None and missing_eos_penalty <= 0:
            raise UserError(
                f"model.missing_eos_penalty is {missing_eos_penalty}: it is subtracted, so give one above 0"
            )
        if (ptx_coef > 0) != (ptx_path is not None):
            raise UserError("model.ptx_coef and model.ptx_path belong together: give both, the weight above 0, or none")
        self.warn_of_truncation()
        self.value_lr = learning_rate if value_lr is None else value_lr
        self.kl_controller: KLController = (
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
        self.score_scaling = score_scaling
        self.score_moments = [0.0, 0.0, 0.0]  # of all scores so far, for running scaling
        self.missing_eos_penalty = missing_eos_penalty
        self.missing_eos_score = missing_eos_score
        self.bootstrap_truncated = bootstrap_truncated
        self.target_kl_update = target_kl_update
        self.value_init = value_init
        self.ptx_coef = ptx_coef
        self.ptx_data = (
            TextDataModule(path=ptx_path, batch_size=ptx_batch_size, val_fraction=0.0) if ptx_path is not None else None
        )

    # ------------------------------------------------------------------ models
    def setup(self, stage: str) -> None:
        """Read the text of PPO-ptx with the other data, before any weights."""
        if self.ptx_data is not None and stage == "fit":
            self.ptx_data.trainer = self.trainer
            self.ptx_data.setup(stage)
            self.ptx_loader = self.ptx_data.train_dataloader()
            self._ptx_batches = endless(self.ptx_loader)

    def configure_model(self) -> None:
        """Policy and frozen models, then the value model on a trunk of its own."""
        super().configure_model()
        if not hasattr(self, "value_model"):
            self.value_model = self.build_value_model()
            self.prepared(self.value_model.trunk, partly=True)
            self.value_model.head.requires_grad_(True)
            self.share_base(self.value_model.trunk)

    def build_value_model(self) -> ValueModel:
        """The value model; which start it takes is printed."""
        learned = trunk_for_values(self.frozen.reward, self.tokenizer)
        if self.value_init in ("reward", "reward_backbone") and learned is None:
            raise UserError(
                f"model.value_init is {self.value_init}, but model.reward is no reward model with the policy's "
                "tokenizer: give auto or policy"
            )
        if self.value_init == "policy" or learned is None:
            self.say(f"value model: from the policy {self.source}, its head at zero")
            return ValueModel.from_policy(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype)
        keep_head = self.value_init != "reward_backbone"
        self.say(f"value model: from the reward model {learned}{'' if keep_head else ', its head at zero'}")
        # a reward model that is an adapter goes on as one: it may have its base in common with the policy
        return ValueModel.from_reward(learned, dtype=self.model_dtype, keep_head=keep_head, merge=self.lora is None)

    def parameter_roles(self) -> dict[str, Parameters]:
        """Policy, reference, rewards, and a value model of about the policy's size."""
        roles = super().parameter_roles()
        roles = {"policy": roles["policy"], "value": roles["policy"], **roles}
        if self.lora is not None and self.value_init != "policy":
            sources = learned_sources(self.reward_spec)
            if sources and not shares_base(sources[0], self.source):
                roles["value base"] = roles["base"]
        return roles

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimiser with the groups of policy and value model."""
        return super().parameter_groups() + decay_groups(self.value_model, self.value_lr, self.weight_decay)

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """The value model's gradients do not shrink the policy's."""
        return super().clipped_together() | {"value": list(self.value_model.parameters())}

    # ------------------------------------------------------------------ samples to experience
    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Log-probs, values, rewards and advantages of a batch of samples; nothing here carries a gradient."""
        exact = self.kl_estimator == "exact"
        policy = self.stats(self.model, rollout, against=self.frozen.reference if exact else None)
        reference = self.stats(self.frozen.reference, rollout)
        values = self.values(rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, policy.logp, reference.logp)
        metrics |= self.engine_metrics(rollout, policy.logp)
        scores = self.shape_scores(proxy.total, rollout)
        mask = scored_mask(rollout.completion_mask, scores)
        kl = policy.kl if policy.kl is not None else kl_estimate(policy.logp, reference.logp, self.kl_estimator)
        rewards, advantages, returns = self.estimates(kl, values, scores, mask, self.bootstrap(rollout))
        metrics |= self.reward_metrics(scores, sequence_kl(kl, mask), mask)
        metrics["val/explained_variance"] = explained_variance(
            *(self.all_reduce(moments(column, mask)) for column in (returns - values, returns))
        )
        self.kl_controller.update(metrics["objective/kl"], len(rollout) * self.trainer.world_size)
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

    def estimates(
        self, kl: Tensor, values: Tensor, scores: Tensor, mask: Tensor, bootstrap: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token rewards, advantages (whitened where the scope is the batch) and returns, each ``[B, T]``."""
        kl_coef, whiten = self.kl_controller.value, self.whiten_scope == "batch"
        options: dict[str, Any] = {"gamma": self.gamma, "lam": self.lam, "bootstrap": bootstrap}
        if self.whiten_rewards:  # their moments are needed before the recursion begins
            rewards = self.whiten(shaped_rewards(kl, mask, scores, kl_coef=kl_coef), mask, shift_mean=False)
            advantages, returns = align_kernels.gae(rewards, values, mask=mask, **options)
            return rewards, self.whiten(advantages, mask) if whiten else advantages, returns
        group = dist.group.WORLD if self.trainer.world_size > 1 else None
        shaped = align_kernels.shaped_advantages(
            kl,
            torch.zeros_like(kl),
            values,
            scores,
            mask,
            kl_coef=kl_coef,
            whiten=whiten,
            process_group=group,
            **options,
        )
        return shaped.rewards, shaped.advantages, shaped.returns

    def reward_metrics(self, scores: Tensor, kl: Tensor, mask: Tensor) -> dict[str, float]:
        """TRL's ``objective/…`` of shaped scores ``[B]`` and sequence KLs ``[B]``, over all ranks."""
        kl_coef = self.kl_controller.value
        non_score = torch.where(mask.any(1), -kl_coef * kl, torch.nan)
        metrics = self.ratios(column_sums({"objective/scores": scores, "objective/non_score_reward": non_score}))
        metrics["objective/kl_coef"] = kl_coef
        if "objective/scores" in metrics:
            metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
            scored = self.all_reduce(moments(scores, ~scores.isnan()))
            metrics["objective/scores_std"] = float(mean_and_var(scored)[1].sqrt())
        return metrics

    def whiten(self, values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        """Whitened over the batches of all ranks."""
        total = self.all_reduce(moments(values, mask))
        return masked_whiten(values, mask, shift_mean=shift_mean, global_moments=total)

    def values(self, rollout: Rollout) -> Tensor:
        """Value of the state before every token, ``[B, T]``."""
        (values,) = self.in_micro_batches(rollout, lambda part: [self.value_model(part.input_ids, part.attention_mask)])
        assert values is not None
        return values

    def bootstrap(self, rollout: Rollout) -> Tensor | None:
        """Value of the last state of truncated completions, if asked for; finished ones end with 0."""
        if not self.bootstrap_truncated:
            return None
        (last,) = self.in_micro_batches(
            rollout, lambda part: [self.value_model.last_value(part.input_ids, part.attention_mask)]
        )
        assert last is not None
        return torch.where(truncated(rollout), last, 0.0)

    def shape_scores(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Score after the missing-EOS rule, clipping and scaling, in this order; NaN stays NaN."""
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * truncated(rollout)
        if self.missing_eos_score is not None:
            scores = torch.where(truncated(rollout) & ~scores.isnan(), self.missing_eos_score, scores)
        if self.score_clip:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        if self.score_scaling == "none":
            return scores
        scored = ~scores.isnan()
        total = self.all_reduce(moments(scores, scored))
        if self.score_scaling == "running":
            total = total + torch.tensor(self.score_moments, dtype=total.dtype, device=total.device)
            self.score_moments = total.tolist()
        return torch.where(scored, masked_whiten(scores, scored, global_moments=total), torch.nan)

    # ------------------------------------------------------------------ loss
    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """Clipped policy loss, clipped value loss and entropy bonus of one micro-batch."""
        assert experience.logp is not None
        assert experience.advantages is not None
        mask = experience.completion_mask
        stats = self.current_stats(experience)
        assert stats.entropy is not None
        policy, sums = ppo_policy_loss(
            stats.logp,
            experience.logp,
            experience.advantages,
            mask,
            cliprange=self.cliprange,
            dual_clip=self.dual_clip,
            normaliser=normaliser,
        )
        value, value_sums = self.value_objective(experience, normaliser)
        entropy = masked_sum(stats.entropy, mask)
        sums["policy/entropy_avg"] = (entropy.detach(), mask.sum())
        loss = policy + self.vf_coef * value
        if self.entropy_coef:  # not 0 · entropy, whose gradient would be computed all the same
            loss = loss - self.entropy_coef * entropy / normaliser
        return loss, sums | value_sums

    def current_stats(self, experience: Experience) -> TokenStats:
        """Log-probs and entropies under the policy as it is now."""
        return self.completion_stats(self.model, experience.rollout, temperature=self.temperature, entropy=True)

    def value_objective(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """Clipped loss of the value model."""
        assert experience.values is not None
        assert experience.returns is not None
        return value_loss(
            self.value_model(experience.input_ids, experience.attention_mask),
            experience.values,
            experience.returns,
            experience.completion_mask,
            cliprange_value=self.cliprange_value,
            normaliser=normaliser,
        )

    def learn(self, experience: Experience) -> dict[str, float]:
        """As every online method; the variance of the ratio comes from its first two moments."""
        metrics = super().learn(experience)
        if "val/ratio_squared" in metrics:
            metrics["val/ratio_var"] = max(0.0, metrics.pop("val/ratio_squared") - metrics["val/ratio"] ** 2)
        return metrics

    def step_gradients(self, minibatch: Experience) -> Metrics:
        """Whiten the advantages of the minibatch first, where that is the scope."""
        if self.whiten_scope == "minibatch":
            assert minibatch.advantages is not None
            minibatch = replace(minibatch, advantages=self.whiten(minibatch.advantages, minibatch.completion_mask))
        return super().step_gradients(minibatch)

    def skip_step(self, sums: Metrics) -> bool:
        """Whether this step's policy has moved too far from the one that sampled."""
        if self.target_kl_update is None:
            return False
        return self.ratios(sums).get("policy/approxkl_avg", 0.0) > self.target_kl_update

    # ------------------------------------------------------------------ ptx
    def further_objectives(self) -> list[Objective]:
        """The language-modelling loss of PPO-ptx."""
        return [self.ptx_loss] if self.ptx_data is not None else []

    def ptx_loss(self) -> tuple[Tensor, Metrics]:
        """γ times the token mean of −log p over a batch of text."""
        assert isinstance(self.model, PreTrainedModel)
        batch = self.transfer_batch_to_device(next(self._ptx_batches), self.device, 0)
        batch = documents_apart(self.model, batch)
        weights = batch["loss_weights"]
        stats = token_stats(
            self.model,
            batch["input_ids"],
            batch["attention_mask"],
            mask=weights > 0,
            position_ids=batch["position_ids"],
            document_ids=batch["document_ids"],
        )
        loss, sums = token_cross_entropy(stats.logp, weights)
        return self.ptx_coef * loss / batch["window_weight"], {"loss/ptx": sums["loss"]}

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """KL controller, running moments and the place in the text: the next iteration depends on them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= {
            "kl_controller": self.kl_controller.state_dict(),
            "score_moments": self.score_moments,
            "ptx": self.ptx_loader.state_dict() if self.ptx_data is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with all of them."""
        super().on_load_checkpoint(checkpoint)
        method = checkpoint["method"]
        self.kl_controller.load_state_dict(method["kl_controller"])
        self.score_moments = list(method["score_moments"])
        if hasattr(self, "ptx_loader"):  # not for validate and test
            self.ptx_loader.load_state_dict(method["ptx"])


def trunk_for_values(reward: Reward, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first reward model among the parts whose tokenizer is the policy's: the value model can start from it."""
    for part in reward.parts:
        if isinstance(part.scorer, LearnedReward) and part.scorer.tokenizer.get_vocab() == tokenizer.get_vocab():
            return part.source
    return None
