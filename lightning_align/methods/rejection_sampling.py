"""Rejection sampling: sample several completions, keep the best, fine-tune on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align.errors import UserError, check_options
from lightning_align.methods.imitation import ImitationModule, said_of_scores
from lightning_align.methods.measures import column_sums
from lightning_align.rollout.types import Experience, Rollout, concatenate, with_completion


@dataclass
class Best:
    """The best completion that a prompt had in an iteration.

    Args:
        ids: Its tokens, the ending one included.
        score: Its score when it was drawn.
        iteration: When that was, counted from 0.
    """

    ids: list[int]
    score: float
    iteration: int


class RejectionSamplingModule(ImitationModule):
    """Best-of-n as training (LLaMA-2, section 3.2.3; RAFT, Dong et al. 2023); docs/rejection_sampling.md.

    Every iteration draws ``samples_per_prompt`` completions of each prompt, keeps the ones that the reward likes best,
    and takes steps of supervised fine-tuning on them. Nothing holds the policy near its start but the number of steps.

    Args:
        learning_rate: 5e-6 to 2e-5 for billions of parameters; up to 5e-4 for a few millions.
        samples_per_prompt: N, 8 to 64.
        keep: The ``best`` of each prompt, its ``top_k``, or all above a ``threshold``.
        top_k_kept: How many ``top_k`` keeps.
        threshold: Score that ``threshold`` asks for, strictly above.
        min_score: Also leave out what does not score more than this, however good it is beside its siblings.
        pool: Learn from the ``last`` iteration's samples, the ``best_per_prompt`` of all iterations so far, or
            ``all_best`` ones of every iteration (LLaMA-2, whose first versions forgot with the last alone).
        kwargs: The settings of :class:`~lightning_align.methods.online.OnlineModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 1e-5,
        samples_per_prompt: int = 16,
        keep: Literal["best", "top_k", "threshold"] = "best",
        top_k_kept: int = 4,
        threshold: float | None = None,
        min_score: float | None = None,
        pool: Literal["last", "best_per_prompt", "all_best"] = "best_per_prompt",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, samples_per_prompt=samples_per_prompt, **kwargs)
        check_options(
            "model",
            ("top_k_kept", top_k_kept, top_k_kept >= 1, "at least 1"),
            ("threshold", threshold, (threshold is None) == (keep != "threshold"), "a score with keep threshold alone"),
            ("pool", pool, pool == "last" or keep == "best", "last, or keep best"),
        )
        self.keep = keep
        self.top_k_kept = top_k_kept
        self.threshold = threshold
        self.min_score = min_score
        self.pool_kind = pool
        self.pool: dict[str, list[Best]] = {}  # by prompt

    # ------------------------------------------------------------------ samples to experience
    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """The completions to learn from, with their scores."""
        reference = self.stats(self.frozen.reference, rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, rollout.engine_logp, reference.logp)
        rows = self.kept_rows(proxy.total, rollout)
        metrics |= self.selection_metrics(rollout, proxy.total, rows)
        everything = Experience(rollout, proxy.total)
        kept = everything.select(rows)
        if self.pool_kind != "last":
            kept, age = self.with_earlier(kept)
            metrics |= self.ratios(column_sums({"rs/pool_age": age}))
        self.check_some(len(kept), proxy.total)
        return kept if len(kept) else everything.without_learning(), metrics

    def kept_rows(self, scores: Tensor, rollout: Rollout) -> list[int]:
        """Rows to learn from; of equal scores the first is the better one, and what has no score is not kept."""
        values = scores.tolist()
        kept = []
        for rows in rollout.rows_of_prompts():
            order = sorted((row for row in rows if values[row] == values[row]), key=lambda row: -values[row])
            number = {"best": 1, "top_k": self.top_k_kept, "threshold": len(order)}[self.keep]
            kept += sorted(order[:number])
        bounds = [bound for bound in (self.threshold, self.min_score) if bound is not None]
        return [row for row in kept if all(values[row] > bound for bound in bounds)]

    def selection_metrics(self, rollout: Rollout, scores: Tensor, rows: Sequence[int]) -> dict[str, float]:
        """What choosing gains, how much is kept, and how many completions of a prompt differ; over all ranks."""
        groups = rollout.rows_of_prompts()
        best = torch.stack([torch.nan_to_num(scores[group], nan=-torch.inf).max() for group in groups])
        unique = torch.tensor(
            [len({rollout.completions[row] for row in group}) / len(group) for group in groups], device=scores.device
        )
        metrics = self.ratios(
            {
                **column_sums({"rs/mean_score": scores, "rs/best_score": best.masked_fill(best.isinf(), torch.nan)}),
                "rs/kept": (scores.new_tensor(len(rows)), scores.new_tensor(len(scores))),
                "rs/unique_fraction": (unique.sum(), unique.new_tensor(len(unique))),
            }
        )
        if "rs/best_score" in metrics:
            metrics["rs/gain"] = metrics["rs/best_score"] - metrics["rs/mean_score"]
        return metrics

    def check_some(self, own: int, scores: Tensor) -> None:
        """Raise where no rank has anything to learn from."""
        if not self.on_every_rank(own):
            raise UserError(
                f"nothing is left of the completions of iteration {self.iteration + 1} ({said_of_scores(scores)}): "
                "lower model.threshold or model.min_score, or raise model.samples_per_prompt"
            )

    # ------------------------------------------------------------------ pool
    def with_earlier(self, kept: Experience) -> tuple[Experience, Tensor]:
        """With the pool's completions of these prompts, and the ages in iterations of all that is learnt then."""
        scores, ids = kept.scores.tolist(), kept.rollout.completion_ids()
        keys = [prompt_key(kept.rollout, row) for row in range(len(kept))]
        for key, score, completion in self.gather(list(zip(keys, scores, ids, strict=True))):
            self.remember(key, Best(completion, score, self.iteration))
        parts, ages = [], []
        for row, key in enumerate(keys):
            if self.pool_kind == "all_best" and key in keys[:row]:
                continue  # a prompt that was drawn twice has its completions there already
            for best in self.pool[key]:
                rollout = kept.rollout.select([row]).cropped()
                if best.ids != ids[row]:
                    rollout = with_completion(rollout, best.ids)
                parts.append(Experience(rollout, kept.scores.new_tensor([best.score])))
                ages.append(self.iteration - best.iteration)
        return concatenate(parts) if parts else kept, torch.tensor(ages, dtype=torch.float32, device=self.device)

    def remember(self, key: str, best: Best) -> None:
        """Add to the pool of a prompt, or take the place of what is worse."""
        earlier = self.pool.setdefault(key, [])
        if self.pool_kind == "all_best":
            if all(best.ids != other.ids for other in earlier):
                earlier.append(best)
        elif not earlier or best.score > earlier[0].score:
            self.pool[key] = [best]

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The pool."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"]["pool"] = {
            key: [[best.ids, best.score, best.iteration] for best in bests] for key, bests in self.pool.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        super().on_load_checkpoint(checkpoint)
        if self.pool_kind != "last":
            pool = checkpoint["method"]["pool"]
            self.pool = {key: [Best(*entry) for entry in entries] for key, entries in pool.items()}


def prompt_key(rollout: Rollout, row: int) -> str:
    """The tokens of a row's prompt, as a text: a checkpoint holds plain values only."""
    return " ".join(map(str, rollout.input_ids[row, : int(rollout.prompt_lengths[row])].tolist()))
