"""Plain and packed linear layers."""

import pytest
import torch

from lightning_align.rollout import projection
from lightning_align.rollout.projection import PackedProjection, PlainProjection, make_projection

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_and_plain_products_agree(
    dtype: torch.dtype, with_bias: bool, transposed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "PACK_FROM", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    weight = torch.randn(40, 72, generator=generator).to(dtype) / 40**0.5
    bias = torch.randn(72, generator=generator).to(dtype) if with_bias else None
    residual = torch.randn(rows, 72, generator=generator).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight

    made = make_projection(weight, bias)
    if not projection._packing_works(dtype):
        assert isinstance(made, PlainProjection)
        pytest.skip(f"this processor does not pack {dtype}")
    assert isinstance(made, PackedProjection)
    expected = x.double() @ weight.double() + (0 if bias is None else bias.double())
    limit = TOLERANCE[dtype] * (1 + expected.abs().max())
    for layer in (made, PlainProjection(weight, bias)):
        assert (layer(x) - expected).abs().max() <= limit
        written = residual.clone()
        assert layer.add_to(written, x) is written
        assert (written - (residual + expected)).abs().max() <= 2 * limit


@pytest.mark.parametrize(
    ("dtype", "columns"), [(torch.float64, 2048), (torch.float32, 8)], ids=["float64", "small matrix"]
)
def test_what_does_not_gain_from_packing_stays_a_view(dtype: torch.dtype, columns: int) -> None:
    weight = torch.randn(128, columns, dtype=dtype)
    made = make_projection(weight)
    assert isinstance(made, PlainProjection)
    assert made.weight is weight


def test_packing_follows_later_changes_of_the_weight_only_when_made_again() -> None:
    weight, x = torch.randn(256, 1024), torch.randn(2, 256)
    made = make_projection(weight)
    before = made(x)
    weight.zero_()
    stale = isinstance(made, PackedProjection)
    assert torch.equal(made(x), before if stale else torch.zeros_like(before))
    assert bool((make_projection(weight)(x) == 0).all())
