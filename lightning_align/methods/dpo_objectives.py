"""What :class:`~lightning_align.methods.dpo.DPOModule` minimises: a mixture of losses of pairs, or KTO's of answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_align.data.collate import PreferenceGroups
from lightning_align.data.unpaired import UnpairedRows
from lightning_align.errors import UserError
from lightning_align.losses.masked import Metrics, masked_sum
from lightning_align.losses.preference import LOSSES, PER_TOKEN, REFERENCE_FREE, Pairs, kto, kto_z0
from lightning_align.losses.preference_metrics import answer_sums, odds_sums, pair_sums
from lightning_align.models.answers import AnswerStats

Batch = Mapping[str, Tensor]
BALANCE = (1.0, 4 / 3)  # of the weights of good and bad answers (KTO, eq. 8)


class Policy(Protocol):
    """What an objective asks of the module."""

    def answers(self, batch: Batch, *, measure: bool = True) -> tuple[AnswerStats, Tensor | None]:
        """Statistics of a batch's answers, and their log-probs under the reference if there is one."""
        ...

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        ...

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks."""
        ...


@dataclass(frozen=True)
class Term:
    """One loss of a mixture.

    Args:
        name: In the table of losses.
        weight: Of its values.
        options: All that it accepts.
        nll_weight: Of the negative log-likelihood that comes with it.
    """

    name: str
    weight: float
    options: Mapping[str, Any]
    nll_weight: float = 0.0

    def values(self, pairs: Pairs, label: Tensor) -> Tensor:
        """Loss of each pair ``[P]``; ``label`` is the probability that chosen is the better one."""
        loss = LOSSES[self.name]
        swapped = loss(pairs.swapped(), **self.options)
        # where, not a product of 0: the swapped loss of a clear pair may be infinite
        mixed = label * loss(pairs, **self.options) + (1 - label) * swapped.where(label < 1, 0.0)
        return self.weight * mixed


class PairObjective:
    """Weighted losses of pairs, and the chosen answers' negative log-likelihood a token.

    Args:
        terms: The losses; the first says what rewards and log-probs are.
        rpo_alpha: Weight of the likelihood beside what terms bring along.
    """

    def __init__(self, terms: Sequence[Term], *, rpo_alpha: float = 0.0) -> None:
        self.terms = terms
        self.nll_weight = rpo_alpha + sum(term.weight * term.nll_weight for term in terms)
        first = terms[0]
        self.beta = float(first.options.get("beta", 1.0))
        self.reference_free = first.name in REFERENCE_FREE
        self.per_token = first.name in PER_TOKEN

    def check(self, data: PreferenceGroups, step_size: int) -> str | None:
        """Refuse data that a loss cannot use."""
        odpo = any(term.name == "odpo" for term in self.terms)
        if odpo and not data.margins.any() and not (data.table["score"] == data.table["score"]).any():
            raise UserError(
                "loss_type odpo needs to know by how much an answer is better, but no record has a margin, a strength "
                "or scores: use sigmoid"
            )
        return None

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the pairs of a micro-batch, and the sums behind the metrics."""
        of_pairs, likelihood, sums = self._parts(policy, batch)
        if not self.nll_weight:
            return of_pairs, sums
        # a mean over the window's tokens beside one over its pairs, by whose weight the sum will be divided
        tokens = batch["window_chosen_tokens"].clamp(min=torch.finfo(torch.float32).tiny)
        scale = batch["window_weight"].to(of_pairs.dtype) / tokens
        loss = of_pairs + self.nll_weight * scale * likelihood
        return loss, sums | {"loss": (loss.detach(), sums["loss"][1])}

    def evaluate(self, policy: Policy, batch: Batch) -> Metrics:
        """The sums of an evaluation; its loss is put together when all are known."""
        return self._parts(policy, batch)[2]

    def eval_metrics(self, policy: Policy, metrics: dict[str, float]) -> dict[str, float]:
        """Add the likelihood, a mean over the tokens of the whole evaluation, to the loss."""
        if self.nll_weight and "nll_loss" in metrics:
            metrics["loss"] += self.nll_weight * metrics["nll_loss"]
        return metrics

    def _parts(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """Summed losses of pairs, summed negative log-likelihood of the better answers, metrics."""
        stats, ref_logp = policy.answers(batch)
        pairs = as_pairs(stats, ref_logp, batch)
        dtype = stats.logp.dtype
        weight, label = batch["pair_weight"].to(dtype), batch["pair_label"].to(dtype)
        counted = weight > 0
        values = torch.stack([term.values(pairs, label) for term in self.terms]).sum(0)
        loss, total = masked_sum(weight * values, counted), masked_sum(weight, counted)
        likelihood = -masked_sum(weight * pairs.chosen_logp, counted)
        sums = {"loss": (loss.detach(), total)}
        sums |= pair_sums(
            pairs, weight, label, beta=self.beta, reference_free=self.reference_free, per_token=self.per_token
        )
        if any(term.name == "orpo" for term in self.terms):
            sums |= odds_sums(pairs, weight)
        if self.nll_weight:
            sums["nll_loss"] = likelihood.detach(), masked_sum(weight * pairs.chosen_length, counted)
        if stats.correct is not None:
            correct = stats.correct[batch["pair_chosen"]].to(dtype)
            sums["mean_token_accuracy"] = masked_sum(correct, counted), masked_sum(pairs.chosen_length, counted)
        for side in ("chosen", "rejected"):
            sums |= logit_sums(side, stats, batch[f"pair_{side}"], counted)
        return loss, likelihood, sums | token_sums(stats, batch, batch["response_weight"] > 0)


class UnpairedObjective:
    """KTO: each answer against a KL that is estimated on mismatched pairs of the whole optimiser step.

    Args:
        beta: Scale of the rewards.
        desirable_weight: Of good answers.
        undesirable_weight: Of bad ones.
    """

    reference_free = False

    def __init__(self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.options = {"beta": beta, **weights}
        self.z0: Tensor | None = None  # of the optimiser step under way
        self._evaluated: list[dict[str, Tensor]] = []

    def check(self, data: UnpairedRows, step_size: int) -> str | None:
        """Refuse steps of one answer; a warning where good and bad answers are out of balance."""
        if step_size < 2:
            raise UserError(
                "data.batch_size is 1, and so is the step: KTO estimates the KL on the answers of a step, give at "
                "least 2, or trainer.accumulate_grad_batches"
            )
        if not data.has_partners:
            raise UserError(
                "all records have the same prompt: KTO needs answers to other prompts, to measure the KL on"
            )
        good = int(data.labels.sum())
        bad = len(data) - good
        if not good or not bad:
            raise UserError(f"all answers are {'good' if good else 'bad'}: KTO needs some of both labels")
        share = float(data.weights[data.labels].sum() / data.weights[~data.labels].sum())
        ratio = self.options["desirable_weight"] * share / self.options["undesirable_weight"]
        if BALANCE[0] <= ratio <= BALANCE[1]:
            return None
        low, high = (self.options["undesirable_weight"] / share * bound for bound in BALANCE)
        return (
            f"{good:,} good and {bad:,} bad answers weigh {ratio:.3g} to 1, and KTO wants 1 to 4/3: set "
            f"model.desirable_weight between {low:.3g} and {high:.3g}, or lower the other"
        )

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the answers of a micro-batch, and the sums behind the metrics."""
        if bool(batch["is_partner"].any()):  # the first of an optimiser step
            self.z0 = kto_z0(*policy.all_reduce(self._mismatched(policy, batch)))
        assert self.z0 is not None, "the first micro-batch of a step brings the mismatched pairs"
        ratio, sums, own = self._answers(policy, batch)
        weight = own["weight"].to(ratio.dtype)
        values = kto(ratio, own["label"], self.z0.to(ratio.dtype), **self.options)
        loss, total = masked_sum(weight * values, weight > 0), weight.sum()
        return loss, sums | {"loss": (loss.detach(), total), "kl": (self.z0 * total, total)}

    def evaluate(self, policy: Policy, batch: Batch) -> Metrics:
        """The sums of an evaluation; answers are kept until the KL of all of them is known."""
        ratio, sums, own = self._answers(policy, batch)
        kept = {"ratio": ratio, "label": own["label"], "weight": own["weight"]}
        kept["mismatched"] = self._mismatched(policy, batch)
        self._evaluated.append({name: values.detach().cpu() for name, values in kept.items()})
        return sums

    def eval_metrics(self, policy: Policy, metrics: dict[str, float]) -> dict[str, float]:
        """Loss and KL of the whole evaluation."""
        parts, self._evaluated = policy.gather(self._evaluated), []
        z0 = kto_z0(*torch.stack([part["mismatched"] for part in parts]).sum(0))
        ratio, label, weight = (torch.cat([part[n] for part in parts]) for n in ("ratio", "label", "weight"))
        values = kto(ratio.double(), label, z0, **self.options)
        return metrics | {"loss": float((weight * values).sum() / weight.sum()), "kl": float(z0)}

    def _answers(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics, Batch]:
        """Λ of the answers ``[R]``, metrics that do not need the KL, and the rows of the batch without mismatched."""
        own = rows_of(batch, ~batch["is_partner"])
        stats, ref_logp = policy.answers(own)
        assert ref_logp is not None
        ratio = stats.logp - ref_logp
        weight = own["weight"].to(ratio.dtype)
        sums = answer_sums(stats.logp, ratio, own["label"], weight, beta=self.options["beta"])
        for side, of_side in (("chosen", own["label"]), ("rejected", ~own["label"])):
            rows = torch.arange(len(weight), device=weight.device)
            sums |= logit_sums(side, stats, rows, of_side & (weight > 0))
        return ratio, sums | token_sums(stats, own, weight > 0), own

    @torch.no_grad()
    def _mismatched(self, policy: Policy, batch: Batch) -> Tensor:
        """Sum of Λ over the mismatched pairs and their number ``[2]``; as many at a time as there are answers."""
        partners = rows_of(batch, batch["is_partner"])
        size = max(1, int((~batch["is_partner"]).sum()))
        total = torch.zeros(2, dtype=torch.float64, device=batch["weight"].device)
        for rows in torch.arange(len(partners["weight"]), device=total.device).split(size):
            part = rows_of(partners, rows)
            stats, ref_logp = policy.answers(part, measure=False)
            assert ref_logp is not None
            counted = part["weight"] > 0
            total += torch.stack([masked_sum(stats.logp - ref_logp, counted).double(), counted.sum().double()])
        return total


def as_pairs(stats: AnswerStats, ref_logp: Tensor | None, batch: Batch) -> Pairs:
    """The answers of a batch as pairs of them."""
    chosen, rejected = batch["pair_chosen"], batch["pair_rejected"]
    gap = batch["score"][chosen] - batch["score"][rejected]
    gap = gap.where(batch["pair_label"] != 0.5, 0.0)  # whatever its scores say, a tie has no better side
    return Pairs(
        stats.logp[chosen],
        stats.logp[rejected],
        stats.length[chosen].clamp(min=1),
        stats.length[rejected].clamp(min=1),
        None if ref_logp is None else ref_logp[chosen],
        None if ref_logp is None else ref_logp[rejected],
        batch["pair_margin"].to(stats.logp.dtype),
        gap.nan_to_num(0.0).to(stats.logp.dtype),
    )


def token_sums(stats: AnswerStats, batch: Batch, counted: Tensor) -> Metrics:
    """Entropy over the tokens of answers that count, and the number of all tokens."""
    one = stats.logp.new_ones(())
    # the stand-in for an empty batch (a process with nothing to do) weighs nothing
    sums = {"num_tokens": ((batch["attention_mask"].sum(1) * counted).sum(), one)}
    if stats.entropy is not None:
        sums["entropy"] = masked_sum(stats.entropy.detach(), counted), masked_sum(stats.length, counted)
    return sums


def logit_sums(side: str, stats: AnswerStats, rows: Tensor, counted: Tensor) -> Metrics:
    """TRL's ``logits/…`` of one side: over the tokens of its answers, the mean of the logits over the vocabulary.

    Args:
        side: ``chosen`` or ``rejected``.
        stats: Of answers.
        rows: Some of these, one as often as it is compared.
        counted: Which of ``rows`` count.
    """
    if stats.mean_logit is None:
        return {}
    return {f"logits/{side}": (masked_sum(stats.mean_logit[rows], counted), masked_sum(stats.length[rows], counted))}


def rows_of(batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch; what does not belong to rows stays as it is."""
    size = len(batch["weight"])
    return {name: values[rows] if values.ndim and len(values) == size else values for name, values in batch.items()}
