"""One iteration of PPO by TRL and by our module, on the same completions of the same tiny models."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from align_kernels import gae
from lightning_align.data.datamodules import PromptDataModule
from lightning_align.losses.advantages import shaped_rewards
from lightning_align.losses.kl import kl_estimate
from lightning_align.losses.masked import Metrics, masked_whiten
from lightning_align.losses.value import value_loss
from lightning_align.methods.ppo import PPOModule
from lightning_align.rollout.types import Experience, Rollout

TEMPERATURE, KL_COEF, CLIPRANGE_VALUE, LEARNING_RATE = 0.7, 0.3, 0.02, 0.02
TRL_EPSILON = 1e-7  # which TRL adds to the temperature
WIDTH = 6  # longest completion in tokens
PROMPTS = [
    *("list three animals", "say something kind about rain", "count to nine", "complete : the sun is"),
    *("say it twice : rain", "sort dog cat", "say cat", "do it"),
]
WORDS = (" cat", " dog", " rain", " is", " nine", " three")  # one token each
# words of each completion: no room for EOS; and EOS in all but the third, with room behind it in all but the fourth
LENGTHS = {"full": (WIDTH,) * 8, "mixed": (2, 1, WIDTH, WIDTH - 1, 2, 1, 3, 4)}


@dataclass(frozen=True)
class Sampled:
    """What both sample: completions of the prompts, from a policy ``older`` than the one that is trained."""

    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    completions: list[list[int]]
    policy: PreTrainedModel
    older: PreTrainedModel
    reference: PreTrainedModel
    reward: PreTrainedModel
    temperature: float = TEMPERATURE + TRL_EPSILON

    def padded(self) -> tuple[Tensor, Tensor]:
        """Prompts and completions as TRL wants them: padded on the left, and on the right."""
        pad_id, longest = self.tokenizer.pad_token_id, max(map(len, self.prompts))
        prompts = [[pad_id] * (longest - len(ids)) + ids for ids in self.prompts]
        completions = [ids + [pad_id] * (WIDTH - len(ids)) for ids in self.completions]
        return torch.tensor(prompts), torch.tensor(completions)

    def rollout(self, *, slot: bool) -> Rollout:
        """As our engines return it; with a ``slot`` the token behind EOS is attended to as well."""
        rows = [p + c for p, c in zip(self.prompts, self.completions, strict=True)]
        prompt_lengths = torch.tensor([len(ids) for ids in self.prompts])
        ends = torch.tensor([len(ids) for ids in rows])
        place = torch.arange(int(ends.max()) + 1)
        padded = [row + [self.tokenizer.pad_token_id] * (len(place) - len(row)) for row in rows]
        finished = [ids[-1] == self.tokenizer.eos_token_id for ids in self.completions]
        room = torch.tensor([len(ids) < WIDTH for ids in self.completions])
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.completions]
        completion = (place >= prompt_lengths[:, None]) & (place < ends[:, None])
        return Rollout(
            input_ids=torch.tensor(padded),
            attention_mask=place < (ends + (room if slot else 0))[:, None],
            completion_mask=completion,
            engine_logp=torch.zeros(completion.shape),
            prompt_lengths=prompt_lengths,
            prompt_index=torch.arange(len(rows)),
            finish_reason=["eos" if ended else "length" for ended in finished],
            completions=texts,
            records=[{"prompt": prompt} for prompt in PROMPTS],
        )


@pytest.fixture
def sample(world: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> Callable[[str], Sampled]:
    """``sample("full")`` or ``sample("mixed")``: completions of so many words, ended by EOS where it fits."""

    def nudged(network: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
        network = copy.deepcopy(network)
        for parameter in network.parameters():
            parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        return network

    def draw(lengths: str) -> Sampled:
        generator = torch.Generator().manual_seed(4)
        words = [torch.randint(0, len(WORDS), (n,), generator=generator).tolist() for n in LENGTHS[lengths]]
        ids = [tokenizer("".join(WORDS[word] for word in row))["input_ids"] for row in words]
        reference = AutoModelForCausalLM.from_pretrained(world / "policy").to(dtype)
        return Sampled(
            tokenizer,
            prompts=[tokenizer(prompt)["input_ids"] for prompt in PROMPTS],
            completions=[row if len(row) == WIDTH else [*row, tokenizer.eos_token_id] for row in ids],
            policy=nudged(reference, generator),
            older=nudged(reference, generator),
            reference=reference,
            reward=AutoModelForSequenceClassification.from_pretrained(world / "reward").to(dtype),
        )

    return draw


# ---------------------------------------------------------------------- theirs
@dataclass(frozen=True)
class Iteration:
    """Metrics, gradients of every step by our names, and each step's mean ratio where it is known."""

    metrics: dict[str, float]
    gradients: list[dict[str, Tensor]]
    ratios: list[float]


