"""Hindsight relabelling: supervised, contrastive and entropy terms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.losses.hindsight import (
    ABSENT,
    Candidates,
    contrastive_loss,
    hindsight_loss,
    smoothed_cross_entropy,
)
from lightning_align.losses.lm import token_cross_entropy

ROWS, LENGTH, VOCABULARY, NUMBER = 5, 6, 7, 4
PLAIN = {"contrast_coef": 0.0, "entropy_coef": 0.0, "label_smoothing": 0.0}


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Candidates]:
    """Logits, labels and weights (0 outside the outputs) of outputs, and candidates of each; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    weights = mask * torch.rand(ROWS, 1, dtype=torch.float64, generator=generator).add(0.2)
    logp = torch.randn(ROWS, NUMBER, dtype=torch.float64, generator=generator) - 1.5
    own = torch.randint(NUMBER, (ROWS,), generator=generator)
    return logits, labels, weights, Candidates(logp, torch.arange(NUMBER).expand(ROWS, NUMBER), own)


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the labels, mean log-prob of all tokens, and entropy."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], logp.mean(-1), -(logp.exp() * logp).sum(-1)


def whole_loss(seed: int, transform: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> Any:
    """The loss of a drawn batch and its metrics; every tensor ``[B, …]`` goes through ``transform``."""
    logits, labels, weights, candidates = draw(seed)
    logp, mean_logp, entropy = (transform(values) for values in statistics(logits, labels))
    return hindsight_loss(
        logp,
        transform(weights),
        Candidates(*map(transform, candidates)),
        mean_logp=mean_logp,
        entropy=entropy,
        **options,
    )


# ------------------------------------------------------------------ supervised
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_that_of_torch(smoothing: float) -> None:
    logits, labels, weights, _ = draw()
    logits.requires_grad_()
    logp, mean_logp, _ = statistics(logits, labels)
    loss, metrics = smoothed_cross_entropy(logp, weights, mean_logp, label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="none"
    )
    expected = (expected * weights.flatten()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))
    torch.testing.assert_close(metrics["hir/loss_sup"], (expected.detach(), weights.sum()))


def test_hir_1_without_contrast_smoothing_and_entropy_it_is_supervised_fine_tuning() -> None:
    logits, labels, weights, candidates = draw(1)
    logp, _, entropy = statistics(logits, labels)
    expected, metrics = token_cross_entropy(logp, weights)
    for options in ({}, {"entropy": entropy}, {"candidates": candidates}):
        loss, _ = hindsight_loss(logp, weights, **options, **PLAIN)
        assert loss == expected / metrics["loss"][1]


# ------------------------------------------------------------------ contrastive
def test_contrast_equals_a_loop() -> None:
    _, _, _, (logp, instruction, own) = draw(2)
    expected = sum(
        -math.log(math.exp(row[i]) / sum(map(math.exp, row)))
        for row, i in zip(logp.tolist(), own.tolist(), strict=True)
    )
    loss, metrics = contrastive_loss(Candidates(logp, instruction, own))
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(metrics["hir/loss_contrast"], (loss, torch.tensor(ROWS).double()))
    assert metrics["hir/contrast_accuracy"][0] == (logp.argmax(1) == own).sum()
    assert torch.autograd.gradcheck(
        lambda x: contrastive_loss(Candidates(x, instruction, own))[0], (logp.requires_grad_(),)
    )


def test_hir_2_a_model_blind_to_instructions() -> None:
    _, _, _, (logp, instruction, own) = draw(3)
    blind = Candidates(logp[:, :1].expand(-1, NUMBER), instruction, own)
    loss, metrics = contrastive_loss(blind)
    assert float(loss) / ROWS == pytest.approx(math.log(NUMBER))
    assert float(metrics["hir/contrast_accuracy"][0]) / ROWS == pytest.approx(1 / NUMBER)
    instruction = instruction.clone()
    instruction[torch.arange(ROWS), (own + 1) % NUMBER] = ABSENT
    loss, _ = contrastive_loss(blind._replace(instruction=instruction))
    assert float(loss) / ROWS == pytest.approx(math.log(NUMBER - 1))


