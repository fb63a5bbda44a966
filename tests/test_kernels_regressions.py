"""Faults of other projects' kernels (KERNELS.md section 8): each test passes here and fails on a copy with the fault.

``Faulty`` implementations below are those copies; ``caught`` says that the check notices them.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import align_kernels as K
from align_kernels import _config, few_logits, layer, native

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETING else "native"
LogProbs = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "LARGEST", 64)
    monkeypatch.setattr(_config, "LARGEST_WITH_ALL", 64)
    monkeypatch.setattr(_config, "SMALLEST", 16)
    monkeypatch.setattr(native, "CACHE_BYTES", 2048)
    monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)


def ours(**options: Any) -> LogProbs:
    return lambda x, labels: K.token_stats(x, labels, impl=IMPL, **options).logp


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(compute: LogProbs, x: Tensor, labels: Tensor, softcap: float | None = None, bound: float = 1e-4) -> bool:
    """Whether log-probs and their gradient are those of float64."""
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    z = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    truth = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    factors = torch.linspace(0.5, 2, len(x))
    found = compute(narrow, labels)
    (truth * factors.double()).sum().backward()
    (found.float() * factors).sum().backward()
    assert wide.grad is not None
    assert narrow.grad is not None
    close = torch.allclose(found.double(), truth, rtol=0, atol=bound)
    return close and torch.allclose(narrow.grad.double(), wide.grad, rtol=0, atol=bound)


def padded(fill: float, softcap: float | None = None, block: int = 64) -> LogProbs:
    """A row pass whose padding to whole blocks has the value ``fill`` before the soft-cap."""

    def compute(x: Tensor, labels: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[1] % block), value=fill)
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        return z.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    return compute


@pytest.mark.parametrize("vocabulary", [63, 65, 127, 130])
def test_vocab_not_multiple_of_block(vocabulary: int) -> None:
    x, labels = draw(3, vocabulary), torch.tensor([0, vocabulary - 1, 5])
    assert agrees(ours(), x, labels)
    assert not agrees(padded(0.0), x, labels)


@pytest.mark.parametrize("offset", [-300.0, -1000.0])
def test_all_negative_logits_zero_padding(offset: float) -> None:
    x, labels = draw(3, 130) + offset, torch.tensor([0, 129, 5])
    assert agrees(ours(), x, labels, bound=2e-3)
    assert not agrees(padded(0.0), x, labels, bound=2e-3)


def test_softcap_revives_padding() -> None:
    x, labels = draw(3, 130), torch.tensor([0, 129, 5])
    assert agrees(ours(softcap=5.0), x, labels, softcap=5.0)
    assert not agrees(padded(-math.inf, softcap=5.0), x, labels, softcap=5.0)


def test_softcap_formula() -> None:
    def faulty(x: Tensor, labels: Tensor) -> Tensor:
        return (x * torch.tanh(x / 5.0)).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    x, labels = 3 * draw(3, 40), torch.tensor([0, 39, 5])
    assert agrees(ours(softcap=5.0), x, labels, softcap=5.0)
    assert not agrees(faulty, x, labels, softcap=5.0)


def test_bias_path() -> None:
    hidden, weight, bias, labels = draw(5, 4), draw(33, 4, seed=1), 3 * draw(33, seed=2), torch.arange(5)

    def error(bias: Tensor | None) -> float:
        found = K.linear_token_logprobs(hidden, weight, labels, bias=bias, impl=IMPL).logp
        truth = F.linear(hidden.double(), weight.double(), 3 * draw(33, seed=2).double()).log_softmax(-1)
        return float((found - truth.gather(1, labels[:, None])[:, 0]).abs().max())

    assert error(bias) < 1e-5
    assert error(None) > 0.1


def test_true_class_cancellation_bf16() -> None:
    tail = torch.zeros(1, 33)
    for peak in (3.0, 6.0, 9.0, 12.0):
        x = tail.clone()
        x[0, 0] = peak + math.log(32)
        narrow = x.bfloat16()
        exact = 1 - narrow.double().softmax(-1)[0, 0]
        leaf = narrow.clone().requires_grad_()
        K.token_stats(leaf, torch.tensor([0]), impl=IMPL).logp.sum().backward()
        assert leaf.grad is not None
        assert float(leaf.grad[0, 0]) == pytest.approx(float(exact), rel=0.06)
    # rounded before the subtraction, as a read-modify-write of the stored softmax is
    faulty = float(1 - narrow.float().softmax(-1).bfloat16()[0, 0])
    assert faulty != pytest.approx(float(exact), rel=0.5)


def test_per_token_upstream_gradient() -> None:
    hidden, weight, labels = draw(6, 4), draw(33, 4, seed=1), torch.arange(6)
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, 4.0])

    def gradient(compute: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        compute(leaf).backward(upstream)
        assert leaf.grad is not None
        return leaf.grad

    def plain(x: Tensor) -> Tensor:
        return F.linear(x, weight).log_softmax(-1).gather(1, labels[:, None])[:, 0]

    faulty = upstream[0] * torch.autograd.grad(plain(leaf := hidden.clone().requires_grad_()).sum(), leaf)[0]
    for save in ("logits", "recompute"):
        found = gradient(lambda x, s=save: K.linear_token_logprobs(x, weight, labels, save=s, impl=IMPL).logp)
        torch.testing.assert_close(found, gradient(plain), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, faulty, atol=1e-2)


def test_masked_rows_are_written() -> None:
    x, mask = draw(64, 40), torch.arange(64) % 2 == 0
    memory = torch.full((64,), math.nan)
    del memory  # what an allocator may hand out next
    leaf = x.clone().requires_grad_()
    stats = K.token_stats(leaf, torch.zeros(64, dtype=torch.long), entropy=True, argmax=True, mask=mask, impl=IMPL)
    (stats.logp.sum() + stats.entropy.sum()).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    for values in (stats.logp, stats.entropy, stats.lse, stats.argmax, leaf.grad):
        assert values is not None
        assert not values[~mask].any()


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compile_keeps_fp32_scalars() -> None:
    def compute(x: Tensor, temperature: float) -> Tensor:
        return K.token_stats(x, torch.zeros(len(x), dtype=torch.long), temperature=temperature).logp

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    for temperature in (0.7, 1.3):
        found = compiled(draw(3, 40), temperature)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, compute(draw(3, 40), temperature))


def test_entropy_zero_probability_value_and_gradient() -> None:
    x = draw(2, 40)
    x[:, 3:9] = -math.inf

    def finite(entropy: Callable[[Tensor], Tensor]) -> bool:
        leaf = x.clone().requires_grad_()
        value = entropy(leaf)
        value.sum().backward()
        assert leaf.grad is not None
        return bool(value.isfinite().all()) and bool(leaf.grad.isfinite().all())

    labels = torch.zeros(2, dtype=torch.long)
    assert finite(lambda x: K.token_stats(x, labels, entropy=True, impl=IMPL).entropy)  # type: ignore[arg-type,return-value]
    # cleaning the value afterwards leaves NaN gradients
    assert not finite(lambda x: -(x.softmax(-1) * x.log_softmax(-1)).nan_to_num().sum(-1))


def test_first_block_all_minus_inf() -> None:
    x = draw(2, 200)
    x[:, :70] = -math.inf
    stats = K.token_stats(x, torch.tensor([100, 199]), entropy=True, ref_logits=x.clone(), impl=IMPL)
    assert stats.entropy is not None
    assert stats.kl is not None
    torch.testing.assert_close(stats.logp, x.log_softmax(-1).gather(1, torch.tensor([[100], [199]]))[:, 0])
    assert bool(stats.entropy.isfinite().all())
    assert float(stats.kl.abs().max()) < 1e-6


def test_large_common_offset() -> None:
    x = (draw(4, 130) * 64).round() / 64  # exact in float32 at the offset too
    labels = torch.arange(4)
    near, far = (K.token_stats(x + offset, labels, entropy=True, impl=IMPL) for offset in (0.0, 65536.0))
    bound = 2e-6 if INTERPRETING else 8e-6
    torch.testing.assert_close(far.logp, near.logp, rtol=0, atol=bound)
    torch.testing.assert_close(far.entropy, near.entropy, rtol=0, atol=bound)
    # rebuilt from a rounded log-sum, 2⁻⁷ of the offset's last place is lost
    shifted = x + 65536.0
    faulty = shifted[:, 0] - (shifted.amax(1) + (shifted - shifted.amax(1, keepdim=True)).exp().sum(1).log())
    assert float((faulty - x.log_softmax(-1)[:, 0]).abs().max()) > 10 * bound
    poisoned = x.clone()
    poisoned[0, 7] = math.nan
    assert K.token_stats(poisoned, labels, impl=IMPL).logp.isnan().tolist() == [True, False, False, False]


def test_transposed_input_stride() -> None:
    x, labels = draw(40, 5), torch.arange(5)
    expected = K.token_stats(x.T.contiguous(), labels, impl=IMPL).logp
    with pytest.warns(UserWarning, match="not contiguous") if not INTERPRETING else pytest.warns():
        from align_kernels import _checks

        _checks._warn_about_copy.cache_clear()
        torch.testing.assert_close(K.token_stats(x.T, labels, impl=IMPL).logp, expected)
    # only the last stride is one
    strided = torch.stack([x.T.contiguous()] * 2, 1)[:, 1]
    assert strided.stride() == (80, 1)
    torch.testing.assert_close(K.token_stats(strided, labels, impl=IMPL).logp, expected)
    hidden, weight = draw(4, 5, seed=3).T, draw(7, 33, seed=4)[:4].T
    product = (hidden @ weight.T).log_softmax(-1)[:, 0]
    found = K.linear_token_logprobs(hidden, weight, torch.zeros(5, dtype=torch.long), impl=IMPL).logp
    torch.testing.assert_close(found, product, rtol=1e-4, atol=1e-5)


def test_autocast_dtype_mismatch() -> None:
    hidden, weight, labels = draw(5, 4), draw(33, 4, seed=1).bfloat16(), torch.arange(5)
    with pytest.raises(TypeError, match="autocast"):
        K.linear_token_logprobs(hidden, weight, labels, impl=IMPL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = K.linear_token_logprobs(hidden, weight, labels, impl=IMPL).logp
    assert found.dtype == torch.float32


@pytest.mark.skipif(INTERPRETING, reason="a launch a token; the sums are the library's in both")
def test_weight_grad_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = draw(256, 8).bfloat16(), torch.zeros(256, dtype=torch.long)

    def error(accum_dtype: torch.dtype | None) -> float:
        weight = draw(9, 8, seed=1).bfloat16().requires_grad_()
        options: dict[str, Any] = {"save": "recompute", "chunk_bytes": 1, "accum_dtype": accum_dtype}
        K.linear_token_logprobs(hidden, weight, labels, impl=IMPL, **options).logp.sum().backward()
        wide = weight.detach().double().requires_grad_()
        F.linear(hidden.double(), wide).log_softmax(-1)[:, 0].sum().backward()
        assert weight.grad is not None
        assert wide.grad is not None
        return float((weight.grad.double() - wide.grad).norm() / wide.grad.norm())

    monkeypatch.setattr(layer.gemm, "compute_dtype", lambda dtype, device: dtype)
    assert error(None) < 6e-3
    assert error(torch.bfloat16) > 2 * error(None)


def test_logits_passed_as_hidden() -> None:
    weight = draw(33, 4)
    with pytest.raises(ValueError, match="look like logits"):
        K.linear_token_logprobs(draw(5, 33), weight, torch.arange(5), impl=IMPL)


@pytest.mark.skipif(not INTERPRETING, reason="native offsets are the library's")
def test_offset_over_int32() -> None:
    code = """
import torch, align_kernels as K
stride = 2**30 + 16
memory = torch.empty(4 * stride, dtype=torch.bfloat16)  # never touched but for four rows
x = memory.as_strided((4, 40), (stride, 1))
x.copy_(torch.randn(4, 40))
found = K.token_stats(x, torch.arange(4), impl="triton").logp
torch.testing.assert_close(found, K.token_stats(x.contiguous(), torch.arange(4), impl="native").logp)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
