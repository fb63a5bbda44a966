"""Metrics of a policy's samples, and of two policies against each other, with intervals over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_align.lab.evaluation.comparison import both_orders, consistency, per_prompt, score_judge
from lightning_align.lab.evaluation.diversity import blocks, distinct_n, prompt_columns, words
from lightning_align.lab.evaluation.intervals import Estimate, means, permutation_p, ratios, student
from lightning_align.lab.evaluation.length_control import length_controlled
from lightning_align.lab.evaluation.sampling import Samples
from lightning_align.lab.overopt import Array
from lightning_align.losses.best_of_n import best_of_n, best_of_n_kl

SUMMED = ("entropy",)  # over tokens: their mean is one of tokens


def sample_metrics(samples: Samples, *, distinct_words: int, seed: int = 0) -> dict[str, Estimate]:
    """What samples say by themselves.

    Args:
        samples: Of a policy.
        distinct_words: Size of the sets in which distinct n-grams are counted.
        seed: Of the resampling.

    Returns:
        The mean of every column over prompts (a prompt's samples are averaged first), the mean ``entropy`` of a token,
        ``self_bleu`` and ``unique_fraction`` where a prompt has several samples, and ``distinct_1`` and ``distinct_2``,
        means over sets of so many words, where the samples fill one; their n is the number of sets.
    """
    groups = [[words(text) for text in texts] for texts in samples.texts]
    columns = {name: per_prompt(values) for name, values in samples.columns.items() if name not in SUMMED}
    entropy, length = (samples.columns[name].sum(1) for name in ("entropy", "length"))
    metrics = means(columns | prompt_columns(groups), seed=seed) | ratios({"entropy": (entropy, length)}, seed=seed)
    sets = blocks(groups, distinct_words, seed=seed)
    for n in (1, 2):
        metrics[f"distinct_{n}"] = student(np.array([distinct_n(answers, n) for answers in sets]))
    return {name: estimate for name, estimate in metrics.items() if estimate.n}


def best_of(samples: Samples, *, seed: int = 0) -> list[dict[str, Any]]:
    """What the completion that the proxy likes best of n is expected to score, for n = 1, 2, 4 … up to the samples.

    Returns:
        For each n a row with ``n``, ``kl_bound`` (the best of n is at most so far from the policy, in nats) and the
        estimates ``proxy`` and ``gold`` as far as they are measured: means over prompts with n scored completions, each
        the mean over all subsets of n of them (without bias). Empty without a proxy, or with one sample a prompt.
    """
    if "proxy" not in samples.columns or samples.columns["proxy"].shape[1] < 2:
        return []
    proxy = torch.from_numpy(samples.columns["proxy"])
    measured = [name for name in ("proxy", "gold") if name in samples.columns]
    scores = {name: torch.from_numpy(samples.columns[name]) for name in measured}
    rows = []
    for n in (2**power for power in range(proxy.shape[1].bit_length())):
        columns: dict[str, Array] = {name: best_of_n(proxy, values, n).numpy() for name, values in scores.items()}
        estimates = {name: estimate for name, estimate in means(columns, seed=seed).items() if estimate.n}
        if estimates:
            found = {name: estimate.as_dict() for name, estimate in estimates.items()}
            rows.append({"n": n, "kl_bound": best_of_n_kl(n), **found})
    return rows


def compare(samples: Samples, other: Samples, *, judge: str, tie_eps: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Win rate of one policy over another, and by how much their scores differ, on the same prompts.

    Every sample of the one meets every sample of the other in both orders; a prompt counts once, whatever their number.

    Args:
        samples: Of the policy.
        other: Of the one it is compared with.
        judge: The score that decides, ``gold`` or ``proxy``.
        tie_eps: Scores that differ by no more are a tie.
        seed: Of resampling and permutation.

    Returns:
        ``win_rate`` (with ``p``, of the hypothesis ½), ``ties``, ``position_consistency``, and by score its
        ``difference`` (with ``p``, of the hypothesis 0).
    """
    a_first, b_first = score_judge(samples.columns[judge], other.columns[judge], tie_eps=tie_eps)
    results = both_orders(a_first, b_first)
    ties = np.where(np.isnan(results), np.nan, results == 0.5)
    columns = {
        "win_rate": per_prompt(results),
        "ties": per_prompt(ties),
        "position_consistency": per_prompt(consistency(a_first, b_first)),
    }
    scores = [name for name in ("gold", "proxy") if name in samples.columns and name in other.columns]
    differences = {
        f"{name}_difference": per_prompt(samples.columns[name]) - per_prompt(other.columns[name]) for name in scores
    }
    estimates = means(columns | differences, seed=seed)
    content: dict[str, Any] = {name: estimate.as_dict() for name, estimate in estimates.items()}
    content["win_rate"]["p"] = permutation_p(columns["win_rate"] - 0.5, seed=seed)
    for name, values in differences.items():
        content[name]["p"] = permutation_p(values, seed=seed)
    return content


def control_length(
    drawn: Sequence[Samples], other: Samples, *, judge: str, tie_eps: float, seed: int
) -> list[Estimate]:
    """Length-controlled win rates of a panel of policies over one; lengths are in characters."""
    results, longer = [], []
    for samples in drawn:
        verdicts = score_judge(samples.columns[judge], other.columns[judge], tie_eps=tie_eps)
        results.append(per_prompt(both_orders(*verdicts)))
        longer.append(_mean_length(samples) - _mean_length(other))
    return length_controlled(np.stack(results), np.stack(longer), seed=seed)


def _mean_length(samples: Samples) -> Array:
    return np.array([np.mean([len(text) for text in texts]) for texts in samples.texts])
