"""K2, log-probs from hidden states: against float64 formulas in every save mode, with shards, narrow dtypes, autocast.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernels (test_kernels_interpreter.py).
"""

import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import align_kernels as K
from align_kernels import _config, few_logits, gemm, native, ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETING else "native"
EXACT = torch.float32 if INTERPRETING else torch.float64
BOUND = 2e-5 if INTERPRETING else 1e-10
EXAMPLES = 8 if INTERPRETING else 60
UPSTREAM = (1.0, -0.5, 0.25, 0.0)  # of log-prob, entropy, KL and log-sum
PER_FUNCTION = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cross several blocks and passes even when short; no path for few logits."""
    monkeypatch.setattr(_config, "LARGEST", 32)
    monkeypatch.setattr(_config, "SMALLEST", 16)
    monkeypatch.setattr(native, "CACHE_BYTES", 512)
    monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)


@pytest.fixture(params=["native", "few logits"] if not INTERPRETING else ["triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "few logits":
        monkeypatch.setattr(few_logits, "FEW_LOGITS", 2**20)
        return "native"
    return request.param


def layer(
    rows: int = 9, vocabulary: int = 37, width: int = 5, seed: int = 1, dtype: torch.dtype = EXACT
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (rows, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def some_labels(rows: int, vocabulary: int) -> Tensor:
    return torch.arange(rows) * 5 % max(vocabulary, 1)


def compute(
    tensors: dict[str, Tensor], labels: Tensor, upstream: tuple[float, ...] = UPSTREAM, **options: Any
) -> tuple[K.TokenStats, list[Tensor | None]]:
    """Statistics, and gradients of hidden states, weight and bias for per-token upstream gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    stats = K.linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    factors = torch.linspace(-1, 2, labels.numel(), dtype=stats.logp.dtype)
    values = (stats.logp, stats.entropy, stats.kl, stats.lse)
    total = sum((x.flatten() * factors).sum() * g for x, g in zip(values, upstream, strict=True) if x is not None and g)
    total.backward()  # type: ignore[union-attr]
    return stats, [x.grad for x in leaves.values()]


def assert_same(actual: tuple[Any, list[Any]], expected: tuple[Any, list[Any]], bound: float = BOUND) -> None:
    for got, want in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            got, want = got.detach(), want.detach()
            scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
            torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=bound * scale)


def exact(
    tensors: dict[str, Tensor], labels: Tensor, upstream: tuple[float, ...] = UPSTREAM, **options: Any
) -> tuple[K.TokenStats, list[Tensor | None]]:
    if options.get("ref") is not None:
        ref = options["ref"]
        options["ref"] = ref._replace(hidden=ref.hidden.double(), weight=ref.weight.double())
    wide = {name: x.double() for name, x in tensors.items()}
    return compute(wide, labels, upstream, impl="reference", **options)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=PER_FUNCTION)
@given(data=st.data())
def test_any_shape_mode_and_option(impl: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 9), "rows")
    vocabulary = data.draw(st.sampled_from([1, 2, 31, 32, 33, 50]), "vocabulary")
    tensors = layer(rows, vocabulary)
    if data.draw(st.booleans(), "without bias"):
        del tensors["bias"]
    labels = torch.tensor(
        [data.draw(st.sampled_from([0, vocabulary - 1, -100])) for _ in range(rows)], dtype=torch.long
    )
    mask = torch.tensor([data.draw(st.booleans()) for _ in range(rows)], dtype=torch.bool)
    choice = data.draw(st.sampled_from(["all", "mask", "rows"]), "rows that count")
    other = layer(rows, vocabulary, 3, seed=2)
    options = {
        "entropy": data.draw(st.booleans(), "entropy"),
        "temperature": data.draw(st.sampled_from([1.0, 0.7]), "temperature"),
        "softcap": data.draw(st.sampled_from([None, 2.0]), "softcap"),
        "mask": None if choice == "all" else mask,
        "rows": mask.nonzero()[:, 0] if choice == "rows" else None,
        "ref": K.Reference(other["hidden"], other["weight"], None, 1.3) if data.draw(st.booleans(), "kl") else None,
        "upstream": data.draw(st.sampled_from([(1.0, 0.0, 0.0, 0.0), (1.0, 0.5, 0.2, 0.0), (0.3, 0.2, 0.1, 1.0)])),
    }
    modes = {"save": data.draw(st.sampled_from(["logits", "recompute"]), "save"), "chunk_bytes": 2 * vocabulary * 8}
    assert_same(compute(tensors, labels, impl=impl, **modes, **options), exact(tensors, labels, **options), 5 * BOUND)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_log_probs_alone_have_every_gradient(impl: str, save: str, masked: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "mask": torch.arange(9) % 3 > 0 if masked else None}
    for upstream in ((1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.5)):
        arguments = (layer(), some_labels(9, 37), upstream)
        found = compute(*arguments, impl=impl, save=save, chunk_bytes=2 * 37 * 8, **options)
        assert_same(found, exact(*arguments, **options))


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_argmax_and_leading_shape(save: str) -> None:
    tensors = layer(6)
    hidden = tensors["hidden"].view(2, 3, -1).requires_grad_()
    labels = some_labels(6, 37).view(2, 3)
    stats = K.linear_token_logprobs(hidden, tensors["weight"], labels, argmax=True, entropy=True, save=save, impl=IMPL)
    assert stats.argmax is not None
    assert stats.logp.shape == stats.argmax.shape == (2, 3)
    assert stats.argmax.tolist() == (hidden @ tensors["weight"].T).argmax(-1).tolist()


