"""Cross-entropy of pre-training and SFT."""

import torch
from torch import Tensor

from lightning_align.losses.lm import token_cross_entropy


def setting() -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` and weights ``[B, T]``: completions of three and two tokens, the second record weighs 2."""
    logits = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.0, 0, 1, 1, 1, 0], [0, 0, 0, 2, 2, 0]], dtype=torch.float64)
    return logits, weights


def loss_of(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    total, metrics = token_cross_entropy(logp, weights)
    return total / metrics["loss"][1]


def test_sft_1_equals_mean_masked_logp_and_is_linear_in_record_weights() -> None:
    logits, weights = setting()
    logits.requires_grad_()
    labels = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(1))
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    total, metrics = token_cross_entropy(logp, weights)
    expected = -(logp[0, 2:5].sum() + 2 * logp[1, 3:5].sum())
    torch.testing.assert_close(total, expected)
    assert metrics["loss"][1] == 7
    assert not metrics["loss"][0].requires_grad
    once = torch.autograd.grad(token_cross_entropy(logp, weights)[0], logits, retain_graph=True)[0]
    thrice = torch.autograd.grad(token_cross_entropy(logp, 3 * weights)[0], logits)[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_conv_3_only_labels_inside_the_mask_matter() -> None:
    logits, weights = setting()
    labels = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(1))
    before = loss_of(logits, labels, weights)
    outside = torch.where(weights == 0, (labels + 1) % 5, labels)
    assert loss_of(logits, outside, weights) == before
    end = labels.clone()
    end[0, 4] = (end[0, 4] + 1) % 5  # the last learnt token, where EOS stands
    assert loss_of(logits, end, weights) != before


def test_conv_9_a_batch_without_loss_tokens() -> None:
    logp = torch.full((2, 3), -torch.inf, requires_grad=True)
    total, metrics = token_cross_entropy(logp, torch.zeros(2, 3))
    total.backward()
    assert total == 0
    assert logp.grad is not None
    assert not logp.grad.any()
    assert metrics["empty_batches"][0] == 1
    assert metrics["loss"][1] == 0
    assert token_cross_entropy(logp, torch.ones(2, 3))[1]["empty_batches"][0] == 0


def test_gradcheck() -> None:
    logits, weights = setting()
    logp = logits[..., 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, weights)[0], (logp,))
