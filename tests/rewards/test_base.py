"""Sums of parts: weights as they are, NaN as "does not apply", and no part touches another sequence."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.rewards.base import Part, Reward
from lightning_align.rewards.combination import weighted_sum
from lightning_align.rewards.function import FunctionReward

NAN = math.nan


def part(name: str, function: Callable[..., Any], weight: float = 1.0) -> Part:
    return Part(name, "test", weight, FunctionReward(function, name))


def lengths(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def score(reward: Reward, completions: Sequence[str]) -> Any:
    count = len(completions)
    return reward.score(["x"] * count, completions, finished=[True] * count, records=[{}] * count)


def test_weighted_sum_over_what_applies() -> None:
    parts = {"a": torch.tensor([1.0, NAN, 2.0, NAN]), "b": torch.tensor([10.0, 20.0, NAN, NAN])}
    total = weighted_sum(parts, {"a": 2.0, "b": -0.5})
    torch.testing.assert_close(total, torch.tensor([-3.0, -10.0, 4.0, NAN]), equal_nan=True)


def test_weights_are_not_renormalised() -> None:
    parts = {"a": torch.tensor([1.0, NAN]), "b": torch.tensor([1.0, 1.0])}
    assert weighted_sum(parts, {"a": 3.0, "b": 1.0}).tolist() == [4.0, 1.0]


def test_a_part_of_weight_zero_is_reported_and_not_counted() -> None:
    reward = Reward([part("counted", lengths), part("watched", lambda completions: [7.0] * len(completions), 0.0)])
    scores = score(reward, ["ab", "c"])
    assert scores.total.tolist() == [2.0, 1.0]
    assert scores.parts["watched"].tolist() == [7.0, 7.0]
    # its NaN leaves the total alone, and where only it applies there is no score
    total = weighted_sum({"a": torch.tensor([1.0, NAN]), "b": torch.tensor([NAN, 5.0])}, {"a": 1.0, "b": 0.0})
    torch.testing.assert_close(total, torch.tensor([1.0, NAN]), equal_nan=True)


FAULTS: dict[str, Callable[[str], Any]] = {
    "raises": lambda text: 1 / 0,
    "nan": lambda text: NAN,
    "none": lambda text: None,
    "infinite": lambda text: math.inf,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_comp_5_a_failing_part_changes_no_other_sequence(fault: str, bad: int) -> None:
    def careful(completions: Sequence[str], **columns: Any) -> list[float]:
        return [2.0 * len(text) for text in completions]

    def careless(completions: Sequence[str], **columns: Any) -> list[Any]:
        return [FAULTS[fault](text) if text == "bad" else 2.0 * len(text) for text in completions]

    texts = ["one", "three", "seven", "thirteen"]
    spoilt = [*texts[:bad], "bad", *texts[bad + 1 :]]
    healthy = score(Reward([part("length", lengths), part("other", careful, 0.5)]), spoilt)
    broken = score(Reward([part("length", lengths), part("other", careless, 0.5)]), spoilt)
    others = [row for row in range(4) if row != bad]
    assert torch.equal(broken.total[others], healthy.total[others])
    assert torch.equal(broken.parts["length"], healthy.parts["length"])
    assert broken.parts["other"][bad].isnan()
    assert broken.total[bad] == 3.0  # the part that applies, with its own weight


def test_comp_5_a_sequence_without_any_score_is_nan_alone() -> None:
    reward = Reward([part("only", lambda completions: [None if text == "bad" else 1.0 for text in completions])])
    torch.testing.assert_close(score(reward, ["a", "bad"]).total, torch.tensor([1.0, NAN]), equal_nan=True)


def test_parts_need_unique_names_and_one_that_counts() -> None:
    with pytest.raises(ValueError, match="names must be unique"):
        Reward([part("a", lengths), part("a", lengths)])
    with pytest.raises(ValueError, match="all have weight 0"):
        Reward([part("a", lengths, 0.0)])


def test_a_scorer_of_the_wrong_shape_is_named() -> None:
    class Wrong:
        def to(self, device: torch.device) -> None: ...

        def score(self, *args: Any, **keywords: Any) -> Tensor:
            return torch.zeros(3, 1)

    with pytest.raises(ValueError, match=r"part wrong gave scores of shape \(3, 1\) for 3 texts"):
        score(Reward([Part("wrong", "test", 1.0, Wrong())]), ["a", "b", "c"])
