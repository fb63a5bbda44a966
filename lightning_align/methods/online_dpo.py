"""Online direct preference optimisation: pairs are the policy's own samples, ordered by a reward or a judge."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_align.errors import check_options
from lightning_align.losses.masked import Metrics
from lightning_align.methods.dpo_options import pair_objective
from lightning_align.methods.measures import column_sums, truncated
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.online_pairs import best_and_worst, number_of_pairs, pair_loss
from lightning_align.models.logprobs import TokenStats
from lightning_align.rollout.types import Experience, Rollout


class OnlineDPOModule(OnlineModule):
    """Online DPO (OAIF, Guo et al. 2024, 2402.04792); docs/online_dpo.md.

    Every iteration draws completions of each prompt; the one that the reward likes best and the one it likes least are
    a pair for a preference loss, whose reference is the policy as it was at the start. Prompts whose completions score
    alike teach nothing; their share is logged.

    Args:
        learning_rate: 5e-7 for billions of parameters; up to 1e-4 for a few millions.
        samples_per_prompt: Completions that a pair is chosen from, at least 2.
        loss_type: ``sigmoid``, ``ipo``, or any other loss of pairs of ``DPOModule`` but ``cpo`` and ``orpo``.
        beta: Strength of the pull to the reference; null is the loss's own, 0.1 for ``sigmoid`` and ``ipo``.
        label_smoothing: Probability that an order is wrong (``sigmoid``, ``robust``, ``simpo``).
        missing_eos_penalty: Subtract this from the score of a completion that hit the length limit, before ordering.
        kwargs: The settings of :class:`~lightning_align.methods.online.OnlineModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 5e-7,
        samples_per_prompt: int = 2,
        loss_type: str = "sigmoid",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        missing_eos_penalty: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, samples_per_prompt=samples_per_prompt, **kwargs)
        check_options(
            "model",
            ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 2, "at least 2: they are compared"),
            ("micro_batch_size", self.micro_batch_size, self.micro_batch_size >= 2, "at least 2, a pair"),
            ("beta", beta, beta is None or 0 < beta < math.inf, "a number above 0"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a probability from 0 to below 0.5"),
            (
                "missing_eos_penalty",
                missing_eos_penalty,
                missing_eos_penalty is None or missing_eos_penalty > 0,
                "above 0: it is subtracted",
            ),
        )
        self.objective = pair_objective(loss_type, beta=beta, label_smoothing=label_smoothing)
        self.missing_eos_penalty = missing_eos_penalty

    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """A pair for each prompt, with log-probs under the reference."""
        reference = self.stats(self.frozen.reference, rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, TokenStats(rollout.engine_logp, *[None] * 3), reference)
        scores = proxy.total
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * truncated(rollout)
        rows, dropped = best_and_worst(scores, rollout)
        everything = Experience(rollout, scores, ref_logp=reference.logp)
        margins = scores[rows[::2]] - scores[rows[1::2]]
        metrics |= self.ratios(
            {
                **column_sums({"objective/scores": scores, "objective/scores_margin": margins}),
                "pairs/dropped": (scores.new_tensor(dropped), scores.new_tensor(len(rollout.rows_of_prompts()))),
            }
        )
        return everything.select(rows) if rows else everything.select([0, 1]).without_learning(), metrics

    def divisor(self, minibatch: Experience) -> Tensor:
        """Pairs."""
        return number_of_pairs(minibatch)

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """The preference loss of one micro-batch."""
        return pair_loss(self, self.objective, experience, normaliser)