def our_name(name: str) -> str:
    """A parameter's name in our module."""
    for theirs, ours in (("policy.", "model."), ("value_model.gpt_neox.", "value_model.trunk.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name.replace("value_model.score.", "value_model.head.")


@pytest.fixture
def run_theirs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorder: Any,
    logs: Any,
    plain_arguments: dict[str, Any],
) -> Callable[..., Iteration]:
    """``run_theirs(sampled, **options)``: one iteration of TRL's trainer."""

    def run(sampled: Sampled, **options: Any) -> Iteration:
        from datasets import Dataset
        from trl.experimental.ppo import ppo_trainer as ppo

        known = dict(zip(map(tuple, sampled.prompts), sampled.padded()[1], strict=True))

        def batch_generation(_: Any, queries: Tensor, __: int, pad_id: int, ___: Any) -> tuple[Tensor, Tensor]:
            answers = torch.stack([known[tuple(row[row != pad_id].tolist())] for row in queries])
            whole = torch.cat([queries, answers], 1)
            logits = ppo.forward(sampled.older, whole, pad_id).logits[:, queries.shape[1] - 1 : -1]
            return whole, logits / sampled.temperature

        monkeypatch.setattr(ppo, "batch_generation", batch_generation)
        tokenizer = copy.deepcopy(sampled.tokenizer)
        tokenizer.padding_side = "left"
        policy, value = copy.deepcopy(sampled.policy), copy.deepcopy(sampled.reward)
        optimizer = recorder(ppo.PolicyAndValueWrapper(policy, value), LEARNING_RATE)
        prompts = Dataset.from_dict({"input_ids": sampled.prompts})
        size = {"per_device_train_batch_size": len(PROMPTS), "total_episodes": len(PROMPTS), "response_length": WIDTH}
        settings = {"temperature": TEMPERATURE, "kl_coef": KL_COEF, "cliprange_value": CLIPRANGE_VALUE}
        around = {"stop_token": "eos", "num_sample_generations": 0}
        ppo.PPOTrainer(
            ppo.PPOConfig(str(tmp_path / "trl"), **plain_arguments, **size, **settings, **around, **options),
            tokenizer,
            model=policy,
            ref_model=copy.deepcopy(sampled.reference),
            reward_model=copy.deepcopy(sampled.reward),
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts,
            optimizers=optimizer.with_schedule(),
            callbacks=[logs],
        ).train()
        gradients = [{our_name(name): found for name, found in step.items()} for step in optimizer.steps]
        return Iteration(logs.rows[-1], gradients, [])

    return run


# ---------------------------------------------------------------------- ours
class LikeTRL(PPOModule):
    """Samples what it is told, moves by plain gradient descent, and takes over some of TRL's conventions.

    Args:
        sampled: What it is told.
        recorder: The class of its optimiser.
        conventions: ``variance`` (divided by n − 1) and ``slot`` (one behind EOS, where there is room, for the score).
        settings: Those of :class:`PPOModule`.
    """

    def __init__(self, sampled: Sampled, recorder: Any, conventions: Collection[str], **settings: Any) -> None:
        super().__init__(**settings)
        self.sampled = sampled
        self.recorder = recorder
        self.conventions = conventions
        self.ratio_of_steps: list[float] = []
        self.rows: list[dict[str, float]] = []

    def configure_model(self) -> None:
        super().configure_model()
        (part,) = self.frozen.reward.parts
        for network in (self.model, self.value_model, self.frozen.reference, part.scorer.model):  # type: ignore[attr-defined]
            network.to(self.sampled.policy.dtype)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.recorder(self, LEARNING_RATE).with_schedule()
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def sample(self, batch: Mapping[str, Any]) -> Rollout:
        return self.sampled.rollout(slot="slot" in self.conventions)

    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        self.model.load_state_dict(self.sampled.older.state_dict())
        experience, metrics = super().experience(rollout)
        self.model.load_state_dict(self.sampled.policy.state_dict())
        return (self.behind_eos(experience) if "slot" in self.conventions else experience), metrics

    def behind_eos(self, experience: Experience) -> Experience:
        """The score on the slot behind EOS, and that slot's value in the recursion."""
        mask, slots = experience.completion_mask, with_slot(experience)
        assert experience.logp is not None
        assert experience.ref_logp is not None
        assert experience.values is not None
        kl = kl_estimate(experience.logp, experience.ref_logp, self.kl_estimator)
        rewards = shaped_rewards(kl.where(mask, 0.0), slots, experience.scores, kl_coef=self.kl_controller.value)
        if self.whiten_rewards:
            rewards = self.whiten(rewards, slots, shift_mean=False)
        advantages, returns = gae(rewards, experience.values, mask=slots, gamma=self.gamma, lam=self.lam)
        return replace(experience, rewards=rewards, advantages=self.whiten(advantages, mask), returns=returns)

    def estimates(
        self, kl: Tensor, values: Tensor, scores: Tensor, mask: Tensor, bootstrap: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step by step, so that :meth:`whiten` can follow TRL's convention; otherwise as it is."""
        if "variance" not in self.conventions:
            return super().estimates(kl, values, scores, mask, bootstrap)
        rewards = shaped_rewards(kl, mask, scores, kl_coef=self.kl_controller.value)
        if self.whiten_rewards:
            rewards = self.whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask=mask, gamma=self.gamma, lam=self.lam, bootstrap=bootstrap)
        return rewards, self.whiten(advantages, mask), returns

    def value_objective(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        if "slot" not in self.conventions:
            return super().value_objective(experience, normaliser)
        values = self.value_model(experience.input_ids, experience.attention_mask)
        assert experience.values is not None
        assert experience.returns is not None
        slots = with_slot(experience)
        return value_loss(values, experience.values, experience.returns, slots, cliprange_value=self.cliprange_value)

    def whiten(self, values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        return masked_whiten(values, mask, shift_mean=shift_mean, unbiased="variance" in self.conventions)

    def step_gradients(self, minibatch: Experience) -> Metrics:
        sums = super().step_gradients(minibatch)
        self.ratio_of_steps.append(self.ratios({"ratio": sums["val/ratio"]})["ratio"])
        return sums

    def report(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.rows.append(dict(metrics))


def with_slot(experience: Experience) -> Tensor:
    """Completions and what is attended to behind them."""
    place = torch.arange(experience.input_ids.shape[1])
    return experience.attention_mask & (place >= experience.rollout.prompt_lengths[:, None])


@pytest.fixture
def run_ours(
    world: Path, write: Callable[..., str], recorder: Any, quiet_trainer: Callable[..., L.Trainer]
) -> Callable[..., Iteration]:
    """``run_ours(sampled, conventions, **options)``: one iteration of our module."""

    def run(sampled: Sampled, conventions: Collection[str], **options: Any) -> Iteration:
        module = LikeTRL(
            sampled,
            recorder,
            conventions,
            **{"model": str(world / "policy"), "reward": str(world / "reward"), "value_init": "reward"},
            **{"iterations": 1, "max_new_tokens": WIDTH, "engine": "generate", "eval_every": 0, "max_grad_norm": 0.0},
            **{"temperature": sampled.temperature, "kl_coef": KL_COEF, "cliprange_value": CLIPRANGE_VALUE},
            **options,
        )
        prompts = write([{"prompt": prompt} for prompt in PROMPTS])
        data = PromptDataModule(path=prompts, batch_size=len(PROMPTS), val_fraction=0.0, cache_dir=None)
        trainer = quiet_trainer(max_epochs=-1)
        trainer.fit(module, datamodule=data)
        return Iteration(module.rows[-1], trainer.optimizers[0].steps, module.ratio_of_steps)  # type: ignore[attr-defined]

    return run
