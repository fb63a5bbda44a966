"""Constitutional AI, its supervised half: answers that a model has revised under a constitution, as demonstrations."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.data.encode import encode_pairs
from lightning_align.data.templates import conventions
from lightning_align.errors import UserError, check_options
from lightning_align.feedback.constitution_file import read_constitution
from lightning_align.feedback.journal import key_of
from lightning_align.feedback.models import LocalModel
from lightning_align.feedback.revise import FAULTS, Chain, Demonstration, Reviser, demonstrations, tally
from lightning_align.losses.masked import Metrics
from lightning_align.methods.frozen import RewardSpec
from lightning_align.methods.imitation import ImitationModule
from lightning_align.methods.measures import column_sums
from lightning_align.models.loading import Parameters, count_parameters
from lightning_align.rewards.revisions import score_revisions
from lightning_align.rollout.types import Experience, Rollout

BARREN = 3  # iterations in a row without anything to learn, before the models are taken not to answer
PATIENCE = 16  # revisions in a row that change nothing, before the critic is taken not to revise at all


class ConstitutionalModule(ImitationModule):
    """Supervised learning of revised answers (Bai et al. 2022, section 3); docs/constitutional.md.

    Every iteration draws prompts; a model answers them, criticises and revises its answers, and the policy takes steps
    of supervised fine-tuning on the revisions. Prompts whose ``is_safety`` is false keep their plain answers.

    Args:
        learning_rate: 1e-5 for billions of parameters; up to 5e-4 for a few millions.
        constitution: ``playground``, ``default`` or a YAML file.
        reviser: Model that answers, criticises and revises; by default the policy as it was at the start.
        revisions: Steps of a chain.
        critique: Whether a critique comes before a revision.
        keep: Learn ``all`` revisions of a chain, or its ``last``.
        on_bad: Where a revision is none (empty, cut off, unchanged, repeats the question): ``keep_previous`` learns the
            text before it once more, ``drop`` leaves the step out.
        helpful: ``keep`` the answers to prompts whose ``is_safety`` is false, or ``revise`` them like the others.
        revision_temperature: Temperature of critiques and revisions; null for that of answers.
        max_critique_tokens: Longest critique in tokens.
        reward: What is measured on held-out prompts, as ``lab/proxy``; nothing learns from it. By default ``gold``.
        gold: What else is measured; of its part ``safety``, where it has one, the mean by revision.
        kwargs: The settings of :class:`~lightning_align.methods.online.OnlineModule`; ``max_new_tokens``,
            ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``stop_strings`` are those of answers and revisions.
    """

    def __init__(
        self,
        *,
        constitution: str,
        learning_rate: float = 1e-5,
        reviser: str | None = None,
        revisions: int = 4,
        critique: bool = True,
        keep: Literal["all", "last"] = "all",
        on_bad: Literal["keep_previous", "drop"] = "keep_previous",
        helpful: Literal["keep", "revise"] = "keep",
        revision_temperature: float | None = None,
        max_critique_tokens: int = 53,
        reward: RewardSpec | None = None,
        gold: RewardSpec | None = None,
        **kwargs: Any,
    ) -> None:
        measured = gold if reward is None else reward
        if measured is None:
            raise UserError(
                "model.gold is null and so is model.reward: give what measures the policy; to learn revisions without "
                "any, write them with label revise and train SFTModule"
            )
        # one sample a prompt, and no KL of samples: those that are learnt are not the policy's own
        super().__init__(
            learning_rate=learning_rate, reward=measured, gold=gold, samples_per_prompt=1, stop_at_kl=None, **kwargs
        )
        hot = revision_temperature
        check_options(
            "model",
            ("revisions", revisions, revisions >= 1, "at least 1"),
            ("revision_temperature", hot, hot is None or hot > 0, "a number above 0, or null"),
            ("max_critique_tokens", max_critique_tokens, max_critique_tokens >= 1, "at least 1"),
        )
        self.constitution = read_constitution(constitution)
        self.reviser_source = reviser
        self.revisions = revisions
        self.critique = critique
        self.keep = keep
        self.on_bad = on_bad
        self.helpful = helpful
        self.revision_params = self.sampling if hot is None else replace(self.sampling, temperature=hot)
        self.critique_params = replace(self.revision_params, max_new_tokens=max_critique_tokens, stop_strings=())
        self.unchanged = 0  # revisions in a row that changed nothing
        self.barren = 0  # iterations in a row without anything to learn

    # ------------------------------------------------------------------ models
    def setup_sampling(self) -> None:
        """Also who answers, criticises and revises."""
        super().setup_sampling()
        if self.reviser_source is not None:
            model = self.frozen_model(self.reviser_source)
        else:
            reference = self.frozen.reference
            if isinstance(reference, PreTrainedModel):
                model = LocalModel("model.model", reference, self.tokenizer, batch_size=self.rollout_batch_size)
            else:  # the policy without its adapter, which no engine samples from
                model = self.frozen_model(self.source)
        self.reviser = Reviser(
            model,
            model,
            self.constitution,
            answer=self.sampling,
            revision=self.revision_params,
            critique=self.critique_params,
            revisions=self.revisions,
            critiques=self.critique,
        )

    def frozen_model(self, source: str) -> LocalModel:
        """A model that is asked, on this process's device."""
        model = LocalModel.load(source, dtype=self.model_dtype, batch_size=self.rollout_batch_size)
        model.model.to(self.device)  # type: ignore[arg-type]
        self.share_base(model.model)
        return model

    def parameter_roles(self) -> dict[str, Parameters]:
        """Also who answers and revises, where that is another model."""
        roles = super().parameter_roles()
        if self.reviser_source is not None:
            roles["reviser"] = count_parameters(self.reviser_source, dtype=self.model_dtype)
        return roles

    # ------------------------------------------------------------------ chains to experience
    @torch.no_grad()
    def collect(self, batch: Mapping[str, Any]) -> tuple[Experience, dict[str, float]]:
        """What a batch of prompts teaches, and what happened in its chains."""
        started = time.perf_counter()
        records = batch["records"]
        first = self.trainer.global_rank * len(records)
        self.draws += 1
        keys = [
            key_of(self.seed(), record["prompt"], self.iteration, first + row) for row, record in enumerate(records)
        ]
        revised = [self.helpful == "revise" or record.get("is_safety") is not False for record in records]
        chains = self.reviser.chains([record["prompt"] for record in records], keys, revised)
        sampled = time.perf_counter()
        learnt = [
            (row, demonstration)
            for row, chain in enumerate(chains)
            for demonstration in demonstrations(chain, self.constitution, keep=self.keep, on_bad=self.on_bad)
        ]
        metrics = self.chain_metrics(chains, records) | {"cai/learnt": float(self.on_every_rank(len(learnt)))}
        self.check_learnable(metrics)
        rollout = self.written(batch, learnt)
        experience = Experience(rollout, rollout.engine_logp.new_zeros(len(rollout)))
        if learnt:
            metrics |= self.ratios(column_sums({"completions/mean_length": rollout.completion_lengths.float()}))
        else:
            experience = experience.without_learning()
        return experience, metrics | {"time/rollout": sampled - started, "time/score": time.perf_counter() - sampled}

    def written(self, batch: Mapping[str, Any], learnt: Sequence[tuple[int, Demonstration]]) -> Rollout:
        """Demonstrations, each with the row of its prompt, as if they had been sampled; without any, an empty one."""
        pairs = encode_pairs(
            self.tokenizer,
            [demonstration.prompt for _, demonstration in learnt],
            [demonstration.completion for _, demonstration in learnt],
        )
        rows = [
            (row, pair.input_ids[pair.prompt_length :], demonstration.completion)
            for (row, demonstration), pair in zip(learnt, pairs, strict=True)
        ] or [(0, [conventions(self.tokenizer).eos_id], "")]
        return as_rollout(batch, rows, pad_id=self.tokenizer.pad_token_id or 0).to(self.device)

    # ------------------------------------------------------------------ metrics
    def chain_metrics(self, chains: Sequence[Chain], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Counts over all ranks, the share of revisions that change something, and harmlessness by revision."""
        one = torch.ones(())
        sums: Metrics = {name: (torch.tensor(float(count)), one) for name, count in tally(chains).items()}
        counts = {name: count for name, (count, _) in self.total(sums).items()}
        metrics = {
            **{"cai/critiques": counts["critiques"], "cai/revisions": counts["revisions"]},
            "cai/bad_revisions": sum(counts[fault] for fault in FAULTS),
            **{f"cai/bad_revisions/{fault}": counts[fault] for fault in FAULTS},
        }
        if counts["revisions"]:
            metrics["cai/revision_changed"] = counts["changed"] / counts["revisions"]
        rows = [row for row, chain in enumerate(chains) if chain.steps]
        columns: dict[str, Tensor] = {}
        if self.frozen.gold is not None and rows:
            _, harmless = score_revisions(
                self.frozen.gold, [chains[row] for row in rows], [records[row] for row in rows]
            )
            columns = {f"cai/harmlessness_by_revision/{n}": harmless[:, n] for n in range(harmless.shape[1])}
        return metrics | self.ratios(column_sums(columns))

    def check_learnable(self, metrics: Mapping[str, float]) -> None:
        """Raise where nothing was left to learn for long, or none of the latest revisions changed anything."""
        self.barren = 0 if metrics["cai/learnt"] else self.barren + 1
        if self.barren >= BARREN:
            raise UserError(
                f"nothing is left to learn of the chains of {BARREN} iterations in a row: answers and revisions are "
                "empty, cut off at model.max_new_tokens, or repeat the questions (label revise writes them to look at)"
            )
        changed = metrics.get("cai/revision_changed", 0.0)
        self.unchanged = 0 if changed else self.unchanged + int(metrics["cai/revisions"])
        if self.unchanged >= PATIENCE:
            raise UserError(
                f"none of {self.unchanged:,} revisions differs from the text that it revises: the model does not "
                "revise; give another model.reviser, or a model.constitution whose questions it understands"
            )

    # ------------------------------------------------------------------ state
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """How long revisions have changed nothing, and nothing was learnt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] |= {"unchanged": self.unchanged, "barren": self.barren}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        super().on_load_checkpoint(checkpoint)
        self.unchanged, self.barren = checkpoint["method"]["unchanged"], checkpoint["method"]["barren"]


def as_rollout(batch: Mapping[str, Any], rows: Sequence[tuple[int, list[int], str]], *, pad_id: int) -> Rollout:
    """Completions that were written elsewhere, behind the prompts of a batch.

    Args:
        batch: ``prompt_ids`` and ``records``.
        rows: Of each, its prompt's row in the batch, its token ids, and its text.
        pad_id: Stands behind the shorter ones.
    """
    sequences = [[*batch["prompt_ids"][row], *ids] for row, ids, _ in rows]
    starts = torch.tensor([len(batch["prompt_ids"][row]) for row, _, _ in rows])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    slots = torch.arange(width)
    attention = slots < lengths[:, None]
    return Rollout(
        input_ids=torch.tensor([sequence + [pad_id] * (width - len(sequence)) for sequence in sequences]),
        attention_mask=attention,
        completion_mask=attention & (slots >= starts[:, None]),
        engine_logp=torch.zeros(len(rows), width),
        prompt_lengths=starts,
        prompt_index=torch.tensor([row for row, _, _ in rows]),
        finish_reason=["eos"] * len(rows),
        completions=[text for _, _, text in rows],
        records=[batch["records"][row] for row, _, _ in rows],
    )
