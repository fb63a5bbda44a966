"""PPO: an iteration on the same completions gives TRL's gradients and metrics, once its conventions are taken over.

What differs otherwise is named here, and shown to be all that differs.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lightning_align.losses.masked import masked_mean, masked_whiten, mean_and_var, moments
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.ppo import PPOModule
from lightning_align.models.heads import RewardModel

ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="make test-parity installs TRL 1.12 for this")

# METHODS, appendix A: the variance is divided by n − 1, and the score lands one position behind EOS, where there is one
CONVENTIONS = ("variance", "slot")
MINIMUM = 1e-3  # what a convention that is left out must change at least
SAME = (
    *("objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores"),
    *("policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/num_eos_tokens"),
    *("lr", "episode"),
)
OVER_PADDING = ("policy/approxkl_avg", "policy/entropy_avg", "val/ratio")
CHANGED = {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8}


def furthest(ours: Any, theirs: Any) -> float:
    """Largest difference of any gradient of any step."""
    pairs = zip(ours.gradients, theirs.gradients, strict=True)
    return max(float((found - other[name]).abs().max()) for own, other in pairs for name, found in own.items())


def chosen(metrics: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Some of them."""
    return {name: metrics[name] for name in names}


# ---------------------------------------------------------------------- whole iterations
def test_completions_of_full_length(
    dtype: torch.dtype,
    sample: Callable[..., Any],
    run_theirs: Callable[..., Any],
    run_ours: Callable[..., Any],
    agree: Callable[..., None],
) -> None:
    """There is no padding, and no slot behind EOS: the variance is all that differs."""
    sampled = sample("full")
    theirs = run_theirs(sampled, num_ppo_epochs=2)
    ours = run_ours(sampled, ("variance",), num_ppo_epochs=2)
    for step in range(2):
        agree(f"gradients of step {step}", ours.gradients[step], theirs.gradients[step], dtype)
    names = (*SAME, *OVER_PADDING, "objective/kl")
    agree("metrics", chosen(ours.metrics, names), chosen(theirs.metrics, names), dtype)
    for name in ("policy/clipfrac_avg", "val/clipfrac_avg"):
        assert 0 < ours.metrics[name] < 1, "some are clipped, some are not"
    assert furthest(run_ours(sampled, (), num_ppo_epochs=2), theirs) > MINIMUM
    # TRL's is the variance of the steps' means, not of the ratio
    agree("variance of the mean ratio", torch.tensor(ours.ratios).var(), theirs.metrics["val/ratio_var"], dtype)
    assert theirs.metrics.keys() - {"epoch"} <= ours.metrics.keys(), "every name that TRL logs"


@pytest.mark.parametrize("options", [{}, CHANGED], ids=["defaults", "changed"])
def test_completions_that_end(
    dtype: torch.dtype,
    sample: Callable[..., Any],
    run_theirs: Callable[..., Any],
    run_ours: Callable[..., Any],
    agree: Callable[..., None],
    options: dict[str, Any],
) -> None:
    """Each of the two conventions is needed, and no third."""
    sampled = sample("mixed")
    options = {"num_ppo_epochs": 2, "missing_eos_penalty": 0.5, **options}
    theirs, ours = run_theirs(sampled, **options), run_ours(sampled, CONVENTIONS, **options)
    for step in range(2):
        agree(f"gradients of step {step}", ours.gradients[step], theirs.gradients[step], dtype)
    agree("metrics", chosen(ours.metrics, SAME), chosen(theirs.metrics, SAME), dtype)
    for left_out in CONVENTIONS:
        others = [convention for convention in CONVENTIONS if convention != left_out]
        assert furthest(run_ours(sampled, others, **options), theirs) > MINIMUM, left_out


def test_objective_kl_is_k1_whatever_the_penalty(
    dtype: torch.dtype,
    sample: Callable[..., Any],
    run_theirs: Callable[..., Any],
    run_ours: Callable[..., Any],
    agree: Callable[..., None],
) -> None:
    """TRL logs what it penalises."""
    sampled = sample("mixed")
    theirs = {estimator: run_theirs(sampled, num_ppo_epochs=1, kl_estimator=estimator) for estimator in ("k1", "k3")}
    ours = run_ours(sampled, CONVENTIONS, num_ppo_epochs=1, kl_estimator="k3").metrics
    agree("k1", ours["objective/kl"], theirs["k1"].metrics["objective/kl"], dtype)
    penalised = ours["objective/non_score_reward"] / -ours["objective/kl_coef"]
    agree("k3", penalised, theirs["k3"].metrics["objective/kl"], dtype)
    assert abs(penalised - ours["objective/kl"]) > MINIMUM