def test_a_logit_scale_is_a_temperature_and_a_soft_cap() -> None:
    tensors, labels, scale, cap = layer(), some_labels(9, 37), 0.3, 2.0
    x = cap * torch.tanh(scale * (tensors["hidden"] @ tensors["weight"].T) / cap)
    expected = x.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    options = {"temperature": 1 / scale, "softcap": cap / scale}
    actual = K.linear_token_logprobs(tensors["hidden"], tensors["weight"], labels, impl=IMPL, **options).logp
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND * 10)


def test_kl_from_itself_is_zero() -> None:
    tensors = layer()
    ref = K.Reference(tensors["hidden"], tensors["weight"])
    kl = K.linear_token_logprobs(tensors["hidden"], tensors["weight"], some_labels(9, 37), ref=ref, impl=IMPL).kl
    assert kl is not None
    assert float(kl.abs().max()) < BOUND


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_only_what_needs_a_gradient_gets_one(save: str) -> None:
    tensors = layer()
    hidden = tensors["hidden"].requires_grad_()
    K.linear_token_logprobs(hidden, tensors["weight"], some_labels(9, 37), save=save, impl=IMPL).logp.sum().backward()
    assert hidden.grad is not None
    assert tensors["weight"].grad is None
    weight = tensors["weight"].clone().requires_grad_()
    K.linear_token_logprobs(hidden.detach(), weight, some_labels(9, 37), save=save, impl=IMPL).logp.sum().backward()
    assert weight.grad is not None


