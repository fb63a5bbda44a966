"""Losses of direct preference optimisation: one function a method, one value a pair; KTO's, one value an answer.

Of an answer y: logp and ref_logp are sums over its n tokens, Λ = logp − ref_logp, a = logp / n. Of a pair:
Δ = Λ_chosen − Λ_rejected. Gradients flow through the policy's log-probs only. [P] pairs, [R] answers.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LEAST_SURPRISE = 1e-7  # nats a token: odds are infinite where an answer is certain


@dataclass(frozen=True)
class Pairs:
    """What the losses need to know of pairs, all ``[P]``, in float32 or wider.

    Args:
        chosen_logp: Log-prob of the better answer under the policy, summed over its tokens.
        rejected_logp: Of the worse one.
        chosen_length: Tokens of the better answer, at least 1.
        rejected_length: Of the worse one.
        ref_chosen_logp: Log-prob of the better answer under the reference; None without one.
        ref_rejected_logp: Of the worse one.
        margin: By how much the better one is better, in units of β times log-odds; None stands for 0.
        score_gap: Difference of their scores where they have any and do not tie, else 0; None stands for 0.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    ref_chosen_logp: Tensor | None = None
    ref_rejected_logp: Tensor | None = None
    margin: Tensor | None = None
    score_gap: Tensor | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """Λ of the better answers."""
        assert self.ref_chosen_logp is not None, "this loss compares with a reference"
        return self.chosen_logp - self.ref_chosen_logp

    @property
    def rejected_ratio(self) -> Tensor:
        """Λ of the worse answers."""
        assert self.ref_rejected_logp is not None, "this loss compares with a reference"
        return self.rejected_logp - self.ref_rejected_logp

    @property
    def delta(self) -> Tensor:
        """Δ."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def chosen_mean(self) -> Tensor:
        """a of the better answers."""
        return self.chosen_logp / self.chosen_length

    @property
    def rejected_mean(self) -> Tensor:
        """a of the worse answers."""
        return self.rejected_logp / self.rejected_length

    def swapped(self) -> "Pairs":
        """The same pairs, judged the other way round."""
        return Pairs(
            self.rejected_logp,
            self.chosen_logp,
            self.rejected_length,
            self.chosen_length,
            self.ref_rejected_logp,
            self.ref_chosen_logp,
            None if self.margin is None else -self.margin,
            None if self.score_gap is None else -self.score_gap,
        )


# ---------------------------------------------------------------------- with a reference
def sigmoid(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: −logsigmoid(βΔ) (Rafailov et al. 2023, 2305.18290, eq. 7).

    With ε = ``label_smoothing``, conservative DPO: −(1 − ε) logsigmoid(βΔ) − ε logsigmoid(−βΔ) (Mitchell 2023).
    """
    return _cross_entropy(beta * pairs.delta, label_smoothing)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """[−(1 − ε) logsigmoid(βΔ) + ε logsigmoid(−βΔ)] / (1 − 2ε) (Chowdhury et al. 2024, 2403.00409).

    Where labels are swapped with probability ε, its mean is the loss of the true labels.
    """
    logits, flips = beta * pairs.delta, label_smoothing
    return (-(1 - flips) * logsigmoid(logits) + flips * logsigmoid(-logits)) / (1 - 2 * flips)


def ipo(pairs: Pairs, *, beta: float = 0.1, ipo_average: bool = True) -> Tensor:
    """(Λ_c/n_c − Λ_r/n_r − 1/(2β))², β being their τ (Azar et al. 2023, 2310.12036, eq. 17).

    ``ipo_average`` is the authors' practice and TRL's; without it (Δ − 1/(2β))², as in the paper.
    """
    gap = _mean_gap(pairs) if ipo_average else pairs.delta
    return (gap - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float = 0.05) -> Tensor:
    """max(0, 1 − βΔ), β being their γ (RSO, Liu et al. 2023, 2309.06657)."""
    return torch.relu(1 - beta * pairs.delta)


def odpo(pairs: Pairs, *, beta: float = 0.1, odpo_alpha: float = 1.0) -> Tensor:
    """−logsigmoid(βΔ − offset) (Amini et al. 2024, 2402.10571).

    The offset is α·log(s_chosen − s_rejected) where answers have scores, else the margin (0 without one).
    """
    offset = torch.zeros_like(pairs.chosen_logp) if pairs.margin is None else pairs.margin
    if pairs.score_gap is not None:
        scored = pairs.score_gap > 0
        offset = torch.where(scored, odpo_alpha * pairs.score_gap.where(scored, 1.0).log(), offset)
    return -logsigmoid(beta * pairs.delta - offset)


def dpop(pairs: Pairs, *, beta: float = 0.3, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-positive: −logsigmoid(β (Δ − λ max(0, −Λ_c))) (Smaug, Pal et al. 2024, 2402.13228).

    It keeps the better answer from becoming less likely than under the reference.
    """
    return -logsigmoid(beta * (pairs.delta - dpop_lambda * torch.relu(-pairs.chosen_ratio)))


def sigmoid_norm(pairs: Pairs, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: −logsigmoid(β (Λ_c/n_c − Λ_r/n_r)) (Tülu 3, Lambert et al. 2024, 2411.15124)."""
    return -logsigmoid(beta * _mean_gap(pairs))


def r_dpo(pairs: Pairs, *, beta: float = 0.1, r_dpo_alpha: float = 0.02) -> Tensor:
    """−logsigmoid(βΔ + α (n_c − n_r)) (Park et al. 2024, 2403.19159).

    Added, not subtracted: with r = β log(π/π_ref) + α n, a longer winner is already explained by its length.
    """
    return -logsigmoid(beta * pairs.delta + r_dpo_alpha * (pairs.chosen_length - pairs.rejected_length))


# ---------------------------------------------------------------------- without one
def slic(pairs: Pairs, *, slic_delta: float = 1.0, slic_lambda: float = 0.1) -> Tensor:
    """max(0, δ − logp_c + logp_r) − λ logp_c (SLiC-HF, Zhao et al. 2023, 2305.10425; y_ref is the chosen)."""
    rank = torch.relu(slic_delta - pairs.chosen_logp + pairs.rejected_logp)
    return rank - slic_lambda * pairs.chosen_logp


def simpo(pairs: Pairs, *, beta: float = 2.0, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """−logsigmoid(β (a_c − a_r) − γ) (Meng et al. 2024, 2405.14734, eq. 6); smoothed as :func:`sigmoid`."""
    return _cross_entropy(beta * (pairs.chosen_mean - pairs.rejected_mean) - simpo_gamma, label_smoothing)


def cpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """−logsigmoid(β (logp_c − logp_r)), smoothed as :func:`sigmoid` (Xu et al. 2024, 2401.08417).

    The paper's second term, the negative log-likelihood of the chosen, belongs to the batch: see :data:`NLL_OPTION`.
    """
    return _cross_entropy(beta * (pairs.chosen_logp - pairs.rejected_logp), label_smoothing)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−λ logsigmoid(log odds_c − log odds_r), odds = e^a / (1 − e^a) (Hong et al. 2024, 2403.07691, eq. 6 and 7).

    λ is ``beta``, as in TRL. The likelihood term belongs to the batch: see :data:`NLL_OPTION`.
    """
    return -beta * logsigmoid(log_odds_ratio(pairs))


def log_odds_ratio(pairs: Pairs) -> Tensor:
    """log odds_c − log odds_r of the answers' mean token log-probs ``[P]``, ORPO's measure of preference."""
    return _log_odds(pairs.chosen_mean) - _log_odds(pairs.rejected_mean)


# ---------------------------------------------------------------------- single answers
def kto(
    ratio: Tensor,
    label: Tensor,
    z0: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ_D (1 − σ(β (Λ − z0))) of good answers, λ_U (1 − σ(β (z0 − Λ))) of bad ones.

    Ethayarajh et al. 2024 (2402.01306, eq. 7).

    Args:
        ratio: Λ ``[R]``.
        label: True for a good answer ``[R]``.
        z0: Estimate of the KL from the reference, see :func:`kto_z0`; a constant.
        beta: β.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        Loss of each answer ``[R]``.
    """
    gain = beta * (ratio - z0.detach())
    # 1 − σ(x) is σ(−x)
    good, bad = desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    return torch.where(label.bool(), good, bad)


def kto_z0(total: Tensor, count: Tensor) -> Tensor:
    """max(0, mean of Λ over mismatched prompts and answers), from sum and count over the global batch; no gradient."""
    return (total / count.clamp(min=1)).clamp(min=0).detach()


# ---------------------------------------------------------------------- the table
LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, robust, ipo, hinge, odpo, dpop, sigmoid_norm, r_dpo),
        *(slic, simpo, cpo, orpo),
    )
}
REFERENCE_FREE = frozenset({"slic", "simpo", "cpo", "orpo"})
# Whose rewards and log-probs are means over tokens; the others' are sums.
PER_TOKEN = frozenset({"simpo", "orpo"})
# Losses that have the chosen answers' negative log-likelihood a token as a second term: the option of its weight, or 1.
NLL_OPTION: dict[str, str | None] = {"cpo": "cpo_alpha", "orpo": None}


def accepted_options(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Names and defaults of a loss's own options."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def bound(loss: Callable[..., Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a loss: those given, where they are not None, else its defaults."""
    return {
        name: default if options.get(name) is None else options[name]
        for name, default in accepted_options(loss).items()
    }


# ---------------------------------------------------------------------- helpers
def _cross_entropy(logits: Tensor, label_smoothing: float) -> Tensor:
    if not label_smoothing:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _mean_gap(pairs: Pairs) -> Tensor:
    return pairs.chosen_ratio / pairs.chosen_length - pairs.rejected_ratio / pairs.rejected_length


def _log_odds(mean_logp: Tensor) -> Tensor:
    """a − log(1 − e^a), a at most −1e-7; each branch of log(1 − e^a) sees only values at which it is finite."""
    a = mean_logp.clamp(max=-LEAST_SURPRISE)
    unlikely = a < -math.log(2)
    far, near = a.where(unlikely, -1.0), a.where(~unlikely, -0.5)
    return a - torch.where(unlikely, torch.log1p(-far.exp()), torch.log(-torch.expm1(near)))
