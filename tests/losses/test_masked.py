"""Reductions, masked moments and whitening."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_align.losses.masked import (
    REDUCTIONS,
    explained_variance,
    masked_mean,
    masked_whiten,
    moments,
    token_mean,
)


def random_batch(seed: int, rows: int = 8, length: int = 7) -> tuple[Tensor, Tensor]:
    """Values and a mask of completions that differ in length; NaN outside."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, length, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return values.where(mask, torch.nan), mask


def variance(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].var(correction=0)


def loss_of(parameter: Tensor, values: Tensor) -> Tensor:
    return (values.nan_to_num(1e6) - parameter) ** 2  # a NaN made here would come back as its gradient


def gradient(parts: list[tuple[Tensor, Tensor]], normaliser: float | None) -> Tensor:
    """Gradient of the token loss accumulated over parts, each divided by the normaliser (None: by its own count)."""
    parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for values, mask in parts:
        scale = 1.0 if normaliser is not None else 1 / len(parts)
        (scale * token_mean(loss_of(parameter, values), mask, normaliser=normaliser)).backward()
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("seed", range(5))
def test_conv_5_token_loss_does_not_depend_on_the_split(seed: int) -> None:
    values, mask = random_batch(seed)
    count = float(mask.sum())
    whole = gradient([(values, mask)], count)
    accumulated = gradient(list(zip(values.split(2), mask.split(2), strict=True)), count)
    # two ranks of two micro-batches: each rank multiplies by the world size, the strategy averages over ranks
    ranks = []
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        parts = list(zip(values[rows].split(2), mask[rows].split(2), strict=True))
        ranks.append(gradient(parts, count) * 2)
    torch.testing.assert_close(accumulated, whole, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(sum(ranks) / 2, whole, rtol=1e-6, atol=1e-12)


def test_conv_5_counter_example_naive_averaging_is_caught() -> None:
    values, mask = random_batch(0)
    whole = gradient([(values, mask)], float(mask.sum()))
    naive = gradient(list(zip(values.split(2), mask.split(2), strict=True)), None)
    assert abs(naive - whole) > 1e-3


@pytest.mark.parametrize("how", list(REDUCTIONS))
def test_reductions_equal_loops_and_ignore_what_is_masked(how: str) -> None:
    values, mask = random_batch(3)
    mask[2] = False
    rows = [[float(v) for v, kept in zip(row, m, strict=True) if kept] for row, m in zip(values, mask, strict=True)]
    expected = {
        "token": sum(map(sum, rows)) / sum(map(len, rows)),
        "sequence": sum(sum(row) / len(row) for row in rows if row) / sum(1 for row in rows if row),
        "sum_sequence": sum(map(sum, rows)) / len(rows),
        "constant": sum(map(sum, rows)) / (len(rows) * 11),
    }[how]
    actual = REDUCTIONS[how](values, mask, **({"length": 11} if how == "constant" else {}))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("how", list(REDUCTIONS))
def test_conv_9_empty_mask_gives_zero_loss_and_zero_gradient(how: str) -> None:
    values = torch.full((2, 3), torch.nan, requires_grad=True)
    loss = REDUCTIONS[how](values, torch.zeros(2, 3), **({"length": 3} if how == "constant" else {}))
    loss.backward()
    assert loss == 0
    assert values.grad is not None
    assert not values.grad.any()


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, -5.0, 1e3]),
)
@settings(deadline=None, max_examples=50)
def test_conv_8_whitened_values_have_mean_0_and_variance_1(seed: int, scale: float, shift: float) -> None:
    values, mask = random_batch(seed)
    white = masked_whiten((values + shift) * scale, mask)
    assert torch.isfinite(white).all()
    assert not white[~mask].any()
    assert abs(masked_mean(white, mask)) < 1e-6
    expected = scale**2 * variance(values, mask)
    assert abs(variance(white, mask) - expected / (expected + 1e-8)) < 1e-6


def test_conv_8_garbage_does_not_leak_into_values_or_gradients() -> None:
    values, mask = random_batch(1)
    clean = values.nan_to_num(0.0)
    for garbage in (torch.nan, torch.inf, -1e30):
        dirty = clean.where(mask, garbage).requires_grad_()
        torch.testing.assert_close(masked_whiten(dirty, mask), masked_whiten(clean, mask), rtol=0, atol=0)
        masked_mean(dirty, mask).backward()
        assert dirty.grad is not None
        assert torch.isfinite(dirty.grad).all()


@pytest.mark.parametrize("valid", [0, 1])
def test_whitening_fewer_than_two_values_changes_nothing(valid: int) -> None:
    values = torch.tensor([[3.0, 4.0, 5.0]])
    mask = torch.tensor([[valid == 1, False, False]])
    torch.testing.assert_close(masked_whiten(values, mask), values, rtol=0, atol=0)


def test_whitening_constant_values_gives_zeros() -> None:
    white = masked_whiten(torch.full((2, 3), 7.0), torch.ones(2, 3))
    torch.testing.assert_close(white, torch.zeros(2, 3))


@pytest.mark.parametrize("options", [{}, {"shift_mean": False}, {"unbiased": True}])
def test_comp_4_whitening_over_two_ranks_equals_one(options: dict[str, bool]) -> None:
    values, mask = random_batch(4)
    whole = masked_whiten(values, mask, **options)
    parts = list(zip(values.tensor_split([3]), mask.tensor_split([3]), strict=True))
    total = sum((moments(v, m) for v, m in parts), torch.zeros(3, dtype=torch.float64))
    shared = torch.cat([masked_whiten(v, m, global_moments=total, **options) for v, m in parts])
    torch.testing.assert_close(shared, whole)
    alone = torch.cat([masked_whiten(v, m, **options) for v, m in parts])
    assert (alone - whole).abs().max() > 1e-3  # counter-example: each rank by itself


def test_explained_variance() -> None:
    returns, mask = random_batch(5)

    def explained(values: torch.Tensor, targets: torch.Tensor = returns) -> float:
        return explained_variance(moments(targets - values, mask), moments(targets, mask))

    assert explained(returns) == 1
    assert explained(returns + 3.0) == pytest.approx(1)  # a constant error explains the variance all the same
    assert abs(explained(torch.zeros_like(returns))) < 1e-12
    assert math.isnan(explained(torch.zeros_like(returns), torch.ones_like(returns)))
    assert explained(-returns) < 0


def test_half_precision_is_reduced_in_float32() -> None:
    values = torch.full((1, 5000), 0.1, dtype=torch.bfloat16)
    mean = masked_mean(values, torch.ones(1, 5000))
    assert mean.dtype == torch.float32
    assert abs(mean - float(values[0, 0])) < 1e-6
