"""Online direct preference optimisation: pairs are the policy's own samples, ordered by a reward or a judge."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_align.errors import check_options
from lightning_align.feedback.judges import preferences
from lightning_align.feedback.sources import kind_of_judge, load_judge
from lightning_align.losses.masked import Metrics
from lightning_align.methods.dpo_options import pair_objective
from lightning_align.methods.measures import column_sums, truncated
from lightning_align.methods.online import OnlineModule
from lightning_align.methods.online_pairs import as_pairs, best_and_worst, number_of_pairs, pair_loss
from lightning_align.models.loading import Parameters, count_parameters
from lightning_align.rollout.types import Experience, Rollout


class OnlineDPOModule(OnlineModule):
    """Online DPO (OAIF, Guo et al. 2024, 2402.04792); docs/online_dpo.md.

    Every iteration draws completions of each prompt; the one that the reward likes best and the one it likes least are
    a pair for a preference loss, whose reference is the policy as it was at the start. Prompts whose completions score
    alike teach nothing; their share is logged. With a judge it is asked which of two completions is better, in both
    orders, and the reward is only logged.

    Args:
        learning_rate: 5e-7 for billions of parameters; up to 1e-4 for a few millions.
        samples_per_prompt: Completions that a pair is chosen from, at least 2.
        loss_type: ``sigmoid``, ``ipo``, or any other loss of pairs of ``DPOModule`` but ``cpo`` and ``orpo``.
        beta: Strength of the pull to the reference; null is the loss's own, 0.1 for ``sigmoid`` and ``ipo``.
        label_smoothing: Probability that an order is wrong (``sigmoid``, ``robust``, ``simpo``).
        judge: Who compares two completions, instead of the reward: a run, path, hub id, ``http://host:port/v1#model``,
            ``package.module.function`` or ``file.py:function``.
        judge_wording: How a language model is asked: ``default``, ``playground``, or a YAML file.
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
        judge: str | None = None,
        judge_wording: str = "default",
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
            (
                "missing_eos_penalty",
                missing_eos_penalty,
                missing_eos_penalty is None or judge is None,
                "null with a judge",
            ),
            ("samples_per_prompt", samples_per_prompt, samples_per_prompt == 2 or judge is None, "2 with a judge"),
        )
        self.objective = pair_objective(loss_type, beta=beta, label_smoothing=label_smoothing)
        self.missing_eos_penalty = missing_eos_penalty
        self.judge_source = judge
        self.judge_wording = judge_wording

    def configure_model(self) -> None:
        """Also the judge."""
        super().configure_model()
        if self.judge_source is not None and not hasattr(self, "judge"):
            self.judge = load_judge(self.judge_source, self.judge_wording)

    def parameter_roles(self) -> dict[str, Parameters]:
        """The judge too, where it is a model in this process."""
        roles = super().parameter_roles()
        if self.judge_source is not None and kind_of_judge(self.judge_source) == "model":
            roles["judge"] = count_parameters(self.judge_source, None, AutoModelForCausalLM, dtype="auto")
        return roles

    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """A pair for each prompt, with log-probs under the reference."""
        reference = self.stats(self.frozen.reference, rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, rollout.engine_logp, reference.logp)
        scores = proxy.total
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * truncated(rollout)
        if self.judge_source is not None:
            scores, judged = self.judged(rollout)
            metrics |= judged
        rows, dropped = best_and_worst(scores, rollout)
        everything = Experience(rollout, scores, ref_logp=reference.logp)
        margins = scores[rows[::2]] - scores[rows[1::2]]
        metrics |= self.ratios(
            {
                **column_sums({"objective/scores": scores, "objective/scores_margin": margins}),
                "pairs/dropped": (scores.new_tensor(dropped), scores.new_tensor(len(rollout.rows_of_prompts()))),
            }
        )
        return as_pairs(everything, rows), metrics

    def judged(self, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Probability of each completion to be the better one of its prompt's two ``[B]``, NaN without an answer."""
        prompts = [record["prompt"] for record in rollout.records[::2]]
        label, sums = preferences(self.judge, prompts, rollout.completions[::2], rollout.completions[1::2])
        scores = torch.stack([label, 1 - label], dim=1).flatten().to(self.device)
        return scores, self.ratios({name: (a.to(self.device), b.to(self.device)) for name, (a, b) in sums.items()})

    def divisor(self, minibatch: Experience) -> Tensor:
        """Pairs."""
        return number_of_pairs(minibatch)

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """The preference loss of one micro-batch."""
        return pair_loss(self, self.objective, experience, normaliser)
