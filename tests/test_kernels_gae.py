"""K5, advantages: every implementation against loops in float64 and the golden vectors; and what it must never do.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernel (test_kernels_interpreter.py).
"""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from align_kernels import scan_compiled, scan_native, scan_tensors
from align_kernels.scan_ops import VTrace, gae, gae_op

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# "tensors" is native where there is no C compiler.
IMPLS = ["triton"] if INTERPRETING else ["native", "tensors"]
with_reference = pytest.mark.parametrize("impl", IMPLS if INTERPRETING else [*IMPLS, "reference"], indirect=True)
DTYPES = [torch.float32] if INTERPRETING else [torch.float32, torch.float64]
EXAMPLES = 25 if INTERPRETING else 120
LONGEST = 40 if INTERPRETING else 150
GARBAGE = [math.nan, math.inf, -7.7e4]
PER_FUNCTION = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        from align_kernels import gae_kernel

        monkeypatch.setattr(gae_kernel, "BLOCK", 16)  # short sequences cross blocks
    if request.param == "tensors":
        monkeypatch.setattr(scan_native, "_module", lambda _: scan_tensors)
        return "native"
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """KERNELS.md section 7: 1e-5 (1 + max|A|) in float32, 1e-12 in float64; and that this would notice a difference."""
    bound = (1e-12 if actual.dtype == torch.float64 else 1e-5) * (
        1 + float(expected.abs().max()) if expected.numel() else 0
    )
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)
    if expected.numel():
        worse = expected.double().clone()
        worse.view(-1)[0] += 3 * bound
        with pytest.raises(AssertionError):
            torch.testing.assert_close(actual.double(), worse, rtol=0, atol=bound)


def rollout(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes; what stands in the holes must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *shape, dtype=dtype, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    garbage = GARBAGE[seed % 3]
    return rewards.where(mask, garbage), values.where(mask, garbage), mask


# ------------------------------------------------------------------ the reference itself
def test_the_reference_computes_what_a_hand_does() -> None:
    """γ = ½, λ = ½: δ = 3 − 2 + ½·4 = 3, then 1 − 4 + ½·8 = 1, then 2 − 8 = −6; A = −6, 1 − 6/4, 3 − ½/4."""
    rewards, values = torch.tensor([[3.0, 1, 2]]), torch.tensor([[2.0, 4, 8]])
    advantages, returns = gae(rewards, values, gamma=0.5, lam=0.5, impl="reference")
    assert advantages.tolist() == [[2.875, -0.5, -6.0]]
    assert returns.tolist() == [[4.875, 3.5, 2.0]]


def test_the_reference_computes_v_trace_as_a_hand_does() -> None:
    """ρ = (2, ½), ρ̄ = 1, c̄ = ¾: A_1 = ½(1 − 4) = −1.5; A_0 = 1·(3 − 2 + 4) + ¾·(−1.5)."""
    trace = VTrace(torch.tensor([[2.0, 0.5]]).log(), rho_bar=1.0, c_bar=0.75)
    pair = torch.tensor([[3.0, 1]]), torch.tensor([[2.0, 4]])
    advantages, _ = gae(*pair, gamma=1.0, lam=1.0, vtrace=trace, impl="reference")
    torch.testing.assert_close(advantages, torch.tensor([[3.875, -1.5]]))


@with_reference
@pytest.mark.parametrize("case", ["plain", "bootstrap", "interior", "dones"])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (1, 2)])
def test_gold_gae(impl: str, dtype: torch.dtype, case: str, padding: tuple[int, int]) -> None:
    inputs, outputs = GOLDEN["gae"]["inputs"], GOLDEN["gae"]["outputs"]

    def padded(rows: Any, value: float, of: torch.dtype) -> Tensor:
        return torch.nn.functional.pad(torch.tensor(rows, dtype=of), padding, value=value)

    mask = padded(inputs["interior_mask" if case == "interior" else "mask"], 0, torch.bool)
    options: dict[str, Any] = {"gamma": inputs["gamma"], "lam": inputs["lam"]}
    if case != "plain":
        options = {"gamma": inputs["gamma2"], "lam": inputs["lam2"]}
    if case == "bootstrap":
        options["bootstrap"] = torch.tensor(inputs["bootstrap"], dtype=dtype)
    if case == "dones":
        options["dones"] = padded(inputs["dones"], 1, torch.bool)
    results = gae(
        padded(inputs["rewards"], 7.7e4, dtype),
        padded(inputs["values"], math.nan, dtype),
        mask=mask,
        impl=impl,
        **options,
    )
    prefix = "" if case == "plain" else f"{case}_"
    for result, name in zip(results, ("advantages", "returns"), strict=True):
        expected = padded(outputs[prefix + name], 0.0, torch.float64)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


