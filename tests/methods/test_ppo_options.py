"""Options of PPO reach its rewards, advantages and loss: each against its formula, token by token."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.models.logprobs import token_stats

Ppo = Callable[..., Any]


def collected(module: Any) -> Any:
    """The first iteration's experience of a policy that is no longer its reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module.collect(next(iter(module.trainer.datamodule.train_dataloader())))[0]


def moved(experience: Any) -> Any:
    """The experience as if the policy and values had moved since, by up to 2 nats a token and by up to 1."""
    generator = torch.Generator().manual_seed(6)
    noise = torch.rand(2, *experience.logp.shape, generator=generator)
    logp, values = experience.logp + 4 * noise[0] - 2, experience.values + 2 * noise[1] - 1
    return dataclasses.replace(experience, logp=logp, values=values)


def tokens(experience: Any) -> Iterator[tuple[int, int]]:
    """Row and column of every completion token."""
    yield from map(tuple, experience.completion_mask.nonzero().tolist())


def current(module: Any, experience: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and values as they are now."""
    with torch.no_grad():
        stats = token_stats(
            module.model, experience.input_ids, experience.attention_mask, mask=experience.completion_mask
        )
        return stats.logp, module.value_model(experience.input_ids, experience.attention_mask)


def loss(module: Any, experience: Any) -> float:
    """The module's loss of the whole experience as one minibatch."""
    with torch.no_grad():
        return float(module.minibatch_loss(experience, experience.completion_mask.sum().float())[0])


def policy_loss(module: Any, experience: Any, *, dual_clip: float = math.inf) -> float:
    """Mean over tokens of max(−A ρ, −A clip(ρ, 1 ± 0.2)), at most −A c where A < 0."""
    logp, _ = current(module, experience)
    terms = []
    for place in tokens(experience):
        ratio = math.exp(float(logp[place] - experience.logp[place]))
        advantage = float(experience.advantages[place])
        term = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        terms.append(min(term, -advantage * dual_clip) if advantage < 0 else term)
    return sum(terms) / len(terms)


def value_loss(module: Any, experience: Any) -> float:
    """Half the mean over tokens of max((V − G)², (clip(V, V_old ± 0.2) − G)²)."""
    _, values = current(module, experience)
    terms = []
    for place in tokens(experience):
        value, old, target = (float(column[place]) for column in (values, experience.values, experience.returns))
        near = min(max(value, old - 0.2), old + 0.2)
        terms.append(max((value - target) ** 2, (near - target) ** 2) / 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("vf_coef", [0.0, 0.1, 2.0])
def test_vf_coef_weighs_the_value_loss(ppo: Ppo, vf_coef: float) -> None:
    module = ppo(ready=True, vf_coef=vf_coef)
    experience = moved(collected(module))
    value = value_loss(module, experience)
    assert value > 1e-2
    assert loss(module, experience) == pytest.approx(policy_loss(module, experience) + vf_coef * value, rel=1e-4)


def test_dual_clip_bounds_the_loss_of_bad_tokens(ppo: Ppo) -> None:
    module = ppo(ready=True, vf_coef=0.0, dual_clip=1.5)
    experience = moved(collected(module))
    clipped, plain = policy_loss(module, experience, dual_clip=1.5), policy_loss(module, experience)
    assert clipped < plain - 1e-2
    assert loss(module, experience) == pytest.approx(clipped, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_kl_estimator_is_the_penalty_of_each_token(ppo: Ppo, estimator: str) -> None:
    module = ppo(ready=True, kl_estimator=estimator, kl_coef=0.5)
    experience = collected(module)
    with torch.no_grad():
        policy, reference = (
            model(input_ids=experience.input_ids, attention_mask=experience.attention_mask).logits.log_softmax(-1)
            for model in (module.model, module.frozen.reference)
        )
    last = experience.completion_mask.sum(1) + experience.rollout.prompt_lengths - 1
    penalties = []
    for row, column in tokens(experience):
        ours, theirs = policy[row, column - 1], reference[row, column - 1]
        token = experience.input_ids[row, column]
        d = float(ours[token] - theirs[token])
        expected = {
            "k1": d,
            "k2": d**2 / 2,
            "k3": math.exp(-d) - 1 + d,
            "exact": float((ours.exp() * (ours - theirs)).sum()),
        }[estimator]
        score = float(experience.scores[row]) if column == last[row] else 0.0
        assert float(experience.rewards[row, column]) == pytest.approx(score - 0.5 * expected, abs=1e-4)
        penalties.append(expected)
    assert max(map(abs, penalties)) > 1e-2


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.95), (1.0, 0.5), (0.8, 0.0)])
def test_gamma_and_lam_discount_the_advantages(ppo: Ppo, gamma: float, lam: float) -> None:
    module = ppo(ready=True, gamma=gamma, lam=lam, whiten_scope="minibatch")  # here they are not whitened yet
    experience = collected(module)
    for row in range(len(experience)):
        columns = experience.completion_mask[row].nonzero().flatten().tolist()
        rewards, values = (column[row, columns].tolist() for column in (experience.rewards, experience.values))
        advantage = 0.0
        for step in reversed(range(len(columns))):
            following = values[step + 1] if step + 1 < len(columns) else 0.0
            advantage = rewards[step] + gamma * following - values[step] + gamma * lam * advantage
            assert float(experience.advantages[row, columns[step]]) == pytest.approx(advantage, abs=1e-4)
            assert float(experience.returns[row, columns[step]]) == pytest.approx(advantage + values[step], abs=1e-4)


def test_entropy_bonus_raises_the_entropy(ppo: Ppo, experiences: list[Any]) -> None:
    def entropy(model: Any) -> float:
        rollout = experiences[0].rollout
        with torch.no_grad():
            stats = token_stats(
                model, rollout.input_ids, rollout.attention_mask, mask=rollout.completion_mask, entropy=True
            )
        assert stats.entropy is not None
        return float(stats.entropy.sum() / rollout.completion_mask.sum())

    modules = [ppo(iterations=1, num_ppo_epochs=1, entropy_coef=coef).module for coef in (0.0, 1.0, 100.0)]
    assert torch.equal(experiences[0].input_ids, experiences[2].input_ids)  # they learned from the same samples
    start, after = entropy(modules[0].frozen.reference), [entropy(module.model) for module in modules]
    assert after[0] < after[1]
    assert start < after[2]
