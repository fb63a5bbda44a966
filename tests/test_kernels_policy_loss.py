"""K3, the policy loss from hidden states: golden vectors, the float64 reference, the spine's loss, and what it spares.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernels (test_kernels_interpreter.py).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import align_kernels as K
from align_kernels import few_logits, gemm, native, policy_terms
from align_kernels.policy_ops import policy_loss_op
from lightning_align.losses.policy import ppo_policy_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETING else "native"
DTYPE = torch.float32 if INTERPRETING else torch.float64
BOUND = 2e-5 if INTERPRETING else 1e-11
B, T, H, V = 3, 4, 5, 37


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CACHE_BYTES", 512)
    monkeypatch.setattr(few_logits, "FEW_LOGITS", 0)
    monkeypatch.setattr(few_logits, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(few_logits, "LEAST_BLOCK_ROWS", 2)


@pytest.fixture(params=["triton"] if INTERPRETING else ["native", "few logits"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "few logits":
        monkeypatch.setattr(few_logits, "FEW_LOGITS", 2**20)
        return "native"
    return request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYER = {"hidden": draw(B, T, H), "weight": draw(V, H, seed=1), "bias": draw(V, seed=2)}
LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3)).index_put(
    (torch.tensor(0), torch.tensor(1)), torch.tensor(-100)
)
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]).bool()
OLD, ADVANTAGES = -3 + 0.3 * draw(B, T, seed=4), draw(B, T, seed=5)
REF, ROLLOUT = OLD + 0.1 * draw(B, T, seed=6), OLD + 0.1 * draw(B, T, seed=7)
IDS = torch.arange(B)[:, None].expand(B, T)
CASES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "cispo": {"loss": "cispo"},
    "dual clip": {"clip_ratio_c": 1.5, "clip_low": 0.1, "clip_high": 0.15},
    "k3": {"ref_logp": OLD + 0.01, "kl_coef": 0.3, "loss": "grpo"},
    "k1 and entropy": {"ref_logp": REF, "kl_coef": 0.3, "kl_estimator": "k1", "entropy_coef": 0.1},
    "k2": {"ref_logp": REF, "kl_coef": 0.3, "kl_estimator": "k2", "normalizer": torch.tensor(11.0)},
    "sequence ratio": {"ratio": "sequence", "seq_ids": IDS, "clip_low": 3.0, "clip_high": 3.0},
    "sequence weights": {
        "ratio": "sequence",
        "seq_ids": IDS,
        "normalizer": torch.tensor([0.5, 1.0, 2.0]),
        "entropy_coef": 0.2,
    },
    "truncated importance": {"tis_cap": 1.05, "rollout_logp": ROLLOUT},
    "truncated importance of cispo": {"loss": "cispo", "tis_cap": 1.05, "rollout_logp": ROLLOUT},
    "ratios beyond the clamp": {"old": OLD - 25.0, "clip_ratio_c": 1e10},
    "temperature and soft-cap": {"normalizer": 7.0, "temperature": 0.7, "softcap": 4.0, "chunk_bytes": 2 * V * 8},
}


def run(
    impl: str,
    mask: Tensor = MASK,
    advantages: Tensor = ADVANTAGES,
    dtype: torch.dtype = DTYPE,
    old: Tensor = OLD,
    **options: Any,
) -> list[Tensor]:
    dtype = torch.float64 if impl == "reference" else dtype
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in LAYER.items()}
    loss = K.linear_policy_loss(
        leaves["hidden"], leaves["weight"], LABELS, old, advantages, mask, bias=leaves["bias"], impl=impl, **options
    )
    (3 * loss.loss).backward()
    return [*(x.detach() for x in loss), *(x.grad for x in leaves.values() if x.grad is not None)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=BOUND * scale)


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_the_reference_s(impl: str, case: str) -> None:
    assert_same(run(impl, **CASES[case]), run("reference", **CASES[case]))
    rows = MASK.flatten().nonzero()[:, 0]
    assert_same(run(impl, rows=rows, **CASES[case]), run("reference", **CASES[case]))


def identity_layer(logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels whose log-probs are the given ones: a vocabulary of two."""
    hidden = torch.stack([logp, torch.log1p(-logp.exp())], -1)
    return hidden, torch.eye(2, dtype=logp.dtype), torch.zeros(logp.shape, dtype=torch.long)


