"""Arguments that are refused, before anything is launched; which implementation runs; what importing costs."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import align_kernels as K
from align_kernels import _dispatch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
X, H, W = torch.zeros(4, 7), torch.zeros(4, 5), torch.zeros(7, 5)
L, IDS, ONES = torch.arange(4), torch.zeros(4, dtype=torch.long), torch.ones(4)
ALL = torch.ones(4, dtype=torch.bool)
META = torch.zeros(4, 7, device="meta")


def stats(x: Tensor = X, labels: Tensor = L, **options: Any) -> Any:
    return K.token_stats(x, labels, **options)


def linear(hidden: Tensor = H, weight: Tensor = W, labels: Tensor = L, **options: Any) -> Any:
    return K.linear_token_logprobs(hidden, weight, labels, **options)


def policy(mask: Tensor = ALL, old: Tensor = ONES, **options: Any) -> Any:
    return K.linear_policy_loss(H, W, L, old, ONES, mask, **options)


def preference(**options: Any) -> Any:
    return K.preference_logps(H, W, L, IDS, 1, **options)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "labels of another shape": (ValueError, r"logits is \[4, 7\], but labels is \[3\]", lambda: stats(labels=L[:3])),
    "labels that are floats": (TypeError, "labels is torch.float32", lambda: stats(labels=ONES)),
    "logits that are integers": (TypeError, "logits is torch.int64", lambda: stats(X.long())),
    "label above": (ValueError, "7 at row 0 is outside the vocabulary of 7", lambda: stats(labels=L + 7)),
    "label just above": (ValueError, "7 at row 0", lambda: linear(labels=torch.full((4,), 7))),
    "label below": (ValueError, "-1 at row 0", lambda: stats(labels=L - 1)),
    "label above, by the reference": (
        ValueError,
        "outside the vocabulary",
        lambda: stats(labels=L + 7, impl="reference"),
    ),
    "reference logits of another shape": (ValueError, "ref_logits is", lambda: stats(ref_logits=X[:, :3])),
    "reference that wants a gradient": (
        ValueError,
        "ref_logits requires a gradient",
        lambda: stats(ref_logits=X.clone().requires_grad_()),
    ),
    "mask of another shape": (ValueError, "mask is", lambda: stats(mask=torch.ones(3, dtype=torch.bool))),
    "mask of floats": (TypeError, "mask is torch.float32", lambda: stats(mask=ONES)),
    "temperature of zero": (ValueError, "temperature is 0.0", lambda: stats(temperature=0.0)),
    "temperature that is no number": (ValueError, "temperature is nan", lambda: stats(temperature=float("nan"))),
    "negative soft-cap": (ValueError, "softcap is -1", lambda: stats(softcap=-1.0)),
    "leaf in place": (ValueError, "leaf", lambda: stats(X.clone().requires_grad_(), inplace_grad=True)),
    "another device": (RuntimeError, "ref_logits is on meta, but logits is on cpu", lambda: stats(ref_logits=META)),
    "unknown implementation": (ValueError, "impl is 'fast'", lambda: stats(impl="fast")),
    "logits passed as hidden": (ValueError, "look like logits", lambda: linear(X)),
    "weight of another width": (ValueError, r"must be \[V, 5\]", lambda: linear(weight=W[:, :3])),
    "weight of another dtype": (TypeError, "under autocast", lambda: linear(weight=W.bfloat16())),
    "weight without elements": (ValueError, "without elements", lambda: linear(weight=torch.zeros(0))),
    "bias of another length": (ValueError, "bias is", lambda: linear(bias=torch.zeros(3))),
    "unknown save": (ValueError, "save is 'some'", lambda: linear(save="some")),
    "chunks of nothing": (ValueError, "chunk_bytes is 0", lambda: linear(chunk_bytes=0)),
    "mask and rows that differ": (
        ValueError,
        "rows has 2 tokens, but mask counts 4",
        lambda: linear(mask=ALL, rows=L[:2]),
    ),
    "rows beyond the tokens": (
        ValueError,
        "rows are 0 … 4: they must be indices of 4",
        lambda: linear(rows=torch.tensor([0, 4])),
    ),
    "rows below zero": (ValueError, "rows are -1 … 2", lambda: linear(rows=L - 1)),
    "temperature to be learned": (
        ValueError,
        "temperature requires a gradient",
        lambda: linear(temperature=torch.ones((), requires_grad=True)),
    ),
    "implementation without a name": (ValueError, "impl is 'fast'", lambda: K.why_not("gae", "fast", "cpu")),
    "operation without a name": (ValueError, "op is 'gea'", lambda: K.why_not("gea", "native", "cpu")),
    "rows that are int32": (TypeError, "rows is torch.int32", lambda: linear(rows=L.int())),
    "vocabulary of another length": (
        ValueError,
        "ref: hidden has 4 rows and weight 6",
        lambda: linear(ref=K.Reference(H, W[:6])),
    ),
    "start without a group": (ValueError, "no process_group", lambda: linear(vocab_start=3)),
    "old log-probs of another shape": (ValueError, "old_logp is", lambda: policy(old=ONES[:2])),
    "old log-probs that want a gradient": (
        ValueError,
        "old_logp requires",
        lambda: policy(old=ONES.clone().requires_grad_()),
    ),
    "unknown loss": (ValueError, "loss is 'pg'", lambda: policy(loss="pg")),
    "KL without a reference": (ValueError, "needs ref_logp", lambda: policy(kl_coef=0.1)),
    "importance without the sampler": (ValueError, "needs rollout_logp", lambda: policy(tis_cap=2.0)),
    "sequence ratio without sequences": (ValueError, "need seq_ids", lambda: policy(ratio="sequence")),
    "negative clip": (ValueError, "clip_low is -0.1", lambda: policy(clip_low=-0.1)),
    "infinite soft-cap": (
        ValueError,
        "softcap is inf: it must be positive",
        lambda: policy(softcap=math.inf),
    ),
    "sums of integers": (TypeError, "accum_dtype is torch.int32", lambda: policy(accum_dtype=torch.int32)),
    "dual clip inside the clip": (ValueError, "clip_ratio_c is 1.1", lambda: policy(clip_ratio_c=1.1)),
    "normaliser of zero": (ValueError, "normalizer is 0", lambda: policy(normalizer=0.0)),
    "sequences of another shape": (ValueError, "seq_ids is", lambda: K.preference_logps(H, W, L, IDS[:2], 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_clear_sentence(case: str) -> None:
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_minus_100_and_empty_inputs_are_valid_everywhere() -> None:
    ignored = torch.full((4,), -100)
    assert stats(labels=ignored).logp.tolist() == [0.0] * 4
    assert linear(labels=ignored).logp.tolist() == [0.0] * 4
    assert stats(X[:0], L[:0], entropy=True).entropy.shape == (0,)
    assert linear(H[:0], labels=L[:0], entropy=True).entropy.shape == (0,)
    assert float(policy(torch.zeros(4, dtype=torch.bool)).loss) == 0.0
    assert preference(mask=torch.zeros(4, dtype=torch.bool))[0].tolist() == [0.0]


@pytest.mark.skipif(INTERPRETING, reason="there Triton can run")
def test_a_wish_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="impl asks for 'triton' in token_stats, which cannot run here"):
        stats(impl="triton")
    assert K.available_impls("token_stats", "cpu") == ["native", "reference"]
    assert K.why_not("token_stats", "triton", "cpu") == "there are no Triton kernels for cpu tensors"


def test_the_environment_chooses_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "ENVIRONMENT", "native,gae=reference")
    cpu = torch.device("cpu")
    assert _dispatch.choose("token_stats", cpu, torch.float32, None) == "native"
    assert _dispatch.choose("gae", cpu, torch.float32, None) == "reference"
    assert _dispatch.choose("gae", cpu, torch.float32, "native") == "native"
    monkeypatch.setattr(_dispatch, "ENVIRONMENT", "gea=native")
    with pytest.raises(RuntimeError, match="'gea=native' is not understood"):
        stats()


def test_importing_imports_no_triton() -> None:
    code = (
        "import sys, align_kernels; assert not {'triton', 'lightning_align'} & {m.split('.')[0] for m in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_no_module_has_the_name_of_a_public_function() -> None:
    for name in K.__all__:
        assert not hasattr(getattr(K, name), "__path__")
        assert type(getattr(K, name)).__name__ != "module", name
