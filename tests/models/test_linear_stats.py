"""Row statistics: golden vectors, gradients against naive autograd, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from align_kernels import _plan, few_logits
from lightning_align.models.linear_stats import Head, RowStats, linear_row_stats, logits_row_stats

Golden = Callable[[str], tuple[dict[str, Any], dict[str, Any]]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def both_ways(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None = None, temperature: float = 1.0
) -> list[RowStats]:
    """From logits, and from hidden states whose head is the identity, in chunks of two rows."""
    identity = Head(torch.eye(logits.shape[1], dtype=logits.dtype))
    reference = None if ref_logits is None else (ref_logits, identity)
    wanted = {"temperature": temperature, "entropy": True, "correct": True}
    return [
        logits_row_stats(logits, labels, ref_logits=ref_logits, **wanted),
        linear_row_stats(logits, identity, labels, reference=reference, **wanted),
    ]


@pytest.fixture(autouse=True, params=["few logits", "kept", "recomputed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through the operations, several chunks even for a handful of rows."""
    if request.param != "few logits":
        monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)
        monkeypatch.setattr(_plan, "LEAST_CHUNK_ROWS", 2)
        monkeypatch.setitem(_plan.CHUNK_BYTES, "cpu", 2 * 7 * 8)
    if request.param == "recomputed":
        monkeypatch.setattr(_plan, "_memory_to_keep", lambda device: 0)


