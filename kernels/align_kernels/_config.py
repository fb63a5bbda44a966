"""Blocks and warps of the vocabulary kernels.

Chosen so that every specialisation stays within its registers on every target (tools/aot_check.py); a sweep on a device
is to replace them by a table for each architecture.
"""

from typing import NamedTuple

from torch import Tensor

LARGEST = 4096
SMALLEST = 128


class Launch(NamedTuple):
    """Columns of a block, and warps of a program."""

    block: int
    warps: int


def launch(x: Tensor) -> Launch:
    """For logits ``[n, V]``: the whole row where it is short."""
    block = max(SMALLEST, min(LARGEST, 1 << (x.shape[1] - 1).bit_length()))
    return Launch(block, 8 if block >= 2048 else 4)
