"""Hindsight instruction relabelling: learn every output under the instruction that it does follow."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align.data.encode import encode_prompts
from lightning_align.errors import UserError, check_options
from lightning_align.feedback.relabel import Conditioned, Feedback, Relabelled, build_relabel, check_told_apart, under
from lightning_align.losses.hindsight import ABSENT, Candidates, hindsight_loss
from lightning_align.losses.masked import Metrics
from lightning_align.methods.base import AlignModule
from lightning_align.methods.lessons import (
    Alternatives,
    HindsightExperience,
    Lesson,
    as_experience,
    key,
    padded,
    quantiles,
    satisfaction,
)
from lightning_align.methods.measures import column_sums
from lightning_align.methods.online import OnlineModule
from lightning_align.models.logprobs import token_stats
from lightning_align.rewards.base import Scores
from lightning_align.rollout.types import Experience, Rollout, SamplingParams

EMPTY_ROUNDS = 3  # in a row, before a relabelling is taken to be broken


class HIRModule(OnlineModule):
    """Hindsight instruction relabelling (Zhang et al. 2023, 2302.05206); docs/hir.md.

    Every iteration draws completions, finds an instruction that each of them follows, and learns it under that one:
    failures teach as successes do, and no reward is maximised. A contrastive term keeps the instruction from being
    ignored.

    Args:
        learning_rate: 1e-5 to 5e-5 for billions of parameters; up to 5e-4 for a few millions.
        relabel: ``constraint`` (the playground's prompts, rewritten), ``binary`` (a right or a wrong answer),
            ``score_bucket`` (the quantile of the score), ``identity`` (the prompt as it was), or your own:
            ``package.module.function`` or ``file.py:function``.
        instructions: What ``binary`` and ``score_bucket`` put before a prompt, from the best on; the first is what the
            model is asked with in training and evaluation.
        satisfied_above: Score above which a completion counts as satisfying its prompt; by default the playground's
            demands decide.
        learn_from: ``all`` completions, ``failures`` (they did not satisfy the prompt they were drawn for), or
            ``successes``.
        buffer_rounds: Learn from this iteration's completions and those of so many before, less one.
        num_negatives: Other instructions that each completion is compared under, a forward pass each: that of the
            relabelling, then others of the iteration.
        contrast_coef: Weight of the contrastive term, α.
        contrast_norm: Compare ``mean`` log-probs of the tokens, or their ``sum``, which saturates.
        entropy_coef: Weight of the entropy, β.
        label_smoothing: Share of each label that is spread over the vocabulary, ε.
        num_epochs: Passes over the completions of an iteration.
        kwargs: The settings of :class:`OnlineModule`.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 2e-5,
        relabel: str = "constraint",
        instructions: list[str] | None = None,
        satisfied_above: float | None = None,
        learn_from: Literal["all", "failures", "successes"] = "all",
        buffer_rounds: int = 1,
        num_negatives: int = 3,
        contrast_coef: float = 1.0,
        contrast_norm: Literal["mean", "sum"] = "mean",
        entropy_coef: float = 0.001,
        label_smoothing: float = 0.1,
        num_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, num_epochs=num_epochs, **kwargs)
        check_options(
            "model",
            ("buffer_rounds", buffer_rounds, buffer_rounds >= 1, "at least 1"),
            ("num_negatives", num_negatives, num_negatives >= 0, "0 or more"),
            ("num_negatives", num_negatives, num_negatives >= 1 or contrast_coef == 0, "1 or more, or contrast_coef 0"),
            ("contrast_coef", contrast_coef, contrast_coef >= 0, "0 or more"),
            ("entropy_coef", entropy_coef, entropy_coef >= 0, "0 or more"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "a share from 0 up to (not including) 1"),
        )
        self.relabel = build_relabel(relabel, satisfied_above=satisfied_above, instructions=instructions)
        self.learn_from = learn_from
        self.buffer_rounds = buffer_rounds
        self.num_negatives = num_negatives if contrast_coef else 0
        self.contrast_coef = contrast_coef
        self.contrast_norm = contrast_norm
        self.entropy_coef = entropy_coef
        self.label_smoothing = label_smoothing
        self.buffer: list[Lesson] = []  # of all processes, in each of them
        self.empty_rounds = 0

    def on_fit_start(self) -> None:
        """Ready to sample; instructions must differ to the model, which may not know their words."""
        super().on_fit_start()
        check_told_apart(self.relabel, self.tokenizer)

    # ------------------------------------------------------------------ samples
    def draw(self, batch: Mapping[str, Any], params: SamplingParams, seeds: Sequence[int]) -> Rollout:
        """Completions of the prompts as they are asked in use, here and in evaluations."""
        if isinstance(self.relabel, Conditioned):
            prompts = [self.relabel.asked(record["prompt"]) for record in batch["records"]]
            batch = {**batch, "prompt_ids": encode_prompts(self.tokenizer, prompts)}
            limit, longest = self.max_tokens(), max(map(len, batch["prompt_ids"]), default=0)
            if limit is not None and longest > limit:
                raise UserError(
                    f"a prompt takes {longest} tokens with its instruction, and there is room for {limit} before a "
                    "completion: leave long prompts out, or lower model.max_new_tokens"
                )
        return super().draw(batch, params, seeds)

    @torch.no_grad()
    def experience(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Relabel the completions, and take what there is to learn from the buffer."""
        reference = self.stats(self.frozen.reference, rollout)
        proxy = self.scores(self.frozen.reward, rollout)
        metrics = self.sample_metrics(rollout, proxy, rollout.engine_logp, reference.logp)
        relabelled = self.relabelled(rollout, proxy)
        lessons = self.lessons(rollout, proxy, relabelled)
        satisfied = satisfaction(relabelled, self.device)
        found = torch.tensor([float(hindsight.instruction is not None) for hindsight in relabelled], device=self.device)
        learnt = (found.new_tensor(len(lessons)), found.new_tensor(len(rollout)))
        columns = {"hir/satisfied_before": satisfied, "hir/relabelled_fraction": found}
        metrics |= self.ratios({**column_sums(columns), "hir/learnt_fraction": learnt})
        kept = [lesson for lesson in self.buffer if lesson.iteration > self.iteration - self.buffer_rounds]
        self.buffer = kept + self.gather(lessons)
        self.check_some(metrics)
        own = self.buffer[self.trainer.global_rank :: self.trainer.world_size]
        negatives = self.negatives(own)
        candidates = torch.tensor([1.0 + len(others) for others in negatives], device=self.device)
        metrics |= self.ratios(column_sums({"hir/candidates": candidates})) | {
            "hir/buffer_size": float(len(self.buffer))
        }
        filler = self.buffer[0] if self.buffer else self.lesson(rollout, 0, Relabelled(""), None)
        experience = as_experience(own, negatives, filler=filler, rows=self.num_mini_batches, device=self.device)
        return experience, metrics

    def relabelled(self, rollout: Rollout, proxy: Scores, *, held_out: bool = False) -> list[Relabelled]:
        """Every completion in hindsight."""
        scores: list[float] = proxy.total.tolist()
        places: Sequence[float | None] = [None] * len(scores)
        if not held_out:  # places are those among the completions of all processes
            start = sum(self.gather([len(scores)])[: self.trainer.global_rank])
            places = quantiles(self.gather(scores))[start : start + len(scores)]
        return [
            self.relabel(record["prompt"], completion, Feedback(score, place, reason != "length", record))
            for record, completion, reason, score, place in zip(
                rollout.records, rollout.completions, rollout.finish_reason, scores, places, strict=True
            )
        ]

    def lessons(self, rollout: Rollout, proxy: Scores, relabelled: Sequence[Relabelled]) -> list[Lesson]:
        """What there is to learn from the completions of this process."""
        limit = AlignModule.max_tokens(self)
        wanted = {"all": (True, False, None), "failures": (False,), "successes": (True,)}[self.learn_from]
        scores, lessons, long = proxy.total.tolist(), [], 0
        for row, hindsight in enumerate(relabelled):
            if hindsight.instruction is None or hindsight.weight == 0 or hindsight.satisfied not in wanted:
                continue
            lesson = self.lesson(rollout, row, hindsight, scores[row])
            if limit is not None and len(lesson.prompt_ids) + len(lesson.completion_ids) > limit:
                long += 1
            else:
                lessons.append(lesson)
        if long:
            self.say(
                f"iteration {self.iteration + 1}: {long:,} completions are left out: with their new instruction "
                f"they are longer than the model's {limit:,} tokens"
            )
        return lessons

    def lesson(self, rollout: Rollout, row: int, hindsight: Relabelled, score: float | None) -> Lesson:
        """One completion under its instruction; the tokens of a prompt that is what was asked are left as they are."""
        assert hindsight.instruction is not None
        record, ids = rollout.records[row], rollout.input_ids[row]
        asked = self.relabel.asked(record["prompt"]) if isinstance(self.relabel, Conditioned) else record["prompt"]
        prompt = under(hindsight.instruction, hindsight.query)
        own = ids[: int(rollout.prompt_lengths[row])].tolist()
        return Lesson(
            self.iteration,
            hindsight.instruction,
            hindsight.negative,
            hindsight.query,
            hindsight.weight,
            None if score is None or score != score else score,
            own if key(prompt) == key(asked) else encode_prompts(self.tokenizer, [prompt])[0],
            ids[rollout.completion_mask[row]].tolist(),
        )

    def negatives(self, lessons: Sequence[Lesson]) -> list[list[list[int]]]:
        """Token ids of the other prompts that each lesson's output is compared under.

        They fit the model, and differ to it from the own one and from each other, as their texts may not.
        """
        if not self.num_negatives:
            return [[] for _ in lessons]
        limit = AlignModule.max_tokens(self)
        others = Alternatives(self.buffer, self.num_negatives, f"{self.seed()} {self.iteration}")
        prompts = [others.of(lesson) for lesson in lessons]
        different = {key(prompt): prompt for row in prompts for prompt in row}
        ids = dict(zip(different, encode_prompts(self.tokenizer, list(different.values())), strict=True))
        chosen = []
        for lesson, row in zip(lessons, prompts, strict=True):
            room = None if limit is None else limit - len(lesson.completion_ids)
            distinct = {tuple(found): found for found in (ids[key(prompt)] for prompt in row)}
            distinct.pop(tuple(lesson.prompt_ids), None)
            chosen.append([found for found in distinct.values() if room is None or len(found) <= room])
        return chosen

    def check_some(self, metrics: Mapping[str, float]) -> None:
        """Raise where it is not known what ``learn_from`` asks, or where nothing was learnt for some iterations."""
        if self.learn_from != "all" and "hir/satisfied_before" not in metrics:
            raise UserError(
                f"model.learn_from is {self.learn_from}, but of no completion it is known whether it satisfies its "
                "prompt: give model.satisfied_above, a score"
            )
        self.empty_rounds = 0 if self.buffer else self.empty_rounds + 1
        if not self.empty_rounds:
            return
        shares = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items() if name.startswith("hir/"))
        said = f"no completion is left to learn from ({shares})"
        if self.empty_rounds == EMPTY_ROUNDS:
            raise UserError(
                f"iteration {self.iteration + 1}: {said}, {EMPTY_ROUNDS} times in a row: check model.relabel and "
                "model.learn_from, or draw more (data.batch_size, model.samples_per_prompt)"
            )
        self.say(f"iteration {self.iteration + 1}: {said}")

    # ------------------------------------------------------------------ loss
    def rows_per_pass(self) -> int:
        """A completion takes as many sequences as it has candidates."""
        return max(1, self.micro_batch_size // (1 + self.num_negatives))

    def divisor(self, minibatch: Experience) -> Tensor:
        """Weights of all tokens, and number of outputs ``[2]``."""
        assert isinstance(minibatch, HindsightExperience)
        mask = minibatch.completion_mask
        return torch.stack([(minibatch.weights[:, None] * mask).sum(), mask.any(1).sum().to(minibatch.weights)])

    def minibatch_loss(self, experience: Experience, normaliser: Tensor) -> tuple[Tensor, Metrics]:
        """L_sup + α L_contrast − β H̄ of one micro-batch; ``normaliser`` is that of :meth:`divisor`."""
        assert isinstance(experience, HindsightExperience)
        mask = experience.completion_mask
        # at temperature 1, whatever the samples were drawn at: it is the model itself that learns them
        stats = self.completion_stats(self.model, experience.rollout, entropy=True, mean_logp=self.label_smoothing > 0)
        assert stats.entropy is not None
        tokens, outputs = normaliser.expand(2)
        return hindsight_loss(
            stats.logp,
            experience.weights[:, None].to(stats.logp) * mask,
            self.candidates(experience, stats.logp) if self.contrast_coef else None,
            mean_logp=stats.mean_logp,
            entropy=stats.entropy if self.entropy_coef else stats.entropy.detach(),
            contrast_coef=self.contrast_coef,
            entropy_coef=self.entropy_coef,
            label_smoothing=self.label_smoothing,
            token_normaliser=tokens,
            output_normaliser=outputs,
        )

    def candidates(self, experience: HindsightExperience, own: Tensor) -> Candidates:
        """Outputs under their own prompts (log-probs ``[B, T]`` are given) and under the others, in one pass."""
        completions = experience.rollout.completion_ids()
        lengths = experience.completion_mask.sum(1)
        terms = lengths.clamp(min=1) if self.contrast_norm == "mean" else torch.ones_like(lengths)
        places = [(row, k) for row, others in enumerate(experience.negatives) for k in range(len(others))]
        places = [(row, k) for row, k in places if completions[row]]
        logp = own.new_zeros(len(completions), max((k for _, k in places), default=-1) + 1)
        numbers = torch.full((len(completions), 1 + logp.shape[1]), ABSENT, device=own.device)
        numbers[:, 0] = 0
        if places:
            rows, ks = (torch.tensor(column, device=own.device) for column in zip(*places, strict=True))
            pairs = [(experience.negatives[row][k], completions[row]) for row, k in places]
            input_ids, attention, mask = (tensor.to(own.device) for tensor in padded(pairs))
            found = token_stats(self.model, input_ids, attention, mask=mask).logp.sum(1)
            logp = logp.index_put((rows, ks), found / terms[rows])
            numbers[rows, ks + 1] = ks + 1
        return Candidates(torch.cat([(own.sum(1) / terms)[:, None], logp], 1), numbers, torch.zeros_like(lengths))

    # ------------------------------------------------------------------ evaluation and state
    def held_out_columns(self, rollout: Rollout, proxy: Scores) -> dict[str, Tensor]:
        """Which completions satisfy the prompt as it was written."""
        return {"hir/satisfied": satisfaction(self.relabelled(rollout, proxy, held_out=True), self.device)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The buffer."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"]["buffer"] = [lesson.state() for lesson in self.buffer]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        super().on_load_checkpoint(checkpoint)
        self.buffer = [Lesson(**lesson) for lesson in checkpoint["method"]["buffer"]]
