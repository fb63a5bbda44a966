"""Blocks and warps of the vocabulary kernels.

Chosen so that every specialisation stays within its registers on every target (tools/aot_check.py); a sweep on a device
is to replace them by a table for each architecture.
"""

from typing import NamedTuple

from torch import Tensor

LARGEST = 4096
LARGEST_WITH_ALL = 1024  # KL and soft-cap together need twice the registers
SMALLEST = 128


class Launch(NamedTuple):
    """Columns of a block, and warps of a program."""

    block: int
    warps: int


def launch(x: Tensor, everything: bool = False) -> Launch:
    """For logits ``[n, V]``: the whole row where it is short. ``everything``: with KL and soft-cap."""
    block = max(SMALLEST, min(LARGEST_WITH_ALL if everything else LARGEST, 1 << (x.shape[1] - 1).bit_length()))
    return Launch(block, warps_for(block))


def warps_for(block: int) -> int:
    """Warps of a program with so many columns at a time."""
    return 8 if block >= 2048 else 4
