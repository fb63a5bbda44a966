"""Measuring policies on fixed prompts: KL, scores and win rate over the model that all of them started from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.comparison import both_orders, per_prompt, score_judge
from lightning_align.lab.evaluation.intervals import means
from lightning_align.lab.evaluation.policies import best_of, control_length, sample_metrics
from lightning_align.lab.evaluation.sampling import Policy, Prompts, Samples, Settings, gathered, score_columns
from lightning_align.lab.overopt import Array
from lightning_align.rewards.base import Reward
from lightning_align.rollout.types import Rollout

ANSWERS_KEPT = 8  # prompts whose first answer a row keeps
DIGITS = 7  # of a prompt's values: what float32 holds
HELDOUT = "heldout"
HELDOUT_LOWER = "heldout_lower"


@dataclass(frozen=True)
class Scorers:
    """What scores answers.

    Attributes:
        scores: ``proxy`` and ``gold``, as far as there are any.
        heldout: Rewards that neither training nor the proxy has seen; several are an ensemble.
        judge: The score that decides who wins, a key of ``scores`` or ``heldout``; None without any.
    """

    scores: Mapping[str, Reward]
    heldout: Sequence[Reward]
    judge: str | None


class Meter:
    """Measures policies that started from one model, always on the same prompts and seeds.

    Args:
        start: The model that they started from.
        prompts: What is answered.
        settings: How; the KL needs temperature 1 and nothing truncated.
        scorers: What scores the answers.
        distinct_words: Size of the sets that distinct n-grams are counted in.
    """

    def __init__(
        self, start: Policy, prompts: Prompts, settings: Settings, scorers: Scorers, *, distinct_words: int = 500
    ) -> None:
        assert settings.measures_kl
        self.start = start
        self.prompts = prompts
        self.settings = settings
        self.scorers = scorers
        self.distinct_words = distinct_words
        for reward in (*scorers.scores.values(), *scorers.heldout):
            reward.to(start.device)

    @cached_property
    def start_samples(self) -> Samples:
        """Answers of the start for comparisons, independent of those that a policy with its weights gives."""
        rollout = self.start.draw(self.prompts, stream=1)
        return gathered(rollout, self.scored(rollout), self.settings.params.num_samples)

    def scored(self, rollout: Rollout) -> dict[str, Any]:
        """Scores ``[B]`` by name: each of :class:`Scorers` with its parts, and the ensemble's mean and lower bound."""
        columns: dict[str, Any] = {}
        for name, reward in self.scorers.scores.items():
            columns |= score_columns(name, reward, rollout)
        members = [score_columns(HELDOUT, reward, rollout)[HELDOUT] for reward in self.scorers.heldout]
        if len(members) == 1:
            columns[HELDOUT] = members[0]
        elif members:
            mean = sum(members) / len(members)
            spread = (sum((member - mean) ** 2 for member in members) / len(members)) ** 0.5
            columns |= {HELDOUT: mean, HELDOUT_LOWER: mean - spread}
            columns |= {f"{HELDOUT}_{number}": member for number, member in enumerate(members, start=1)}
        return columns

    def measure(self, policy: Policy) -> dict[str, Any]:
        """``metrics`` with intervals, ``per_prompt`` values ``[P]`` and the first prompts' ``answers`` of a policy.

        Raises:
            UserError: It has other tokens than the start: there is no KL between them.
        """
        if policy.tokenizer.get_vocab() != self.start.tokenizer.get_vocab():
            raise UserError(
                f"{self.start.source} has another vocabulary than {policy.source}: there is no KL between them"
            )
        rollout = policy.draw(self.prompts)
        columns = policy.token_columns(rollout, self.start.model) | self.scored(rollout)
        samples = gathered(rollout, columns, self.settings.params.num_samples)
        metrics = sample_metrics(samples, distinct_words=self.distinct_words, seed=self.settings.seed)
        values = {name: per_prompt(column) for name, column in samples.columns.items() if name != "entropy"}
        if self.scorers.judge is not None:
            values["win_rate"] = self._wins(samples)
            metrics |= means({"win_rate": values["win_rate"]}, seed=self.settings.seed)
            options: dict[str, Any] = {"judge": self.scorers.judge, "tie_eps": 0.0, "seed": self.settings.seed}
            (controlled,) = control_length([samples], self.start_samples, **options)
            metrics["length_controlled_win_rate"] = controlled
        return {
            "metrics": {name: estimate.as_dict() for name, estimate in metrics.items()},
            "per_prompt": {name: [float(f"{value:.{DIGITS}g}") for value in row] for name, row in values.items()},
            "answers": self._answers(samples, rollout),
        }

    def _wins(self, samples: Samples) -> Array:
        assert self.scorers.judge is not None
        judge = self.scorers.judge
        return per_prompt(both_orders(*score_judge(samples.columns[judge], self.start_samples.columns[judge])))

    def _answers(self, samples: Samples, rollout: Rollout) -> list[dict[str, Any]]:
        """The first answer to each of the first prompts, with its scores."""
        shown = [name for name in samples.columns if name not in ("entropy", "truncated", "kl_k1", "kl_k3")]
        every = self.settings.params.num_samples
        return [
            {
                "prompt": self.prompts.records[index]["prompt"],
                "completion": samples.texts[index][0],
                "finish_reason": rollout.finish_reason[index * every],
                **{name: float(samples.columns[name][index, 0]) for name in shown},
            }
            for index in range(min(ANSWERS_KEPT, len(self.prompts)))
        ]

    def best_of(self) -> list[dict[str, Any]]:
        """:func:`~lightning_align.lab.evaluation.policies.best_of` of the start's answers, a row for each n."""
        rollout = self.start.draw(self.prompts)
        columns: dict[str, Any] = {}
        for name, reward in self.scorers.scores.items():
            columns |= score_columns(name, reward, rollout)
        samples = gathered(rollout, columns, self.settings.params.num_samples)
        return best_of(samples, seed=self.settings.seed)
