"""LoRA as the methods have it: its options, what a checkpoint then holds, and how its parameters are counted."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_align.errors import UserError, check_options
from lightning_align.models.adapter_files import WEIGHTS, check_base
from lightning_align.models.loading import Parameters
from lightning_align.models.lora import ALL_LINEAR, LoraOptions, fingerprint_of_base
from lightning_align.models.sources import base_of_adapter, resolve_source
from lightning_align.rewards.base import Reward
from lightning_align.rewards.ensemble import EnsembleReward
from lightning_align.rewards.learned import LearnedReward

Export = Literal["merged", "adapter"]
ALPHA = 32  # TRL's default
ADAPTER_BYTES = 4  # a value: adapters are float32 whatever the base is


def lora_options(
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | list[str],
    export: Export,
    source: str,
    may_drop: bool,
) -> LoraOptions | None:
    """The checked options of a method; None where the whole model is trained.

    Args:
        r: ``model.lora_r``, 0 for no adapters.
        alpha: ``model.lora_alpha``.
        dropout: ``model.lora_dropout``.
        target_modules: ``model.lora_target_modules``.
        export: ``model.lora_export``.
        source: The model to adapt.
        may_drop: Whether the method bears dropout.
    """
    check_options(
        "model",
        ("lora_r", r, r >= 0, "a rank of at least 1, or 0 to train the whole model"),
        ("lora_alpha", alpha, alpha > 0, "a number above 0"),
        ("lora_dropout", dropout, 0 <= dropout < 1, "a probability from 0 up to (not including) 1"),
        ("lora_dropout", dropout, may_drop or not dropout, "0: this method compares log-probs or scores"),
        ("lora_target_modules", target_modules, bool(target_modules), f"{ALL_LINEAR} or names of layers"),
    )
    if r == 0:
        given = {
            **{"lora_alpha": alpha != ALPHA, "lora_dropout": dropout != 0},
            **{"lora_target_modules": target_modules != ALL_LINEAR, "lora_export": export != "merged"},
        }
        for name in (name for name, changed in given.items() if changed):
            warnings.warn(f"model.{name} is not used: without model.lora_r the whole model is trained", stacklevel=3)
        return None
    if resolve_source(source).kind == "architecture":
        raise UserError(f"model.lora_r is {r}, but {source} is an architecture without weights: train it whole first")
    if export == "adapter":
        check_base(source)
    return LoraOptions(r=r, alpha=alpha, dropout=dropout, target_modules=target_modules)


# ---------------------------------------------------------------------- checkpoints
def drop_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave frozen weights out of a checkpoint, and say which they were."""
    frozen = _frozen(module)
    checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name not in frozen}
    checkpoint["method"]["base"] = fingerprint_of_base(module)


def add_frozen(module: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Put the module's own frozen weights in the place of those that were left out.

    Raises:
        UserError: If the checkpoint was made with other weights, or without adapters.
    """
    base = checkpoint["method"].get("base")
    if base is None:
        raise UserError("the checkpoint is of a run that trained the whole model: leave model.lora_r out")
    if base != fingerprint_of_base(module):
        raise UserError(
            f"the checkpoint holds an adapter of other weights than {source} has now (or of a value model that began "
            "with others): bring back the model that the run began with, or start again"
        )
    checkpoint["state_dict"] = {**_frozen(module), **checkpoint["state_dict"]}


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


# ---------------------------------------------------------------------- counting
def shares_base(source: str, policy: str) -> bool:
    """Whether a model argument is an adapter of the weights that the policy starts from."""
    base = base_of_adapter(resolve_source(source))
    return base is not None and _place(base) == _place(policy)


def _place(source: str) -> Path:
    return Path(resolve_source(source).location).resolve()


def learned_networks(*rewards: Reward | None) -> Iterator[PreTrainedModel]:
    """The networks of reward models, those in ensembles too."""
    for part in (part for reward in rewards if reward is not None for part in reward.parts):
        for scorer in part.scorer.members if isinstance(part.scorer, EnsembleReward) else (part.scorer,):
            if isinstance(scorer, LearnedReward):
                yield scorer.model.network


def stored_adapter(source: str) -> Parameters:
    """Parameters of an adapter in a folder, by the size of its file."""
    number = Path(resolve_source(source).location, WEIGHTS).stat().st_size // ADAPTER_BYTES
    return Parameters(number, number * ADAPTER_BYTES)
