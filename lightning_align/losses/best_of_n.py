"""Best of n samples: what it is expected to score, and how far it may be from the policy that it samples from.

Legend: P prompts, N samples of each.
"""

import math

import torch
from torch import Tensor


def best_of_n(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the sample that the proxy likes best among n, estimated without bias from N ≥ n samples.

    (1/C(N, n)) Σ_{i=n}^{N} C(i − 1, n − 1)·s_(i), s_(1) … s_(N) in ascending order of the proxy: the mean over all
    subsets of n samples (Nakano et al. 2021, 2112.09332; Gao et al. 2022, 2210.10760). Of equal proxies the earlier
    sample is the better one.

    Args:
        proxy: Scores to choose by ``[P, N]``; a sample whose score is NaN does not exist.
        values: s, what is to be known of the chosen ``[P, N]``: the proxy itself, gold scores, or wins.
        n: Samples to choose from.

    Returns:
        ``[P]`` float64; NaN for a prompt with fewer than n scored samples.
    """
    if not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"n is {n}: it must be from 1 to the number of samples, {proxy.shape[1]}")
    count = (~proxy.isnan()).sum(1)
    order = proxy.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    weights = _weights(count, proxy.shape[1], n)
    expected = torch.where(weights > 0, weights * values.double().gather(1, order), 0.0).sum(1)
    return expected.where(count >= n, torch.nan)


def _weights(count: Tensor, samples: int, n: int) -> Tensor:
    """Probability that the k-th best of ``count`` samples is the best of n of them, k = 1 … N: ``[P, N]``.

    w_1 = n/count, w_{k+1} = w_k (count − k + 1 − n)/(count − k): the binomials themselves would overflow.
    From the place on where fewer than n are left it is 0.
    """
    count = count.double()[:, None]
    worse = count - torch.arange(1, samples, device=count.device)  # samples below the k-th, k = 1 … N − 1
    ratios = (worse + 1 - n) / worse.clamp(min=1)
    return torch.cat([n / count, ratios], dim=1).cumprod(1)


def best_of_n_win_rate(proxy: Tensor, values: Tensor, reference: Tensor, n: int) -> Tensor:
    """Probability ``[P]`` that the best of n by the proxy is strictly better than a reference; no bias.

    Args:
        proxy: As for :func:`best_of_n`.
        values: Scores that decide who wins ``[P, N]``.
        reference: That score of the reference's completion ``[P]``.
        n: Samples to choose from.
    """
    return best_of_n(proxy, (values > reference[:, None]).double(), n)


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n in nats: at least KL(best of n ‖ policy), and equal to it if no two samples score the same.

    An upper bound otherwise (Beirami et al. 2024, 2401.01879).
    """
    if n < 1:
        raise ValueError(f"n is {n}: it must be at least 1")
    return math.log(n) - (n - 1) / n
