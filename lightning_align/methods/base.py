"""The base of every method: model and tokenizer, one optimiser, metrics that mean the same on one process or many."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from lightning_align.data.records import Kind
from lightning_align.data.templates import conventions
from lightning_align.errors import UserError, check_options
from lightning_align.losses.masked import Metrics
from lightning_align.methods.adapters import ALPHA, Export, add_frozen, drop_frozen, lora_options
from lightning_align.methods.optimizers import OptimizerName, build_optimizer, check_optimizer, keep_embeddings_wide
from lightning_align.models.adapter_files import check_base
from lightning_align.models.export import save_adapter, save_model
from lightning_align.models.loading import (
    Parameters,
    count_adapter,
    count_parameters,
    empty_network,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_positions,
    tokenizer_plan,
)
from lightning_align.models.lora import add_lora
from lightning_align.models.sources import resolve_source
from lightning_align.models.tokenizer_training import train_tokenizer

Schedule = Literal["constant", "linear", "cosine"]
# Their names in transformers.
SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}
EXTREMES = {"min_reward": torch.minimum, "max_reward": torch.maximum}  # metrics that are no ratios of sums


class AlignModule(L.LightningModule):
    """What all methods share.

    An offline method implements :meth:`loss`, which returns a *sum* over its micro-batch; the base divides by the
    weight of the whole optimiser window (all accumulation steps and ranks), so splitting a batch never changes a
    gradient. Metrics under way are sums too; ratios are taken once, over all micro-batches and ranks.

    Args:
        model: Policy to start from: run directory, local path, hub id, or a YAML file of an architecture to initialise.
        learning_rate: Peak learning rate; with ``lora_r`` set it ten times as high.
        weight_decay: Decoupled weight decay, on matrices only (not on norms, biases and embeddings).
        adam_beta1: First AdamW coefficient.
        adam_beta2: Second AdamW coefficient.
        adam_epsilon: AdamW epsilon.
        optimizer: ``adamw``; ``adamw_8bit`` or ``paged_adamw_8bit`` (of ``bitsandbytes``); or ``adafactor``, to which
            the Adam settings mean nothing.
        lr_scheduler_type: Shape of the learning rate after warm-up.
        warmup_ratio: Share of the steps that warm up linearly.
        min_lr_ratio: With ``cosine``, the share of the peak that is left at the end.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        dtype: Parameter dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored).
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        lora_r: Rank of low-rank adapters (LoRA), which are then trained in the place of the model; 0 trains it all.
        lora_alpha: Their output is multiplied by lora_alpha / lora_r.
        lora_dropout: Dropout of their input, where the method bears dropout.
        lora_target_modules: ``all-linear``, which is every linear layer of the decoder, or names: ``[q_proj, v_proj]``.
        lora_export: Whether ``model/`` holds the model with the adapters ``merged`` into it, or the ``adapter`` alone.
    """

    kinds: tuple[Kind, ...] = ()  # of records that it learns from; empty where any will do
    record_kind: Kind | None = None  # to ask a datamodule for that has several
    tie_models: tuple[str, ...] = ()  # probabilities of ties that it has a parameter for
    uses_margins = False  # whether ``data.margin`` changes what it learns
    trained_roles: tuple[str, ...] = ("policy",)  # of :meth:`parameter_roles`, those that learn
    dropout = 0.0  # of the whole network; off wherever log-probs or scores are compared
    may_drop = False  # whether it can be on

    def __init__(
        self,
        *,
        model: str,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_epsilon: float = 1e-8,
        optimizer: OptimizerName = "adamw",
        lr_scheduler_type: Schedule = "cosine",
        warmup_ratio: float = 0.03,
        min_lr_ratio: float = 0.1,
        max_grad_norm: float = 1.0,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
        lora_r: int = 0,
        lora_alpha: int = ALPHA,
        lora_dropout: float = 0.0,
        lora_target_modules: Literal["all-linear"] | list[str] = "all-linear",
        lora_export: Export = "merged",
    ) -> None:
        super().__init__()
        check_options(
            "model",
            ("learning_rate", learning_rate, 0 <= learning_rate < float("inf"), "0 or more"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("adam_beta1", adam_beta1, 0 <= adam_beta1 < 1, "a number from 0 up to (not including) 1"),
            ("adam_beta2", adam_beta2, 0 <= adam_beta2 < 1, "a number from 0 up to (not including) 1"),
            ("adam_epsilon", adam_epsilon, adam_epsilon >= 0, "0 or more"),
            ("warmup_ratio", warmup_ratio, 0 <= warmup_ratio < 1, "a share from 0 up to (not including) 1"),
            ("min_lr_ratio", min_lr_ratio, 0 <= min_lr_ratio <= 1, "a share from 0 to 1"),
            ("max_grad_norm", max_grad_norm, max_grad_norm >= 0, "a norm, or 0 for no clipping"),
        )
        if dtype == "float16":
            raise UserError("model.dtype is float16: its range is too small to train in, give float32 or bfloat16")
        check_optimizer(optimizer)
        self.lora = lora_options(
            r=lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            target_modules=lora_target_modules,
            export=lora_export,
            source=model,
            may_drop=self.may_drop,
        )
        self.lora_export = lora_export
        self.source = model
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (adam_beta1, adam_beta2)
        self.adam_epsilon = adam_epsilon
        self.lr_scheduler_type = lr_scheduler_type
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio
        self.max_grad_norm = max_grad_norm
        self.model_dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.num_tokens = 0  # tokens seen by the optimiser, over all ranks
        self._window_sums: Metrics = {}
        self._eval_sums: Metrics = {}
        self._grad_norm: Tensor | None = None
        if tokenizer_plan(model) is None:  # otherwise it is trained on the data, which is read before any weights are
            self._tokenizer = load_tokenizer(model)

    # ------------------------------------------------------------------ models
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; available once the datamodule is set up."""
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is trained by the datamodule's setup, which has not run yet")
        return self._tokenizer

    def get_tokenizer(self, texts: Callable[[], Iterator[str]]) -> PreTrainedTokenizerBase:
        """The tokenizer, trained on ``texts`` first if the model's YAML asks for that."""
        if self._tokenizer is None:
            plan = tokenizer_plan(self.source)
            assert plan is not None
            self._tokenizer = train_tokenizer(texts(), **plan)
        return self._tokenizer

    def max_tokens(self) -> int | None:
        """Longest record the method can take, in tokens; None where the model sets no limit."""
        return max_positions(load_config(resolve_source(self.source), self.tokenizer))

    def build_model(self) -> nn.Module:
        """The network that is trained and exported; a causal language model unless a method says otherwise."""
        model = load_causal_lm(self.source, tokenizer=self.tokenizer, dtype=self.model_dtype, dropout=self.dropout)
        if model.generation_config is not None:  # samplers stop at the end of a turn, here and after the export
            named = model.generation_config.eos_token_id
            ends = conventions(self.tokenizer).end_ids | ({named} if isinstance(named, int) else set(named or ()))
            model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else min(ends)
        return self.prepared(model)

    def prepared(self, network: PreTrainedModel, *, partly: bool = False) -> PreTrainedModel:
        """The network as it is trained: with adapters, recomputing its activations, as far as that was asked for.

        ``partly`` is that of :func:`~lightning_align.models.lora.add_lora`.
        """
        if self.lora is not None:
            add_lora(network, self.lora, partly=partly)
        check_trainable(network)
        keep_embeddings_wide(self.optimizer_name, network)
        if self.gradient_checkpointing:
            network.activation_checkpointing_enable()
        return network

    def configure_model(self) -> None:
        """Build the weights: after the data were checked, and only once."""
        if not hasattr(self, "model"):
            # a loaded model comes in evaluation mode, in which dropout and gradient checkpointing do nothing
            self.model = self.build_model().train()

    def parameter_roles(self) -> dict[str, Parameters]:
        """Parameters by role, without loading any weights."""
        return self.count("policy")

    def count(self, role: str, auto_class: Any = AutoModelForCausalLM) -> dict[str, Parameters]:
        """The parameters that learn under the name of their role; those that stay under adapters as ``base``."""
        if self.lora is None:
            return {role: count_parameters(self.source, self.tokenizer, auto_class, dtype=self.model_dtype)}
        learn, rest = count_adapter(self.source, self.lora, self.tokenizer, auto_class, dtype=self.model_dtype)
        return {role: learn, "base": rest}

    def empty_model(self) -> PreTrainedModel:
        """The policy without its weights, for what can be known from shapes."""
        network = empty_network(self.source, self.tokenizer)
        return network if self.lora is None else add_lora(network, self.lora)

    def export(self, folder: Path) -> None:
        """Write the trained model in Hugging Face format, tokenizer and chat template included."""
        assert isinstance(self.model, PreTrainedModel)
        self.save(self.model, folder)

    def choose_export(self, form: Export) -> None:
        """Export in another form than ``lora_export`` says."""
        if self.lora is None:
            raise UserError("the run has no adapters (model.lora_r): leave --lora out")
        if form == "adapter":
            check_base(self.source)
        self.lora_export = form

    def save(self, network: PreTrainedModel, folder: Path) -> None:
        """Write a trained network to a folder as ``lora_export`` says."""
        if self.lora is not None and self.lora_export == "adapter":
            save_adapter(network, self.tokenizer, folder, self.source)
        else:
            save_model(network, self.tokenizer, folder)

    def check_data(self, datamodule: Any) -> None:
        """Hook: refuse data that the losses cannot use; asked once they are read, before the plan and any weights."""

    # ------------------------------------------------------------------ objective
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Summed loss of one micro-batch and the sums of its metrics (detached numerators and denominators)."""
        raise NotImplementedError(f"{type(self).__name__} must implement loss")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """One micro-batch; the scale undoes Lightning's division by accumulation and the mean over ranks."""
        loss_sum, sums = self.loss(batch)
        add_sums(self._window_sums, sums)
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        # a window without anything to learn has weight 0 and loss 0; it must not become 0/0
        return loss_sum * scale / batch["window_weight"].clamp(min=torch.finfo(torch.float32).tiny)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums of this evaluation."""
        self.add_eval_sums(self.loss(batch)[1])

    def add_eval_sums(self, sums: Metrics) -> None:
        """Add to the evaluation under way."""
        add_sums(self._eval_sums, sums)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same measures as validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation under ``eval/``, as ratios of global sums."""
        metrics = self.eval_metrics(self.ratios(self._eval_sums))
        self._eval_sums = {}
        self.report({f"eval/{name}": value for name, value in metrics.items()}, step=self.trainer.global_step)

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self.on_validation_epoch_end()

    def eval_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Hook to derive further metrics (perplexity, calibration) from the global ratios."""
        return metrics

    # ------------------------------------------------------------------ optimiser
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the one optimiser; weight decay on matrices only."""
        return decay_groups(self.model, self.learning_rate, self.weight_decay)

    def total_steps(self) -> int:
        """Number of times the schedule is stepped in the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, in one place for all methods."""
        optimizer = build_optimizer(
            self.optimizer_name,
            self.parameter_groups(),
            learning_rate=self.learning_rate,
            betas=self.betas,
            epsilon=self.adam_epsilon,
        )
        total = self.total_steps()
        warmup = round(self.warmup_ratio * total)
        name = SCHEDULERS[self.lr_scheduler_type]
        extra = {"min_lr_rate": self.min_lr_ratio} if self.lr_scheduler_type == "cosine" else None
        scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def clip_gradients_(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clip in place; returns the norm before clipping."""
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        return nn.utils.clip_grad_norm_(parameters, limit)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """``max_grad_norm`` is the module's setting, so that it works alike with manual optimisation."""
        if gradient_clip_val is not None:
            raise UserError("trainer.gradient_clip_val is not used here: set model.max_grad_norm instead")
        self._grad_norm = self.clip_gradients_([p for group in optimizer.param_groups for p in group["params"]])

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then log the window: loss, metrics and gradient norm belong to the step that just happened."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1  # Lightning counts it after this hook
        sums, self._window_sums = self._window_sums, {}
        if "num_tokens" in sums:
            self.num_tokens += int(self.all_reduce(sums.pop("num_tokens")[0]))
        if self.logs_step(step):
            metrics = self.ratios(sums)
            metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["num_tokens"] = float(self.num_tokens)
            metrics["epoch"] = self.trainer.current_epoch + (batch_idx + 1) / max(1, self.trainer.num_training_batches)
            if self._grad_norm is not None:
                metrics["grad_norm"] = float(self._grad_norm)
            self.report(metrics, step=step)

    # ------------------------------------------------------------------ metrics
    def logs_step(self, step: int) -> bool:
        """Whether this optimiser step, counted from 1, is logged."""
        return step == 1 or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def logs_this_step(self) -> bool:
        """Whether the step under way is logged, or an evaluation runs; costly metrics are computed only then."""
        return not self.trainer.training or self.logs_step(self.trainer.global_step + 1)

    def all_reduce(self, value: Tensor, reduce_op: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum or maximum over all ranks, without gradient."""
        return self.trainer.strategy.reduce(value.detach().clone(), reduce_op=reduce_op)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in the order of ranks; ranks may hold different numbers of them."""
        if self.trainer.world_size == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def total(self, sums: Metrics) -> dict[str, tuple[float, float]]:
        """:func:`add_sums` over all ranks as plain numbers; a rank may lack some, or all."""
        names = sorted(sums)
        columns = [torch.stack([value.detach().double() for value in sums[name]]) for name in names]
        own = dict(zip(names, torch.stack(columns).tolist(), strict=True)) if names else {}
        total: Metrics = {}
        for part in self.gather([own]):
            add_sums(total, {name: tuple(torch.tensor(pair, dtype=torch.float64)) for name, pair in part.items()})
        return {name: (float(numerator), float(denominator)) for name, (numerator, denominator) in total.items()}

    def ratios(self, sums: Metrics) -> dict[str, float]:
        """Global ratios; a metric with denominator 0 is left out, never logged as 0."""
        return ratios(self.total(sums))

    def say(self, text: str) -> None:
        """Tell the user something, once."""
        if self.trainer.is_global_zero:
            print(text, file=sys.stderr, flush=True)

    def report(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write one row to every logger and show it to callbacks. ``step``: optimiser steps (or iterations) done."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=step)
        for name, value in metrics.items():
            self.trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)

    # ------------------------------------------------------------------ state
    def checkpoint_label(self) -> str | None:
        """Name of a checkpoint to keep at this point of training, if any; asked after every step."""
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """State beside weights and optimiser; plain numbers, so that the file loads with ``weights_only=True``."""
        checkpoint["method"] = {"name": type(self).__name__, "num_tokens": self.num_tokens}
        if self.lora is not None:
            drop_frozen(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method; restore the counters."""
        method = checkpoint.get("method", {"name": "another program"})
        if method["name"] != type(self).__name__:
            raise UserError(
                f"the checkpoint is of {method['name']}, not of {type(self).__name__}: give one of the same method"
            )
        self.num_tokens = method["num_tokens"]
        if self.lora is not None:
            add_frozen(self, checkpoint, self.source)
        elif "base" in method:
            raise UserError("the checkpoint holds adapters of a run with model.lora_r: give the same here")


def add_sums(total: Metrics, sums: Metrics) -> None:
    """Add ``sums`` into ``total`` in place; of :data:`EXTREMES` the further one of those that have a denominator."""
    for name, (numerator, denominator) in sums.items():
        numerator, denominator = numerator.detach(), denominator.detach()
        if name not in total:
            total[name] = numerator, denominator
        elif name in EXTREMES:
            before, counted = total[name]
            either = torch.where(counted == 0, numerator, before)
            both = EXTREMES[name](before, numerator)
            total[name] = torch.where((counted == 0) | (denominator == 0), either, both), counted.maximum(denominator)
        else:
            total[name] = total[name][0] + numerator, total[name][1] + denominator


def ratios(total: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Numerator by denominator, without those whose denominator is 0."""
    return {name: numerator / denominator for name, (numerator, denominator) in total.items() if denominator != 0}


def decay_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices of linear layers with weight decay; norms, biases and embeddings without."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [{**group, "lr": learning_rate} for group in groups if group["params"]]


def check_trainable(network: PreTrainedModel) -> None:
    """Refuse parameters that cannot take small steps, and say so of those that take them badly."""
    trained = {parameter.dtype for parameter in network.parameters() if parameter.requires_grad}
    if network.dtype == torch.float16:
        raise UserError(
            "the weights are stored in float16, in which training fails: give model.dtype float32 or bfloat16"
        )
    if torch.bfloat16 in trained:
        warnings.warn(
            "training bfloat16 weights: steps below about 0.4 % of a weight are rounded away, so low learning rates "
            "hardly move it (they do with float32 weights and trainer.precision bf16-mixed)",
            stacklevel=2,
        )