def test_golden_ppo_loss() -> None:
    inputs, outputs = GOLDEN["ppo_loss"]["inputs"], GOLDEN["ppo_loss"]["outputs"]
    logp, old, advantages = (torch.tensor(inputs[name], dtype=DTYPE) for name in ("logp", "old_logp", "advantages"))
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    layer = identity_layer(logp)

    def loss(**options: Any) -> K.PolicyLoss:
        return K.linear_policy_loss(*layer, old, advantages, mask, impl=IMPL, **options)

    plain = loss()
    close = {"rel": 1e-5 if INTERPRETING else 1e-10}
    assert float(plain.loss) == pytest.approx(outputs["loss"], **close)
    assert float(plain.approx_kl) == pytest.approx(outputs["approx_kl"], **close)
    clipped = int(plain.clip_low_count + plain.clip_high_count)
    assert clipped / int(mask.sum()) == pytest.approx(outputs["clipfrac"])
    assert float(loss(clip_ratio_c=inputs["dual_clip"]).loss) == pytest.approx(outputs["loss_dual"], **close)
    assert float(loss(clip_high=inputs["clip_high"]).loss) == pytest.approx(outputs["loss_clip_higher"], **close)


def test_golden_group_losses() -> None:
    inputs, outputs = GOLDEN["group_losses"]["inputs"], GOLDEN["group_losses"]["outputs"]
    logp, old, ref = (torch.tensor(inputs[name], dtype=DTYPE) for name in ("logp", "old_logp", "ref_logp"))
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    lengths = mask.sum(1)
    layer, by_sequence = identity_layer(logp), 1 / (len(mask) * lengths).to(DTYPE)
    advantages = torch.tensor(inputs["advantages"], dtype=DTYPE)[:, None].expand_as(logp)
    ids = torch.arange(len(mask))[:, None].expand_as(mask)
    group = {"seq_ids": ids, "normalizer": by_sequence}
    options: dict[str, dict[str, Any]] = {
        "grpo": {"loss": "grpo", "ref_logp": ref, "kl_coef": inputs["beta"], **group},
        "dr_grpo": {"loss": "dr_grpo", "normalizer": float(len(mask) * inputs["max_completion_length"])},
        "dapo": {"loss": "dapo", "clip_high": inputs["dapo_high"]},
        "cispo": {"loss": "cispo", "clip_high": inputs["cispo_high"]},
        "gspo": {"ratio": "sequence", "clip_low": inputs["gspo_low"], "clip_high": inputs["gspo_high"], **group},
    }
    for name, chosen in options.items():
        found = K.linear_policy_loss(*layer, old, advantages, mask, impl=IMPL, **chosen).loss
        assert float(found) == pytest.approx(outputs[name], rel=1e-5 if INTERPRETING else 1e-10, abs=1e-7), name


def test_it_is_the_spine_s_ppo_loss() -> None:
    found = run(IMPL, clip_low=0.1, clip_high=0.3, clip_ratio_c=1.6)
    leaves = {name: x.clone().requires_grad_() for name, x in LAYER.items()}
    log_p = (leaves["hidden"] @ leaves["weight"].T + leaves["bias"]).log_softmax(-1)
    counted = MASK & (LABELS >= 0)
    logp = log_p.gather(-1, LABELS.clamp(min=0)[..., None])[..., 0]
    loss, _ = ppo_policy_loss(logp, OLD, ADVANTAGES, counted, cliprange=0.1, cliprange_high=0.3, dual_clip=1.6)
    (3 * loss).backward()
    assert_same([found[0], *found[7:]], [loss.detach(), *(x.grad for x in leaves.values() if x.grad is not None)])


