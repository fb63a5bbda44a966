"""DPO-1 to 4, 8, 10 and 11: the losses of pairs and KTO's, against closed forms, at their limits, at their optimum."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_align.losses.preference import (
    LOSSES,
    REFERENCE_FREE,
    Pairs,
    accepted_options,
    bound,
    kto,
    kto_z0,
    log_odds_ratio,
)
from lightning_align.losses.preference_metrics import answer_sums, odds_sums, pair_sums

DTYPE = torch.float64
BETA = 0.1
# those that see nothing of the reference but its difference between the two answers
OF_DELTA = [
    *(("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.1}), ("robust", {"label_smoothing": 0.1})),
    *(("ipo", {"ipo_average": False}), ("hinge", {}), ("odpo", {}), ("r_dpo", {})),
]


def pairs_of(seed: int = 0, size: int = 7, **changes: Any) -> Pairs:
    """Random pairs."""
    draw = torch.Generator().manual_seed(seed)

    def column(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=draw, dtype=DTYPE)

    columns = {
        **{"chosen_logp": column(-40, -2), "rejected_logp": column(-40, -2)},
        **{"chosen_length": column(1, 9).round(), "rejected_length": column(1, 9).round()},
        **{"ref_chosen_logp": column(-40, -2), "ref_rejected_logp": column(-40, -2), "margin": column(0, 1)},
    }
    return Pairs(**{**columns, **changes})


def at_reference(**changes: Any) -> Pairs:
    """Pairs of a policy that is the reference."""
    pairs = pairs_of()
    return pairs_of(
        chosen_logp=pairs.ref_chosen_logp.clone().requires_grad_(),  # type: ignore[union-attr]
        rejected_logp=pairs.ref_rejected_logp.clone().requires_grad_(),  # type: ignore[union-attr]
        margin=None,
        **changes,
    )


def close(actual: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=DTYPE).expand_as(actual), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- DPO-1
@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        *(("sigmoid", {}, math.log(2)), ("sigmoid", {"label_smoothing": 0.2}, math.log(2))),
        *(("robust", {"label_smoothing": 0.2}, math.log(2)), ("hinge", {}, 1.0), ("ipo", {}, 1 / (2 * BETA) ** 2)),
        *(("ipo", {"ipo_average": False}, 1 / (2 * BETA) ** 2), ("sigmoid_norm", {}, math.log(2))),
        *(("dpop", {}, math.log(2)), ("odpo", {}, math.log(2)), ("r_dpo", {"r_dpo_alpha": 0.0}, math.log(2))),
    ],
)
def test_dpo_1_loss_of_the_reference_itself(name: str, options: dict[str, Any], value: float) -> None:
    close(LOSSES[name](at_reference(), beta=BETA, **options), value)


def test_dpo_1_gradient_and_metrics_of_the_reference_itself() -> None:
    pairs = at_reference()
    LOSSES["sigmoid"](pairs, beta=BETA).sum().backward()
    close(pairs.chosen_logp.grad, -BETA / 2)  # type: ignore[arg-type]
    close(pairs.rejected_logp.grad, BETA / 2)  # type: ignore[arg-type]
    one = torch.ones(7, dtype=DTYPE)
    sums = pair_sums(pairs, one, one, beta=BETA, reference_free=False, per_token=False)
    ratios = {name: float(a / b) for name, (a, b) in sums.items()}
    assert [ratios[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0.5]
    assert ratios["logps/chosen"] == pytest.approx(float(pairs.chosen_logp.detach().mean()))


def test_dpo_1_kto_of_the_reference_itself() -> None:
    ratio = torch.zeros(4, dtype=DTYPE)
    label = torch.tensor([1, 0, 1, 0])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    close(kto(ratio, label, torch.zeros(()), **weights), torch.tensor([0.75, 0.35, 0.75, 0.35], dtype=DTYPE))


# ---------------------------------------------------------------------- DPO-2 to DPO-4
def test_dpo_2_gradient_is_the_closed_form() -> None:
    pairs = pairs_of()
    pairs.chosen_logp.requires_grad_()
    pairs.rejected_logp.requires_grad_()
    LOSSES["sigmoid"](pairs, beta=BETA).sum().backward()
    expected = (-BETA * torch.sigmoid(-BETA * pairs.delta)).detach()
    close(pairs.chosen_logp.grad, expected)  # type: ignore[arg-type]
    close(pairs.rejected_logp.grad, -expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_dpo_2_gradients_are_those_of_differences(name: str) -> None:
    pairs = pairs_of(3, score_gap=torch.tensor([0.5, 0, 2, 0, 1, 0, 0.1], dtype=DTYPE))

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return LOSSES[name](
            Pairs(chosen, rejected, *(getattr(pairs, field) for field in list(vars(pairs))[2:])),
            **bound(LOSSES[name], {}),
        )

    sides = (pairs.chosen_logp.requires_grad_(), pairs.rejected_logp.requires_grad_())
    assert torch.autograd.gradcheck(loss, sides, eps=1e-6, atol=1e-6)


def test_dpo_3_swapped_sides_turn_delta_round() -> None:
    pairs = pairs_of()
    swapped = pairs.swapped()
    close(swapped.delta, -pairs.delta)
    close(log_odds_ratio(swapped), -log_odds_ratio(pairs))
    close(LOSSES["sigmoid"](swapped), -logsigmoid(-BETA * pairs.delta))
    close(swapped.margin, -pairs.margin)  # type: ignore[arg-type, operator]
    # the margin belongs to the pair: swapping the label moves no probability
    close(LOSSES["odpo"](swapped), -logsigmoid(pairs.margin - BETA * pairs.delta))  # type: ignore[operator]
    gap = torch.linspace(-2, 2, 7, dtype=DTYPE)
    scored = pairs_of(score_gap=gap)
    close(scored.swapped().score_gap, -gap)  # type: ignore[arg-type]
    close(LOSSES["odpo"](scored.swapped().swapped()), LOSSES["odpo"](scored))


@pytest.mark.parametrize("flips", [0.05, 0.3, 0.45])
def test_dpo_3_robust_loss_is_the_clean_one_on_average(flips: float) -> None:
    pairs, robust = pairs_of(), LOSSES["robust"]
    average = (1 - flips) * robust(pairs, label_smoothing=flips) + flips * robust(
        pairs.swapped(), label_smoothing=flips
    )
    close(average, LOSSES["sigmoid"](pairs))
    # what conservative DPO is not
    smoothed = LOSSES["sigmoid"](pairs, label_smoothing=flips)
    assert not torch.allclose(smoothed, LOSSES["sigmoid"](pairs), atol=1e-3)


@pytest.mark.parametrize(("name", "options"), OF_DELTA)
def test_dpo_4_a_constant_on_both_references_changes_nothing(name: str, options: dict[str, Any]) -> None:
    pairs = pairs_of()
    shift = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    shifted = pairs_of(
        ref_chosen_logp=pairs.ref_chosen_logp + shift,  # type: ignore[operator]
        ref_rejected_logp=pairs.ref_rejected_logp + shift,  # type: ignore[operator]
    )
    close(LOSSES[name](shifted, **options), LOSSES[name](pairs, **options))


def test_dpo_4_others_do_see_it() -> None:
    pairs = pairs_of()
    shifted = pairs_of(ref_chosen_logp=pairs.ref_chosen_logp + 1, ref_rejected_logp=pairs.ref_rejected_logp + 1)  # type: ignore[operator]
    for name in ("ipo", "sigmoid_norm", "dpop"):
        assert not torch.allclose(LOSSES[name](shifted), LOSSES[name](pairs), atol=1e-4)


def test_dpo_4_kto_only_while_the_kl_is_positive() -> None:
    ratio, label = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE), torch.tensor([1, 0, 0])
    mismatched = torch.tensor([0.7, 0.2, 0.9], dtype=DTYPE)

    def loss(shift: float) -> Tensor:
        return kto(ratio + shift, label, kto_z0((mismatched + shift).sum(), torch.tensor(3)))

    close(loss(0.3), loss(0.0))
    assert not torch.allclose(loss(-2.0), loss(0.0), atol=1e-3)


# ---------------------------------------------------------------------- signs and terms of single losses
def test_offsets_and_lengths_have_the_signs_of_the_papers() -> None:
    pairs = pairs_of()
    close(LOSSES["odpo"](pairs), -logsigmoid(BETA * pairs.delta - pairs.margin))  # type: ignore[operator]
    longer = pairs_of(chosen_length=pairs.rejected_length + 3)
    assert (LOSSES["r_dpo"](longer) < LOSSES["sigmoid"](longer)).all()  # a longer winner is explained already
    gap = torch.full((7,), 2.0, dtype=DTYPE)
    close(LOSSES["odpo"](pairs_of(score_gap=gap)), -logsigmoid(BETA * pairs.delta - math.log(2)))
    close(LOSSES["simpo"](pairs), -logsigmoid(2.0 * (pairs.chosen_mean - pairs.rejected_mean) - 0.5))
    likelier = pairs_of(chosen_logp=pairs.ref_chosen_logp + 1)  # type: ignore[operator]
    close(LOSSES["dpop"](likelier), LOSSES["sigmoid"](likelier, beta=0.3))


def test_losses_without_a_reference_need_none() -> None:
    pairs = pairs_of(ref_chosen_logp=None, ref_rejected_logp=None)
    for name, loss in LOSSES.items():
        if name in REFERENCE_FREE:
            assert torch.isfinite(loss(pairs)).all()
        else:
            with pytest.raises(AssertionError, match="reference"):
                loss(pairs)


def test_options_are_those_given_or_the_losses_own() -> None:
    assert bound(LOSSES["dpop"], {"beta": None, "dpop_lambda": 5.0, "other": 1}) == {"beta": 0.3, "dpop_lambda": 5.0}
    assert accepted_options(LOSSES["slic"]) == {"slic_delta": 1.0, "slic_lambda": 0.1}


# ---------------------------------------------------------------------- DPO-8
def test_dpo_8_optimum_of_full_bradley_terry_data_is_the_tilted_reference() -> None:
    reward = torch.tensor([0.0, 0.3, -0.2, 0.5], dtype=DTYPE)
    ref = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=DTYPE).log()
    beta = 0.5
    first, second = torch.triu_indices(4, 4, 1)
    better = torch.sigmoid(reward[first] - reward[second])
    logits = ref.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], lr=1, max_iter=200, line_search_fn="strong_wolfe")
    length = torch.ones(6, dtype=DTYPE)

    def closure() -> Tensor:
        optimiser.zero_grad()
        logp = logits.log_softmax(0)
        pairs = Pairs(logp[first], logp[second], length, length, ref[first], ref[second])
        loss = LOSSES["sigmoid"]
        total = (better * loss(pairs, beta=beta) + (1 - better) * loss(pairs.swapped(), beta=beta)).sum()
        total.backward()
        return total

    optimiser.step(closure)
    optimum = (ref + reward / beta).softmax(0)
    distance = float((logits.detach().softmax(0) - optimum).abs().sum() / 2)
    assert distance < 0.02
    assert float((ref.exp() - optimum).abs().sum() / 2) > 0.05  # which is not where it began


def test_dpo_8_ipo_reaches_its_margin_while_that_of_dpo_keeps_growing() -> None:
    beta, ref = 0.1, torch.tensor([0.5, 0.5], dtype=DTYPE).log()

    def margins(name: str) -> list[float]:
        logits = torch.zeros(2, dtype=DTYPE, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=0.05)
        found = []
        for step in range(1200):
            logp, one = logits.log_softmax(0), torch.ones(1, dtype=DTYPE)
            pairs = Pairs(logp[:1], logp[1:], one, one, ref[:1], ref[1:])
            optimiser.zero_grad()
            LOSSES[name](pairs, beta=beta).sum().backward()
            optimiser.step()
            if step in (599, 1199):
                found.append(float(pairs.delta.detach()))
        return found

    early, late = margins("ipo")
    assert early == pytest.approx(1 / (2 * beta), abs=0.05)
    assert late == pytest.approx(early, abs=0.01)
    early, late = margins("sigmoid")
    assert late > early + 5 > 1 / (2 * beta) + 5


# ---------------------------------------------------------------------- DPO-10 and DPO-11
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-0.0, -1e-12, -1e-7, -1e-4, -math.log(2), -0.7, -50.0, -1e4])
def test_dpo_10_orpo_is_finite_wherever_it_is_asked(mean: float, dtype: torch.dtype) -> None:
    length = torch.full((1,), 3.0, dtype=dtype)
    chosen, rejected = (
        torch.full((1,), value, dtype=dtype, requires_grad=True) for value in (3 * mean, 3 * min(mean, -0.3))
    )
    for pairs in (Pairs(chosen, rejected, length, length), Pairs(rejected, chosen, length, length)):
        loss = LOSSES["orpo"](pairs).sum()
        gradients = torch.autograd.grad(loss, (chosen, rejected))
        assert all(torch.isfinite(values).all() for values in (loss, *gradients))


def test_dpo_10_odds_are_those_of_a_plain_formula() -> None:
    pairs = pairs_of()
    odds = pairs.chosen_mean.exp() / (1 - pairs.chosen_mean.exp())
    other = pairs.rejected_mean.exp() / (1 - pairs.rejected_mean.exp())
    close(log_odds_ratio(pairs), (odds / other).log())
    sums = odds_sums(pairs, torch.tensor([1, 1, 0, 1, 2, 1, 1], dtype=DTYPE))
    weight = torch.tensor([1, 1, 0, 1, 2, 1, 1], dtype=DTYPE)
    expected = (weight * (odds / other).log()).sum() / weight.sum()
    close(sums["log_odds_chosen"][0] / sums["log_odds_chosen"][1], expected)


def test_dpo_11_the_kl_is_a_constant_and_not_negative() -> None:
    mismatched = torch.tensor([0.4, 0.2], dtype=DTYPE, requires_grad=True)
    ratio = torch.tensor([0.1, -0.3], dtype=DTYPE, requires_grad=True)
    z0 = kto_z0(mismatched.sum(), torch.tensor(2))
    close(z0, 0.3)
    assert not z0.requires_grad
    kto(ratio, torch.tensor([1, 0]), mismatched.sum() / 2).sum().backward()
    assert mismatched.grad is None
    assert (ratio.grad != 0).all()  # type: ignore[union-attr]
    close(kto_z0(-mismatched.sum(), torch.tensor(2)), 0.0)


# ---------------------------------------------------------------------- metrics
def test_metrics_of_pairs_are_weighted_means_without_those_of_weight_0() -> None:
    pairs, weight = pairs_of(), torch.tensor([1, 0, 2, 1, 1, 1, 1], dtype=DTYPE)
    pairs.chosen_logp[1] = torch.nan  # what stands in for an empty batch may be anything
    label = torch.tensor([1, 1, 0.5, 1, 1, 1, 1], dtype=DTYPE)
    kept = weight > 0
    for free, per_token in ((False, False), (True, False), (True, True)):
        sums = pair_sums(pairs, weight, label, beta=2.0, reference_free=free, per_token=per_token)
        found = {name: float(a / b) for name, (a, b) in sums.items()}
        logp = (pairs.chosen_mean, pairs.rejected_mean) if per_token else (pairs.chosen_logp, pairs.rejected_logp)
        chosen, rejected = logp if free else (pairs.chosen_ratio, pairs.rejected_ratio)

        def mean(values: Tensor, of: Tensor = kept) -> float:
            return float((weight * values)[of].sum() / weight[of].sum())

        assert found["rewards/chosen"] == pytest.approx(2 * mean(chosen))
        assert found["rewards/margins"] == pytest.approx(2 * mean(chosen - rejected))
        assert found["logps/rejected"] == pytest.approx(mean(logp[1]))
        assert found["rewards/accuracies"] == pytest.approx(mean((chosen > rejected).double(), kept & (label == 1)))


def test_metrics_of_answers_are_means_of_each_label() -> None:
    logp, ratio = torch.tensor([-3.0, -5, -7]), torch.tensor([0.2, -0.4, 0.8])
    sums = answer_sums(logp, ratio, torch.tensor([1, 0, 1]), torch.tensor([1.0, 1, 0]), beta=0.5)
    found = {name: float(a / b) for name, (a, b) in sums.items()}
    assert found == pytest.approx(
        {"rewards/chosen": 0.1, "rewards/rejected": -0.2, "logps/chosen": -3, "logps/rejected": -5}
    )
