"""Datasets whose elements can be batched: packed rows, prompts with their answers, prompts alone.

Legend: B rows, T padded length, R answers, P pairs. Padding is on the right; masks, never ids, say what is padding.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_align.data.cache import hash_arrays
from lightning_align.data.packing import Packing
from lightning_align.data.tables import Arrays

Batch = dict[str, Any]
# LLaMA-2's margins (2307.09288, appendix) by strength: significantly, better, slightly, negligibly.
MARGINS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
}


class Window(NamedTuple):
    """The optimiser step that a micro-batch is part of.

    Attributes:
        elements: Of all processes.
        own: Of this process.
        first: Whether it is this process's first micro-batch of the step.
    """

    elements: Sequence[int]
    own: Sequence[int]
    first: bool


class Batchable(Protocol):
    """Elements that a loader orders and batches.

    Attributes:
        weights: What each element adds to the weight of an optimiser step, float64 ``[N]``.
        lengths: Tokens of each element ``[N]``.
        longest: Tokens of the longest sequence.
        sequences_per_element: How many sequences an element has on average.
    """

    weights: NDArray[np.float64]
    lengths: NDArray[np.int64]
    longest: int
    sequences_per_element: float

    def __len__(self) -> int: ...

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> Batch:
        """One micro-batch of the optimiser step (window) whose weight is ``window_weight``.

        Without elements it is a batch of the same form that weighs nothing: every process must take every step.
        ``window`` is for losses that need more than its weight; None makes a step of the batch alone.
        """
        ...


class PackedRows:
    """Documents or demonstrations in rows; the batches of pre-training and SFT.

    A batch holds, all ``[B, T]``, ``input_ids`` int64, ``attention_mask`` bool, ``position_ids`` (from 0 in every
    document), ``document_ids`` (numbered within the row, −1 for padding) and ``loss_weights`` float32 (the record's
    weight; 0 where nothing is learnt and for the first token of every document); and ``window_weight``, the sum of
    ``loss_weights`` over all micro-batches of all processes in the optimiser step.

    Args:
        table: ``ids``, ``starts``, ``mask``, ``weight`` of the records.
        packing: Which parts of which records make up a row.
        pad_id: Stands where nothing is.
        document_mask: False makes one document of every row, as plain GPT packing does: its documents see each other.
    """

    def __init__(self, table: Arrays, packing: Packing, *, pad_id: int, document_mask: bool = True) -> None:
        self.table = table
        self.packing = packing
        self.pad_id = pad_id
        self.document_mask = document_mask
        self.lengths = packing.row_lengths
        self.longest = int(self.lengths.max())
        self.sequences_per_element = 1.0
        self.weights = self._row_weights()

    def __len__(self) -> int:
        return len(self.packing)

    def _bounds(self, segments: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where segments lie in the table."""
        offset = self.table["starts"][self.packing.document[segments]]
        return offset + self.packing.start[segments], offset + self.packing.stop[segments]

    def _row_weights(self) -> NDArray[np.float64]:
        learnt = np.concatenate([[0], self.table["mask"].cumsum(dtype=np.int64)])
        begin, end = self._bounds(slice(None))
        first_learns = self._firsts() & self.table["mask"][begin] if len(begin) else begin
        tokens = learnt[end] - learnt[begin] - first_learns
        weights = tokens * self.table["weight"][self.packing.document].astype(np.float64)
        sums = np.concatenate([[0.0], weights.cumsum()])
        return np.diff(sums[self.packing.rows])

    def _firsts(self) -> NDArray[np.bool_]:
        """Segments whose first token has nothing before it."""
        firsts = np.full(len(self.packing.document), self.document_mask)
        firsts[self.packing.rows[:-1]] = True
        return firsts

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> Batch:
        """See :class:`Batchable`."""
        rows = [self._row(element) for element in elements] or [self._nothing()]
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_id, "position_ids": 0, "document_ids": -1, "loss_weights": 0.0}
        batch: Batch = {name: _padded([row[name] for row in rows], width, value) for name, value in fill.items()}
        batch["attention_mask"] = batch["document_ids"] >= 0
        batch["window_weight"] = torch.tensor(window_weight, dtype=torch.float32)
        return batch

    def _row(self, row: int) -> dict[str, NDArray[Any]]:
        segments = slice(self.packing.rows[row], self.packing.rows[row + 1])
        begin, end = self._bounds(segments)
        sizes = end - begin
        index = np.repeat(begin - sizes.cumsum() + sizes, sizes) + np.arange(sizes.sum())
        within = np.repeat(sizes.cumsum() - sizes, sizes)
        weights = np.where(self.table["mask"][index], np.repeat(self._weights_of(segments), sizes), np.float32(0))
        weights[(sizes.cumsum() - sizes) if self.document_mask else 0] = 0
        positions = np.arange(len(index))
        return {
            "input_ids": self.table["ids"][index].astype(np.int64),
            "position_ids": positions - within if self.document_mask else positions,
            "document_ids": np.repeat(np.arange(len(sizes)), sizes) if self.document_mask else np.zeros_like(positions),
            "loss_weights": weights,
        }

    def _weights_of(self, segments: slice) -> NDArray[np.float32]:
        return self.table["weight"][self.packing.document[segments]]

    def _nothing(self) -> dict[str, NDArray[Any]]:
        zero = np.zeros(1, dtype=np.int64)
        return {
            "input_ids": zero + self.pad_id,
            "position_ids": zero,
            "document_ids": zero,
            "loss_weights": np.zeros(1, dtype=np.float32),
        }