@with_reference
def test_gold_gae_packed(impl: str, dtype: torch.dtype) -> None:
    inputs, outputs = GOLDEN["gae_packed"]["inputs"], GOLDEN["gae_packed"]["outputs"]
    rewards, values = (torch.tensor(inputs[name], dtype=dtype) for name in ("rewards", "values"))
    cu = torch.tensor(inputs["cu_seqlens"])
    results = gae(rewards, values, gamma=inputs["gamma"], lam=inputs["lam"], cu_seqlens=cu, impl=impl)
    for result, name in zip(results, ("advantages", "returns"), strict=True):
        expected = torch.tensor(outputs[name], dtype=torch.float64)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


# ------------------------------------------------------------------ against the reference
@given(data=st.data())
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=PER_FUNCTION)
def test_every_implementation_equals_the_loops(impl: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000), label="seed")
    packed = data.draw(st.booleans(), label="packed")
    mode = data.draw(st.sampled_from(["skip", "stop", "dense"]), label="mode")
    rows, length = data.draw(st.integers(0, 4), label="rows"), data.draw(st.integers(0, LONGEST), label="length")
    rewards, values, mask = rollout(seed, rows, length, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    if mode == "dense":  # where every token is a step, its numbers count
        rewards, values = torch.randn(2, rows, length, dtype=dtype, generator=generator)
    dones = torch.rand(rows, length, generator=generator) < 0.15
    log_rho = (torch.randn(rows, length, dtype=dtype, generator=generator) / 3).where(mask, values)
    tokens, cu, sequences = [rewards, values, mask, dones, log_rho], None, rows
    if packed:
        tokens = [x.flatten() for x in tokens]
        cuts = data.draw(st.lists(st.integers(0, rows * length), max_size=4), label="cuts")
        cu = torch.tensor(
            [0, *sorted(cuts), rows * length], dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))
        )
        sequences = len(cu) - 1
    rewards, values, mask, dones, log_rho = tokens
    options: dict[str, Any] = {"cu_seqlens": cu, "mask_mode": mode}
    options |= data.draw(st.sampled_from([{"gamma": 0.97, "lam": 0.9}, {"gamma": 1.0, "lam": 1.0}, {"lam": 0.0}]))
    if data.draw(st.booleans(), label="mask"):
        options["mask"] = mask.to(data.draw(st.sampled_from([torch.bool, torch.uint8])))
    else:
        rewards, values, log_rho = (x.nan_to_num(0.5, 0.5, 0.5).clamp(-3, 3) for x in (rewards, values, log_rho))
    if data.draw(st.booleans(), label="dones"):
        options["dones"] = dones
    if data.draw(st.booleans(), label="bootstrap"):
        options["bootstrap"] = torch.randn(sequences, dtype=dtype, generator=generator)
    if data.draw(st.booleans(), label="vtrace"):
        options["vtrace"] = VTrace(log_rho, 0.9, 1.1)
    expected = gae(rewards.double(), values.double(), impl="reference", **options)
    for actual, wanted in zip(gae(rewards, values, impl=impl, **options), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_and_never_computed_in(impl: str, source: torch.dtype) -> None:
    rewards, values, mask = rollout(3, 3, 30)
    rewards, values = rewards.to(source), values.to(source)
    advantages, returns = gae(rewards, values, mask=mask, impl=impl)
    expected = gae(rewards.double(), values.double(), mask=mask, impl="reference")
    assert advantages.dtype == returns.dtype == torch.float32
    assert_close(advantages, expected[0])
    assert_close(returns, expected[1])


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded", "every other"])
def test_any_stride(impl: str, view: str) -> None:
    """A matrix is read where it lies: only ``stride(-1)`` checked reads the wrong rows of a transposed view."""
    views = {
        "transposed": lambda x: x.t().contiguous().t(),
        "sliced": lambda x: torch.nn.functional.pad(x, (2, 3), value=5)[:, 2:-3],
        "expanded": lambda x: x[:1].expand_as(x),
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    rewards, values, mask = (views[view](x) for x in rollout(4, 4, 35, dtype=torch.float32))
    bootstrap = torch.arange(8.0)[::2]
    actual = gae(rewards, values, mask=mask, bootstrap=bootstrap, impl=impl)
    plain = [x.contiguous() for x in (rewards, values, mask)]
    expected = gae(*plain[:2], mask=plain[2], bootstrap=bootstrap.contiguous(), impl="reference")
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y)


def test_threads_change_nothing() -> None:
    rewards, values, mask = rollout(0, 80, 2048, dtype=torch.float32)
    assert rewards.numel() > 2 * scan_compiled.TOKENS_PER_THREAD
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gae(rewards, values, mask=mask, impl="native")
        torch.set_num_threads(2)
        together = gae(rewards, values, mask=mask, impl="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


# ------------------------------------------------------------------ properties
@with_reference
def test_ppo_2_limits_of_lambda_are_exact(impl: str) -> None:
    """Dyadic numbers, so that sums are exact and 'equal' means bit for bit."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randint(-64, 64, (2, 4, 37), generator=generator) / 8
    mask = torch.rand(4, 37, generator=generator) < 0.8
    _, returns = gae(rewards, values, mask=mask, gamma=1.0, lam=1.0, impl=impl)
    assert torch.equal(returns, rewards.where(mask, 0.0).flip(1).cumsum(1).flip(1).where(mask, 0.0))
    advantages, _ = gae(rewards, values, gamma=1.0, lam=0.0, impl=impl)
    assert torch.equal(advantages, rewards + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values)


@pytest.mark.parametrize(("left", "right"), [(0, 3), (5, 0), (1, 8)])
def test_ppo_4_padding_changes_nothing(impl: str, left: int, right: int) -> None:
    rewards, values, mask = rollout(5, 4, 11, dtype=torch.float32)
    before = gae(rewards, values, mask=mask, impl=impl)
    padded = [torch.nn.functional.pad(x, (left, right), value=torch.nan) for x in (rewards, values)]
    after = gae(*padded, mask=torch.nn.functional.pad(mask, (left, right), value=False), impl=impl)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y[:, left : left + 11], x, rtol=0, atol=1e-6)
        assert not y[:, :left].any()
        assert not y[:, left + 11 :].any()


@with_reference
def test_ppo_5_packed_equals_padded(impl: str, dtype: torch.dtype) -> None:
    lengths = [7, 0, 1, 33, 12]
    rewards, values, mask = (x[0] for x in rollout(6, 1, sum(lengths), dtype=dtype))
    bootstrap = torch.arange(1.0, 6.0, dtype=dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    options: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "impl": impl}
    packed = gae(rewards, values, mask=mask, bootstrap=bootstrap, cu_seqlens=cu, **options)
    for index, (lo, hi) in enumerate(pairwise(cu.tolist())):
        row = slice(lo, hi)
        own = bootstrap[index : index + 1]
        alone = gae(rewards[None, row], values[None, row], mask=mask[None, row], bootstrap=own, **options)
        for x, y in zip(packed, alone, strict=True):
            torch.testing.assert_close(x[row], y[0], rtol=1e-6, atol=1e-6)
    joined, _ = gae(rewards, values, mask=mask, cu_seqlens=torch.tensor([0, sum(lengths)]), **options)
    assert (packed[0] - joined).abs().max() > 1e-3  # a boundary that is ignored would be noticed


@with_reference
def test_ppo_6_a_masked_span_inside_may_as_well_not_be_there(impl: str) -> None:
    rewards, values = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[:, 3:21] = False
    with_span, _ = gae(rewards, values, mask=mask, gamma=0.9, impl=impl)
    without, _ = gae(rewards[mask].view(3, -1), values[mask].view(3, -1), gamma=0.9, impl=impl)
    torch.testing.assert_close(with_span[mask].view(3, -1), without, rtol=0, atol=1e-6)


@with_reference
def test_regression_gae_masked_observations(impl: str) -> None:
    """Tool tokens that decay and leak into GAE (radixark/miles#1827, verl-project/verl#2337).

    With values of 0 and a reward on the last token alone, an advantage is (γλ)^n for n *valid* tokens after it.
    ``dense``, which counts every token, is the fault.
    """
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    rewards, values = torch.zeros(1, 7), torch.zeros(1, 7)
    rewards[0, 6] = 1.0
    rewards[0, 3] = values[0, 3] = 9.0  # of a tool's output
    expected = torch.tensor([[0.125, 0.25, 0, 0, 0, 0.5, 1.0]])
    advantages, _ = gae(rewards, values, mask=mask, gamma=0.5, lam=1.0, impl=impl)
    torch.testing.assert_close(advantages, expected)
    faulty, _ = gae(rewards, values, mask=mask, gamma=0.5, lam=1.0, mask_mode="dense", impl=impl)
    assert (faulty - expected).abs().max() > 0.1


@with_reference
def test_stop_ends_the_episode_at_an_invalid_token(impl: str) -> None:
    rewards, values = torch.ones(1, 6), torch.zeros(1, 6)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    bootstrap = torch.tensor([10.0])
    options: dict[str, Any] = {"gamma": 1.0, "lam": 1.0, "mask": mask, "bootstrap": bootstrap, "impl": impl}
    stopped, _ = gae(rewards, values, mask_mode="stop", **options)
    assert stopped.tolist() == [[2.0, 1.0, 0.0, 12.0, 11.0, 0.0]]
    skipped, _ = gae(rewards, values, mask_mode="skip", **options)
    assert skipped.tolist() == [[14.0, 13.0, 0.0, 12.0, 11.0, 0.0]]


def test_v_trace_on_policy_is_gae(impl: str) -> None:
    rewards, values, mask = rollout(8, 3, 30, dtype=torch.float32)
    plain = gae(rewards, values, mask=mask, gamma=0.9, impl=impl)
    on_policy = gae(rewards, values, mask=mask, gamma=0.9, vtrace=VTrace(torch.zeros(3, 30)), impl=impl)
    for x, y in zip(plain, on_policy, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@with_reference
def test_v_trace_of_a_huge_ratio_is_its_bound_and_of_nan_is_nan(impl: str) -> None:
    rewards, values = torch.ones(1, 2), torch.zeros(1, 2)
    huge = gae(rewards, values, lam=1.0, vtrace=VTrace(torch.full((1, 2), 1e3), 2.0, 1.0), impl=impl)[0]
    assert huge.tolist() == [[4.0, 2.0]]
    assert gae(rewards, values, vtrace=VTrace(torch.tensor([[math.nan, 0.0]])), impl=impl)[0].isnan().tolist() == [
        [True, False]
    ]


def test_a_lazily_negated_tensor_is_read_as_it_looks(impl: str) -> None:
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    assert torch.equal(gae(torch._neg_view(rewards), values, impl=impl)[0], gae(-rewards, values, impl=impl)[0])


def test_results_are_the_same_every_time(impl: str) -> None:
    rewards, values, mask = rollout(9, 4, 40, dtype=torch.float32)
    first, second = (gae(rewards, values, mask=mask, impl=impl) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@with_reference
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_batches_of_nothing(impl: str, shape: tuple[int, int]) -> None:
    for result in gae(torch.ones(shape), torch.zeros(shape), mask=torch.zeros(shape, dtype=torch.bool), impl=impl):
        assert result.shape == shape
        assert not result.any()
    nothing, cu = torch.ones(0), torch.zeros(shape[0] + 1, dtype=torch.int32)
    assert gae(nothing, nothing, cu_seqlens=cu, impl=impl)[0].shape == (0,)


def test_no_gradient_leaves_the_estimates(impl: str) -> None:
    rewards, values = torch.randn(2, 2, 3).requires_grad_()
    for result in gae(rewards, values, impl=impl):
        assert not result.requires_grad


# ------------------------------------------------------------------ operators
def operator_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    rewards, values, mask = rollout(1, 3, 20, dtype=dtype)
    return rewards, values, mask, None, torch.ones(3, dtype=dtype), None, None, 0.9, 0.8, "skip", 1.0, 1.0


def test_opcheck(impl: str) -> None:
    torch.library.opcheck(gae_op, (*operator_arguments(), impl), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compiles_without_a_graph_break(impl: str) -> None:
    rewards, values, mask = rollout(1, 3, 20, dtype=torch.float32)

    def loss(rewards: Tensor, values: Tensor) -> Tensor:
        return gae(rewards * 2, values, mask=mask, impl=impl)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, values), loss(rewards, values))


def test_shapes_are_known_without_data(impl: str) -> None:
    with FakeTensorMode():
        for result in gae(torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(3, 5), impl=impl):
            assert (result.shape, result.dtype) == ((3, 5), torch.float32)


# ------------------------------------------------------------------ errors
WRONG = [
    ({"values": torch.zeros(2, 4)}, ValueError, r"values has shape \[2, 4\], but rewards has \[2, 3\]"),
    ({"rewards": torch.zeros(3)}, ValueError, r"rewards has shape \[3\]: give \[B, T\], or \[N\] with cu_seqlens"),
    ({"rewards": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "rewards is torch.int64: it must be float32"),
    ({"mask": torch.zeros(2, 3)}, TypeError, "mask is torch.float32: it must be bool or uint8"),
    ({"dones": torch.zeros(3, 2, dtype=torch.bool)}, ValueError, r"dones has shape \[3, 2\], but rewards has \[2, 3\]"),
    ({"bootstrap": torch.zeros(3)}, ValueError, r"bootstrap has shape \[3\], but rewards has \[2, 3\]"),
    ({"values": torch.zeros(2, 3, device="meta")}, RuntimeError, "values is on meta, but rewards on cpu"),
    ({"mask_mode": "jump"}, ValueError, "mask_mode is 'jump': it must be one of skip, stop, dense"),
    ({"gamma": 1.5}, ValueError, r"gamma is 1.5: it must be in \[0, 1\]"),
    ({"lam": math.nan}, ValueError, r"lam is nan: it must be in \[0, 1\]"),
    ({"vtrace": VTrace(torch.zeros(2, 3), rho_bar=0.0)}, ValueError, "rho_bar 0.0 and c_bar 1.0: both must be above 0"),
    ({"vtrace": VTrace(torch.zeros(2, 2))}, ValueError, r"vtrace.log_rho has shape \[2, 2\]"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"rewards has shape \[2, 3\]: with cu_seqlens it must be \[N\]"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:30] for _, _, message in WRONG])
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        gae(**arguments)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5]])
def test_wrong_boundaries_are_named(impl: str, bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to 4, the number of tokens"):
        gae(torch.zeros(4), torch.zeros(4), cu_seqlens=torch.tensor(bounds), impl=impl)


# ------------------------------------------------------------------ compiled code
def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(OSError, match=r"/bin/false cannot compile scan\.c"):
        scan_compiled.library.__wrapped__(torch.float32)
    monkeypatch.setenv("ALIGN_KERNELS_CPU_COMPILE", "0")
    assert scan_compiled.problem.__wrapped__() == "ALIGN_KERNELS_CPU_COMPILE=0 turns compiled code off"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiler_of_another_language_is_a_reason_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "g++")
    with pytest.raises(OSError, match=r"what g\+\+ made of scan\.c has no function gae"):
        scan_compiled.library.__wrapped__(torch.float32)


@pytest.mark.skipif(scan_compiled.problem() is not None, reason="there is no C compiler")
def test_a_damaged_library_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = "from align_kernels import scan_compiled; assert scan_compiled.problem() is None, scan_compiled.problem()"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
    for kept in (tmp_path / "align_kernels").iterdir():
        kept.write_bytes(b"")  # as a crash may leave it
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
    assert all(kept.stat().st_size for kept in (tmp_path / "align_kernels").iterdir())


@pytest.mark.skipif(scan_compiled.problem() is not None, reason="there is no C compiler")
def test_compiled_code_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan_compiled.library.__wrapped__(torch.float32)
    (kept,) = (tmp_path / "align_kernels").iterdir()
    made = kept.stat().st_mtime_ns
    scan_compiled.library.__wrapped__(torch.float32)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "align_kernels").iterdir()] == [made]
