"""What DPOModule minimises and logs, by itself: of answers whose log-probs are known, against closed forms."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_align.losses.preference import LOSSES, log_odds_ratio
from lightning_align.methods.dpo import DPOModule
from lightning_align.methods.dpo_objectives import PairObjective, Term, as_pairs
from lightning_align.models.answers import AnswerStats

DTYPE = torch.float64


class Known:
    """A policy whose answers have these statistics, by the batch's ``row``."""

    def __init__(self, logp: Tensor, length: Tensor, ref_logp: Tensor | None = None, **more: Tensor) -> None:
        columns = {"logp": logp, "length": length, "entropy": None, "correct": None, **more}
        self.columns, self.ref_logp = columns, ref_logp

    def answers(self, batch: Any, *, measure: bool = True) -> tuple[AnswerStats, Tensor | None]:
        rows = batch["row"]
        found = {name: None if values is None else values[rows] for name, values in self.columns.items()}
        return AnswerStats(**found), None if self.ref_logp is None else self.ref_logp[rows]

    def all_reduce(self, value: Tensor) -> Tensor:
        return value

    def gather(self, items: list[Any]) -> list[Any]:
        return items


@pytest.fixture
def objective(tmp_path: Path) -> Callable[..., Any]:
    """``objective(**options)``: that of a module with these."""
    architecture = tmp_path / "model.yaml"
    architecture.write_text("architecture: llama\ntokenizer: {train: {vocab_size: 9, algorithm: words}}\n")
    return lambda **options: DPOModule(model=str(architecture), **options).objective


