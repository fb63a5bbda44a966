"""K4, log-probs of sequences: sums, means and counts against a loop, and preference losses made of them.

Under ``TRITON_INTERPRET=1`` the same tests run the Triton kernels (test_kernels_interpreter.py).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import align_kernels as K

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["cases"]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETING else "native"
IMPLS = [IMPL, "reference"]
DTYPE = torch.float32 if INTERPRETING else torch.float64
BOUND = 1e-4 if INTERPRETING else 1e-11
H, V = 5, 23


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        from align_kernels import pref_logps_kernel

        monkeypatch.setattr(pref_logps_kernel, "BLOCK", 4)


def leaves(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPE).requires_grad_()
        for shape in ((rows, H), (V, H), (V,))
    ]


def run(tensors: list[Tensor], labels: Tensor, ids: Tensor, num: int, impl: str, **options: Any) -> list[Tensor]:
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in tensors)
    hidden_in = hidden.view(*labels.shape, H)
    sums, counts = K.preference_logps(hidden_in, weight, labels, ids, num, bias=bias, impl=impl, **options)
    (sums * torch.arange(1, num + 1)).sum().backward()
    gradients = [x.grad for x in (hidden, weight, bias) if x.grad is not None]
    return [sums.detach(), counts, *gradients]


def by_loop(tensors: list[Tensor], labels: Tensor, ids: Tensor, num: int, mask: Tensor, average: bool) -> list[Tensor]:
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in tensors)
    log_p = (hidden @ weight.T + bias).log_softmax(-1)
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(num)], [0] * num
    for row, (label, sequence, counted) in enumerate(
        zip(labels.flatten().tolist(), ids.flatten().tolist(), mask.flatten().tolist(), strict=True)
    ):
        if counted and label >= 0:
            sums[sequence] = sums[sequence] + log_p[row, label]
            counts[sequence] += 1
    values = torch.stack([s / max(c, 1) if average else s for s, c in zip(sums, counts, strict=True)])
    (values * torch.arange(1, num + 1)).sum().backward()
    gradients = [x.grad for x in (hidden, weight, bias) if x.grad is not None]
    return [values.detach(), torch.tensor(counts), *gradients]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("choice", ["all", "mask", "rows"])
def test_sums_means_counts_and_gradients(impl: str, average: bool, choice: str) -> None:
    ids = torch.tensor([[0] * 7, [1] * 7, [3] * 7])  # sequence 2 has no tokens
    labels = (torch.arange(21) * 5 % V).view(3, 7)
    labels[0, 2] = -100
    mask = torch.ones(3, 7, dtype=torch.bool)
    if choice != "all":
        mask[1, :3] = mask[2, 4:] = False
    options: dict[str, Any] = {"mask": {"mask": mask}, "rows": {"rows": mask.flatten().nonzero()[:, 0]}}.get(choice, {})
    tensors = leaves(21)
    expected = by_loop(tensors, labels, ids, 5, mask, average)
    for got, want in zip(run(tensors, labels, ids, 5, impl, average=average, **options), expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=BOUND)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_in_gives_zeros_out(impl: str) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    sums, counts, *gradients = run(leaves(0), empty, empty, 3, impl)
    assert sums.tolist() == [0.0] * 3
    assert counts.tolist() == [0] * 3
    assert not any(x.any() for x in gradients)


def test_golden_dpo_from_sequences_of_one_token() -> None:
    inputs, outputs = GOLDEN["dpo"]["inputs"], GOLDEN["dpo"]["outputs"]["sigmoid"]
    targets = torch.tensor(inputs["chosen"] + inputs["rejected"], dtype=torch.float64)
    # each sequence is ten tokens that share its log-prob, in a vocabulary of two
    token = (targets / 10).repeat_interleave(10)
    hidden = torch.stack([token, torch.log1p(-token.exp())], 1).to(DTYPE)
    ids = torch.arange(6).repeat_interleave(10)
    sums, counts = K.preference_logps(
        hidden, torch.eye(2, dtype=DTYPE), torch.zeros(60, dtype=torch.long), ids, 6, impl=IMPL
    )
    assert counts.tolist() == [10] * 6
    ref = torch.tensor(inputs["ref_c"] + inputs["ref_r"], dtype=torch.float64)
    chosen, rejected = (sums.double() - ref).chunk(2)
    loss = -F.logsigmoid(inputs["beta"]["default"] * (chosen - rejected))
    torch.testing.assert_close(loss, torch.tensor(outputs["per_pair"], dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ids", [[0, 1, 0], [0, 1, 2], [-1, 0, 1]])
def test_sequence_numbers_that_descend_or_are_outside_are_refused(ids: list[int]) -> None:
    hidden, weight, _ = leaves(3)
    with pytest.raises(ValueError, match="seq_ids"):
        K.preference_logps(hidden, weight, torch.zeros(3, dtype=torch.long), torch.tensor(ids), 2, impl=IMPL)
