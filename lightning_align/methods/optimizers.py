"""The optimisers to choose from, and how much memory their states take."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import Adafactor

from lightning_align.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]
Groups = list[dict[str, Any]]


def build_optimizer(
    name: OptimizerName, groups: Groups, *, learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """The optimiser of that name over parameter groups.

    Args:
        name: ``adamw``; ``adamw_8bit``, whose two moments take a byte each; ``paged_adamw_8bit``, whose moments move to
            the host's memory while the device has none to spare; ``adafactor`` (Shazeer and Stern 2018), without first
            moment and with a factored second.
        groups: With their learning rates and weight decays.
        learning_rate: Of groups without one.
        betas: Of the AdamW ones.
        epsilon: Of the AdamW ones.

    Raises:
        UserError: If the library that has it is not there.
    """
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
        # It could divide by fp16's loss scale on its own; then gradients would be clipped while they are still scaled.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    if name == "adafactor":
        # its own schedule and scaling off: the learning rate means what it says
        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    library = _bitsandbytes(name)
    eight_bit = {"adamw_8bit": library.optim.AdamW8bit, "paged_adamw_8bit": library.optim.PagedAdamW8bit}
    return eight_bit[name](groups, lr=learning_rate, betas=betas, eps=epsilon)


def check_optimizer(name: OptimizerName) -> None:
    """Raise :class:`UserError`, before anything is loaded, if the optimiser's library is not there."""
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        _bitsandbytes(name)


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # it loads a library of its own, which may not fit
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        raise UserError(
            f"model.optimizer {name} is of the package bitsandbytes, which {reason}: `pip install bitsandbytes`, or "
            "give adamw or adafactor"
        ) from error
    return bitsandbytes


def state_bytes(name: OptimizerName, parameters: Sequence[tuple[int, int]]) -> int:
    """Bytes of an optimiser's states on the device.

    Args:
        name: The optimiser.
        parameters: Number and bytes of the parameters that learn.
    """
    if name == "adafactor":
        return 0  # of a matrix a row and a column
    return sum(2 * size if name == "adamw" else 2 * number for number, size in parameters)


def keep_embeddings_wide(name: OptimizerName, network: nn.Module) -> None:
    """Ask for 32-bit moments of input embeddings, whose gradients are too uneven for 8 bits (Dettmers et al. 2021)."""
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        manager = _bitsandbytes(name).optim.GlobalOptimManager.get_instance()
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
