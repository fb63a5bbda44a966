"""KL estimators: what they estimate, and what their gradients are."""

import pytest
import torch
from torch import Tensor

from lightning_align.losses.kl import KL_ESTIMATORS, k1, k3, kl_estimate, sequence_kl


def distributions() -> tuple[Tensor, Tensor]:
    """Log-probs of two distributions over five symbols."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    return logits[0].log_softmax(0), logits[1].log_softmax(0)


def exact(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def test_conv_6_estimators_agree_with_the_exact_kl_on_samples() -> None:
    p, q = distributions()
    tokens = torch.multinomial(p.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(1))
    for name in ("k1", "k3"):
        samples = kl_estimate(p[tokens], q[tokens], name)
        error = samples.std() / len(samples) ** 0.5
        assert abs(samples.mean() - exact(p, q)) < 4 * error
    assert (kl_estimate(p[tokens], q[tokens], "k3") >= 0).all()
    assert (k3(torch.linspace(-9, 9, 1001), torch.zeros(1001)) >= 0).all()


def test_conv_6_exact_kl_is_0_for_logits_equal_up_to_a_constant() -> None:
    p, q = distributions()
    assert abs(exact((p + 3).log_softmax(0), p)) < 1e-15
    assert exact(p, q) > 0
    for estimator in KL_ESTIMATORS.values():
        assert not estimator(p, p).any()


def test_conv_7_gradients_of_the_mean_estimators() -> None:
    """Enumerated over all symbols with constant probabilities, as samples give them."""
    p, q = distributions()
    logits = p.clone().requires_grad_()
    logp = logits.log_softmax(0)
    probability = logp.exp().detach()

    def grad(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    means = {name: (probability * estimator(logp, q)).sum() for name, estimator in KL_ESTIMATORS.items()}
    torch.testing.assert_close(grad(means["k1"]), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(grad(means["k2"]), grad(exact(logp, q)))
    torch.testing.assert_close(grad(means["k3"]), grad(exact(q, logp)))


def test_k3_keeps_small_differences() -> None:
    """expm1, not exp − 1: at d = 1e-4 the estimate is d²/2 to 1e-3 relative even in float32."""
    d = torch.tensor([1e-3])
    torch.testing.assert_close(k3(d, torch.zeros(1)), d**2 / 2, rtol=5e-3, atol=0)


def test_sequence_kl_sums_over_tokens_and_ignores_padding() -> None:
    kl = torch.tensor([[torch.nan, 1.0, 2.0], [4.0, torch.inf, torch.nan]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(sequence_kl(kl, mask), torch.tensor([3.0, 4.0]))


def test_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_half_precision_differences_are_float32() -> None:
    logp = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert k1(logp, logp).dtype == torch.float32
