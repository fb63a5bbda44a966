"""Best of n: the unbiased estimate, wins against a reference, and the bound of the KL."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_align.losses.best_of_n import best_of_n, best_of_n_kl, best_of_n_win_rate

NAN = math.nan


def draw(samples: int, seed: int = 0, *, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Proxy and gold of five prompts."""
    generator = torch.Generator().manual_seed(seed)
    proxy, gold = (torch.randn(5, samples, dtype=torch.float64, generator=generator) for _ in range(2))
    return proxy.round() if ties else proxy, gold


def enumerated(proxy: list[float], values: list[float], n: int) -> float:
    """Mean over all subsets of n samples; of equal proxies the first."""
    best = [values[max(subset, key=lambda i: (proxy[i], -i))] for subset in combinations(range(len(proxy)), n)]
    return sum(best) / len(best)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 5, 10])
def test_rs_1_the_estimate_is_the_mean_over_all_subsets(samples: int, ties: bool) -> None:
    proxy, gold = draw(samples, ties=ties)
    for n in range(1, samples + 1):
        expected = [enumerated(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)]
        found = best_of_n(proxy, gold, n)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert best_of_n(proxy.float(), gold.float(), n).dtype == torch.float64


def test_rs_1_one_is_the_mean_and_all_is_the_best() -> None:
    proxy, gold = draw(8)
    torch.testing.assert_close(best_of_n(proxy, gold, 1), gold.mean(1))
    torch.testing.assert_close(best_of_n(proxy, proxy, 8), proxy.amax(1))
    torch.testing.assert_close(best_of_n(proxy, gold, 8), gold.gather(1, proxy.argmax(1, keepdim=True))[:, 0])
    curve = torch.stack([best_of_n(proxy, proxy, n) for n in range(1, 9)])
    assert (curve.diff(dim=0) > 0).all()


def test_rs_1_of_equal_proxies_the_earlier_is_chosen() -> None:
    proxy, values = torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert best_of_n(proxy, values, 4) == 20
    assert best_of_n(proxy.flip(1), values.flip(1), 4) == 30
    many = torch.zeros(1, 500)
    torch.testing.assert_close(best_of_n(many, torch.arange(500.0)[None], 500)[0], torch.tensor(0.0).double())


def test_many_samples_neither_overflow_nor_underflow() -> None:
    samples = 5000
    proxy = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).double()[None]
    for n in (1, 7, 2500, 4999, 5000):
        # ranks 0 … N − 1: the best of n is n(N + 1)/(n + 1) − 1
        expected = torch.tensor([n * (samples + 1) / (n + 1) - 1], dtype=torch.float64)
        torch.testing.assert_close(best_of_n(proxy, proxy, n), expected, rtol=1e-10, atol=0)


def test_samples_without_score_do_not_exist() -> None:
    proxy, gold = draw(6)
    holes = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    found = best_of_n(proxy.where(~holes, NAN), gold.where(~holes, NAN), 3)
    torch.testing.assert_close(found, best_of_n(proxy[:, ~holes[0]], gold[:, ~holes[0]], 3))
    proxy[0, 1:] = NAN
    proxy[1] = NAN
    few = best_of_n(proxy, gold, 2)
    assert few[:2].isnan().all()
    assert few[2:].isfinite().all()
    assert best_of_n(proxy, gold, 1)[0] == gold[0, 0]


@pytest.mark.parametrize("n", [0, 7])
def test_n_beyond_the_samples_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}: it must be from 1 to the number of samples, 6"):
        best_of_n(*draw(6), n)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_rs_1_wins_against_a_reference(n: int) -> None:
    proxy, gold = draw(7, seed=1)
    reference = gold.median(1).values  # one of the samples: it does not beat itself
    wins = best_of_n_win_rate(proxy, gold, reference, n)
    for p, g, r, win in zip(proxy.tolist(), gold.tolist(), reference.tolist(), wins.tolist(), strict=True):
        assert win == pytest.approx(enumerated(p, [float(value > r) for value in g], n))
    assert (best_of_n_win_rate(gold, gold, gold.amax(1), n) == 0).all()
    torch.testing.assert_close(best_of_n_win_rate(gold, gold, reference, 1), torch.full((5,), 3 / 7).double())


def test_rs_1_the_estimate_is_unbiased() -> None:
    """The mean over draws of six samples is the expectation of the best of two of a categorical policy."""
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    proxy, gold = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 5.0, -2.0]).double()
    drawn = torch.multinomial(probabilities, 60_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimates = best_of_n(proxy[drawn].view(-1, 6), gold[drawn].view(-1, 6), 2)
    cumulative = probabilities.cumsum(0)
    chosen = cumulative**2 - (cumulative - probabilities) ** 2
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - (chosen * gold).sum()) < 4 * error


def test_rs_2_the_kl_of_a_categorical_policy_stays_below_its_bound_and_reaches_it() -> None:
    for n in (1, 2, 4, 16):
        gaps = []
        for support in (3, 30, 300, 30_000):
            probabilities = torch.linspace(1, 2, support, dtype=torch.float64)
            probabilities /= probabilities.sum()
            above = probabilities.cumsum(0)  # distinct scores, ascending
            chosen = above**n - (above - probabilities).clamp(min=0) ** n
            kl = torch.special.xlogy(chosen, chosen / probabilities).sum()
            gaps.append(best_of_n_kl(n) - float(kl))
        assert min(gaps) > -1e-9
        assert gaps == sorted(gaps, reverse=True) or n == 1
        assert gaps[-1] < 1e-3
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_kl(0)
