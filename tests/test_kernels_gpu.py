"""Tier 4: the compiled kernels on a GPU, at full size. One command: ``pytest -m gpu``; skipped without a GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import align_kernels as K

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

DEVICE = "cuda"
GIB = 2**30


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def labels_below(vocabulary: int, count: int) -> Tensor:
    return torch.randint(vocabulary, (count,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))


# Each takes an implementation and a number of rows, and returns outputs and gradients.
def run_token_stats(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    logits, reference = (normal(rows, 5003, seed=s, dtype=dtype) for s in (0, 1))
    if impl == "reference":
        logits, reference = logits.double(), reference.double()
    logits.requires_grad_()
    stats = K.token_stats(logits, labels_below(5003, rows), ref_logits=reference, entropy=True, softcap=30.0, impl=impl)
    assert stats.entropy is not None
    assert stats.kl is not None
    (stats.logp + 0.3 * stats.entropy + 0.2 * stats.kl).sum().backward()
    assert logits.grad is not None
    return [stats.logp, stats.entropy, stats.kl, logits.grad]


def head(impl: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = normal(rows, 64, dtype=dtype), (normal(5003, 64, seed=1) / 8).to(dtype)
    if impl == "reference":
        hidden, weight = hidden.double(), weight.double()
    return hidden.requires_grad_(), weight.requires_grad_(), labels_below(5003, rows)


def run_linear_token_logprobs(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, labels = head(impl, rows, dtype)
    chosen = torch.arange(0, rows, 2, device=DEVICE)  # half the tokens count; known without a look at the device
    stats = K.linear_token_logprobs(hidden, weight, labels, entropy=True, rows=chosen, impl=impl)
    assert stats.entropy is not None
    (stats.logp + 0.3 * stats.entropy).sum().backward()
    return [stats.logp, stats.entropy, hidden.grad, weight.grad]  # type: ignore[list-item]


def run_linear_policy_loss(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, labels = head(impl, rows, dtype)
    old, advantages = -8.5 + normal(rows, seed=4) / 10, normal(rows, seed=5)
    chosen = torch.arange(0, rows, 2, device=DEVICE)
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE).index_fill(0, chosen, True)
    found = K.linear_policy_loss(hidden, weight, labels, old, advantages, mask, rows=chosen, impl=impl)
    found.loss.backward()
    return [found.loss, found.logp, hidden.grad, weight.grad]  # type: ignore[list-item]


def run_preference_logps(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, labels = head(impl, rows, dtype)
    ids, chosen = torch.arange(rows, device=DEVICE) // 8, torch.arange(0, rows, 2, device=DEVICE)
    sums, _ = K.preference_logps(hidden, weight, labels, ids, (rows + 7) // 8, rows=chosen, impl=impl)
    (sums * normal(len(sums), seed=6)).sum().backward()
    return [sums, hidden.grad, weight.grad]  # type: ignore[list-item]


def rollout(rows: int, length: int = 1300) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(rows, length, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(9)) < 0.8
    return normal(rows, length), normal(rows, length, seed=1), mask


def run_gae(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    rewards, values, mask = rollout(rows)
    values, dones = values.to(dtype), normal(*mask.shape, seed=2) > 2
    bootstrap, cu = normal(rows, seed=3), torch.arange(0, mask.numel() + 1, 1300, device=DEVICE)
    trace = K.VTrace(normal(*mask.shape, seed=4) / 3, 0.9, 1.1)
    options: dict[str, Any] = {"gamma": 0.99, "impl": impl}
    flat = rewards.flatten(), values.flatten()
    return [
        *K.gae(rewards, values, mask=mask, dones=dones, bootstrap=bootstrap, **options),
        *K.gae(rewards, values, mask=mask, bootstrap=bootstrap, mask_mode="stop", **options),
        *K.gae(rewards, values, mask=mask, mask_mode="dense", vtrace=trace, **options),
        *K.gae(*flat, mask=mask.flatten(), bootstrap=bootstrap, cu_seqlens=cu, **options),
    ]


def run_shaped_advantages(impl: str, rows: int, dtype: torch.dtype) -> list[Tensor]:
    logp, values, mask = rollout(rows)
    reference, scores = logp + normal(*logp.shape, seed=5) / 3, normal(rows, seed=6)
    inputs = logp, reference, values.to(dtype), scores, mask
    found: list[Tensor] = []
    for estimator, shift_mean in (("k1", True), ("k3", False)):
        options = {"kl_coef": 0.1, "score_clip": 2.0, "shift_mean": shift_mean, "kl_estimator": estimator}
        found += K.shaped_advantages(*inputs, **options, impl=impl)  # type: ignore[arg-type]
    return found


RUNS: dict[str, Callable[[str, int, torch.dtype], list[Tensor]]] = {
    "token_stats": run_token_stats,
    "linear_token_logprobs": run_linear_token_logprobs,
    "linear_policy_loss": run_linear_policy_loss,
    "preference_logps": run_preference_logps,
    "gae": run_gae,
    "shaped_advantages": run_shaped_advantages,
}
every_operation = pytest.mark.parametrize("op", [op for op in RUNS if op in K.__all__])


# ------------------------------------------------------------------ correct
@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_run_here_and_equal_the_reference(op: str, dtype: torch.dtype) -> None:
    assert K.available_impls(op, DEVICE)[0] == "triton", K.why_not(op, "triton", DEVICE)
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    for x, y in zip(RUNS[op]("triton", 96, dtype), RUNS[op]("reference", 96, dtype), strict=True):
        wanted = y.double()
        assert (x.double() - wanted).norm() <= bound * (1e-6 + wanted.norm())
        assert (x.double() - 1.1 * wanted - 0.01).norm() > bound * wanted.norm()  # a wrong result would be seen


@every_operation
def test_bitwise_the_same_every_time(op: str) -> None:
    first, second = (RUNS[op]("triton", 96, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ------------------------------------------------------------------ large
def test_more_logits_than_an_int32_counts() -> None:
    """N·V > 2³¹: the last rows are those of a small problem (offsets that wrap read elsewhere, or crash)."""
    rows, vocabulary = 17_000, 128_256
    assert rows * vocabulary > 2**31
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-8:] = normal(8, vocabulary, dtype=torch.bfloat16)
    logits.requires_grad_()
    labels = labels_below(vocabulary, rows)
    stats = K.token_stats(logits, labels, entropy=True, impl="triton")
    stats.logp.sum().backward()
    tail = logits.detach()[-8:].double().requires_grad_()
    wanted = K.token_stats(tail, labels[-8:], entropy=True, impl="reference")
    wanted.logp.sum().backward()
    torch.testing.assert_close(stats.logp[-8:].double(), wanted.logp, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.grad[-8:].double(), tail.grad, rtol=1e-2, atol=1e-6)  # type: ignore[index]


def test_more_than_65535_rows() -> None:
    labels = labels_below(64, 70_000)
    logits = normal(70_000, 64)
    actual, wanted = (K.token_stats(logits, labels, impl=impl).logp for impl in ("triton", "native"))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    rewards, values, mask = rollout(70_000, 32)
    for x, y in zip(*(K.gae(rewards, values, mask=mask, impl=impl) for impl in ("triton", "native")), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_a_head_keeps_no_logits() -> None:
    """K2 and K3 at Llama's vocabulary: 2 GiB of bf16 logits never exist (KERNELS.md section 4: 0.6 GiB of extra)."""
    rows, vocabulary = 8192, 128_256
    hidden = normal(rows, 512, dtype=torch.bfloat16)
    weight = (normal(vocabulary, 512, seed=1) / 23).to(torch.bfloat16).requires_grad_()
    labels, chosen = labels_below(vocabulary, rows), torch.arange(rows, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    K.linear_token_logprobs(hidden, weight, labels, rows=chosen, save="recompute", impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 0.6 * GIB


# ------------------------------------------------------------------ never in the way
@every_operation
def test_no_operation_waits_for_the_device(op: str) -> None:
    RUNS[op]("triton", 96, torch.bfloat16)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        RUNS[op]("triton", 96, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_with_inductor() -> None:
    rewards, values, mask = rollout(16)
    logits, labels = normal(64, 1000).requires_grad_(), labels_below(1000, 64)

    def both(logits: Tensor, rewards: Tensor) -> Tensor:
        advantages, _ = K.gae(rewards * 2, values, mask=mask, impl="triton")
        return K.token_stats(logits * 2, labels, impl="triton").logp.sum() + advantages.sum()

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(compiled(logits, rewards), both(logits, rewards))


@pytest.mark.parametrize("op", ["gae", "shaped_advantages"])
def test_scans_can_be_captured_in_a_graph(op: str) -> None:
    rewards, values, mask = rollout(32)
    scores = normal(32, seed=6)

    def work() -> list[Tensor]:
        if op == "gae":
            return list(K.gae(rewards, values, mask=mask, impl="triton"))
        return list(K.shaped_advantages(rewards, values, values, scores, mask, kl_coef=0.1, impl="triton"))

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    selected = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_bitwise_the_same_every_time"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *selected]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
