"""K1, statistics of logits: every implementation against float64 textbook formulas and the golden vectors.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernels (test_kernels_interpreter.py).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import align_kernels as K
from align_kernels import _config, few_logits, native, ops

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETING else "native"
# "few logits" is native for few logits; elsewhere in this file it is switched off.
IMPLS = ["triton"] if INTERPRETING else ["native", "few logits", "reference"]
DTYPES = [torch.float32] if INTERPRETING else [torch.float32, torch.float64]
EXAMPLES = 20 if INTERPRETING else 100
EPS = 2.0**-23
PER_FUNCTION = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cross several blocks and passes even when short; no path for few logits."""
    monkeypatch.setattr(_config, "LARGEST", 32)
    monkeypatch.setattr(_config, "LARGEST_WITH_ALL", 32)
    monkeypatch.setattr(_config, "SMALLEST", 16)
    monkeypatch.setattr(native, "CACHE_BYTES", 1024)
    monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "few logits":
        monkeypatch.setattr(few_logits, "FEW_LOGITS", 2**20)
        return "native"
    return request.param


def draw(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def truth(logits: Tensor, labels: Tensor, upstream: list[float], **options: Any) -> tuple[K.TokenStats, Tensor]:
    """Statistics and gradient in float64 by the reference."""
    if options.get("ref_logits") is not None:
        options["ref_logits"] = options["ref_logits"].double()
    return with_gradient(logits.double(), labels, upstream, impl="reference", **options)


def with_gradient(logits: Tensor, labels: Tensor, upstream: list[float], **options: Any) -> tuple[K.TokenStats, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    stats = K.token_stats(leaf, labels, **options)
    rows = torch.linspace(-1, 2, labels.numel(), dtype=stats.logp.dtype).view(labels.shape)
    values = (stats.logp, stats.entropy, stats.kl, stats.lse)
    total = sum((x * rows).sum() * g for x, g in zip(values, upstream, strict=True) if x is not None)
    total.backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    return K.TokenStats(*(None if x is None else x.detach() for x in stats)), leaf.grad  # type: ignore[arg-type]


def magnitude(logits: Tensor) -> float:
    finite = logits[logits.isfinite()].abs()
    return max(1.0, float(finite.max()) if finite.numel() else 1.0)


def assert_within(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Within the bound, which a perturbed result is not."""
    expected = expected.to(torch.float64)
    torch.testing.assert_close(actual.to(torch.float64), expected, rtol=0, atol=bound, equal_nan=True)
    if expected.numel() and bool(expected.isfinite().any()):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(expected + 2 * bound, expected, rtol=0, atol=bound, equal_nan=True)


def assert_same(actual: tuple[K.TokenStats, Tensor], expected: tuple[K.TokenStats, Tensor], logits: Tensor) -> None:
    """KERNELS.md section 7."""
    a, vocabulary = magnitude(logits), max(logits.shape[-1], 2)
    exact = actual[0].logp.dtype == torch.float64
    bound = 1e-12 * a if exact else 8 * EPS * a + 4 * EPS * math.log(vocabulary)
    for got, want in zip(actual[0][:4], expected[0][:4], strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert_within(got, want, bound)
    largest = float(expected[1].abs().max()) if expected[1].numel() else 0.0
    store = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(logits.dtype, 0.0)
    relative = 1e-10 if exact else 64 * EPS * a + store
    assert_within(actual[1], expected[1], relative * max(largest, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_log_probs_entropy_and_kl(impl: str, dtype: torch.dtype) -> None:
    inputs, outputs = GOLDEN["token_logp"]["inputs"], GOLDEN["token_logp"]["outputs"]
    logits, labels = torch.tensor(inputs["logits"], dtype=dtype), torch.tensor(inputs["labels"])
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for temperature, suffix in ((1.0, ""), (inputs["temperature"], "_tempered")):
        stats = K.token_stats(logits, labels, entropy=True, argmax=True, temperature=temperature, impl=impl)
        assert stats.entropy is not None
        assert stats.argmax is not None
        assert_within(stats.logp, torch.tensor(outputs["logp" + suffix], dtype=torch.float64), 4 * bound)
        assert_within(stats.entropy, torch.tensor(outputs["entropy" + suffix], dtype=torch.float64), 4 * bound)
        assert stats.argmax.tolist() == logits.argmax(1).tolist()
    inputs, outputs = GOLDEN["kl"]["inputs"], GOLDEN["kl"]["outputs"]
    x, y = (torch.tensor(inputs[name], dtype=dtype) for name in ("logits", "ref_logits"))
    kl = K.token_stats(x, labels, ref_logits=y, impl=impl).kl
    assert kl is not None
    assert_within(kl, torch.tensor(outputs["exact"], dtype=torch.float64), 4 * bound)
    own = K.token_stats(x, labels, ref_logits=x, impl=impl).kl
    assert own is not None
    assert own.abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_common_offset(impl: str, dtype: torch.dtype) -> None:
    inputs, outputs = GOLDEN["token_logp_offset"]["inputs"], GOLDEN["token_logp_offset"]["outputs"]
    logits = torch.tensor(inputs["logits"], dtype=dtype)
    stats = K.token_stats(logits, torch.tensor(inputs["labels"]), entropy=True, impl=impl)
    assert stats.entropy is not None
    bound = 1e-11 if dtype == torch.float64 else 3e-5 + 8 * EPS * 300  # the inputs themselves are rounded to 3e-5
    assert_within(stats.logp, torch.tensor(outputs["logp"], dtype=torch.float64), bound)
    assert_within(stats.entropy, torch.tensor(outputs["entropy"], dtype=torch.float64), bound)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=PER_FUNCTION)
@given(data=st.data())
@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "reference"], indirect=True)
def test_any_shape_mask_stride_and_label(impl: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 6), "rows")
    vocabulary = data.draw(st.sampled_from([1, 2, 7, 16, 31, 32, 33, 65, 100]), "vocabulary")
    dtype = data.draw(st.sampled_from([*DTYPES, torch.bfloat16, torch.float16]), "dtype")
    offset = data.draw(st.sampled_from([0.0, -300.0, 50.0]), "offset")
    logits = (draw(rows, vocabulary, data.draw(st.integers(0, 99), "seed")) + offset).to(dtype)
    if data.draw(st.booleans(), "strided"):
        logits = torch.stack([logits, logits.flip(0)], 1)[:, 0]
    allowed = st.sampled_from([0, vocabulary - 1, -100, vocabulary // 2])
    kind = data.draw(st.sampled_from([torch.int64, torch.int32]), "labels")
    labels = torch.tensor([data.draw(allowed) for _ in range(rows)], dtype=kind)
    mask = torch.tensor([data.draw(st.booleans()) for _ in range(rows)], dtype=torch.bool)
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 0.7]), "temperature"),
        "softcap": data.draw(st.sampled_from([None, 30.0]), "softcap"),
        "entropy": data.draw(st.booleans(), "entropy"),
        "mask": data.draw(st.sampled_from([None, mask]), "mask"),
        "ref_logits": draw(rows, vocabulary, 7).to(dtype) if data.draw(st.booleans(), "kl") else None,
    }
    upstream = [1.0, -0.5, 0.25, 0.125]
    assert_same(
        with_gradient(logits, labels, upstream, impl=impl, **options),
        truth(logits, labels, upstream, **options),
        logits,
    )


def test_maxima_that_grow_from_block_to_block(impl: str) -> None:
    """What a block has summed is rescaled to a maximum of a later one, of the logits and of the reference's."""
    ascending = torch.linspace(-3, 5, 100).expand(4, 100) + 0.1 * draw(4, 100)
    labels, upstream = torch.tensor([0, 40, 70, 99]), [1.0, -0.5, 0.25, 0.125]
    for logits, ref_logits in [(ascending, ascending.flip(1)), (ascending.flip(1), ascending)]:
        options = {"entropy": True, "argmax": True, "ref_logits": 2 * ref_logits}
        found, expected = (
            with_gradient(logits, labels, upstream, impl=impl, **options),
            truth(logits, labels, upstream, **options),
        )
        assert_same(found, expected, logits)
        assert torch.equal(found[0].argmax, expected[0].argmax)  # type: ignore[arg-type]
    ties = K.token_stats(torch.zeros(1, 100), torch.zeros(1, dtype=torch.long), argmax=True, impl=impl).argmax
    assert ties is not None
    assert ties.tolist() == [0]


def test_minus_infinity_contributes_nothing_and_nan_poisons_its_row(impl: str) -> None:
    rows = [[0.0, -math.inf, -math.inf], [-math.inf, 1.0, 1.0], [math.nan, 1.0, 1.0]]
    logits, labels = torch.tensor(rows), torch.tensor([0, 1, 1])
    stats, gradient = with_gradient(logits, labels, [1.0, 1.0, 0.0, 0.0], entropy=True, impl=impl)
    assert stats.entropy is not None
    assert stats.logp[:2].tolist() == pytest.approx([0.0, -math.log(2)])
    assert stats.entropy[:2].tolist() == pytest.approx([0.0, math.log(2)])
    assert bool(gradient[:2].isfinite().all())
    assert bool(stats.logp[2].isnan())
    assert bool(stats.entropy[2].isnan())


def test_a_label_that_cannot_be_has_a_gradient_all_the_same(impl: str) -> None:
    if impl == "reference":
        pytest.skip("autograd's own derivative of 0·log 0 is NaN")
    logits = torch.tensor([[-math.inf, 1.0, 2.0]])
    _, grad = with_gradient(logits, torch.tensor([0]), [0.0, 1.0, 0.0, 0.0], entropy=True, impl=impl)
    p = logits[0, 1:].double().softmax(0)
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(
        grad[0].double(), torch.tensor([0.0, *(p * (p.log() + entropy))]).double(), rtol=1e-5, atol=1e-6
    )


def test_statistics_may_be_changed_in_place(impl: str) -> None:
    logits = draw(2, 5).requires_grad_()
    stats = K.token_stats(logits, torch.tensor([0, 1]), entropy=True, impl=impl)
    stats.logp.mul_(2.0).sum().backward()
    assert logits.grad is not None


def test_kl_is_infinite_where_the_reference_excludes_a_possible_symbol(impl: str) -> None:
    logits, ref_logits = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    kl = K.token_stats(logits, torch.tensor([0, 0]), ref_logits=ref_logits, impl=impl).kl
    assert kl is not None
    assert kl.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_place_is_the_same_and_is_the_logits(dtype: torch.dtype) -> None:
    logits, ref_logits, labels = (
        draw(5, 40, dtype=dtype),
        draw(5, 40, 1, dtype=dtype),
        torch.tensor([0, 39, 3, -100, 5]),
    )
    mask = torch.tensor([True, True, False, True, True])
    gradients = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1
        x.retain_grad()
        stats = K.token_stats(x, labels, ref_logits=ref_logits, mask=mask, inplace_grad=in_place, impl=IMPL)
        assert stats.kl is not None
        (stats.logp.sum() + stats.kl.sum()).backward()
        assert x.grad is not None
        assert torch.equal(x.grad, x.detach()) == in_place
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_leading_shape_and_nothing_saved_without_gradients() -> None:
    logits = draw(6, 33).view(2, 3, 33).requires_grad_()
    with torch.no_grad():
        stats = K.token_stats(logits, torch.zeros(2, 3, dtype=torch.long), argmax=True, impl=IMPL)
    assert stats.logp.shape == stats.lse.shape == (2, 3)
    assert stats.logp.grad_fn is None


@pytest.mark.skipif(INTERPRETING, reason="float64")
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap: float | None, with_mask: bool) -> None:
    labels, ref = torch.tensor([0, 6, -100]), draw(3, 7, 1, dtype=torch.float64)
    mask = torch.tensor([True, True, False]) if with_mask else None
    for function in (ops._TokenStats.apply, ops.token_stats_op):

        def compute(x: Tensor, function: Any = function) -> tuple[Tensor, ...]:
            return function(x, labels, ref, mask, 0.7, softcap, True, False, False, False, "native")[:4]

        assert torch.autograd.gradcheck(compute, (draw(3, 7, dtype=torch.float64).requires_grad_(),))


def test_opcheck() -> None:
    inputs = (draw(3, 7).requires_grad_(), torch.tensor([0, 6, -100]), draw(3, 7, 1), None, 0.7, 1.5)
    torch.library.opcheck(ops.token_stats_op, (*inputs, True, True, False, False, IMPL))


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compiles_without_graph_breaks() -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        stats = K.token_stats(x, labels, entropy=True)
        assert stats.entropy is not None
        return (stats.logp + 0.1 * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        ours, eager = (draw(rows, 9).requires_grad_() for _ in range(2))
        labels = torch.arange(rows)
        compiled(ours, labels).backward()
        loss(eager, labels).backward()
        torch.testing.assert_close(ours.grad, eager.grad)
