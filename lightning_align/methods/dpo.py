"""Direct preference optimisation and its relatives: learn from comparisons without a reward model or sampling."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lightning_align.data.answer_rows import packed_rows, padded_rows
from lightning_align.data.collate import PreferenceGroups
from lightning_align.data.datamodules import PreferenceDataModule
from lightning_align.data.loader import EvalLoader
from lightning_align.data.unpaired import UnpairedRows
from lightning_align.errors import UserError, check_options
from lightning_align.losses.masked import Metrics
from lightning_align.methods.base import AlignModule
from lightning_align.methods.dpo_objectives import UnpairedObjective
from lightning_align.methods.dpo_options import build_objective, check_reference
from lightning_align.methods.reference import Frozen, fingerprint, read_log_probs, write_log_probs
from lightning_align.models.answers import AnswerRows, AnswerStats, answer_stats
from lightning_align.models.loading import Parameters
from lightning_align.models.lora import adapters_off
from lightning_align.models.masks import keeps_documents_apart

CACHE_FILE = "reference_logps.safetensors"
MEASURED = {"entropy": True, "correct": True}  # beside log-probs, where a step is logged


class DPOModule(AlignModule):
    """Direct preference optimisation (Rafailov et al. 2023) and its relatives; docs/dpo.md has their formulas.

    Reads ``preference`` or ``ranked`` records, with ``kto`` ``unpaired`` ones. Prompts with several answers are encoded
    once, where that is cheaper and the model can tell the answers apart. An option of a loss that is not in use is an
    error, not ignored.

    Args:
        learning_rate: 5e-7 to 5e-6 for billions of parameters; up to 1e-4 for a few millions.
        loss_type: ``sigmoid`` (DPO), ``robust``, ``ipo``, ``hinge``, ``slic``, ``odpo``, ``dpop``, ``sigmoid_norm``,
            ``r_dpo``, ``simpo``, ``cpo``, ``orpo`` or ``kto``; or a list of several of pairs.
        loss_weights: Weights of the losses of a list; 1 each if not given.
        beta: Strength of the pull to the reference, or scale of a loss without one (``orpo``: weight of its odds term);
            null is each loss's own: 0.1, of ``hinge`` 0.05, ``dpop`` 0.3, ``simpo`` 2, ``sigmoid_norm`` 5.
        label_smoothing: Probability that a label is wrong (``sigmoid``, ``robust``, ``simpo``, ``cpo``).
        reference: What log-probs are compared with: the ``model`` as it was at the start (with ``lora_r`` no copy,
            but the model without its adapters), or its log-probs ``cached`` before training, so that it leaves memory;
            ``none`` for losses that need none; ``auto`` is one or the other.
        reference_cache: File of the cached log-probs; by default in the run directory.
        rpo_alpha: Weight of the chosen answers' negative log-likelihood a token, beside any loss (2404.19733).
        ipo_average: ``ipo`` of means over tokens, as its authors compute it; false for sums, as they write it.
        slic_delta: Margin of ``slic``.
        slic_lambda: Weight of its likelihood term.
        odpo_alpha: Of the logarithm of score differences in ``odpo``.
        dpop_lambda: Penalty of ``dpop`` on chosen answers that become less likely than under the reference.
        r_dpo_alpha: Penalty of ``r_dpo`` on a token more; 0.01 to 0.05.
        simpo_gamma: Margin of ``simpo``.
        cpo_alpha: Weight of the likelihood term of ``cpo``.
        desirable_weight: Of good answers in ``kto``.
        undesirable_weight: Of bad ones.
        kwargs: The settings of :class:`AlignModule`.
    """

    model: PreTrainedModel
    kinds = ("preference",)

    def __init__(
        self,
        *,
        learning_rate: float = 1e-6,
        loss_type: str | list[str] = "sigmoid",
        loss_weights: list[float] | None = None,
        beta: float | None = None,
        label_smoothing: float = 0.0,
        reference: Literal["auto", "model", "cached", "none"] = "auto",
        reference_cache: str | None = None,
        rpo_alpha: float = 0.0,
        ipo_average: bool = True,
        slic_delta: float = 1.0,
        slic_lambda: float = 0.1,
        odpo_alpha: float = 1.0,
        dpop_lambda: float = 50.0,
        r_dpo_alpha: float = 0.02,
        simpo_gamma: float = 0.5,
        cpo_alpha: float = 1.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        check_options(
            "model",
            ("beta", beta, beta is None or beta > 0, "a number above 0"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "a probability from 0 to below 0.5"),
            ("rpo_alpha", rpo_alpha, rpo_alpha >= 0, "0 or more"),
            ("desirable_weight", desirable_weight, desirable_weight > 0, "a number above 0"),
            ("undesirable_weight", undesirable_weight, undesirable_weight > 0, "a number above 0"),
            *(
                ("loss_weights", loss_weights, 0 < weight < math.inf, "numbers above 0")
                for weight in loss_weights or ()
            ),
        )
        options: dict[str, Any] = {
            **{"beta": beta, "label_smoothing": label_smoothing, "ipo_average": ipo_average, "rpo_alpha": rpo_alpha},
            **{"slic_delta": slic_delta, "slic_lambda": slic_lambda, "odpo_alpha": odpo_alpha},
            **{"dpop_lambda": dpop_lambda, "r_dpo_alpha": r_dpo_alpha, "simpo_gamma": simpo_gamma},
            **{"cpo_alpha": cpo_alpha, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight},
        }
        check_options(
            "model",
            *(
                (name, value, value is None or math.isfinite(value), "a finite number")
                for name, value in options.items()
            ),
        )
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        self.uses_margins = "odpo" in names
        self.objective = build_objective(names, loss_weights, options)
        if isinstance(self.objective, UnpairedObjective):
            self.record_kind = "unpaired"
        self.reference = check_reference(reference, names, reference_cache)
        self.reference_cache = reference_cache
        self.frozen: Frozen | None = None
        self.reference_has_left = False  # for good: the policy is no longer what it was copied from

    def check_data(self, datamodule: PreferenceDataModule) -> None:
        """Of KTO also steps and prompts that its KL cannot be estimated on."""
        datasets: Mapping[Any, Any] = datamodule.datasets  # of the kind that the objective asked for
        if "train" in datasets:
            step = datamodule.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size
            warning = self.objective.check(datasets["train"], step)
            if warning is not None:
                warnings.warn(warning, stacklevel=2)

    # ------------------------------------------------------------------ reference
    def configure_model(self) -> None:
        """The policy, and the reference if there is one: a copy of it, before a checkpoint's weights take its place.

        A policy with adapters is its own reference, with them switched off.
        """
        super().configure_model()
        if self.reference != "none" and self.frozen is None and not self.reference_has_left:
            whole = self.lora is None
            self.frozen = Frozen(copy.deepcopy(self.model).eval().requires_grad_(False) if whole else self.model)

    def parameter_roles(self) -> dict[str, Parameters]:
        """The policy and, where it stays in memory, the reference."""
        roles = super().parameter_roles()
        copied = self.reference == "model" and self.lora is None
        return roles | ({"reference": roles["policy"]} if copied else {})

    @contextmanager
    def reference_network(self) -> Iterator[PreTrainedModel | None]:
        """The network that log-probs are compared with, while it is needed; None without one."""
        if self.frozen is None:
            yield None
        else:
            with adapters_off(self.frozen.network):
                yield self.frozen.network

    def on_fit_start(self) -> None:
        """Bring the reference to its place, or let it say all that it will be asked and leave."""
        if self.reference == "cached":
            self.cache_reference()
        elif self.frozen is not None:
            self.frozen.join(self.model)

    def on_validation_start(self) -> None:
        """``validate`` and ``test`` do not fit first, and ask the reference itself."""
        if self.frozen is not None:
            self.frozen.join(self.model)

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def cache_reference(self) -> None:
        """Log-probs of all answers under the reference, from the file or by one pass over the data; then it leaves."""
        if self.reference_has_left:  # another fit: the data have their log-probs, or :meth:`answers` refuses them
            return
        datasets = self.trainer.datamodule.datasets  # type: ignore[attr-defined]
        assert self.frozen is not None
        origin = {"reference model": fingerprint(self.frozen.network), "precision": str(self.trainer.precision)}
        origin |= {f"{split} data": data.sequences_hash() for split, data in datasets.items()}
        path = Path(self.reference_cache or Path(self.trainer.default_root_dir) / CACHE_FILE)
        found = read_log_probs(path, origin)
        if found is None:
            self.frozen.join(self.model)
            found = {split: self.reference_log_probs(data) for split, data in datasets.items()}
            if self.trainer.is_global_zero:
                write_log_probs(path, found, origin)
        for split, data in datasets.items():
            data.ref_logp = found[split]
        self.frozen = None
        self.reference_has_left = self.lora is None  # under adapters it is still there

    @torch.no_grad()
    def reference_log_probs(self, data: PreferenceGroups | UnpairedRows) -> NDArray[np.floating]:
        """One an answer, by row of the data, each computed by one process."""
        loader = EvalLoader(
            data,
            batch_size=self.trainer.datamodule.eval_batch_size,  # type: ignore[attr-defined]
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
            fill=False,
            by_length=True,
        )
        # in float64 runs as wide as the policy's own, or rounding would decide which answer is ahead
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        total = torch.zeros(data.num_sequences, device=self.device, dtype=dtype)
        for batch in loader:
            batch = {name: values.to(self.device) for name, values in batch.items()}
            with self.trainer.precision_plugin.forward_context(), self.reference_network() as network:
                assert network is not None
                total[batch["row"]] = answer_stats(network, self.answer_rows(batch), **MEASURED).logp
        return self.all_reduce(total).cpu().numpy()

    # ------------------------------------------------------------------ objective
    def answer_rows(self, batch: Mapping[str, Tensor]) -> AnswerRows:
        """How the model sees the answers of a batch: in as little space as it can tell them apart in."""
        if keeps_documents_apart(self.model, "every answer gets a row of its own, with its prompt"):
            return packed_rows(batch, self.model.config.get_text_config().hidden_size)
        return padded_rows(batch)

    def answers(self, batch: Mapping[str, Tensor], *, measure: bool = True) -> tuple[AnswerStats, Tensor | None]:
        """Statistics of a batch's answers, and their log-probs under the reference if there is one.

        Args:
            batch: Rows of answers.
            measure: Whether to measure what is only logged, where it is logged.
        """
        rows, logged = self.answer_rows(batch), measure and self.logs_this_step()
        # the reference is asked for the same: what is measured beside them changes how log-probs round
        asked = MEASURED if logged else {}
        stats = answer_stats(self.model, rows, **asked, mean_logit=logged)
        if "ref_logp" in batch and self.reference == "cached":
            return stats, batch["ref_logp"].to(stats.logp.dtype)
        if self.reference_has_left:
            raise UserError(
                "model.reference is cached: the reference has left memory, and its log-probs of these data were not "
                "cached before training; evaluate them with model.reference model"
            )
        with torch.no_grad(), self.reference_network() as network:
            return stats, None if network is None else answer_stats(network, rows, **asked).logp

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Summed losses, and the sums behind TRL's metrics."""
        return self.objective.loss(self, batch)

    # ------------------------------------------------------------------ evaluation and metrics
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums of this evaluation."""
        self.add_eval_sums(self.objective.evaluate(self, batch))

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Loss of the whole evaluation."""
        metrics.pop("num_tokens", None)
        return self.objective.eval_metrics(self, metrics)

    def ratios(self, sums: Metrics) -> dict[str, float]:
        """Global ratios; of single answers the margin too, between the means of good and bad ones."""
        metrics = super().ratios(sums)
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys() and "rewards/margins" not in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics
