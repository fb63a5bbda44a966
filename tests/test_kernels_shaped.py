"""K6, shaped advantages: every implementation against loops in float64, golden vectors and the pitfalls of whitening.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernels (test_kernels_interpreter.py).
"""

import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_kernels import scan_native, scan_reference, scan_tensors
from align_kernels.scan_ops import Shaped, gae, shaped_advantages, shaped_op, whiten_op

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# "tensors" is native where there is no C compiler.
IMPLS = ["triton"] if INTERPRETING else ["native", "tensors"]
with_reference = pytest.mark.parametrize("impl", IMPLS if INTERPRETING else [*IMPLS, "reference"], indirect=True)
DTYPES = [torch.float32] if INTERPRETING else [torch.float32, torch.float64]
EXAMPLES = 20 if INTERPRETING else 80
LONGEST = 40 if INTERPRETING else 150
GARBAGE = [math.nan, math.inf, -7.7e4]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        from align_kernels import shaped_kernel

        for block, size in (("BLOCK", 16), ("WHITEN_BLOCK", 64), ("MERGE_BLOCK", 2)):  # small data crosses blocks
            monkeypatch.setattr(shaped_kernel, block, size)
    if request.param == "tensors":
        monkeypatch.setattr(scan_native, "_module", lambda _: scan_tensors)
        return "native"
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """1e-5 (1 + max) in float32, 1e-11 in float64; and that this would notice a difference."""
    if not expected.numel():
        assert actual.shape == expected.shape
        return
    bound = (1e-11 if actual.dtype == torch.float64 else 1e-5) * (1 + float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)
    worse = expected.double().clone()
    worse.view(-1)[0] += 3 * bound
    with pytest.raises(AssertionError):
        torch.testing.assert_close(actual.double(), worse, rtol=0, atol=bound)


def batch(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, reference log-probs, values and a mask with holes; what stands in the holes must not matter."""
    generator = torch.Generator().manual_seed(seed)
    logp, difference, values = torch.randn(3, *shape, dtype=dtype, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    garbage = GARBAGE[seed % 3]
    return logp.where(mask, garbage), (logp + difference / 3).where(mask, garbage), values.where(mask, garbage), mask


def whitened(values: Tensor, mask: Tensor, impl: str, **options: Any) -> Shaped:
    """Whitening alone: with γ = 0, λ = 0 and neither KL nor score the advantages are minus the values."""
    zero, scores = torch.zeros_like(values), values.new_zeros(len(values))
    return shaped_advantages(zero, zero, -values, scores, mask, kl_coef=0.0, gamma=0.0, lam=0.0, impl=impl, **options)


# ------------------------------------------------------------------ golden vectors
@with_reference
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (1, 2)])
def test_gold_masked_whiten(impl: str, dtype: torch.dtype, padding: tuple[int, int]) -> None:
    inputs, outputs = GOLDEN["masked_whiten"]["inputs"], GOLDEN["masked_whiten"]["outputs"]
    values = torch.nn.functional.pad(torch.tensor(inputs["values"], dtype=dtype), padding, value=7.7e4)
    mask = torch.nn.functional.pad(torch.tensor(inputs["mask"]).bool(), padding)
    for name, shift_mean in (("default", True), ("no_shift", False)):
        expected = torch.nn.functional.pad(torch.tensor(outputs[name], dtype=torch.float64), padding)
        assert_close(whitened(values, mask, impl, shift_mean=shift_mean).advantages, expected)


@with_reference
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (1, 2)])
def test_gold_shaped_reward(impl: str, dtype: torch.dtype, padding: tuple[int, int]) -> None:
    inputs, outputs = GOLDEN["shaped_reward"]["inputs"], GOLDEN["shaped_reward"]["outputs"]
    logp, ref_logp = (
        torch.nn.functional.pad(torch.tensor(inputs[name], dtype=dtype), padding, value=math.nan)
        for name in ("logp", "ref_logp")
    )
    mask = torch.nn.functional.pad(torch.tensor(inputs["mask"]).bool(), padding)
    scores = torch.tensor(inputs["scores"], dtype=dtype)
    shaped = shaped_advantages(logp, ref_logp, logp, scores, mask, kl_coef=inputs["beta"], impl=impl)
    expected = torch.nn.functional.pad(torch.tensor(outputs["rewards"], dtype=torch.float64), padding)
    assert_close(shaped.rewards, expected)
    assert_close(shaped.kl_sum, torch.tensor(outputs["kl_sum"], dtype=torch.float64))


# ------------------------------------------------------------------ against the reference
@given(data=st.data())
@settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_implementation_equals_the_loops(impl: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000), label="seed")
    rows, length = data.draw(st.integers(0, 4), label="rows"), data.draw(st.integers(0, LONGEST), label="length")
    logp, ref_logp, values, mask = batch(seed, rows, length, dtype=dtype)
    cu, sequences = None, rows
    if data.draw(st.booleans(), label="packed"):
        logp, ref_logp, values, mask = (x.flatten() for x in (logp, ref_logp, values, mask))
        cuts = data.draw(st.lists(st.integers(0, rows * length), max_size=4), label="cuts")
        cu = torch.tensor(
            [0, *sorted(cuts), rows * length], dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))
        )
        sequences = len(cu) - 1
    generator = torch.Generator().manual_seed(seed + 1)
    scores, bootstrap = 3 * torch.randn(2, sequences, dtype=dtype, generator=generator)
    options: dict[str, Any] = {"kl_coef": 0.1, "cu_seqlens": cu, "gamma": 0.97, "lam": 0.9}
    options |= {
        "kl_estimator": data.draw(st.sampled_from(["k1", "k2", "k3"])),
        "score_clip": data.draw(st.sampled_from([None, 2.0])),
        "bootstrap": data.draw(st.sampled_from([None, bootstrap])),
        "whiten": data.draw(st.booleans(), label="whiten"),
        "shift_mean": data.draw(st.booleans(), label="shift_mean"),
    }
    actual = shaped_advantages(logp, ref_logp, values, scores, mask, impl=impl, **options)
    # The reference of the very same numbers.
    wide = [x.double() for x in (logp, ref_logp, values, scores)]
    expected = shaped_advantages(*wide, mask, impl="reference", **options)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        assert_close(x, y)


def test_the_reference_is_its_parts() -> None:
    logp, ref_logp, values, mask = batch(1, 3, 25)
    scores = torch.tensor([3.0, -3, 1], dtype=torch.float64)
    shaped = shaped_advantages(logp, ref_logp, values, scores, mask, kl_coef=0.2, score_clip=2.0, impl="reference")
    d = (logp - ref_logp).where(mask, 0.0)
    rewards = -0.2 * d
    for row, last in enumerate((mask * torch.arange(25)).amax(1)):
        rewards[row, last] += scores[row].clamp(-2, 2)
    torch.testing.assert_close(shaped.rewards, rewards)
    torch.testing.assert_close(shaped.kl_sum, d.sum(1))
    advantages, returns = gae(rewards, values, mask=mask, impl="reference")
    torch.testing.assert_close(shaped.returns, returns)
    kept = advantages[mask]
    torch.testing.assert_close(shaped.mean, kept.mean())
    torch.testing.assert_close(shaped.var, kept.var(correction=0))
    torch.testing.assert_close(shaped.advantages[mask], (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt())


@pytest.mark.parametrize("d", [0.0, 1e-4, -1e-3, 0.02, 0.4999, -0.5001, 3.0, -4.0])
def test_k3_keeps_its_digits_where_it_is_small(impl: str, d: float) -> None:
    """e^−d − 1 + d by itself is 8 % off at d = 10⁻³ in float32."""
    logp = torch.tensor([[d]])
    zero = torch.zeros(1, 1)
    ones = torch.ones(1, 1, dtype=torch.bool)
    shaped = shaped_advantages(logp, zero, zero, zero[0], ones, kl_coef=1.0, kl_estimator="k3", impl=impl)
    exact = scan_reference.token_kl(logp.item(), 0.0, "k3")
    assert shaped.kl_sum.item() == pytest.approx(exact, rel=2e-6, abs=0)


@pytest.mark.parametrize("view", ["transposed", "sliced"])
def test_any_stride(impl: str, view: str) -> None:
    def moved(x: Tensor) -> Tensor:
        return x.t().contiguous().t() if view == "transposed" else torch.nn.functional.pad(x, (1, 2), value=1)[:, 1:-2]

    plain = batch(4, 4, 35, dtype=torch.float32)
    logp, ref_logp, values, mask = map(moved, plain)
    scores = torch.arange(8.0)[::2]
    actual = shaped_advantages(logp, ref_logp, values, scores, mask, kl_coef=0.1, impl=impl)
    expected = shaped_advantages(*plain[:3], scores.contiguous(), plain[3], kl_coef=0.1, impl="reference")
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y)


# ------------------------------------------------------------------ properties
@with_reference
def test_ppo_1_rewards_add_up_to_score_minus_kl(impl: str) -> None:
    logp, ref_logp, values, mask = batch(0, 6, 33, dtype=torch.float32)
    scores = torch.randn(6, generator=torch.Generator().manual_seed(5))
    shaped = shaped_advantages(logp, ref_logp, values, scores, mask, kl_coef=0.3, impl=impl)
    torch.testing.assert_close(shaped.rewards.sum(1), scores - 0.3 * shaped.kl_sum, rtol=0, atol=1e-5)
    assert not shaped.rewards[~mask].any()


@with_reference
def test_ppo_5_packed_equals_padded(impl: str) -> None:
    logp, ref_logp, values, mask = batch(2, 4, 30, dtype=torch.float32)
    scores = torch.arange(4.0)
    padded = shaped_advantages(logp, ref_logp, values, scores, mask, kl_coef=0.1, impl=impl)
    flat = [x.flatten() for x in (logp, ref_logp, values)]
    cu = torch.arange(0, 121, 30)
    packed = shaped_advantages(*flat, scores, mask.flatten(), kl_coef=0.1, cu_seqlens=cu, impl=impl)
    for x, y in zip(padded, packed, strict=True):
        torch.testing.assert_close(x.flatten(), y.flatten(), rtol=0, atol=1e-6)


@with_reference
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_conv_8_whitened_values_have_mean_0_and_variance_1(impl: str, offset: float) -> None:
    values, _, _, mask = batch(7, 5, 60, dtype=torch.float32)
    white = whitened(values + offset, mask, impl).advantages
    kept = white[mask].double()
    assert abs(kept.mean()) < 1e-4
    assert kept.var(correction=0) == pytest.approx(1, abs=1e-3)
    assert not white[~mask].any()


def test_an_exact_kl_goes_in_as_k1_against_zeros(impl: str) -> None:
    kl, _, values, mask = batch(3, 3, 20, dtype=torch.float32)
    shaped = shaped_advantages(kl, torch.zeros_like(kl), values, torch.zeros(3), mask, kl_coef=0.5, impl=impl)
    torch.testing.assert_close(shaped.rewards, (-0.5 * kl).where(mask, 0.0))


@with_reference
def test_a_score_is_for_valid_tokens_alone(impl: str) -> None:
    """The score lands on the last *valid* token (a terminal reward on a masked one would be lost); NaN needs one."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    zero = torch.zeros(3, 4)
    scores = torch.tensor([2.0, math.nan, math.nan])
    shaped = shaped_advantages(zero, zero, zero, scores, mask, kl_coef=0.1, score_clip=5.0, whiten=False, impl=impl)
    assert shaped.rewards[:2].tolist() == [[0.0, 2.0, 0.0, 0.0], [0.0] * 4]
    assert shaped.rewards[2].isnan().tolist() == [False, False, False, True]
    assert shaped.advantages[2].isnan().tolist() == mask[2].tolist()


def test_results_are_the_same_every_time(impl: str) -> None:
    inputs = batch(9, 4, 40, dtype=torch.float32)
    scores = torch.arange(4.0)
    first, second = (shaped_advantages(*inputs[:3], scores, inputs[3], kl_coef=0.1, impl=impl) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_gradient_leaves_and_no_input_changes(impl: str) -> None:
    logp, ref_logp, values, mask = batch(9, 4, 20, dtype=torch.float32)
    before = logp.clone()
    logp.requires_grad_()
    shaped = shaped_advantages(logp, ref_logp, values, torch.ones(4), mask, kl_coef=0.1, impl=impl)
    assert not any(x.requires_grad for x in shaped)
    assert torch.equal(logp.detach().nan_to_num(), before.nan_to_num())


# ------------------------------------------------------------------ regressions (KERNELS.md section 8)
@with_reference
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_regression_whiten_zero_one_two_tokens(impl: str, count: int, shift_mean: bool) -> None:
    """Bessel's n − 1 is 0 with one valid token (alibaba/ROLL#475): one value stays as it is, two become ∓1."""
    values = torch.tensor([[3.0, 5.0, 9.0]])
    mask = torch.arange(3)[None] < count
    shaped = whitened(values, mask, impl, shift_mean=shift_mean)
    pair = [-1.0, 1.0, 0.0] if shift_mean else [3.0, 5.0, 0.0]
    expected = {0: [0.0, 0.0, 0.0], 1: [3.0, 0.0, 0.0], 2: pair}[count]
    torch.testing.assert_close(shaped.advantages, torch.tensor([expected]), rtol=0, atol=1e-6)
    mean, var = {0: (0.0, 0.0), 1: (3.0, 0.0), 2: (4.0, 1.0)}[count]
    assert (shaped.mean.item(), shaped.var.item()) == (mean, var)
    kept = values[mask]
    faulty = (kept - kept.mean()).square().sum() / torch.tensor(count - 1.0)
    assert torch.isfinite(faulty) == (count != 1)


@with_reference
def test_regression_whiten_ignores_padding(impl: str) -> None:
    """A plain mean over padded positions (NovaSky-AI/SkyRL#1782)."""
    values, _, _, mask = batch(1, 3, 20, dtype=torch.float32)
    shaped = whitened(values, mask, impl)
    kept = values[mask].double()
    assert shaped.mean.item() == pytest.approx(kept.mean().item(), abs=1e-6)
    wider = torch.nn.functional.pad(values, (0, 30), value=math.inf), torch.nn.functional.pad(mask, (0, 30))
    torch.testing.assert_close(whitened(*wider, impl).advantages[:, :20], shaped.advantages, rtol=0, atol=1e-6)
    faulty = values.where(mask, 0.0).mean()
    assert abs(faulty - kept.mean()) > 1e-3


def whiten_one_shard(rank: int, folder: str) -> None:
    """Rank 1 has no valid token; it must take part all the same."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    values, _, _, mask = batch(1, 4, 20)
    mask = mask & (rank == 0)
    shaped = whitened(values, mask, "native", process_group=dist.group.WORLD)
    torch.save((shaped.advantages, shaped.mean, shaped.var), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(INTERPRETING, reason="the collective is no kernel")
def test_regression_whiten_empty_shard(tmp_path: Path) -> None:
    """A rank without tokens that skips the collective hangs the others (radixark/miles#3229); statistics are global."""
    mp.spawn(whiten_one_shard, args=(str(tmp_path),), nprocs=2)
    values, _, _, mask = batch(1, 4, 20)
    alone = whitened(values, mask, "native")
    (full, mean, var), (empty, mean_1, var_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(full, alone.advantages)
    assert not empty.any()
    for one, other, both in ((mean, mean_1, alone.mean), (var, var_1, alone.var)):
        torch.testing.assert_close(one, both)
        assert torch.equal(one, other)


# ------------------------------------------------------------------ operators
def test_opcheck(impl: str) -> None:
    logp, ref_logp, values, mask = batch(0, 3, 20, dtype=torch.float32)
    arguments = (logp, ref_logp, values, torch.ones(3), mask, None, None, 0.1, "k1", 2.0, 0.9, 0.8, impl)
    torch.library.opcheck(shaped_op, arguments, rtol=0, atol=0)
    moments = torch.tensor([[5.0, 0.1, 2.0], [2.0, -1, 0.5]])
    torch.library.opcheck(whiten_op, (torch.randn(3, 20), mask, moments, True, True, impl), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compiles_without_a_graph_break(impl: str) -> None:
    logp, ref_logp, values, mask = (x.nan_to_num() for x in batch(0, 3, 20, dtype=torch.float32))

    def total(logp: Tensor, values: Tensor) -> Tensor:
        shaped = shaped_advantages(logp * 2, ref_logp, values, values[:, 0], mask, kl_coef=0.1, impl=impl)
        return shaped.advantages.abs().sum() + shaped.mean

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logp, values), total(logp, values))


# ------------------------------------------------------------------ errors
WRONG = [
    ({"ref_logp": torch.zeros(2, 4)}, ValueError, r"ref_logp has shape \[2, 4\], but logp has \[2, 3\]"),
    ({"mask": None}, TypeError, "mask is None: give a bool or uint8 tensor"),
    ({"mask": torch.ones(2, 3, dtype=torch.long)}, TypeError, "mask is torch.int64: it must be bool or uint8"),
    ({"scores": torch.zeros(3)}, ValueError, r"scores has shape \[3\], but logp has \[2, 3\]"),
    ({"scores": torch.zeros(2, device="meta")}, RuntimeError, "scores is on meta, but logp on cpu"),
    ({"kl_estimator": "exact"}, ValueError, "kl_estimator is 'exact': it must be one of k1, k2, k3"),
    ({"score_clip": 0.0}, ValueError, "score_clip is 0.0: it must be above 0, or None"),
    ({"lam": -0.1}, ValueError, r"lam is -0.1: it must be in \[0, 1\]"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"logp has shape \[2, 3\]: with cu_seqlens it must be \[N\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:30] for _, _, message in WRONG])
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    tokens = {name: torch.zeros(2, 3) for name in ("logp", "ref_logp", "values")}
    arguments = tokens | {"scores": torch.zeros(2), "mask": torch.ones(2, 3, dtype=torch.bool)} | change
    with pytest.raises(error, match=message):
        shaped_advantages(**arguments, kl_coef=0.1)


def test_packed_scores_are_one_for_each_sequence() -> None:
    zero, mask = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    cu = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"scores has shape \[3\], but cu_seqlens has \[3\], bounds of 2 sequences"):
        shaped_advantages(zero, zero, zero, torch.zeros(3), mask, kl_coef=0.1, cu_seqlens=cu)