def test_no_tokens_give_no_loss_and_no_gradient() -> None:
    for ratio in ("token", "sequence"):
        loss, *_, approx_kl, hidden, weight, bias = run(IMPL, mask=torch.zeros_like(MASK), ratio=ratio, seq_ids=IDS)
        assert float(loss) == float(approx_kl) == 0.0
        assert not any(x.any() for x in (hidden, weight, bias))


@pytest.mark.skipif(INTERPRETING, reason="on a GPU, whether a row counts is not known without waiting")
def test_rows_without_a_derivative_meet_only_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = gemm.times_weight

    def counting(grad: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(grad))
        return plain(grad, weight)

    monkeypatch.setattr(gemm, "times_weight", counting)
    advantages = ADVANTAGES.clone()
    advantages[0] = 0.0
    found = run(IMPL, advantages=advantages, clip_low=9.0, clip_high=9.0)
    assert sum(seen) == 4  # of the seven tokens that count, three have advantage 0
    assert_same(found, run("reference", advantages=advantages, clip_low=9.0, clip_high=9.0))
    seen.clear()
    run(IMPL, advantages=torch.zeros_like(advantages))
    assert not seen


def test_a_nan_is_no_row_without_a_derivative(impl: str) -> None:
    advantages = torch.zeros_like(ADVANTAGES)
    advantages[2, 1] = torch.nan
    hidden, *_ = run(impl, advantages=advantages)[7:]
    assert hidden.isnan().any(-1).nonzero().tolist() == [[2, 1]]


def test_without_gradients_nothing_is_computed_for_them() -> None:
    leaf = LAYER["weight"].to(DTYPE, copy=True).requires_grad_()
    with torch.no_grad():
        loss = K.linear_policy_loss(LAYER["hidden"].to(DTYPE), leaf, LABELS, OLD, ADVANTAGES, MASK, impl=IMPL).loss
    assert loss.grad_fn is None
    truth = K.linear_policy_loss(LAYER["hidden"], LAYER["weight"], LABELS, OLD, ADVANTAGES, MASK, impl="reference")
    assert float(loss) == pytest.approx(float(truth.loss), rel=1e-4)


@pytest.mark.parametrize("estimator", policy_terms.KL_ESTIMATORS)
def test_kl_terms_keep_their_precision_near_zero(estimator: str) -> None:
    d = torch.tensor([0.0, 1e-6, -1e-5, 9e-4, -1.1e-3, 0.1, -2.0])
    wide = d.double().requires_grad_()
    truth = {"k1": wide, "k2": wide**2 / 2, "k3": torch.expm1(-wide) + wide}[estimator]
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    value, derivative = policy_terms.kl_terms(d, estimator)
    torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(derivative.double(), slope, rtol=1e-5, atol=1e-13)


def test_opcheck() -> None:
    tensors = [x.to(DTYPE, copy=True) for x in (LAYER["hidden"].flatten(0, 1), LAYER["weight"], LAYER["bias"])]
    columns = [x.flatten().to(DTYPE) for x in (OLD, ADVANTAGES, torch.ones(B, T))]
    inputs = (LABELS.flatten(), None, *columns, None, None, None, B * T, "ppo", 0.2, 0.2, None, 0.0, "k3", 0.1, None)
    settings = (1.0, None, 5, None, [True, True, True], False, IMPL)
    torch.library.opcheck(policy_loss_op, (*(x.requires_grad_() for x in tensors), *inputs, *settings))


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is no compiler's business")
def test_compiles_without_graph_breaks() -> None:
    rows = MASK.flatten().nonzero()[:, 0]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return K.linear_policy_loss(hidden, weight, LABELS, OLD, ADVANTAGES, MASK, rows=rows).loss

    pairs = [[LAYER[name].clone().requires_grad_() for name in ("hidden", "weight")] for _ in range(2)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*pairs[0]).backward()
    loss(*pairs[1]).backward()
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