def close(actual: Tensor | None, expected: list[float], dtype: torch.dtype) -> None:
    assert actual is not None
    assert actual.dtype == dtype
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_1_golden_log_probs_and_entropy(golden_case: Golden, dtype: torch.dtype) -> None:
    inputs, outputs = golden_case("token_logp")
    logits, labels = torch.tensor(inputs["logits"], dtype=dtype), torch.tensor(inputs["labels"])
    for temperature, suffix in ((1.0, ""), (inputs["temperature"], "_tempered")):
        for stats in both_ways(logits, labels, temperature=temperature):
            close(stats.logp, outputs["logp" + suffix], dtype)
            close(stats.entropy, outputs["entropy" + suffix], dtype)
            assert stats.correct is not None
            assert stats.correct.tolist() == (logits.argmax(1) == labels).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_1_a_common_offset_changes_nothing(golden_case: Golden, dtype: torch.dtype) -> None:
    inputs, outputs = golden_case("token_logp_offset")
    # float32 holds −300.926 to 3e-5 only; the offset itself is what is tested there
    plain = torch.tensor(golden_case("token_logp")[0]["logits"], dtype=dtype)
    logits = torch.tensor(inputs["logits"], dtype=dtype) if dtype == torch.float64 else plain - 256.0 + 0.0
    labels = torch.tensor(inputs["labels"])
    for stats in both_ways(logits, labels):
        if dtype == torch.float64:
            close(stats.logp, outputs["logp"], dtype)
            close(stats.entropy, outputs["entropy"], dtype)
        else:
            expected = logits_row_stats(logits.double(), labels, entropy=True)
            close(stats.logp, expected.logp.tolist(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_conv_6_golden_exact_kl(golden_case: Golden, dtype: torch.dtype) -> None:
    inputs, outputs = golden_case("kl")
    logits = torch.tensor(inputs["logits"], dtype=dtype)
    ref_logits = torch.tensor(inputs["ref_logits"], dtype=dtype)
    labels = torch.tensor(inputs["labels"])
    for stats in both_ways(logits, labels, ref_logits):
        close(stats.kl, outputs["exact"], dtype)
    for stats in both_ways(logits, labels, logits):
        assert stats.kl is not None
        assert not stats.kl.any()
    for stats in both_ways(logits, labels, logits + 3.0):
        assert stats.kl is not None
        assert stats.kl.abs().max() < 1e-6


def leaves(requires_grad: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)

    return {"hidden": draw(9, 5), "weight": draw(7, 5), "bias": draw(7)}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_equal_naive_autograd(softcap: float | None, with_kl: bool, with_entropy: bool) -> None:
    labels = torch.arange(9) % 7
    factors = torch.linspace(-1, 2, 9, dtype=torch.float64)
    other = leaves(requires_grad=False)
    reference = (other["hidden"].flip(0), Head(other["weight"].flip(0), other["bias"]))

    def loss(stats: RowStats) -> Tensor:
        total = (stats.logp * factors).sum()
        if stats.entropy is not None:
            total = total + (stats.entropy * factors.flip(0)).sum()
        if stats.kl is not None:
            total = total + (stats.kl * factors.square()).sum()
        return total

    wanted = {"temperature": 0.7, "entropy": with_entropy}
    ours, naive = leaves(), leaves()
    head = Head(ours["weight"], ours["bias"], softcap=softcap, scale=0.6)
    stats = linear_row_stats(ours["hidden"], head, labels, reference=reference if with_kl else None, **wanted)
    loss(stats).backward()
    logits = 0.6 * (naive["hidden"] @ naive["weight"].T + naive["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ref_logits = reference[1].logits(reference[0]) if with_kl else None
    loss(logits_row_stats(logits, labels, ref_logits=ref_logits, **wanted)).backward()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, naive[name].grad, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    labels = torch.arange(9) % 7

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        stats = linear_row_stats(hidden, Head(weight, bias, softcap=2.0), labels, temperature=1.3, entropy=True)
        assert stats.entropy is not None
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(function, tuple(leaves().values()))


def test_only_what_needs_a_gradient_gets_one() -> None:
    tensors = leaves()
    weight = tensors["weight"].detach()
    linear_row_stats(tensors["hidden"], Head(weight), torch.zeros(9, dtype=torch.long)).logp.sum().backward()
    assert tensors["hidden"].grad is not None
    assert weight.grad is None


def test_gradient_of_a_near_certain_token_keeps_its_precision() -> None:
    logits = torch.tensor([[10.0, 0.0, 0.0]]).requires_grad_()
    stats = linear_row_stats(logits, Head(torch.eye(3)), torch.tensor([0]))
    stats.logp.sum().backward()
    exact = 2 / (2 + torch.tensor(10.0, dtype=torch.float64).exp())
    assert logits.grad is not None
    assert float(logits.grad[0, 0] / exact) == pytest.approx(1, abs=2e-3)  # 1 − p = 9e-5; float32 has 7 digits


def test_impossible_symbols_contribute_nothing() -> None:
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    hidden = torch.zeros(2, 4, requires_grad=True)
    head = Head(torch.zeros(3, 4), bias)
    stats = linear_row_stats(hidden, head, torch.tensor([0, 1]), entropy=True, reference=(torch.zeros(2, 4), head))
    assert stats.entropy is not None
    assert stats.kl is not None
    torch.testing.assert_close(stats.entropy, torch.full((2,), 2.0).log())
    assert not stats.kl.any()
    (stats.logp + stats.entropy + stats.kl).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_conv_9_no_rows_give_empty_results_and_zero_gradients() -> None:
    tensors = leaves()
    head = Head(tensors["weight"], tensors["bias"])
    stats = linear_row_stats(tensors["hidden"][:0], head, torch.zeros(0, dtype=torch.long), entropy=True)
    (stats.logp.sum() + stats.entropy.sum()).backward()  # type: ignore[union-attr]
    for tensor in tensors.values():
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_give_float32_statistics(dtype: torch.dtype) -> None:
    wide = {name: tensor.float() for name, tensor in leaves(requires_grad=False).items()}
    narrow = {name: tensor.to(dtype).requires_grad_() for name, tensor in wide.items()}
    labels = torch.arange(9) % 7
    stats = linear_row_stats(narrow["hidden"], Head(narrow["weight"], narrow["bias"]), labels)
    exact = linear_row_stats(wide["hidden"], Head(wide["weight"], wide["bias"]), labels)
    assert stats.logp.dtype == torch.float32
    torch.testing.assert_close(stats.logp, exact.logp, rtol=2e-2, atol=2e-2)
    stats.logp.sum().backward()
    assert narrow["weight"].grad is not None
    assert narrow["weight"].grad.dtype == dtype


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters() -> None:
    tensors = {name: tensor.detach().float().requires_grad_() for name, tensor in leaves().items()}
    labels = torch.arange(9) % 7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_row_stats(tensors["hidden"], Head(tensors["weight"], tensors["bias"]), labels)
    assert stats.logp.dtype == torch.float32
    stats.logp.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors.values())
