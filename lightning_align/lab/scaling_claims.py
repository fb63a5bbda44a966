"""The five claims on scaling (Gao et al. 2022, sections 3.2 to 3.4), each judged over seeds.

Every seed gives one number, a slope, a ratio or a correlation; the interval is Student's over them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lightning_align.lab.claims import Verdict, judge
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.overopt import Array
from lightning_align.lab.scaling import (
    FEWEST_POINTS,
    Law,
    Number,
    comparisons,
    ln_policy,
    ln_reward,
    measure_of_gain,
    policy_sweep,
    reward_sweep,
    slopes,
)

SIMILAR = math.log(1.5)  # largest log ratio of distances that counts as similar
STATEMENTS = {
    "S1": "larger reward models allow larger updates before gold falls",
    "S2": "below a threshold of comparisons the reward model's size does not help",
    "S3": "larger policies gain less from the same reward model",
    "S4": "policies of different sizes peak at a similar KL",
    "S5": "a reward model with a lower validation loss gives a higher gain",
}


@dataclass(frozen=True)
class Finding:
    """A claim with what the sweep says of it; ``estimate`` is over seeds, ``details`` are further numbers for JSON."""

    claim: str
    estimate: Estimate
    verdict: Verdict
    reason: str
    runs: Sequence[Path] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def assess(laws: Sequence[Law]) -> list[Finding]:
    """What the sweep says of each claim."""
    by_reward, by_policy = reward_sweep(laws), policy_sweep(laws)
    return [
        larger_rewards(by_reward),
        threshold(by_reward),
        larger_policies(by_policy),
        similar_peaks(by_policy),
        loss_foretells(by_reward),
    ]


def larger_rewards(laws: Sequence[Law]) -> Finding:
    """S1: slope of d* on ln N, within each amount of data; of the gain where peaks are censored.

    Beside it Page's test of a trend over sizes with seeds as blocks, and the slopes of d* at those amounts of data at
    which no peak is censored.
    """
    gain, told = measure_of_gain(laws) if any(law.censored for law in laws) else (_peak_d, "d*")
    levels = {
        level: [law for law in laws if comparisons(law) == level] for level in sorted(set(map(comparisons, laws)))
    }
    whole = {level: own for level, own in levels.items() if not any(law.censored for law in own)}
    trend = page(laws, gain)
    details = {
        "page_p": trend,
        "slope_of_d_by_comparisons": {
            str(level): student(slopes(own, ln_reward, _peak_d)).as_dict() for level, own in whole.items()
        },
    }
    what = f"slope of {told} on ln N, per seed{_censored(laws)}"
    if math.isfinite(trend):
        what += f"; Page's trend test p = {trend:.2g}"
    return _finding("S1", laws, student(slopes(laws, ln_reward, gain, comparisons)), "more", what, details)


def page(laws: Sequence[Law], gain: Number) -> float:
    """p of Page's test that the gain rises with the reward model's size; NaN for fewer than 3 sizes or 2 seeds.

    A seed is a block, with the mean over the amounts of data; seeds that lack a combination are left out.
    """
    cells = sorted({(law.measured.reward_parameters, comparisons(law)) for law in laws})
    sizes = sorted({size for size, _ in cells})
    blocks = []
    for seed in sorted({law.measured.seed for law in laws}):
        own = {
            (law.measured.reward_parameters, comparisons(law)): gain(law) for law in laws if law.measured.seed == seed
        }
        if set(own) == set(cells):
            blocks.append([np.mean([value for (size, _), value in own.items() if size == wanted]) for wanted in sizes])
    if len(sizes) < 3 or len(blocks) < 2:
        return math.nan
    return float(stats.page_trend_test(blocks).pvalue)


def threshold(laws: Sequence[Law]) -> Finding:
    """S2: where data are few the size's slope is not told from 0, and it grows with the data.

    The threshold is the smallest amount of data with a gain clearly above that of the least, of the same size and seed.
    """
    levels = sorted(set(map(comparisons, laws)))
    if len(levels) < 2 or len({law.measured.reward_parameters for law in laws}) < 2:
        return _finding("S2", laws, _nothing(), "more", "needs several sizes and several amounts of data")
    gain, told = measure_of_gain(laws)
    at = {level: [law for law in laws if comparisons(law) == level] for level in levels}
    by_level = {level: student(slopes(own, ln_reward, gain)) for level, own in at.items()}
    gains = {level: student(_over(at[level], at[levels[0]], gain)) for level in levels[1:]}
    enough = next((level for level in levels[1:] if judge(gains[level], "more", 0.0)[0] == "supported"), None)
    growth = student(_interaction(at, gain))
    details = {
        "threshold": enough,
        "slope_by_comparisons": {str(level): estimate.as_dict() for level, estimate in by_level.items()},
        "gain_over_fewest": {str(level): estimate.as_dict() for level, estimate in gains.items()},
    }
    verdict, reason = judge(growth, "more", 0.0)
    helps = [level for level in levels if enough is not None and level < enough and by_level[level].low > 0]
    if verdict == "supported" and enough is None:
        verdict, reason = "undecided", "no amount of data is told from the smallest"
    elif verdict == "supported" and helps:
        verdict, reason = "contradicted", f"size helps at {helps[0]} comparisons, below the threshold of {enough}"
    what = f"growth of the slope of {told} on ln N with ln D, per seed; threshold: {enough or 'none found'}"
    return Finding("S2", growth, verdict, f"{what}; {reason}", _runs(laws), details)


def larger_policies(laws: Sequence[Law]) -> Finding:
    """S3: the slope of the gain on ln P is below 0 while that of the start is above."""
    if len({law.measured.policy_parameters for law in laws}) < 2:
        return _finding("S3", laws, _nothing(), "less", "needs policies of several sizes")
    gain, told = measure_of_gain(laws)
    less = student(slopes(laws, ln_policy, gain))
    starts = student(slopes(laws, ln_policy, lambda law: law.measured.start))
    verdict, reason = judge(less, "less", 0.0)
    if verdict == "supported" and judge(starts, "more", 0.0)[0] != "supported":
        verdict, reason = "undecided", f"{reason}, but larger policies do not clearly start higher"
    what = f"slope of {told} on ln P, per seed{_censored(laws)}; of the start: {starts.value:+.2f}"
    details = {"slope_of_start": starts.as_dict()}
    return Finding("S3", less, verdict, f"{what}; {reason}", _runs(laws), details)


def similar_peaks(laws: Sequence[Law]) -> Finding:
    """S4: for every pair of policy sizes ln of the ratio of d* is within ±ln 1.5, by its interval.

    The estimate is that of the pair whose interval reaches farthest. A censored peak has no ratio; as it may well lie
    far away, similarity is not concluded where there is one.
    """
    sizes = sorted({law.measured.policy_parameters for law in laws})
    if len(sizes) < 2:
        return _finding("S4", laws, _nothing(), "equal", "needs policies of several sizes")
    peaks = {
        size: {
            law.measured.seed: law.peak_d
            for law in laws
            if law.measured.policy_parameters == size and law.censored is None
        }
        for size in sizes
    }
    ratios = {
        (small, large): student(
            np.array(
                [math.log(peaks[large][seed] / peaks[small][seed]) for seed in peaks[small] if seed in peaks[large]]
            )
        )
        for small, large in combinations(sizes, 2)
    }
    judged = {pair: judge(estimate, "equal", SIMILAR) for pair, estimate in ratios.items()}
    apart = [pair for pair in ratios if judged[pair][0] == "contradicted"]
    pair = max(apart or ratios, key=lambda pair: _reach(ratios[pair]))
    verdict, reason = judged[pair]
    if verdict == "supported" and any(law.censored for law in laws):
        verdict, reason = "undecided", f"{reason}, but without the censored peaks"
    what = f"ln of d* of the policy of {pair[1]:,} over that of {pair[0]:,}, per seed, within ±ln 1.5{_censored(laws)}"
    details = {"ln_ratios": {f"{large}/{small}": estimate.as_dict() for (small, large), estimate in ratios.items()}}
    return Finding("S4", ratios[pair], verdict, f"{what}; {reason}", _runs(laws), details)


def loss_foretells(laws: Sequence[Law]) -> Finding:
    """S5: rank correlation of validation loss and gain over the reward models, per seed."""
    known = [law for law in laws if math.isfinite(law.measured.reward_loss)]
    gain, told = measure_of_gain(known) if known else (_peak_d, "R*")
    found = []
    for seed in sorted({law.measured.seed for law in known}):
        own = [law for law in known if law.measured.seed == seed]
        pairs = np.array([(law.measured.reward_loss, gain(law)) for law in own])
        if len(own) >= FEWEST_POINTS and (np.ptp(pairs, axis=0) > 0).all():
            found.append(float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic))
    over = student(np.array(found))
    estimate = replace(over, low=float(np.clip(over.low, -1, 1)), high=float(np.clip(over.high, -1, 1)))
    return _finding("S5", known, estimate, "less", f"rank correlation of loss and {told}, per seed")


def _finding(
    claim: str,
    laws: Sequence[Law],
    estimate: Estimate,
    expect: str,
    what: str,
    details: Mapping[str, Any] | None = None,
) -> Finding:
    verdict, reason = judge(estimate, expect, SIMILAR if expect == "equal" else 0.0)
    return Finding(claim, estimate, verdict, f"{what}; {reason}", _runs(laws), details or {})


def _nothing() -> Estimate:
    return student(np.array([]))


def _peak_d(law: Law) -> float:
    return law.peak_d


def _censored(laws: Sequence[Law]) -> str:
    count = sum(law.censored is not None for law in laws)
    return f"; {count} of {len(laws)} peaks censored" if count else ""


def _reach(estimate: Estimate) -> float:
    """Of an interval from 0; infinite without one."""
    reach = max(abs(estimate.low), abs(estimate.high))
    return reach if math.isfinite(reach) else math.inf


def _runs(laws: Sequence[Law]) -> list[Path]:
    return [law.measured.run for law in laws if law.measured.run is not None]


def _over(more: Sequence[Law], fewest: Sequence[Law], gain: Number) -> Array:
    """Of each seed the mean, over the sizes that both have, of the gain minus that with the fewest data."""
    least = {(law.measured.seed, law.measured.reward_parameters): gain(law) for law in fewest}
    found: dict[str, list[float]] = {}
    for law in more:
        key = (law.measured.seed, law.measured.reward_parameters)
        if key in least:
            found.setdefault(law.measured.seed, []).append(gain(law) - least[key])
    return np.array([np.mean(found[seed]) for seed in sorted(found)])


def _interaction(at: Mapping[int, Sequence[Law]], gain: Number) -> Array:
    """Of each seed the slope, on ln D, of the slope of the gain on ln N."""
    found = []
    for seed in sorted({law.measured.seed for own in at.values() for law in own}):
        pairs = []
        for level, own in at.items():
            slope = slopes([law for law in own if law.measured.seed == seed], ln_reward, gain)
            pairs += [(math.log(level), float(slope[0]))] if len(slope) else []
        if len(pairs) > 1:
            x, y = np.array(pairs).T
            found.append(float(stats.linregress(x, y).slope))
    return np.array(found)