def test_averages_leave_out_padding(
    dtype: torch.dtype,
    sample: Callable[..., Any],
    run_theirs: Callable[..., Any],
    run_ours: Callable[..., Any],
    agree: Callable[..., None],
) -> None:
    """TRL's include it, with ratio 1 and difference 0, and the entropy of whatever the policy says there."""
    sampled = sample("mixed")
    theirs = run_theirs(sampled, num_ppo_epochs=1).metrics
    ours = run_ours(sampled, CONVENTIONS, num_ppo_epochs=1).metrics
    queries, answers = sampled.padded()
    padding = answers == sampled.tokenizer.pad_token_id
    with torch.no_grad():
        output = ppo.forward(sampled.policy, torch.cat([queries, answers], 1), sampled.tokenizer.pad_token_id)
    logits = output.logits[:, queries.shape[1] - 1 : -1] / sampled.temperature
    entropy = torch.distributions.Categorical(logits=logits).entropy()[padding].mean()
    share = float(padding.double().mean())
    assert 0.2 < share < 0.8, "enough of both"
    for name, there in zip(OVER_PADDING, (0.0, float(entropy), 1.0), strict=True):
        agree(name, (1 - share) * ours[name] + share * there, theirs[name], dtype)


# ---------------------------------------------------------------------- functions
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_differs_by_the_variance_alone(
    dtype: torch.dtype, agree: Callable[..., None], shift_mean: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    values = 2 + 3 * torch.randn(4, 7, generator=generator, dtype=dtype)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    theirs = torch.where(mask, ppo.masked_whiten(values, mask, shift_mean=shift_mean), 0.0)
    agree("unbiased", masked_whiten(values, mask, shift_mean=shift_mean, unbiased=True), theirs, dtype)
    agree("mean", masked_mean(values, mask), ppo.masked_mean(values, mask), dtype)
    total = moments(values, mask)
    agree("biased variance", mean_and_var(total)[1], ppo.masked_var(values, mask, unbiased=False), dtype)
    assert not torch.allclose(masked_whiten(values, mask, shift_mean=shift_mean), theirs, atol=MINIMUM)


def test_scores_are_read_at_the_same_token(
    world: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, agree: Callable[..., None]
) -> None:
    """TRL's completions start at one column behind padding on the left; ours are padded on the right."""
    network = AutoModelForSequenceClassification.from_pretrained(world / "reward").to(dtype)
    prompts = [tokenizer(text)["input_ids"] for text in ("sort dog cat", "do it")]
    answers = [tokenizer(text)["input_ids"] for text in (" cat dog<|im_end|>", " cat cat cat rain")]
    pad_id, start, stop = tokenizer.pad_token_id, max(map(len, prompts)), max(map(len, answers))
    rows = [
        [pad_id] * (start - len(p)) + p + a + [pad_id] * (stop - len(a)) for p, a in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        _, theirs, _ = ppo.get_reward(network, torch.tensor(rows), pad_id, start)
        for prompt, answer, score in zip(prompts, answers, theirs, strict=True):
            ids = torch.tensor([prompt + answer])
            agree("score", RewardModel(network)(ids, torch.ones_like(ids))[0], score, dtype)


def test_defaults_are_those_of_trl() -> None:
    """Of every setting that both have, but for the temperature: ours samples from the policy as it is."""
    from trl.experimental.ppo import PPOConfig

    theirs = PPOConfig(use_cpu=True, bf16=False)
    ours = {
        name: parameter.default
        for method in (PPOModule, OnlineModule)
        for name, parameter in inspect.signature(method.__init__).parameters.items()
    }
    names = ("learning_rate", "num_ppo_epochs", "num_mini_batches", "kl_coef", "kl_estimator", "cliprange")
    more = ("cliprange_value", "vf_coef", "gamma", "lam", "whiten_rewards", "missing_eos_penalty")
    for name in (*names, *more):
        assert ours[name] == getattr(theirs, name), name
    assert ours["max_new_tokens"] == theirs.response_length
    assert (ours["temperature"], theirs.temperature) == (1.0, 0.7)
