"""Which checkpoint to keep: the one-standard-error rule, the knee, and the noise they rest on."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_align.lab.overopt import Interval
from lightning_align.lab.places import noise
from lightning_align.lab.regret import as_dict, lines, own_peak, pooled, regrets
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.select import (
    POLICIES,
    KnownPeak,
    Policy,
    automatic,
    choose,
    knee,
    one_standard_error,
    select,
)


def points_of(kl: list[float], gold: list[float], se: float = math.nan) -> list[Point]:
    return [
        Point(i, kl=k, proxy=math.tanh(0.2 * i), gold=g, gold_se=se)
        for i, (k, g) in enumerate(zip(kl, gold, strict=True))
    ]


NOISY = points_of(
    [(0.2 * i) ** 2 for i in range(20)],
    [1 + 0.1 * i - 0.006 * i * i + 0.03 * math.sin(37.0 * i) for i in range(20)],
)


# ------------------------------------------------------------------ OPT-4
@pytest.mark.parametrize("offset", [-7.5, 0.25, 1000.0])
def test_opt_4_shifting_gold_changes_nothing(offset: float) -> None:
    shifted = [replace(point, gold=point.gold + offset) for point in NOISY]
    for policy in (lambda points: one_standard_error(points)[0].step, lambda points: knee(points).step):
        assert policy(shifted) == policy(NOISY)


def test_opt_4_the_order_of_rows_changes_nothing() -> None:
    for seed in range(20):
        mixed = random.Random(seed).sample(NOISY, len(NOISY))
        assert one_standard_error(mixed) == one_standard_error(NOISY)
        assert knee(mixed) == knee(NOISY)
        assert choose(Curve("a", mixed)) == choose(Curve("a", NOISY))


def test_opt_4_ties_go_to_the_smaller_kl() -> None:
    points = points_of([0.0, 4.0, 1.0, 2.0], [0.5, 0.9, 0.9, 0.9], se=0.0)
    chosen, best, se = one_standard_error(points)
    assert chosen.kl == best.kl == 1.0
    assert se == 0.0
    same_kl = [Point(step, kl=1.0, proxy=1.0, gold=0.9, gold_se=0.0) for step in (9, 3, 5)]
    assert one_standard_error(same_kl)[0].step == 3
    level = [
        Point(step, kl=kl, proxy=proxy)
        for step, kl, proxy in ((0, 0.0, 0.0), (9, 1.0, 1.0), (3, 1.0, 1.0), (4, 4.0, 1.0))
    ]
    assert knee(level).step == 3


# ------------------------------------------------------------------ gold
def test_one_standard_error_takes_the_smallest_kl_within_it() -> None:
    points = points_of([0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.79, 0.81, 1.0, 0.9], se=0.2)
    chosen, best, se = one_standard_error(points)
    assert (chosen.kl, best.kl, se) == (2.0, 3.0, 0.2)


def test_the_error_of_the_best_counts_not_that_of_the_others() -> None:
    points = points_of([0.0, 1.0, 2.0], [0.0, 0.9, 1.0], se=5.0)
    points[2] = replace(points[2], gold_se=0.05)
    assert one_standard_error(points)[0].kl == 2.0


def test_without_errors_the_scatter_is_the_error() -> None:
    chosen, best, se = one_standard_error(NOISY)
    assert se == noise(NOISY, [point.gold for point in NOISY])
    assert 0.005 < se < 0.06
    assert chosen.gold >= best.gold - se
    assert all(point.gold < best.gold - se for point in NOISY if point.kl < chosen.kl)


def test_gold_of_the_choice_has_an_interval_of_its_own_error() -> None:
    points = points_of([0.0, 1.0, 2.0], [0.0, 0.9, 1.0], se=0.3)
    points[2] = replace(points[2], gold_se=0.15)
    choice = select(Curve("run", points), "gold")
    assert choice.best is not None
    assert choice.gold is not None
    assert (choice.point.step, choice.best.step, choice.se) == (1, 2, 0.15)
    assert choice.gold.low == pytest.approx(0.9 - 1.959964 * 0.3)
    assert choice.gold.high == pytest.approx(0.9 + 1.959964 * 0.3)


def test_an_error_from_the_scatter_has_students_interval() -> None:
    points = points_of([0.0, 1.0, 4.0, 9.0, 16.0, 25.0], [0.0, 0.5, 0.4, 0.7, 0.6, 0.2])
    choice = select(Curve("run", points), "gold")
    assert choice.gold is not None
    reach = 4.302653 * noise(points, [point.gold for point in points])  # t of (6 − 2)/2 degrees of freedom
    assert choice.gold.high - choice.gold.estimate == pytest.approx(reach, rel=1e-6)
    assert choice.gold.estimate - choice.gold.low == pytest.approx(reach, rel=1e-6)


def test_the_win_rate_has_the_one_standard_error_rule_too() -> None:
    curve = measured([0.0, 1.0, 2.0], win_rate=[0.5, 0.68, 0.7], win_rate_se=[0.0, 0.5, 0.03])
    choice = select(curve, "winrate")
    assert choice.best is not None
    assert (choice.point.step, choice.best.step, choice.se) == (1, 2, 0.03)
    assert "within one standard error (0.03) of the best, at step 2" in choice.reason
    sharp = measured([0.0, 1.0, 2.0], win_rate=[0.5, 0.68, 0.7], win_rate_se=[0.0, 0.5, 0.01])
    assert select(sharp, "winrate").point.step == 2


def test_points_without_gold_are_passed_over() -> None:
    points = [*points_of([1.0, 2.0], [0.2, 0.4], se=0.0), Point(9, kl=0.1, proxy=8.0)]
    assert one_standard_error(points)[0].kl == 2.0
    with pytest.raises(ValueError, match="use knee"):
        one_standard_error(points[2:])


# ------------------------------------------------------------------ knee
def test_knee_of_a_broken_line_is_where_it_breaks() -> None:
    d = np.linspace(0, 4, 17)
    proxy = np.where(d < 1.5, 2 * d, 3 + 0.1 * (d - 1.5))
    points = [Point(i, kl=float(x * x), proxy=float(y)) for i, (x, y) in enumerate(zip(d, proxy, strict=True))]
    assert math.sqrt(knee(points).kl) == pytest.approx(1.5)


def test_knee_does_not_depend_on_the_scales_of_the_axes() -> None:
    points = [Point(i, kl=(0.3 * i) ** 2, proxy=math.tanh(0.5 * i)) for i in range(12)]
    other = [Point(p.step, kl=100 * p.kl, proxy=3 * p.proxy - 50) for p in points]
    assert knee(other).step == knee(points).step


def test_knee_smooths_a_dip_before_it_looks() -> None:
    """A single lucky value must not become the knee."""
    d = np.linspace(0, 4, 21)
    proxy = np.minimum(d, 2.0)
    proxy[3] = 1.6  # far above the line, and alone
    points = [Point(i, kl=float(x * x), proxy=float(y)) for i, (x, y) in enumerate(zip(d, proxy, strict=True))]
    assert math.sqrt(knee(points).kl) == pytest.approx(2.0)


def test_knee_with_negative_kl_estimates() -> None:
    points = [Point(0, kl=-0.02, proxy=9.0), *(Point(1 + i, kl=float(i), proxy=min(i, 1.0)) for i in range(4))]
    assert knee(points).step == 2
    with pytest.raises(ValueError, match="no point has a proxy"):
        knee([Point(0, kl=1.0, gold=1.0)])


@pytest.mark.parametrize(
    "points",
    [
        [Point(i, kl=round(0.09 * i * i, 3), proxy=round(0.8 * 0.3 * i, 3)) for i in range(12)],
        [Point(i, kl=0.09 * i * i, proxy=float(i * i)) for i in range(12)],  # convex
        [Point(i, kl=float(i), proxy=-float(i)) for i in range(6)],
        [Point(i, kl=float(i), proxy=1.0) for i in range(6)],
        [Point(i, kl=1.0, proxy=float(i)) for i in range(6)],
        [Point(4, kl=0.3, proxy=1.0)],
        [Point(i, kl=-0.1, proxy=float(i)) for i in range(3)],
    ],
)
def test_where_there_is_no_knee_none_is_named(points: list[Point]) -> None:
    for seed in range(3):
        with pytest.raises(ValueError, match=r"no knee: .* give a score"):
            knee(random.Random(seed).sample(points, len(points)))
    assert choose(Curve("run", points)) is None


# ------------------------------------------------------------------ noise
def test_noise_of_independent_errors_on_a_line_is_their_deviation() -> None:
    generator = np.random.default_rng(0)
    d = np.sort(generator.uniform(0, 5, 4000))  # neighbours at unequal distances
    values = 2 + 0.7 * d + generator.normal(0, 0.3, len(d))
    points = [Point(i, kl=float(x * x)) for i, x in enumerate(d)]
    assert noise(points, values.tolist()) == pytest.approx(0.3, rel=0.05)


def test_noise_of_a_straight_line_is_zero_and_of_two_points_unknown() -> None:
    points = [Point(i, kl=(0.1 * i + 0.02 * i * i) ** 2) for i in range(9)]
    assert noise(points, [3 - 2 * point.d for point in points]) == pytest.approx(0.0, abs=1e-12)
    assert noise(points[:2], [0.0, 5.0]) == 0.0


def test_noise_of_points_at_one_kl_is_their_scatter() -> None:
    points = [Point(i, kl=1.0) for i in range(2000)]
    values = np.random.default_rng(0).normal(0, 0.2, 2000)
    assert noise(points, values.tolist()) == pytest.approx(0.2, rel=0.1)


def test_noise_ignores_the_order_of_the_points() -> None:
    order = random.Random(1).sample(range(len(NOISY)), len(NOISY))
    mixed = [NOISY[i] for i in order]
    assert noise(mixed, [p.gold for p in mixed]) == pytest.approx(noise(NOISY, [p.gold for p in NOISY]))


# ------------------------------------------------------------------ choose
def test_choose_names_the_checkpoint_saved_nearest() -> None:
    saved = {step: Path(f"step={step:05d}-kl=1.000.ckpt") for step in (0, 10, 20)}
    curve = Curve("run", points_of([0.0, 1.0, 4.0], [0.0, 1.0, 0.5], se=0.0), checkpoints=saved)
    curve.points = [replace(point, step=12 * point.step) for point in curve.points]
    choice = select(curve, "gold")
    assert choose(curve) == choice
    assert (choice.policy, choice.point.step, choice.checkpoint_step) == ("gold", 12, 10)
    assert choice.checkpoint == saved[10]
    assert select(Curve("run", curve.points), "gold").checkpoint is None


def test_the_nearest_file_is_nearest_over_root_kl_and_its_own_regret_is_told() -> None:
    """Step 3 lies nearer to step 0 by steps and to step 7 by √KL."""
    curve = measured(
        [0.0, 0.25, 1.0, 4.0, 4.2, 4.4, 4.6, 4.84], gold=[1.0, 2.0, 3.0, 4.0, 3.0, 3.0, 3.0, 2.5], gold_se=[0.1] * 8
    )
    curve.checkpoints = {0: Path("0"), 7: Path("7")}
    choice = select(curve, "gold")
    assert (choice.point.step, choice.checkpoint_step) == (3, 7)
    table, silent = regrets([curve])
    row = table[0]
    assert (row.policy, row.values, row.of_files) == ("gold", {0: 0.0}, {0: 1.5})
    assert "; of the files kept 1.500" in lines(table, silent, 1)[0]
    assert as_dict(table)["gold"]["of_files"]["runs"] == [1.5]
    curve.checkpoints = {3: Path("3")}
    table, silent = regrets([curve])
    assert table[0].of_files == {0: 0.0}
    assert "of the files" not in "".join(lines(table, silent, 1))


def test_files_as_near_on_both_sides_go_to_the_smaller_kl_then_to_the_earlier_step() -> None:
    curve = measured([9.0, 4.0, 1.0], gold=[0.0, 1.0, 0.0], gold_se=[0.0] * 3)  # d = 3, 2, 1
    curve.checkpoints = {0: Path("0"), 2: Path("2")}
    assert select(curve, "gold").checkpoint_step == 2
    same = measured([1.0, 4.0, 1.0], gold=[0.0, 1.0, 0.0], gold_se=[0.0] * 3)
    same.checkpoints = {2: Path("2"), 0: Path("0")}
    assert select(same, "gold").checkpoint_step == 0


def test_a_file_whose_kl_was_not_measured_lies_between_its_neighbours() -> None:
    curve = measured([0.0, 1.0, 4.0], gold=[0.0, 0.5, 1.0], gold_se=[0.0] * 3)
    curve.points = [replace(point, step=10 * point.step) for point in curve.points]
    curve.checkpoints = {10: Path("10"), 18: Path("18")}  # KL 3.4 by the line between steps 10 and 20
    assert select(curve, "gold").checkpoint_step == 18
    assert select(curve, "gold", budget=3.0).checkpoint_step == 10


def test_choose_falls_back_to_the_knee_without_gold() -> None:
    curve = Curve("run", [Point(i, kl=float(i), proxy=math.tanh(i)) for i in range(9)])
    choice = choose(curve)
    assert choice is not None
    assert choice.policy == "knee"
    assert choice.best is None


# ------------------------------------------------------------------ the other policies
def measured(kl: list[float], **scores: list[float]) -> Curve:
    rows = [{name: values[i] for name, values in scores.items()} for i in range(len(kl))]
    return Curve("run", [Point(i, kl=k, **row) for i, (k, row) in enumerate(zip(kl, rows, strict=True))])


PEAK = KnownPeak(Interval(1.5, 1.2, 1.9), Interval(0.4, 0.3, 0.5), "fitted to another run")


def test_opt_4_every_policy_ignores_gold_offset_and_row_order() -> None:
    d = [0.3 * i for i in range(12)]
    points = [
        Point(
            i,
            kl=x * x,
            proxy=math.tanh(x),
            gold=x - 0.3 * x * x,
            heldout=x - 0.2 * x * x,
            win_rate=0.5 + 0.1 * math.sin(x),
        )
        for i, x in enumerate(d)
    ]
    for policy in POLICIES:
        expected = select(Curve("a", points), policy, budget=6.0, peak=PEAK).point.step
        shifted = [replace(p, gold=p.gold + 50) for p in random.Random(3).sample(points, len(points))]
        assert select(Curve("a", shifted), policy, budget=6.0, peak=PEAK).point.step == expected


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "knee"])
def test_opt_4_ties_and_a_single_point(policy: Policy) -> None:
    tie = [
        Point(s, kl=2.0, proxy=1.0, gold=1.0, gold_se=0.0, heldout=1.0, heldout_se=0.0, win_rate=0.6) for s in (4, 2, 9)
    ]
    assert select(Curve("a", tie), policy, budget=3.0, peak=PEAK).point.step == 2
    assert select(Curve("a", tie[:1]), policy, budget=3.0, peak=PEAK).point.step == 4


def test_peak_is_clamped_and_never_beyond_what_was_trained() -> None:
    curve = measured([0.0, 1.0, 2.0, 2.6, 9.0], proxy=[0.0, 1.0, 2.0, 3.0, 4.0])
    choice = select(curve, "peak", peak=PEAK)
    assert (choice.point.kl, choice.gold, choice.gain) == (2.0, PEAK.gain, True)
    lopsided = measured([1.15**2, 1.88**2], proxy=[0.0, 1.0])  # the first is nearer, and outside the interval
    assert select(lopsided, "peak", peak=PEAK).point.step == 1
    far = KnownPeak(Interval(9.0, 8.0, 10.0), PEAK.gain, "another")
    beyond = select(curve, "peak", peak=far)
    assert beyond.point.kl == 9.0
    assert beyond.gold is None
    assert "No checkpoint lies within" in beyond.reason


def test_budget_caps_every_policy_and_says_when_nothing_is_left() -> None:
    curve = measured([0.5, 1.0, 4.0], proxy=[0.0, 1.0, 2.0], heldout=[0.0, 1.0, 5.0])
    assert select(curve, "budget", budget=3.9).point.kl == 1.0
    assert select(curve, "heldout", budget=3.9).point.kl == 1.0
    with pytest.raises(ValueError, match=r"0\.1 or less: the smallest is 0\.5"):
        select(curve, "budget", budget=0.1)


def test_heldout_says_when_it_parts_from_the_proxy() -> None:
    curve = measured([0.0, 1.0, 2.0, 3.0, 4.0], proxy=[0, 1, 2, 3, 4], heldout=[0.0, 5.0, 4.0, 3.0, 2.0])
    assert "up to step 4" in select(curve, "heldout").reason
    curve.points[3] = replace(curve.points[3], proxy=1.5)
    assert "fell" not in select(curve, "heldout").reason


def test_auto_takes_the_strongest_that_was_measured() -> None:
    curve = measured([0.0, 1.0], proxy=[0.0, 1.0])
    assert automatic(curve) == "knee"
    assert automatic(curve, peak=PEAK) == "peak"
    for name, policy in (("win_rate", "winrate"), ("heldout", "heldout"), ("gold", "gold")):
        curve.points = [replace(point, **{name: 0.5}) for point in curve.points]
        assert automatic(curve, peak=PEAK) == policy


# ------------------------------------------------------------------ OPT-5
def simulated(seed: int) -> Curve:
    generator = np.random.default_rng(seed)
    d = np.linspace(0.2, 5.0, 20)
    gold = d * (0.8 - 0.6 * np.log(d))
    heldout = gold + generator.normal(0, 0.08, 20)
    points = [
        Point(i, kl=float(x * x), proxy=math.tanh(x), gold=float(g), gold_se=0.02, heldout=float(h), heldout_se=0.08)
        for i, (x, g, h) in enumerate(zip(d, gold, heldout, strict=True))
    ]
    return Curve("s", points)


def test_opt_5_regret_of_a_family_with_a_known_law() -> None:
    table, silent = regrets([simulated(seed) for seed in range(12)])
    mean = {row.policy: row.mean for row in table}
    assert mean["heldout"].high < mean["last"].low
    assert mean["peak"].value < 0.02  # the law is the same in every run
    assert mean["gold"].value <= mean["heldout"].value
    assert set(silent) == {"winrate", "budget"}


def test_regret_hides_gold_and_the_own_fit() -> None:
    """A run alone has a peak in its gold, and none that another run has shown."""
    alone, silent = regrets([simulated(0)])
    assert "peak" not in {row.policy for row in alone}
    assert "own fit" in silent["peak"]


def family(seed: int, runs: int, noise_of_heldout: float) -> list[Curve]:
    """Runs of one law, α 0.8 and β 0.6, that end in a deep fall; gold too is measured with noise."""
    generator = np.random.default_rng(seed)
    curves = []
    for number in range(runs):
        d = np.linspace(0.0, 5.0 + generator.uniform(-0.5, 0.5), 16)
        law = np.where(d > 0, d * (0.8 - 0.6 * np.log(np.maximum(d, 1e-9))), 0.0)
        gold = law + generator.normal(0, 0.03, len(d))
        heldout = law + generator.normal(0, noise_of_heldout, len(d))
        curves.append(
            Curve(
                f"run {number}",
                [
                    Point(
                        i, kl=float(x * x), proxy=float(np.tanh(x)), gold=float(g), gold_se=0.03,
                        heldout=float(h), heldout_se=noise_of_heldout, win_rate=float(0.5 + 0.1 * h),
                    )
                    for i, (x, g, h) in enumerate(zip(d, gold, heldout, strict=True))
                ],
            )
        )  # fmt: skip
    return curves


def test_opt_5_every_policy_is_listed_and_heldout_beats_last_over_families() -> None:
    """The mean regret over 20 families of 5 runs, policy by policy."""
    means: dict[str, list[float]] = {}
    for seed in range(20):
        table, silent = regrets(family(seed, 5, 0.2), budget=4.0)
        assert [row.policy for row in table] == [*POLICIES, "last"]
        assert not silent
        assert all(len(row.values) == 5 and row.mean.n == 5 for row in table)
        for row in table:
            means.setdefault(row.policy, []).append(row.mean.value)
    mean = {policy: float(np.mean(values)) for policy, values in means.items()}
    assert mean["gold"] < mean["peak"] < mean["heldout"] < 0.5 * mean["last"]
    by_law = 0.6 * math.exp(0.8 / 0.6 - 1) - 5.0 * (0.8 - 0.6 * math.log(5.0))  # at the peak less at the mean end
    assert mean["last"] == pytest.approx(by_law, abs=0.1)
    assert all(value >= 0 for values in means.values() for value in values)


def test_only_gold_sees_gold() -> None:
    """With other gold scores the others choose as before: their regret is what the new scores say of that choice."""
    curves = family(0, 3, 0.1)
    chosen = {policy: [select(c, policy, budget=4.0, peak=PEAK).point.step for c in curves] for policy in POLICIES}
    upside_down = [replace(c, points=[replace(p, gold=-p.gold) for p in c.points]) for c in curves]
    table, _ = regrets(upside_down, budget=4.0)
    for row in table:
        if row.policy in ("heldout", "winrate", "knee", "budget"):
            for number, curve in enumerate(upside_down):
                golds = {p.step: p.gold for p in curve.points}
                assert row.values[number] == max(golds.values()) - golds[chosen[row.policy][number]]


def test_what_a_budget_costs_is_part_of_the_regret() -> None:
    curve = measured([0.0, 1.0, 2.0, 3.0], gold=[0.0, 0.5, 0.4, 2.0], gold_se=[0.0] * 4)
    found = {row.policy: row.values[0] for row in regrets([curve], budget=2.5)[0]}
    assert found == {"gold": 1.5, "budget": pytest.approx(1.6), "last": 0.0}


def test_a_given_fit_of_the_run_itself_is_not_used_and_none_counts_twice(tmp_path: Path) -> None:
    curves = [replace(simulated(seed), path=tmp_path / f"{seed}.csv") for seed in range(2)]
    own = [own_peak(curve) for curve in curves]
    assert own[0] is not None
    assert own[1] is not None
    alone, silent = regrets(curves[:1], given=[own[0]])
    assert "peak" not in {row.policy for row in alone}
    assert "own fit" in silent["peak"]
    both = KnownPeak(Interval(5.0, 4.9, 5.1), own[0].gain, "both", own[0].runs | own[1].runs)
    assert regrets(curves, given=[both]) == regrets(curves)
    assert regrets(curves, given=[own[0]]) == regrets(curves)
    far = replace(both, runs=own[1].runs)  # stands for the second run's own, which it covers
    table = {row.policy: row.values for row in regrets(curves, given=[far])[0]}
    assert table["peak"][0] == pytest.approx(max(p.gold for p in curves[0].points) - curves[0].points[-1].gold)


def test_the_peak_of_another_run_is_taken_where_it_is_not_at_the_end_of_its_interval() -> None:
    """d* of 1 with an interval from 0.9 to 4: the checkpoint at d = 1, not one further out."""
    curve = measured([0.64, 1.0, 4.0, 9.0, 16.0], gold=[0.0, 0.1, 0.2, 0.3, 0.4])
    peak = KnownPeak(Interval(1.0, 0.9, 4.0), Interval(0.3, 0.1, 0.9), "another run")
    (row,) = (row for row in regrets([curve], given=[peak])[0] if row.policy == "peak")
    assert row.values == {0: pytest.approx(0.3)}


def test_pooled_peaks_rest_on_the_estimates_not_on_the_ends() -> None:
    peaks = [
        KnownPeak(Interval(d, d / 2, d * ratio), Interval(gain, gain - 0.1, gain + 0.4), "a")
        for d, ratio, gain in ((1.0, 3.0, 0.2), (4.0, 7.0, 0.6))
    ]
    together = pooled(peaks)
    assert together is not None
    assert together.d.estimate == pytest.approx(2.0)
    assert together.gain.estimate == pytest.approx(0.4)


def test_regret_ignores_row_order_and_points_without_gold() -> None:
    curves = family(1, 4, 0.1)
    mixed = []
    for seed, curve in enumerate(curves):
        more = [*curve.points, Point(99, kl=1.0, proxy=50.0, heldout=50.0), Point(98, kl=math.nan, gold=math.nan)]
        mixed.append(replace(curve, points=random.Random(seed).sample(more, len(more))))
    assert regrets(mixed)[0] == regrets(curves)[0]
    assert regrets([*curves, Curve("no gold", [Point(0, kl=1.0, proxy=1.0)])])[0] == regrets(curves)[0]


def test_pooled_peaks_are_the_geometric_mean_with_students_interval() -> None:
    peaks = [KnownPeak(Interval(d, d, d), Interval(gain, gain, gain), "a") for d, gain in ((1.0, 0.2), (4.0, 0.6))]
    together = pooled(peaks)
    assert together is not None
    assert together.d.estimate == pytest.approx(2.0)
    reach = 12.7062 * math.log(4.0) / 2  # t of one degree of freedom, times the standard error of two logarithms
    assert math.log(together.d.high) == pytest.approx(math.log(2.0) + reach, rel=1e-4)
    assert together.gain.estimate == pytest.approx(0.4)
    assert pooled(peaks[:1]) == peaks[0]
    assert pooled([]) is None


def test_the_file_that_is_named_keeps_to_the_budget() -> None:
    curve = measured([0.0, 1.0, 2.0, 3.0], proxy=[0.0, 1.0, 2.0, 3.0])
    curve.checkpoints = {0: Path("0"), 3: Path("3")}
    assert select(curve, "budget", budget=2.5).checkpoint_step == 0
    assert select(curve, "budget", budget=9.0).checkpoint_step == 3
    curve.checkpoints = {3: Path("3")}
    assert select(curve, "budget", budget=2.5).checkpoint is None


def test_kl_that_goes_back_is_no_trouble() -> None:
    """A run that returned: the larger step has the smaller KL."""
    curve = measured([0.0, 4.0, 1.0], proxy=[0.0, 2.0, 1.5], gold=[0.0, 1.0, 1.0], gold_se=[0.1, 0.1, 0.1])
    assert select(curve, "gold").point.step == 2
    assert select(curve, "budget", budget=9.0).point.step == 1
