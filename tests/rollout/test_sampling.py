"""Uniform numbers, the likeliest token, inverse-CDF draws and truncation, against the truth and transformers."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_align.rollout.sampling import _mix, choose, inverse_cdf, likeliest, truncate, uniforms
from lightning_align.rollout.types import SamplingParams

LARGEST = 1.0 - 2.0**-52  # the largest number that ``uniforms`` yields
SIGNIFICANCE = 1e-3  # seeds are fixed, so a test that passes once passes always


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 1} | changes))


def random_logits(rows: int, vocabulary: int, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def brute_force_cdf(weights: Tensor, uniform: Tensor) -> list[int]:
    """The definition in float64: the first index whose cumulative weight exceeds uniform · total."""
    chosen = []
    for row, u in zip(weights.double(), uniform, strict=True):
        mass = row.cumsum(0)
        chosen.append(int((mass > u * mass[-1]).nonzero()[0]))
    return chosen


# ---------------------------------------------------------------------- uniforms
def test_mixing_matches_the_published_splitmix64_sequence() -> None:
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_depend_on_seed_and_step_alone() -> None:
    together = uniforms([5, -1, 2**70, 5], 9)
    assert together.shape == (4, 9)
    assert together.dtype == torch.float64
    assert torch.equal(together[0], together[3])
    assert torch.equal(together[1:2], uniforms([-1], 9))
    assert torch.equal(together[:, :3], uniforms([5, -1, 2**70, 5], 3))
    assert len(together[:3].unique()) == 27


def test_uniforms_are_uniform_and_below_one() -> None:
    values = uniforms(range(2000), 50)
    assert 0 <= float(values.min()) < float(values.max()) <= LARGEST
    assert stats.kstest(values.view(-1).numpy(), "uniform").pvalue > SIGNIFICANCE
    assert stats.kstest(uniforms(range(20_000), 1).view(-1).numpy(), "uniform").pvalue > SIGNIFICANCE
    assert stats.kstest(uniforms([3], 20_000).view(-1).numpy(), "uniform").pvalue > SIGNIFICANCE


@pytest.mark.parametrize(("seed_lag", "step_lag"), [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (4, 1)])
def test_uniforms_of_neighbouring_seeds_and_steps_are_independent(seed_lag: int, step_lag: int) -> None:
    values = uniforms(range(400), 250).numpy()
    first = values[: values.shape[0] - seed_lag, : values.shape[1] - step_lag].ravel()
    second = values[seed_lag:, step_lag:].ravel()
    cells = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chi2_contingency(cells).pvalue > SIGNIFICANCE


# ---------------------------------------------------------------------- choice
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("greedy", [False, True])
def test_conv_1_logp_is_that_of_the_whole_distribution_at_the_temperature(temperature: float, greedy: bool) -> None:
    logits = random_logits(40, 300)
    asked = params(temperature=temperature, greedy=greedy, top_k=5, top_p=0.7, min_p=0.1)
    tokens, logp = choose(logits, asked, uniforms(range(40), 1)[:, 0])
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 7, 128, 129, 1000])
def test_likeliest_is_argmax_and_the_first_of_equals(vocabulary: int) -> None:
    logits = random_logits(50, vocabulary).round()  # many ties
    first = [row.index(max(row)) for row in logits.tolist()]
    assert likeliest(logits).tolist() == first
    assert likeliest(torch.full((2, vocabulary), -torch.inf)).tolist() == [0, 0]


def test_greedy_ignores_seeds_and_truncation() -> None:
    logits = random_logits(20, 200)
    asked = params(greedy=True, top_k=3, temperature=0.1)
    tokens, _ = choose(logits, asked, torch.rand(20, dtype=torch.float64))
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_not_numbers_give_a_valid_token_and_a_logp_that_is_not_a_number(greedy: bool) -> None:
    logits = random_logits(3, 130)
    logits[1, 129] = torch.nan
    logits[2] = torch.inf
    tokens, logp = choose(logits, params(greedy=greedy), torch.tensor([0.1, 0.5, LARGEST], dtype=torch.float64))
    assert bool(((tokens >= 0) & (tokens < 130)).all())
    assert logp.isnan().tolist() == [False, True, True]


# ---------------------------------------------------------------------- inverse CDF
@pytest.mark.parametrize("vocabulary", [1, 2, 53, 127, 128, 129, 1000])
def test_inverse_cdf_equals_brute_force(vocabulary: int) -> None:
    weights = random_logits(300, vocabulary, spread=4.0).exp()
    weights[::3] *= torch.rand(weights[::3].shape, generator=torch.Generator().manual_seed(1)) < 0.2
    weights[:, 0] += 1e-6 * (weights.sum(1) == 0)
    uniform = uniforms(range(300), 1)[:, 0]
    assert inverse_cdf(weights, uniform).tolist() == brute_force_cdf(weights, uniform)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-52, 0.5, LARGEST])
def test_inverse_cdf_never_draws_what_has_no_weight(uniform: float) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(500, 777, generator=generator)
    weights *= torch.rand(500, 777, generator=generator) < 0.01
    weights[torch.arange(500), torch.randint(0, 777, (500,), generator=generator)] = 1e-30
    drawn = inverse_cdf(weights, torch.full((500,), uniform, dtype=torch.float64))
    assert bool((weights.gather(1, drawn[:, None]) > 0).all())


def test_inverse_cdf_at_the_ends_of_the_interval() -> None:
    weights = torch.tensor([[0.0, 0.0, 1.0, 3.0, 0.0]])
    assert inverse_cdf(weights, torch.tensor([0.0], dtype=torch.float64)).item() == 2
    assert inverse_cdf(weights, torch.tensor([0.25], dtype=torch.float64)).item() == 3
    assert inverse_cdf(weights, torch.tensor([LARGEST], dtype=torch.float64)).item() == 3


def test_inverse_cdf_is_exact_over_a_large_vocabulary() -> None:
    """A float32 cumulative sum over 150,000 tokens would be off by many tokens."""
    weights = random_logits(20, 150_001, spread=1.0).softmax(-1)
    uniform = uniforms(range(20), 1)[:, 0]
    drawn, exact = inverse_cdf(weights, uniform), torch.tensor(brute_force_cdf(weights, uniform))
    mass = weights.double().cumsum(1)
    off = (mass.gather(1, drawn[:, None]) - mass.gather(1, exact[:, None])).abs()
    assert float(off.max()) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(changes: dict[str, float]) -> None:
    logits = random_logits(1, 12, spread=1.0, seed=4)
    asked, draws = params(**changes), 40_000
    tokens, _ = choose(logits.expand(draws, -1), asked, uniforms(range(draws), 1)[:, 0])
    weights = truncate((logits.double() / asked.temperature).softmax(-1), asked)[0]
    expected = (draws * weights / weights.sum()).numpy()
    counts = np.bincount(tokens.numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > SIGNIFICANCE


# ---------------------------------------------------------------------- truncation
def brute_force_truncation(probs: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    """The definitions one after the other, over Python lists."""
    kept = set(range(len(probs)))
    if top_k:
        kth = sorted(probs, reverse=True)[min(top_k, len(probs)) - 1]
        kept = {index for index in kept if probs[index] >= kth}
    if top_p < 1:
        total, mass, nucleus = sum(probs[index] for index in kept), 0.0, set()
        for index in sorted(kept, key=lambda index: -probs[index]):
            if mass < top_p * total:
                nucleus.add(index)
            mass += probs[index]
        kept = nucleus
    if min_p:
        kept = {index for index in kept if probs[index] >= min_p * max(probs)}
    return [prob if index in kept else 0.0 for index, prob in enumerate(probs)]


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.9])
def test_truncation_equals_brute_force(top_k: int, top_p: float, min_p: float) -> None:
    probs = random_logits(30, 40, spread=2.0).softmax(-1)
    truncated = truncate(probs, params(top_k=top_k, top_p=top_p, min_p=min_p))
    expected = [brute_force_truncation(row, top_k, top_p, min_p) for row in probs.tolist()]
    assert truncated.tolist() == torch.tensor(expected).tolist()
    assert bool((truncated.argmax(-1) == probs.argmax(-1)).all())  # the likeliest token always stays


@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_truncation_keeps_what_transformers_keeps(changes: dict[str, float], warper: object) -> None:
    logits = random_logits(30, 100, spread=2.0)
    kept = truncate(logits.softmax(-1), params(**changes)) > 0
    assert torch.equal(kept, warper(None, logits) > -torch.inf)
