"""A policy beside models that are asked and never trained: its reference, its reward, what is measured."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_align.errors import UserError
from lightning_align.methods.adapters import learned_networks, shares_base, stored_adapter
from lightning_align.methods.base import AlignModule
from lightning_align.models.heads import RewardModel
from lightning_align.models.loading import Parameters, count_parameters, load_causal_lm, load_tokenizer
from lightning_align.models.lora import WithoutAdapter, share_frozen
from lightning_align.rewards.base import Reward
from lightning_align.rewards.build import build_reward, learned_sources, parse_reward
from lightning_align.rewards.spec import check_files

RewardSpec = str | dict[str, Any]


@dataclass
class Frozen:
    """Models that are asked and never trained; the reference is a copy of the policy, or the policy without adapter."""

    reference: nn.Module | WithoutAdapter
    reward: Reward
    gold: Reward | None
    initial: PreTrainedModel | None = None  # what ``lab/kl`` is measured to, where it is not the reference

    @property
    def origin(self) -> nn.Module | WithoutAdapter:
        """What ``lab/kl`` is measured to."""
        return self.reference if self.initial is None else self.initial

    def to(self, device: torch.device) -> None:
        """Move them all."""
        for network in (self.reference, self.initial):
            if isinstance(network, nn.Module):
                network.to(device)
        for reward in (self.reward, self.gold):
            if reward is not None:
                reward.to(device)


class FrozenModule(AlignModule):
    """A policy with what it is compared with and scored by.

    Args:
        reward: What scores a completion: a run, path, hub id, ``package.module.function``, ``file.py:function``,
            ``playground``; or a mapping of name to ``{source, weight}``; or ``parts``, and how to ``combine`` them.
        gold: What is measured but never trained on; the same forms as ``reward``.
        initial: Model that ``lab/kl`` is measured to, with the policy's tokens: the SFT model where the policy went on
            from there by another method; null is the policy as it is at the start.
        kwargs: The settings of :class:`AlignModule`.
    """

    def __init__(
        self, *, reward: RewardSpec, gold: RewardSpec | None = None, initial: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for spec in (reward, gold):
            if spec is not None:
                parse_reward(spec)  # a mistake is said before anything is loaded
        self.reward_spec = reward
        self.gold_spec = gold
        self.initial = initial

    def configure_model(self) -> None:
        """The policy, and what stays frozen: reference, reward, gold."""
        super().configure_model()
        if not hasattr(self, "frozen"):
            # kept outside the module tree: frozen models belong neither in the checkpoint nor in the optimiser
            self.frozen = Frozen(
                self.build_reference(),
                build_reward(self.reward_spec),
                build_reward(self.gold_spec, default_name="gold") if self.gold_spec is not None else None,
                self.build_initial(),
            )
            for network in learned_networks(self.frozen.reward, self.frozen.gold):
                self.share_base(network)

    def build_reference(self) -> nn.Module | WithoutAdapter:
        """The policy as it is now: a copy, or its base."""
        assert isinstance(self.model, PreTrainedModel)
        if self.lora is not None:
            return WithoutAdapter(self.model)
        # not read again: an architecture would be drawn anew
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def build_initial(self) -> PreTrainedModel | None:
        """The model that the option names; :class:`UserError` for one with other tokens, to which there is no KL."""
        if self.initial is None:
            return None
        if load_tokenizer(self.initial).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"model.initial is {self.initial}, which has another vocabulary than {self.source}: there is no KL "
                "between them"
            )
        network = load_causal_lm(self.initial, tokenizer=self.tokenizer, dtype=self.model_dtype)
        return network.eval().requires_grad_(False)

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
        if self.initial is not None:
            roles["initial"] = count_parameters(
                self.initial, self.tokenizer, AutoModelForCausalLM, dtype=self.model_dtype
            )
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
