"""The static key-value cache.

Axes: K key-value heads, D head dimension.
"""

import torch
from torch import Tensor

SLOT_STEP = 16  # the cache grows by this many slots, or by an eighth when that is more
CHUNK_BYTES = 2**20  # keys and values moved at a time when it grows: what fits a processor's second-level cache


class KVCache:
    """Keys and values of ``rows`` sequences, [2, rows, K, slots, D] a layer.

    The slots in use are contiguous in memory: reading all of them in one sweep is 3 × as fast as skipping unused ones,
    once the cache is larger than the processor's. So it starts with few slots and grows, and readers mask the unused.

    Args:
        num_layers: Layers of the model.
        num_heads: Key-value heads, K.
        head_dim: D.
        rows: Sequences.
        capacity: Most slots.
        like: A tensor of the dtype and on the device that the cache shall have.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, *, rows: int, capacity: int, like: Tensor
    ) -> None:
        self.rows, self.num_heads, self.head_dim, self.capacity = rows, num_heads, head_dim, capacity
        self.matrices = 2 * rows * num_heads
        self.storage = like.new_empty(num_layers, self.matrices * capacity * head_dim)
        self.slots = 0
        self.layers: list[Tensor] = []
        self.first_slot = torch.empty(0)

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots; what is there stays."""
        if slots <= self.slots:
            return
        wanted = max(slots, self.slots + self.slots // 8)
        old, self.slots = self.slots, min(self.capacity, wanted + -wanted % SLOT_STEP)
        assert slots <= self.slots
        for layer in self.storage:
            self._spread(layer, old)
        shape = (2, self.rows, self.num_heads, self.slots, self.head_dim)
        self.layers = [self._used(layer, self.slots).view(shape) for layer in self.storage]
        heads = torch.arange(self.matrices, device=self.storage.device).view(2, self.rows, self.num_heads)
        # first flat slot of every (row, keys|values, head), in the order in which a projection yields them
        self.first_slot = heads.transpose(0, 1).reshape(self.rows, -1) * self.slots

    def write(self, layer: int, index: Tensor, keys_values: Tensor) -> None:
        """Put the key and value heads [n, 2K, D] of one token per row into the flat slots ``index`` [n · 2K]."""
        self.layers[layer].view(-1, self.head_dim).index_copy_(0, index, keys_values.reshape(len(index), -1))

    def read(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``rows`` rows, each [n · K, slots, D], without a copy."""
        keys, values = self.layers[layer][:, :rows].flatten(1, 2)
        return keys, values

    def fill(self, layer: int, first: int, keys_values: Tensor, samples: int) -> None:
        """Write whole prompts [n, p, 2, K, D] into ``samples`` rows each, beginning at row ``first``."""
        prompts, slots = keys_values.shape[:2]
        rows = self.layers[layer][:, first : first + prompts * samples, :, :slots]
        rows.unflatten(1, (prompts, samples)).copy_(keys_values.permute(2, 0, 3, 1, 4)[:, :, None])

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows ``source`` over rows ``target``."""
        for layer in self.layers:
            layer[:, target] = layer[:, source]

    def _used(self, layer: Tensor, slots: int) -> Tensor:
        """The part of a layer's storage that holds ``slots`` slots, [2 · rows · K, slots, D]."""
        return layer[: self.matrices * slots * self.head_dim].view(self.matrices, slots, self.head_dim)

    def _spread(self, layer: Tensor, old: int) -> None:
        """Move ``old`` slots of every head apart, within the same memory: from the last head to the first."""
        before, after = self._used(layer, old), self._used(layer, self.slots)
        size = max(1, CHUNK_BYTES // (self.slots * self.head_dim * layer.element_size()), self.matrices // 32)
        for first in reversed(range(0, self.matrices, size)):
            kept = before[first : first + size].clone()
            after[first : first + size, :old] = kept
            # zeros, not whatever was there: a masked slot still enters 0 · value, and 0 · NaN is NaN
            after[first : first + size, old:] = 0
