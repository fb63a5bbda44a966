"""Gate, ensembles, whitening and length penalty: which score counts, and what leaves the batch alone."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.rewards.base import Part, Reward
from lightning_align.rewards.combination import (
    LOGIT_LIMIT,
    Combination,
    LengthPenalty,
    Whitening,
    combine_members,
    gate,
    spread,
)
from lightning_align.rewards.ensemble import EnsembleReward

NAN = math.nan
BOUNDARY = math.log(0.15 / 0.85)


class Given:
    """Scores that are known beforehand."""

    def __init__(self, *values: float) -> None:
        self.values = torch.tensor(values)

    def to(self, device: torch.device) -> None: ...

    def score(self, prompts: Sequence[Any], completions: Sequence[str], **options: Any) -> Tensor:
        return self.values[[int(text) for text in completions]]


def reward(parts: dict[str, Any], weights: dict[str, float] | None = None, **options: Any) -> Reward:
    made = [Part(name, name, (weights or {}).get(name, 1.0), scorer) for name, scorer in parts.items()]
    return Reward(made, Combination(**options))


def score(of: Reward, count: int, safety: Sequence[bool] | None = None, **options: Any) -> Any:
    records = [{"is_safety": flag} for flag in safety] if safety is not None else [{}] * count
    texts = [str(index) for index in range(count)]
    return of.score(["x"] * count, texts, finished=[True] * count, records=records, **options)


# ------------------------------------------------------------------ the gate
@pytest.mark.parametrize(
    ("is_safety", "safe", "takes"),
    [
        (False, BOUNDARY + 1e-3, "helpfulness"),
        (False, BOUNDARY, "helpfulness"),  # the boundary itself
        (False, BOUNDARY - 1e-3, "safety"),
        (True, BOUNDARY + 1e-3, "safety"),
        (True, BOUNDARY - 1e-3, "safety"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_comp_1_which_model_the_gate_takes(is_safety: bool, safe: float, takes: str, dtype: torch.dtype) -> None:
    helpfulness, safety = torch.tensor([0.7], dtype=dtype), torch.tensor([safe], dtype=dtype)
    found = gate(helpfulness, safety, torch.tensor([is_safety]))
    assert torch.equal(found, {"helpfulness": helpfulness, "safety": safety}[takes])


@given(raw=st.floats(-13, 13))
@settings(deadline=None, max_examples=100)
def test_comp_2_log_odds_are_the_raw_scores_within_13(raw: float) -> None:
    scores = torch.tensor([raw])  # float32: through probabilities the error would be 0.009
    assert torch.equal(gate(scores, torch.zeros(1), torch.tensor([False])), scores)


def test_comp_2_log_odds_are_clamped_where_probabilities_are() -> None:
    scores = torch.tensor([50.0, -50.0])
    expected = torch.tensor([LOGIT_LIMIT, -LOGIT_LIMIT])
    torch.testing.assert_close(gate(scores, torch.zeros(2), torch.zeros(2, dtype=torch.bool)), expected)
    assert math.isclose(LOGIT_LIMIT, 13.8155, abs_tol=1e-4)


def test_the_gate_of_another_threshold() -> None:
    of = reward({"helpfulness": Given(5.0, 5.0), "safety": Given(0.5, -0.5)}, how="gate", threshold=0.5, whiten="none")
    assert score(of, 2).total.tolist() == [5.0, -0.5]


def test_gate_leaves_unscored_what_its_model_did_not_score() -> None:
    parts = {"helpfulness": Given(1.0, NAN, 3.0, 4.0), "safety": Given(NAN, 0.0, NAN, -9.0)}
    found = score(reward(parts, how="gate", whiten="none"), 4, [False, False, True, False])
    torch.testing.assert_close(found.total, torch.tensor([1.0, NAN, NAN, -9.0]), equal_nan=True)
    white = score(reward(parts, how="gate"), 4, [False, False, True, False]).total
    assert white.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(white[[0, 3]], torch.tensor([1.0, -1.0]))


def test_gate_is_logged_before_whitening_and_further_parts_are_added_after_it() -> None:
    parts = {"helpfulness": Given(1.0, 3.0), "safety": Given(0.0, 0.0), "brief": Given(10.0, NAN)}
    found = score(reward(parts, {"brief": 0.5}, how="gate"), 2)
    torch.testing.assert_close(found.proxy, torch.tensor([1.0 + 5.0, 3.0]))
    torch.testing.assert_close(found.total, torch.tensor([-1.0 + 5.0, 1.0]))
    assert found.parts["helpfulness"].tolist() == [1.0, 3.0]


# ------------------------------------------------------------------ whitening
def test_comp_4_whitening_by_two_processes_is_whitening_by_one() -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(0))
    whole = Whitening("batch")(values, torch.clone)
    assert abs(float(whole.mean())) < 1e-6
    assert float(whole.std(correction=0)) == pytest.approx(1, abs=1e-6)
    sums: list[Tensor] = []

    def remember(own: Tensor) -> Tensor:
        sums.append(own)
        return own

    def both(own: Tensor) -> Tensor:
        return sums[0] + sums[1]

    for half in (values[:3], values[3:]):
        Whitening("batch")(half, remember)
    for how in ("batch", "running"):  # the running moments of one batch are its own
        halves = [Whitening(how)(half, both) for half in (values[:3], values[3:])]  # type: ignore[arg-type]
        torch.testing.assert_close(torch.cat(halves), whole)


def test_running_whitening_follows_an_exponential_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    whitening = Whitening("running")
    mean = square = weight = 0.0
    for _ in range(5):
        values = 3 + 2 * torch.randn(4, generator=generator)
        white = whitening(values, torch.clone)
        mean = 0.99 * mean + 0.01 * float(values.double().mean())
        square = 0.99 * square + 0.01 * float((values.double() ** 2).mean())
        weight = 0.99 * weight + 0.01
        deviation = (square / weight - (mean / weight) ** 2 + 1e-8) ** 0.5
        torch.testing.assert_close(white, ((values - mean / weight) / deviation).float(), rtol=1e-4, atol=1e-5)
    one = torch.tensor([4.0])  # a batch of one is whitened too, by what was seen before
    assert abs(float(whitening(one, torch.clone))) < 2
    assert whitening(torch.tensor([NAN]), torch.clone).isnan().all()


def test_running_moments_go_on_after_a_restart_and_evaluations_leave_them_alone() -> None:
    def fresh() -> Reward:
        return reward(
            {"helpfulness": Given(1.0, 3.0, 7.0), "safety": Given(0.0, 0.0, 0.0)}, how="gate", whiten="running"
        )

    first = fresh()
    score(first, 2)
    state = first.state_dict()
    held_out = score(first, 3, held_out=True)
    assert held_out.total.tolist() == held_out.proxy.tolist() == [1.0, 3.0, 7.0]
    second = fresh()
    second.load_state_dict(state)
    assert torch.equal(score(first, 3).total, score(second, 3).total)
    assert not torch.equal(score(fresh(), 3).total, score(second, 3).total)


# ------------------------------------------------------------------ ensembles
members = st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=2, max_size=6)


@given(table=members, coef=st.floats(0, 5))
@settings(deadline=None, max_examples=100)
def test_comp_3_the_mean_is_the_most_that_an_ensemble_says(table: list[list[float]], coef: float) -> None:
    scores = torch.tensor(table, dtype=torch.float64)
    mean = combine_members(scores, "mean")
    assert (mean - combine_members(scores, "uwo", uwo_coef=coef) >= -1e-9).all()
    assert (mean - combine_members(scores, "min") >= -1e-9).all()
    assert torch.equal(combine_members(scores, "uwo", uwo_coef=0.0), mean)
    alike = scores[:1].expand(4, 3)
    for how in ("mean", "min", "uwo"):
        torch.testing.assert_close(combine_members(alike, how, uwo_coef=coef), scores[0])  # type: ignore[arg-type]
    torch.testing.assert_close(spread(alike), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-7)


def test_members_that_do_not_apply_are_left_out() -> None:
    scores = torch.tensor([[1.0, NAN, NAN], [3.0, 5.0, NAN], [NAN, 9.0, NAN]])
    expected = {"mean": [2.0, 7.0, NAN], "min": [1.0, 5.0, NAN], "uwo": [2 - 0.5, 7 - 0.5 * 4, NAN]}
    for how, values in expected.items():
        found = combine_members(scores, how, uwo_coef=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(values), equal_nan=True)
    torch.testing.assert_close(spread(scores), torch.tensor([1.0, 2.0, NAN]), equal_nan=True)


def test_an_ensemble_is_one_part_whose_spread_is_known() -> None:
    ensemble = EnsembleReward([Given(1.0, 2.0), Given(3.0, 2.0)], "uwo", uwo_coef=0.5)
    found = score(reward({"rm": ensemble, "other": Given(10.0, 10.0)}, {"other": 2.0}), 2)
    assert found.parts["rm"].tolist() == [2.0 - 0.5, 2.0]
    assert found.total.tolist() == [21.5, 22.0]
    assert found.spreads["rm"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, 4.0]), ("min", [1.0, 3.0]), ("uwo", [1.9, 3.9])])
def test_named_parts_as_members(how: Any, expected: list[float]) -> None:
    parts = {"a": Given(1.0, 5.0), "b": Given(3.0, 3.0), "watched": Given(100.0, 100.0)}
    found = score(reward(parts, {"watched": 0.0}, how=how), 2)
    assert found.total.tolist() == pytest.approx(expected)
    assert (list(found.spreads) == ["parts"]) == (how != "min")


def test_comp_5_a_member_that_fails_changes_no_other_sequence() -> None:
    healthy = score(reward({"rm": EnsembleReward([Given(1.0, 2.0, 3.0), Given(3.0, 2.0, 1.0)], "uwo")}), 3)
    broken = score(reward({"rm": EnsembleReward([Given(1.0, NAN, 3.0), Given(3.0, NAN, 1.0)], "uwo")}), 3)
    assert torch.equal(broken.total[[0, 2]], healthy.total[[0, 2]])
    assert broken.total[1].isnan()


# ------------------------------------------------------------------ length
def test_length_penalty_is_counted_in_tokens_beyond_the_limit() -> None:
    of = reward({"rm": Given(1.0, 1.0, NAN, 1.0)}, length_penalty=LengthPenalty(0.5, 10))
    found = score(of, 4, lengths=torch.tensor([10, 14, 14, 3]))
    torch.testing.assert_close(found.total, torch.tensor([1.0, -1.0, NAN, 1.0]), equal_nan=True)
    assert found.parts["length_penalty"].tolist() == [0.0, -2.0, -2.0, 0.0]
    with pytest.raises(ValueError, match="needs the lengths"):
        score(of, 4)


def test_a_gate_without_its_parts_and_an_ensemble_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="a gate chooses between helpfulness and safety"):
        reward({"helpfulness": Given(1.0), "harm": Given(1.0)}, how="gate")
    with pytest.raises(ValueError, match="an ensemble of 1"):
        EnsembleReward([Given(1.0)])
