"""From a judge's log-probs to labels of comparisons and to rewards: constitutional AI and RLAIF.

Legend: P pairs of completions, or completions that are rated.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics, at_least_float32

UNDECIDED = 0.05  # |p − ½| below which a label says next to nothing


def soft_label(logp_a: Tensor, logp_b: Tensor, *, bounds: tuple[float, float] | None = None) -> Tensor:
    """p = P(A)/(P(A) + P(B)), the probability of option A among the two; any shape.

    Bai et al. 2022 (2212.08073). Where an option can be written in several ways, their log-probs are added first, by
    logsumexp.

    Args:
        logp_a: Log-prob of option A.
        logp_b: Log-prob of option B.
        bounds: Clamp p to these; the paper's are (0.4, 0.6) after a chain of thought, which leaves no doubt. Labels of
            several principles or orders are averaged *after* that.
    """
    label = torch.sigmoid(at_least_float32(logp_a) - at_least_float32(logp_b))
    if bounds is None:
        return label
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"bounds are {bounds}: they must be two ascending probabilities")
    return label.clamp(*bounds)


def both_orders(first: Tensor, swapped: Tensor) -> tuple[Tensor, Metrics]:
    """p = ½(p_12 + 1 − p_21): the label of a pair that was shown in both orders, free of a preference for a place.

    Lee et al. 2023 (2309.00267).

    Args:
        first: p_12 ``[P]``, probability that the completion shown first wins, which is completion 1.
        swapped: p_21 ``[P]``, probability that the completion shown first wins, which is completion 2.

    Returns:
        p ``[P]``, probability that completion 1 is the better one; metrics ``ai/position_bias`` (share of pairs
        whose winner changes with the order) and those of :func:`label_metrics`.
    """
    first, swapped = at_least_float32(first), at_least_float32(swapped)
    label = 0.5 + 0.5 * (first - swapped)
    flipped = torch.sign(first - 0.5) * torch.sign(0.5 - swapped) < 0
    return label, {"ai/position_bias": _mean(flipped), **label_metrics(label)}


def label_metrics(label: Tensor, gold: Tensor | None = None) -> Metrics:
    """What labels ``[P]`` say about their judge.

    ``ai/mean_confidence``, max(p, 1 − p); ``ai/undecided``, share with p nearer than 0.05 to ½;
    ``cai/label_entropy`` in nats; and with ``gold`` labels ``[P]`` (½ for a tie, left out) ``ai/alignment``, share
    that agrees, p = ½ counting half.
    """
    label = at_least_float32(label)
    distance = (label - 0.5).abs()
    metrics = {
        "ai/mean_confidence": _mean(0.5 + distance),
        "ai/undecided": _mean(distance < UNDECIDED),
        "cai/label_entropy": _mean(torch.special.entr(label) + torch.special.entr(1 - label)),
    }
    if gold is not None:
        side = torch.sign(gold - 0.5).to(label.dtype)
        agrees = 0.5 * (1 + torch.sign(label - 0.5) * side)
        metrics["ai/alignment"] = _mean(agrees[side != 0])
    return metrics


class Rating(NamedTuple):
    """What a judge's ratings come to, each ``[P]``.

    Args:
        score: Expected rating, from 1 to K.
        reward: The same in [−1, 1].
        mass: Probability that the judge gives a rating at all; where it is small (below ½), the prompt is at fault.
    """

    score: Tensor
    reward: Tensor
    mass: Tensor


def expected_rating(logp: Tensor) -> Rating:
    """s = Σ_k k w_k with w_k = P(k)/Σ_j P(j), and 2(s − 1)/(K − 1) − 1: direct RLAIF's reward (2309.00267).

    Args:
        logp: Log-probs of the ratings 1 … K ``[P, K]`` (K = 10 in the paper), each as a whole: "10" is P(1)·P(0|1),
            and "1" is P(1)·P(end|1). A row of nothing but −inf comes out as NaN, which means unscored.
    """
    logp = at_least_float32(logp)
    weights = logp.softmax(-1)
    top = logp.shape[-1]
    place = torch.linspace(-1, 1, top, dtype=logp.dtype, device=logp.device)
    reward = (weights * place).sum(-1)
    return Rating(1 + 0.5 * (top - 1) * (reward + 1), reward, logp.logsumexp(-1).exp())


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    values = at_least_float32(values.detach())
    return values.sum(), values.new_tensor(math.prod(values.shape))
