"""Where the answers of a batch lie in the rows that a model sees: a row each, packed, or behind a shared prompt.

In a packed row the first answer of a prompt is a document with the prompt in front; each further one is a branch
(``models/masks``) that begins with a copy of the prompt's last token, whose state predicts the answer's first. So a
prompt is encoded once however many answers it has, and every token is still predicted by the slot before it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_align.data.packing import Packing, pack
from lightning_align.models.answers import AnswerRows

Ints = NDArray[np.int64]
# A token costs 12 H² multiply-adds in a layer's matrices, and 2 H with every token that it attends to.
MATRICES = 6
# Rows to try, in lengths of the longest sequence: longer ones have less padding, and more attention.
ROWS = (1.0, 1.5, 2.0, 3.0)


def padded_rows(batch: Mapping[str, Tensor]) -> AnswerRows:
    """The rows of a batch as they are: ``input_ids``, ``attention_mask``, ``completion_mask`` ``[R, T]``."""
    real = batch["attention_mask"].bool()
    predicted = real.clone()
    predicted[:, 1:] &= real[:, :-1]
    predicted[:, 0] = False
    where = batch["completion_mask"].bool() & predicted
    slots, mask = _compact([np.flatnonzero(row) for row in where.cpu().numpy()], where.shape[1])
    return AnswerRows(batch["input_ids"], real, slots.to(real.device), mask.to(real.device))


def packed_rows(batch: Mapping[str, Tensor], width: int) -> AnswerRows:
    """The same answers in as few slots as cost least, each prompt of several answers once if that is cheaper.

    Args:
        batch: As for :func:`padded_rows`, on any side of its padding; ``group`` ``[R]`` numbers the prompts, and
            answers of one stand next to each other.
        width: The model's hidden size, by which tokens are weighed against attention.
    """
    device = batch["input_ids"].device
    real, answer, ids = (batch[name].cpu().numpy() for name in ("attention_mask", "completion_mask", "input_ids"))
    lengths = real.sum(1)
    sequences = [row[mask != 0] for row, mask in zip(ids, real, strict=True)]
    prompts = lengths - (answer.astype(bool) & (real != 0)).sum(1)
    group = batch["group"].cpu().numpy()
    trees = [np.arange(len(group))]
    if len(np.unique(group)) < len(group):
        trees.append(group)
    plans = [_Plan(lengths, prompts, tree, factor) for tree in trees for factor in ROWS]
    return min(plans, key=lambda plan: plan.cost(width)).rows(sequences, device)


class _Plan:
    """Answers in packed rows; those of one tree share the beginning of their prompt.

    Args:
        lengths: Tokens of each sequence ``[R]``.
        prompts: Of these, of its prompt ``[R]``.
        tree: Which answers share a prompt ``[R]``, ascending.
        factor: Length of a row, in lengths of the longest tree.
    """

    def __init__(self, lengths: Ints, prompts: Ints, tree: Ints, factor: float) -> None:
        self.lengths = lengths
        self.prompts = prompts
        first = np.r_[True, tree[1:] != tree[:-1]]
        # a branch repeats the last token of its prompt, from which its first is predicted
        self.shared = np.where(first, 0, np.maximum(prompts - 1, 0))
        self.sizes = lengths - self.shared
        self.trees = np.append(np.flatnonzero(first), len(tree))
        sizes = np.add.reduceat(self.sizes, self.trees[:-1])
        self.packing: Packing = pack(sizes, int(sizes.max() * factor), "bfd")
        self.row_length = int(self.packing.row_lengths.max())

    def cost(self, width: int) -> float:
        """Of a layer's forward pass, up to a factor."""
        return len(self.packing) * self.row_length * float(MATRICES * width + self.row_length)

    def rows(self, sequences: Sequence[Ints], device: torch.device) -> AnswerRows:
        """The rows on a device; what stands in padding is the first token of the batch."""
        shape = len(self.packing), self.row_length
        ids, positions = np.full(shape, sequences[0][0]), np.zeros(shape, dtype=np.int64)
        documents = np.full(shape, -1)
        places: list[Ints] = [np.empty(0, dtype=np.int64)] * len(sequences)
        for row in range(shape[0]):
            slot, document = 0, 0
            for tree in self.packing.document[self.packing.rows[row] : self.packing.rows[row + 1]]:
                for answer in range(self.trees[tree], self.trees[tree + 1]):
                    shared, end = self.shared[answer], slot + self.sizes[answer]
                    ids[row, slot:end] = sequences[answer][shared:]
                    positions[row, slot:end] = np.arange(shared, self.lengths[answer])
                    documents[row, slot:end] = document
                    begin = max(1, self.prompts[answer]) - shared
                    places[answer] = np.arange(row * shape[1] + slot + begin, row * shape[1] + end)
                    slot, document = end, document + 1
        columns = (torch.from_numpy(values).to(device) for values in (ids, positions, documents))
        input_ids, position_ids, document_ids = columns
        slots, mask = _compact(places, 0)
        return AnswerRows(input_ids, document_ids >= 0, slots.to(device), mask.to(device), position_ids, document_ids)


def _compact(places: Sequence[Ints], stride: int) -> tuple[Tensor, Tensor]:
    """Slots of each answer as a rectangle with its mask; answer r's are counted from ``r · stride``."""
    width = max(1, *(len(found) for found in places)) if places else 1
    slots = np.zeros((len(places), width), dtype=np.int64)
    mask = np.zeros((len(places), width), dtype=bool)
    for number, found in enumerate(places):
        slots[number, : len(found)] = found + number * stride
        mask[number, : len(found)] = True
    return torch.from_numpy(slots), torch.from_numpy(mask)