def test_hir_4_gradient_is_the_softmax_on_negatives_and_sums_to_zero() -> None:
    _, _, _, (logp, instruction, own) = draw(4)
    logp.requires_grad_()
    gradient = torch.autograd.grad(contrastive_loss(Candidates(logp, instruction, own))[0], logp)[0]
    expected = logp.detach().softmax(1)
    expected[torch.arange(ROWS), own] -= 1
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(ROWS).double(), rtol=0, atol=1e-12)
    assert (gradient.gather(1, own[:, None]) < 0).all()


@pytest.mark.parametrize("first", [True, False])
def test_hir_5_duplicates_of_an_instruction_change_nothing(first: bool) -> None:
    """Of a negative, and of the own one; before or behind the other columns."""
    _, _, _, (logp, instruction, own) = draw(5)
    expected, metrics = contrastive_loss(Candidates(logp, instruction, own))
    columns = torch.tensor([2, 0, *range(NUMBER), 3] if first else [*range(NUMBER), 2, 0, 1])
    more = Candidates(logp[:, columns].requires_grad_(), instruction[:, columns], own + 2 * first)
    loss, more_metrics = contrastive_loss(more)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(more_metrics, metrics)
    gradient = torch.autograd.grad(loss, more.logp)[0]
    single = logp.detach().requires_grad_()
    wanted = torch.autograd.grad(contrastive_loss(Candidates(single, instruction, own))[0], single)[0]
    torch.testing.assert_close(torch.zeros_like(wanted).index_add(1, columns, gradient), wanted)
    torch.testing.assert_close(gradient.gather(1, more.own[:, None]), wanted.gather(1, own[:, None]))
    distinct = more._replace(instruction=torch.arange(len(columns)).expand(ROWS, -1))
    assert abs(contrastive_loss(distinct)[0] - expected) > 0.1, "counted as others, they do"


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, -1e9])
def test_what_is_absent_or_left_out_does_not_matter(garbage: float) -> None:
    _, _, _, (logp, instruction, own) = draw(6)
    expected, metrics = contrastive_loss(Candidates(logp[:4], instruction[:4], own[:4]))
    wide = torch.nn.functional.pad(logp, (0, 2), value=garbage)
    wide[4] = garbage
    wide.requires_grad_()
    absent = torch.nn.functional.pad(instruction, (0, 2), value=ABSENT)
    rows = torch.arange(ROWS) < 4
    loss, same = contrastive_loss(Candidates(wide, absent, own), rows=rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(same, metrics)
    gradient = torch.autograd.grad(loss, wide)[0]
    assert not gradient[4].any()
    assert not gradient[:, NUMBER:].any()
    assert gradient[:4, :NUMBER].all()
    alone = contrastive_loss(Candidates(logp[:, :1], instruction[:, :1], torch.zeros_like(own)))
    assert alone[0] == 0
    assert alone[1]["hir/contrast_accuracy"] == (ROWS, ROWS)


# ------------------------------------------------------------------ together
def test_the_three_terms_add_up() -> None:
    logits, labels, weights, candidates = draw(7)
    logits.requires_grad_()
    candidates.logp.requires_grad_()
    logp, mean_logp, entropy = statistics(logits, labels)
    loss, metrics = hindsight_loss(
        logp,
        weights,
        candidates,
        mean_logp=mean_logp,
        entropy=entropy,
        contrast_coef=0.7,
        entropy_coef=0.3,
        label_smoothing=0.2,
    )
    assert not any(value.requires_grad for sides in metrics.values() for value in sides)
    nll = -(weights * (0.8 * logp + 0.2 * mean_logp)).sum() / weights.sum()
    chaos = (weights * entropy).sum() / weights.sum()
    apart = contrastive_loss(candidates)[0] / ROWS
    torch.testing.assert_close(loss, nll + 0.7 * apart - 0.3 * chaos)
    terms = {name: a / b for name, (a, b) in metrics.items()}
    torch.testing.assert_close(terms["hir/loss_sup"], nll.detach())
    torch.testing.assert_close(terms["hir/loss_contrast"], apart.detach())
    torch.testing.assert_close(terms["hir/entropy"], chaos.detach())
    assert torch.autograd.gradcheck(
        lambda x: hindsight_loss(
            *(statistics(x, labels)[0], weights, candidates),
            mean_logp=statistics(x, labels)[1],
            entropy=statistics(x, labels)[2],
            entropy_coef=0.3,
        )[0],
        (logits,),
    )


def test_only_the_proportions_of_weights_matter() -> None:
    logits, labels, weights, candidates = draw(11)
    logp, mean_logp, entropy = statistics(logits, labels)
    options = {"mean_logp": mean_logp, "entropy": entropy}
    expected, _ = hindsight_loss(logp, weights, candidates, **options)
    torch.testing.assert_close(hindsight_loss(logp, weights * 1e-3, candidates, **options)[0], expected)


def test_conv_5_micro_batches_add_up() -> None:
    whole, metrics = whole_loss(8)
    options = {"token_normaliser": draw(8)[2].sum(), "output_normaliser": ROWS}
    parts = [whole_loss(8, lambda x, rows=rows: x[rows], **options) for rows in (slice(0, 1), slice(1, 5))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name in metrics.keys() - {"empty_batches"}:
        for side in (0, 1):
            torch.testing.assert_close(sum(part[name][side] for _, part in parts), metrics[name][side])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e9])