def drawn(low: float, high: float, size: int = 8, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


# four pairs of unequal weights, one of them a tie
LENGTH = torch.tensor([3.0, 7, 2, 5, 4, 6, 8, 1], dtype=DTYPE)
POLICY = Known(
    drawn(-9, -1) * LENGTH / 2, LENGTH, drawn(-9, -1, seed=1) * LENGTH / 2, correct=torch.arange(8.0, dtype=DTYPE)
)
WEIGHT = torch.tensor([1.0, 0.5, 2, 3], dtype=DTYPE)
LABEL = torch.tensor([1.0, 1, 0.5, 1], dtype=DTYPE)
PAIRS: dict[str, Tensor] = {
    **{"row": torch.arange(8), "pair_chosen": torch.arange(4), "pair_rejected": torch.arange(4, 8)},
    **{"pair_weight": WEIGHT, "pair_label": LABEL, "pair_margin": torch.tensor([0.3, 1, 0, 0], dtype=DTYPE)},
    **{"score": torch.tensor([3, torch.nan, 1, 2, 1, torch.nan, 1, 1.5], dtype=DTYPE)},
    **{"response_weight": torch.ones(8), "attention_mask": torch.ones(8, 2), "window_weight": WEIGHT.sum()},
    "window_chosen_tokens": (WEIGHT * LENGTH[:4]).sum(),
}


def weighted_mean(values: Tensor, weight: Tensor = WEIGHT) -> float:
    return float((weight * values).sum() / weight.sum())


def evaluated(of: Any, policy: Known, *batches: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of an evaluation in these batches."""
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, pair in of.evaluate(policy, batch).items():
            sums.setdefault(name, []).append(torch.stack([part.double() for part in pair]))
    totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
    return of.eval_metrics(policy, {name: float(top / bottom) for name, (top, bottom) in totals.items()})


# ---------------------------------------------------------------------- losses of pairs
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_loss_of_a_tie_is_that_of_both_sides(name: str) -> None:
    term = Term(name, 0.7, {})
    pairs = dataclasses.replace(as_pairs(*POLICY.answers(PAIRS), PAIRS), score_gap=None)
    tie, certain, wrong = (term.values(pairs, torch.full((4,), label, dtype=DTYPE)) for label in (0.5, 1.0, 0.0))
    torch.testing.assert_close(tie, (certain + wrong) / 2)
    torch.testing.assert_close(term.values(pairs.swapped(), LABEL.new_full((4,), 0.5)), tie)
    torch.testing.assert_close(wrong, 0.7 * LOSSES[name](pairs.swapped()))
    assert not torch.allclose(certain, wrong)


def test_a_mixture_is_the_weighted_sum_of_its_losses_and_likelihoods(objective: Callable[..., Any]) -> None:
    options = {"rpo_alpha": 0.3, "cpo_alpha": 0.5, "beta": 0.2}
    of = objective(loss_type=["sigmoid", "cpo", "orpo"], loss_weights=[0.7, 0.4, 1.5], **options)
    stats, ref_logp = POLICY.answers(PAIRS)
    pairs = as_pairs(stats, ref_logp, PAIRS)
    parts = {"sigmoid": pairs.delta, "cpo": pairs.chosen_logp - pairs.rejected_logp, "orpo": log_odds_ratio(pairs)}
    values = torch.zeros(4, dtype=DTYPE)
    for (name, gap), weight in zip(parts.items(), (0.7, 0.4, 1.5), strict=True):
        inner, outer = (1.0, 0.2) if name == "orpo" else (0.2, 1.0)
        values += weight * outer * -(LABEL * logsigmoid(inner * gap) + (1 - LABEL) * logsigmoid(-inner * gap))
    nll = float((WEIGHT * -pairs.chosen_logp).sum() / (WEIGHT * pairs.chosen_length).sum())
    expected = weighted_mean(values) + (0.3 + 0.4 * 0.5 + 1.5) * nll
    loss, sums = of.loss(POLICY, PAIRS)
    assert float(loss / PAIRS["window_weight"]) == pytest.approx(expected, rel=1e-9)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(expected, rel=1e-9)
    metrics = evaluated(of, POLICY, PAIRS)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-9)
    assert metrics["nll_loss"] == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize("first", ["simpo", "sigmoid"])
def test_rewards_of_a_mixture_are_those_of_its_first_loss(objective: Callable[..., Any], first: str) -> None:
    second = {"simpo": "sigmoid", "sigmoid": "simpo"}[first]
    mixed, alone = (evaluated(objective(loss_type=names), POLICY, PAIRS) for names in ([first, second], [first]))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert mixed[name] == pytest.approx(alone[name])


def test_odpo_takes_the_difference_of_scores_before_the_margin(objective: Callable[..., Any]) -> None:
    loss, _ = objective(loss_type="odpo", beta=0.2, odpo_alpha=0.5).loss(POLICY, PAIRS)
    pairs = as_pairs(*POLICY.answers(PAIRS), PAIRS)
    # scores 3 and 1; none, so the margin; equal ones; 2 and 1.5
    offset = torch.tensor([0.5 * 2.0, 1, 0, 0.5 * 0.5], dtype=DTYPE)
    offset[[0, 3]] = 0.5 * torch.tensor([2.0, 0.5], dtype=DTYPE).log()
    ahead = 0.2 * pairs.delta - offset
    values = -(LABEL * logsigmoid(ahead) + (1 - LABEL) * logsigmoid(-ahead))
    torch.testing.assert_close(loss, (WEIGHT * values).sum())


def test_odpo_of_a_tie_is_the_same_whichever_side_is_called_better(objective: Callable[..., Any]) -> None:
    """Also where the scores of the two differ, on either side."""
    score = torch.tensor([3.0, 1, torch.nan, 2, 1, 3, 2, 2], dtype=DTYPE)
    ties = {**PAIRS, "score": score, "pair_label": torch.full_like(LABEL, 0.5), "pair_margin": torch.zeros_like(LABEL)}
    turned = {**ties, "pair_chosen": ties["pair_rejected"], "pair_rejected": ties["pair_chosen"]}
    of = objective(loss_type="odpo", beta=0.2)
    torch.testing.assert_close(of.loss(POLICY, ties)[0], of.loss(POLICY, turned)[0])
    ahead = 0.2 * as_pairs(*POLICY.answers(ties), ties).delta
    torch.testing.assert_close(of.loss(POLICY, ties)[0], -(WEIGHT * (logsigmoid(ahead) + logsigmoid(-ahead)) / 2).sum())


@pytest.mark.parametrize(
    ("losses", "beta", "per_token", "reference_free"),
    [
        (["simpo"], 3.0, True, True),
        (["orpo"], 0.4, True, True),
        (["cpo"], 0.4, False, True),
        (["sigmoid", "orpo"], 0.4, False, False),
        (["simpo", "cpo"], 3.0, True, True),
    ],
)
def test_metrics_of_each_kind_of_loss(
    objective: Callable[..., Any], losses: list[str], beta: float, per_token: bool, reference_free: bool
) -> None:
    metrics = evaluated(objective(loss_type=losses, beta=beta), POLICY, PAIRS)
    stats, ref_logp = POLICY.answers(PAIRS)
    assert ref_logp is not None
    logp = stats.logp / stats.length if per_token else stats.logp
    rewards = beta * (logp if reference_free else stats.logp - ref_logp)
    for side, rows in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        assert metrics[f"logps/{side}"] == pytest.approx(weighted_mean(logp[rows]))
        assert metrics[f"rewards/{side}"] == pytest.approx(weighted_mean(rewards[rows]))
    ahead = rewards[:4] - rewards[4:]
    assert metrics["rewards/margins"] == pytest.approx(weighted_mean(ahead))
    decided = WEIGHT * (LABEL == 1)
    assert metrics["rewards/accuracies"] == pytest.approx(weighted_mean((ahead > 0).double(), decided))
    assert metrics["mean_token_accuracy"] == pytest.approx(float((0 + 1 + 2 + 3) / LENGTH[:4].sum()))
    assert ("log_odds_chosen" in metrics) == ("orpo" in losses)


# ---------------------------------------------------------------------- single answers
def answers(rows: list[int], partners: list[int], real: bool = True) -> dict[str, Tensor]:
    """A batch of KTO; rows from 4 on are mismatched pairs, which weigh nothing unless ``real``."""
    own = len(rows)
    return {
        "row": torch.tensor(rows + partners),
        "label": torch.tensor([row % 2 == 0 for row in rows + partners]),
        "weight": torch.tensor([1.0] * own + [float(real)] * len(partners)),
        "is_partner": torch.arange(own + len(partners)) >= own,
        "attention_mask": torch.ones(own + len(partners), 2),
    }


def test_dpo_11_kto_in_training_and_evaluation_is_its_closed_form(objective: Callable[..., Any]) -> None:
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    ratio = torch.tensor([0.4, -0.3, 1.5, 0.8, 0.2, 0.9, 0.5, 2.0], dtype=DTYPE)
    policy = Known(ratio - 5, torch.full((8,), 3.0, dtype=DTYPE), torch.full((8,), -5.0, dtype=DTYPE))
    z0 = float(ratio[4:].mean())
    gain = 0.3 * (ratio[:4] - z0)
    good = torch.tensor([True, False, True, False])
    values = torch.where(good, 1.5 * torch.sigmoid(-gain), 0.7 * torch.sigmoid(gain))
    of = objective(loss_type="kto", **options)
    loss, sums = of.loss(policy, answers([0, 1, 2, 3], [4, 5, 6, 7]))
    torch.testing.assert_close(loss, values.sum())
    assert float(sums["kl"][0] / sums["kl"][1]) == pytest.approx(z0)
    metrics = evaluated(of, policy, answers([0, 1, 2], [4, 5, 6]), answers([3], [7]))
    assert metrics["loss"] == pytest.approx(float(values.mean()))
    assert metrics["kl"] == pytest.approx(z0)
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * float(ratio[[0, 2]].mean()))
    assert metrics["rewards/rejected"] == pytest.approx(0.3 * float(ratio[[1, 3]].mean()))


def test_dpo_11_stand_ins_are_not_counted_in_the_kl(objective: Callable[..., Any]) -> None:
    policy = Known(torch.ones(8, dtype=DTYPE), torch.ones(8, dtype=DTYPE), torch.zeros(8, dtype=DTYPE))
    of = objective(loss_type="kto")
    of.loss(policy, answers([0, 1], [4, 5], real=False))
    assert float(of.z0) == 0


def test_dpo_11_two_processes_estimate_one_kl(world: Any) -> None:
    """Also where one of them has nothing but stand-ins, in the last step of each epoch."""
    options = {
        **{"model": "DPOModule", "model.model": "@sft", "model.loss_type": "kto", "model.learning_rate": 3e-3},
        **{"model.desirable_weight": 8.0, "data": "PreferenceDataModule", "data.path": "@unpaired.jsonl"},
        **{"data.val_path": "@unpaired_val.jsonl", "data.batch_size": 8, "trainer.max_epochs": 6},
        "trainer.precision": "64-true",
    }
    both = {"data.batch_size": 4, "trainer.devices": 2, "trainer.strategy": "ddp"}
    one, two = world.fork(options), world.fork({**options, **both}, processes=2)
    kl = [row["kl"] for row in one.rows if "kl" in row]
    assert sum(value > 1e-3 for value in kl[2::3]) >= 2
    for first, second in zip(one.rows, two.rows, strict=True):
        assert second == pytest.approx(first, rel=1e-6, abs=1e-8)


# ---------------------------------------------------------------------- golden vectors
def test_dpo_2_likelihood_terms_are_means_over_the_tokens_of_the_chosen() -> None:
    cases = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["cases"]
    case, outputs = cases["dpo"]["inputs"], cases["dpo"]["outputs"]
    sides = (("chosen", "rejected"), ("len_c", "len_r"))
    policy = Known(*(torch.tensor(case[a] + case[b], dtype=DTYPE) for a, b in sides))
    one = torch.ones(3)
    batch = {
        **{"pair_chosen": torch.arange(3), "pair_rejected": torch.arange(3, 6), "pair_weight": one, "pair_label": one},
        **{"pair_margin": one, "score": torch.full((6,), torch.nan), "response_weight": torch.ones(6)},
        **{"attention_mask": torch.ones(6, 2), "window_weight": torch.tensor(3.0), "row": torch.arange(6)},
        "window_chosen_tokens": torch.tensor(float(sum(case["len_c"]))),
    }
    for name, beta, weight in (("cpo", 0.1, 0.4), ("orpo", case["orpo_lambda"], 1.0)):
        of = PairObjective([Term(name, 1.0, {"beta": beta}, weight)])
        loss, sums = of.loss(policy, batch)
        expected = outputs[name]["loss"] + weight * outputs["nll_chosen_token_mean"]
        assert float(loss) / 3 == pytest.approx(expected, rel=1e-10)
        assert float(sums["nll_loss"][0] / sums["nll_loss"][1]) == pytest.approx(outputs["nll_chosen_token_mean"])
        assert evaluated(of, policy, batch)["loss"] == pytest.approx(expected, rel=1e-10)