@pytest.mark.skipif(INTERPRETING, reason="kept logits are overwritten")
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_backward_can_run_twice(save: str) -> None:
    tensors = layer()
    hidden = tensors["hidden"].requires_grad_()
    logp = K.linear_token_logprobs(hidden, tensors["weight"], some_labels(9, 37), save=save, impl=IMPL).logp.sum()
    first, second = (torch.autograd.grad(logp, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_repeated_runs_are_bitwise_equal_and_a_second_derivative_is_an_error(save: str) -> None:
    tensors, labels = layer(dtype=torch.float32), some_labels(9, 37)
    runs = [compute(tensors, labels, entropy=True, save=save, impl=IMPL)[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True) if a is not None)  # type: ignore[arg-type]
    below = tensors["hidden"].requires_grad_()
    # what stands below gives the gradient a graph of its own, in which nothing would be missed
    logp = K.linear_token_logprobs(below.tanh(), tensors["weight"], labels, entropy=True, save=save, impl=IMPL)
    with pytest.raises(RuntimeError, match=r"first derivatives only|no autograd formula"):
        torch.autograd.grad((logp.logp + logp.entropy).sum(), below, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow_products", [True, False])
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_narrow_dtypes_are_no_worse_than_naive(
    dtype: torch.dtype, narrow_products: bool, save: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_bfloat16_pays", lambda: narrow_products)
    monkeypatch.setattr(gemm, "SLICE_BYTES", 4096)
    tensors, labels = layer(64, 200, 32, dtype=dtype), some_labels(64, 200)
    del tensors["bias"]
    upstream = (1.0, 0.0, 0.0, 0.0)
    truth = exact(tensors, labels, upstream=upstream)
    ours = compute(tensors, labels, upstream, save=save, chunk_bytes=200 * 2 * 40, impl=IMPL)
    assert ours[0].logp.dtype == torch.float32
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    naive = F.linear(leaves["hidden"], leaves["weight"]).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (naive * torch.linspace(-1, 2, 64)).sum().backward()

    def error(actual: Tensor | None, expected: Tensor | None) -> float:
        assert actual is not None
        assert expected is not None
        return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())

    assert error(ours[0].logp, truth[0].logp) <= 1.1 * error(naive, truth[0].logp)
    limit = 6e-3 if dtype == torch.bfloat16 else 1e-3
    # a GPU sums the bf16 products of chunks unrounded; here, in its stead, each is rounded
    times_naive = 1.25 if INTERPRETING else 1.1
    for got, simple, want in zip(ours[1], (x.grad for x in leaves.values()), truth[1], strict=True):
        assert got is not None
        assert got.dtype == dtype
        assert error(got, want) <= max(times_naive * error(simple, want), limit)


def test_autocast_computes_in_its_dtype_and_gradients_are_the_parameters() -> None:
    tensors, labels = layer(dtype=torch.float32), some_labels(9, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats, gradients = compute(tensors, labels, entropy=True, impl=IMPL)
    narrow = {name: x.bfloat16() for name, x in tensors.items()}
    expected, _ = compute(narrow, labels, entropy=True, impl=IMPL)
    assert torch.equal(stats.logp, expected.logp)
    assert all(x is not None and x.dtype == torch.float32 for x in gradients)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.skipif(INTERPRETING, reason="memory is native's own business here")
@pytest.mark.parametrize("with_more", [False, True])
def test_recomputing_never_holds_more_than_a_chunk_and_masked_rows_meet_no_product(with_more: bool) -> None:
    rows, vocabulary, chunk = 256, 512, 32
    tensors = layer(rows, vocabulary, 16, dtype=torch.float32)
    other = layer(rows, vocabulary, 16, 3, dtype=torch.float32)
    ref = K.Reference(other["hidden"], other["weight"]) if with_more else None
    options: dict[str, Any] = {
        "entropy": with_more,
        "argmax": with_more,
        "ref": ref,
        "chunk_bytes": chunk * vocabulary * 4,
    }
    with Largest() as largest:
        compute(tensors, some_labels(rows, vocabulary), save="recompute", impl=IMPL, **options)
    assert chunk * vocabulary <= largest.elements < rows * vocabulary / 4
    few = torch.arange(rows) < 8
    with Largest() as largest:
        compute(tensors, some_labels(rows, vocabulary), mask=few, save="logits", impl=IMPL)
    assert largest.elements <= max(8 * vocabulary, vocabulary * 16)


@pytest.mark.skipif(INTERPRETING, reason="float64")
@pytest.mark.parametrize("save", [True, False])
def test_gradcheck_and_opcheck(save: bool) -> None:
    labels, rows = torch.tensor([0, 6, -100]), torch.tensor([0, 2, 3])
    leaves = [x.requires_grad_() for x in layer(4, 7, 3).values()]
    other = layer(4, 7, 2, 5)
    settings = (0.7, 1.5, True, True, 1.3, None, save, 2, None, False, "native")
    inputs = (labels, rows, other["hidden"], other["weight"], None, *settings)
    for function in (ops.linear_stats_op, lambda *x: ops._LinearStats.apply(*x, None)):
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, *inputs)[:4], tuple(leaves))
    torch.library.opcheck(ops.linear_stats_op, (*leaves, *inputs))


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compiles_without_graph_breaks() -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return K.linear_token_logprobs(hidden, weight, labels, entropy=True).logp.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        tensors, labels = layer(rows), some_labels(rows, 37)
        pairs = [[tensors[name].clone().requires_grad_() for name in ("hidden", "weight")] for _ in range(2)]
        compiled(*pairs[0], labels).backward()
        loss(*pairs[1], labels).backward()
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------------- vocabulary shards
def _rank(rank: int, folder: str, impl: str) -> None:
    try:
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        torch.set_num_threads(1)
        tensors = layer(dtype=torch.float32)
        labels = torch.tensor([0, 36, 20, 19, -100, 5, 30, 21, 1])
        part = slice(0, 20) if rank == 0 else slice(20, 37)
        own = {"hidden": tensors["hidden"], "weight": tensors["weight"][part], "bias": tensors["bias"][part]}
        options: dict[str, Any] = {"entropy": True, "temperature": 0.7, "mask": torch.arange(9) != 3}
        group = dist.group.WORLD
        for save in ("logits", "recompute"):
            shard = {"process_group": group, "vocab_start": part.start, "save": save, "impl": impl}
            upstream = (1.0, -0.5, 0.0, 0.3)
            stats, gradients = compute(own, labels, upstream, **options, **shard)
            whole, expected = exact(tensors, labels, upstream=upstream, **options)
            expected = [expected[0], *(x[part] for x in expected[1:] if x is not None)]
            assert_same((stats, gradients), (whole, expected), 1e-5)
        local = F.linear(own["hidden"], own["weight"], own["bias"])
        inside = (labels >= part.start) & (labels < part.stop)
        stats = K.token_stats(local, torch.where(inside, labels - part.start, -100), entropy=True, temperature=0.7)
        merged = K.merge_vocab_stats(stats._replace(logp=torch.where(inside, stats.logp, torch.inf)), group)
        whole, _ = exact(tensors, labels, entropy=True, temperature=0.7)
        torch.testing.assert_close(merged.logp.double(), whole.logp.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(merged.entropy, whole.entropy.detach().float(), rtol=0, atol=1e-5)  # type: ignore[union-attr]
        dist.destroy_process_group()
        Path(folder, f"done{rank}").touch()
    except BaseException:
        Path(folder, f"failed{rank}").write_text(traceback.format_exc())
    os._exit(0)  # Gloo's destructor, called by what still refers to the group, now and then waits for ever


def test_two_vocabulary_shards_are_one_vocabulary(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path), IMPL)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    problems = [path.read_text() for path in tmp_path.glob("failed*")]
    assert not problems, problems[0]
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