class PreferenceGroups:
    """Prompts with the answers that are compared; the batches of reward models.

    One prompt is one element. A batch holds ``input_ids``, ``attention_mask``, ``completion_mask`` ``[R, T]``;
    ``[R]`` of the answers: ``row`` of the table, ``group``, which prompt of the batch it belongs to, ``score`` (NaN if
    unknown), ``response_weight`` (the record's weight / the prompt's number of answers) and, where :attr:`ref_logp` is
    set, ``ref_logp``; ``[P]`` of the pairs: ``pair_chosen``,
    ``pair_rejected`` (rows), ``pair_weight`` (the record's weight / the prompt's number of pairs), ``pair_margin``,
    ``pair_label`` (1, a soft label, or ½ for a tie), ``pair_strength`` (0 significantly … 3 negligibly, −1 unknown);
    and of the prompts ``group_rows`` ``[G, K]`` (rows of its answers, −1 where it has fewer), ``group_ranks``
    ``[G, K]`` (1 is best, equal is a tie) and ``group_weight`` ``[G]``. Over all micro-batches of all processes in the
    optimiser step, ``window_weight`` is the sum of ``group_weight``, and ``window_chosen_tokens`` that of
    ``pair_weight`` times the tokens of the pair's better answer.

    Args:
        table: Answers with their prompts, groups and pairs.
        pad_id: Stands where nothing is.
        margins: Margin by strength; a pair's own margin goes before it.

    Attributes:
        ref_logp: Log-prob of every answer under a reference, by row of the table, where it was computed before.
    """

    def __init__(self, table: Arrays, *, pad_id: int, margins: Sequence[float]) -> None:
        self.table = table
        self.pad_id = pad_id
        by_strength = np.array([*margins, 0.0], dtype=np.float32)[table["strength"]]  # −1 is the last
        known = np.where(np.isnan(table["margin"]), by_strength, table["margin"])
        self.margins = np.where(table["label"] == 0.5, np.float32(0), known)  # a tie's answers are not to be told apart
        self.weights = table["weight"].astype(np.float64)
        self.lengths = np.diff(table["starts"][table["groups"]])
        self.longest = int(np.diff(table["starts"]).max())
        self.sequences_per_element = len(table["prompt_length"]) / len(self.weights)
        self.chosen_tokens = self._chosen_tokens()
        self.ref_logp: NDArray[np.floating] | None = None

    @property
    def num_sequences(self) -> int:
        """Answers."""
        return len(self.table["prompt_length"])

    def sequences_hash(self) -> str:
        """What the log-probs of the answers depend on, beside the model."""
        return hash_arrays({name: self.table[name] for name in ("ids", "starts", "prompt_length")})

    def _chosen_tokens(self) -> NDArray[np.float64]:
        """Tokens of the better answer, the mean over a prompt's pairs times its weight ``[N]``."""
        table, counts = self.table, np.diff(self.table["pair_groups"])
        group = np.repeat(np.arange(len(counts)), counts)
        rows = table["groups"][group] + table["chosen"]
        # nothing predicts the first token of a sequence
        tokens = np.diff(table["starts"])[rows] - np.maximum(table["prompt_length"][rows], 1)
        return np.bincount(group, tokens, minlength=len(counts)) * self.weights / np.maximum(counts, 1)

    def __len__(self) -> int:
        return len(self.weights)

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> Batch:
        """See :class:`Batchable`."""
        parts = [self._group(element, self.weights[element]) for element in elements] or [self._group(0, 0.0)]
        table, rows = self.table, [row for part in parts for row in part[0]]
        ids = [table["ids"][table["starts"][row] : table["starts"][row + 1]].astype(np.int64) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        slots = torch.arange(int(lengths.max()))
        attention_mask = slots < lengths[:, None]
        sizes = [len(part[0]) for part in parts]
        weights = np.array([part[3] for part in parts])
        firsts = np.cumsum([0, *sizes[:-1]])
        offsets = np.repeat(firsts, [len(part[1]) for part in parts])
        pairs = np.concatenate([part[1] for part in parts])
        chosen_tokens = self.chosen_tokens[list(elements if window is None else window.elements)].sum()
        known = {} if self.ref_logp is None else {"ref_logp": torch.from_numpy(self.ref_logp[rows])}
        return known | {
            "input_ids": _padded(ids, len(slots), self.pad_id),
            "attention_mask": attention_mask,
            "completion_mask": attention_mask & (slots >= torch.from_numpy(table["prompt_length"][rows])[:, None]),
            "row": torch.tensor(rows),
            "group": torch.arange(len(parts)).repeat_interleave(torch.tensor(sizes)),
            "score": torch.from_numpy(table["score"][rows]),
            "response_weight": torch.from_numpy(np.repeat(weights / sizes, sizes).astype(np.float32)),
            "group_rows": _padded(np.split(np.arange(len(rows)), firsts[1:]), max(sizes), -1),
            "group_ranks": _padded(np.split(table["rank"][rows].astype(np.int64), firsts[1:]), max(sizes), 0),
            "group_weight": torch.from_numpy(weights.astype(np.float32)),
            "pair_chosen": torch.from_numpy(table["chosen"][pairs] + offsets),
            "pair_rejected": torch.from_numpy(table["rejected"][pairs] + offsets),
            "pair_weight": torch.from_numpy(np.concatenate([part[2] for part in parts]).astype(np.float32)),
            "pair_margin": torch.from_numpy(self.margins[pairs]),
            "pair_label": torch.from_numpy(table["label"][pairs]),
            "pair_strength": torch.from_numpy(table["strength"][pairs].astype(np.int64)),
            "window_chosen_tokens": torch.tensor(chosen_tokens, dtype=torch.float32),
            "window_weight": torch.tensor(window_weight, dtype=torch.float32),
        }

    def _group(self, group: int, weight: float) -> tuple[range, NDArray[np.int64], NDArray[np.float64], float]:
        """Rows and pairs of a prompt, the weights of its pairs, and its own."""
        groups, pair_groups = self.table["groups"], self.table["pair_groups"]
        pairs = np.arange(pair_groups[group], pair_groups[group + 1])
        return range(groups[group], groups[group + 1]), pairs, np.full(len(pairs), weight / max(1, len(pairs))), weight


class PromptRows:
    """Prompts to sample from; a batch is plain Python: ``prompt_ids`` (lists of ids), ``records`` and ``copy``.

    ``copy`` says how many earlier prompts of the data set have the same ids.

    Args:
        table: ``ids``, ``starts``, and ``record``, the index of each prompt's record.
        records: The records, with whatever columns they have.
    """

    def __init__(self, table: Arrays, records: Sequence[Mapping[str, Any]]) -> None:
        self.table = table
        self.records = records
        self.lengths = np.diff(table["starts"])
        self.longest = int(self.lengths.max())
        self.sequences_per_element = 1.0
        self.weights = np.ones(len(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> Batch:
        """See :class:`Batchable`; there is nothing to weigh here."""
        starts = self.table["starts"]
        return {
            "prompt_ids": [self.table["ids"][starts[i] : starts[i + 1]].tolist() for i in elements],
            "records": [dict(self.records[self.table["record"][i]]) for i in elements],
            "copy": [self._copies[i] for i in elements],
        }

    @cached_property
    def _copies(self) -> list[int]:
        ids, starts = self.table["ids"], self.table["starts"]
        seen: Counter[bytes] = Counter()
        copies = []
        for start, stop in pairwise(starts):
            key = ids[start:stop].tobytes()
            copies.append(seen[key])
            seen[key] += 1
        return copies


def _padded(rows: Sequence[NDArray[Any]], width: int, value: float) -> torch.Tensor:
    result = np.full((len(rows), width), value, dtype=rows[0].dtype)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(result)