def test_padding_changes_nothing(garbage: float) -> None:
    logits, labels, weights, candidates = draw(9)
    tensors = statistics(logits, labels)
    expected, metrics = hindsight_loss(tensors[0], weights, candidates, mean_logp=tensors[1], entropy=tensors[2])
    wide = [
        torch.nn.functional.pad(values.where(weights > 0, garbage), (1, 2), value=garbage).requires_grad_()
        for values in tensors
    ]
    padded = torch.nn.functional.pad(weights, (1, 2))
    loss, same = hindsight_loss(wide[0], padded, candidates, mean_logp=wide[1], entropy=wide[2])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(same, metrics)
    for gradient in torch.autograd.grad(loss, wide):
        assert not gradient[padded == 0].any()
        assert gradient[padded > 0].all()


def test_conv_9_outputs_without_tokens_have_no_part_in_any_term() -> None:
    logits, labels, weights, candidates = draw(10)
    tensors = statistics(logits, labels)
    names = ("mean_logp", "entropy")
    kept = torch.arange(ROWS) != 2
    expected, _ = hindsight_loss(
        *(tensors[0][kept], weights[kept], Candidates(*(values[kept] for values in candidates))),
        **{name: values[kept] for name, values in zip(names, tensors[1:], strict=True)},
    )
    weights[2] = 0
    options = dict(zip(names, tensors[1:], strict=True))
    torch.testing.assert_close(hindsight_loss(tensors[0], weights, candidates, **options)[0], expected)
    logp = tensors[0].clone().requires_grad_()
    loss, metrics = hindsight_loss(logp, torch.zeros_like(weights), candidates, **options)
    loss.backward()
    assert loss == 0
    assert logp.grad is not None
    assert not logp.grad.any()
    assert metrics["empty_batches"] == (1, 1)
    assert all(not any(sides) for name, sides in metrics.items() if name != "empty_batches")


@pytest.mark.parametrize("needs", ["contrast_coef", "entropy_coef", "label_smoothing"])
def test_what_a_term_needs_is_asked_for(needs: str) -> None:
    logits, labels, weights, _ = draw()
    with pytest.raises(ValueError, match=rf"{needs} is 0\.5: it needs"):
        hindsight_loss(statistics(logits, labels)[0], weights, **PLAIN | {needs: 0.5})
