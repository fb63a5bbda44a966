"""Single answers that were liked or not, each with a partner: another prompt's answer under its own prompt.

KTO estimates how far the policy is from the reference on such mismatched pairs. Who is whose partner is fixed here, so
that neither the order of an epoch nor how a batch is split changes it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_align.data.cache import hash_arrays
from lightning_align.data.collate import Batch, Window
from lightning_align.data.report import Report
from lightning_align.data.tables import Arrays

MOST_SHIFTS = 64  # tried, before single prompts look for partners of their own


class UnpairedRows:
    """Answers with labels; the batches of KTO.

    A batch holds ``input_ids``, ``attention_mask``, ``completion_mask`` ``[R, T]``; and ``[R]``: ``label`` (true for a
    good answer), ``weight`` (the record's, or 0 for what stands in for an empty batch), ``is_partner``, ``row``
    (answers are numbered from 0, then their mismatched pairs), ``group`` (each its own) and, where :attr:`ref_logp` is
    set, ``ref_logp``. The mismatched pairs of *all* micro-batches of a process come with the first of an optimiser
    step, the others have none: what is estimated on them, each counting once, is needed before the first backward pass.
    ``window_weight`` is the sum of the answers' weights in the optimiser step.

    Args:
        table: Answers with their prompts; ``score`` above ½ is a good one.
        pad_id: Stands where nothing is.
        capacity: Longest sequence: a mismatched pair beyond it loses the beginning of the prompt.
        report: Told how many do.

    Attributes:
        has_partners: Whether there is more than one prompt. If not, mismatched pairs weigh nothing.
        ref_logp: Log-prob of every answer, then of every mismatched pair, under a reference, where computed before.
    """

    def __init__(self, table: Arrays, *, pad_id: int, capacity: int, report: Report) -> None:
        self.table = table
        self.pad_id = pad_id
        self.capacity = capacity
        starts, prompts = table["starts"], table["prompt_length"]
        keys = [table["ids"][start : start + n].tobytes() for start, n in zip(starts[:-1], prompts, strict=True)]
        prompt = np.unique(np.array(keys, dtype=object), return_inverse=True)[1]
        self.has_partners = bool((prompt != prompt[0]).any())
        self.partners = partners(prompt) if self.has_partners else np.arange(len(prompt))
        self.labels = table["score"] > 0.5
        self.lengths = np.diff(starts)
        self.longest = int(self.lengths.max())
        self.sequences_per_element = 2.0
        self.weights = table["weight"].astype(np.float64)
        self.ref_logp: NDArray[np.floating] | None = None
        cut = int((prompts + (self.lengths - prompts)[self.partners] > capacity).sum())
        if cut:
            report.note("mismatched pairs (for the KL) whose prompt lost its beginning", cut)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_sequences(self) -> int:
        """Answers and mismatched pairs."""
        return 2 * len(self)

    def sequences_hash(self) -> str:
        """What the log-probs of all these depend on, beside the model."""
        names = ("ids", "starts", "prompt_length")
        capacity = np.array([self.capacity])
        return hash_arrays({name: self.table[name] for name in names} | {"of": self.partners, "capacity": capacity})

    def collate(self, elements: Sequence[int], window_weight: float, window: Window | None = None) -> Batch:
        """See :class:`Batchable`."""
        own = list(elements) or [0]
        partnered = own if window is None or not window.own else list(window.own)
        if window is not None and not window.first:
            partnered = []
        rows = [self._ids(element, element) for element in own]
        rows += [self._ids(element, int(self.partners[element])) for element in partnered]
        width = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        for target, (ids, _) in zip(input_ids, rows, strict=True):
            target[: len(ids)] = ids
        slots = torch.arange(width)
        attention_mask = slots < torch.tensor([len(ids) for ids, _ in rows])[:, None]
        some_partner = self.has_partners and bool(elements if window is None else window.own)
        own_weights = self.weights[own] if elements else np.zeros(len(own))
        weights = np.concatenate([own_weights, np.full(len(partnered), float(some_partner))])
        numbers = np.array([*own, *(element + len(self) for element in partnered)])
        known = {} if self.ref_logp is None else {"ref_logp": torch.from_numpy(self.ref_logp[numbers])}
        return known | {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": attention_mask,
            "completion_mask": attention_mask & (slots >= torch.tensor([start for _, start in rows])[:, None]),
            "row": torch.from_numpy(numbers),
            "group": torch.arange(len(rows)),
            "label": torch.from_numpy(self.labels[[*own, *partnered]]),
            "weight": torch.from_numpy(weights.astype(np.float32)),
            "is_partner": torch.arange(len(rows)) >= len(own),
            "window_weight": torch.tensor(window_weight, dtype=torch.float32),
        }

    def _ids(self, prompt: int, answer: int) -> tuple[NDArray[np.int32], int]:
        """One record's prompt with another's answer (or its own), and where the answer begins."""
        ids, starts, lengths = self.table["ids"], self.table["starts"], self.table["prompt_length"]
        tail = ids[starts[answer] + lengths[answer] : starts[answer + 1]]
        head = ids[starts[prompt] : starts[prompt] + lengths[prompt]]
        cut = len(head) + len(tail) - self.capacity
        if cut > 0:  # its first token may be BOS
            head = np.concatenate([head[:1], head[1 + cut :]])[: len(head) - cut]
        return np.concatenate([head, tail]), len(head)


def partners(prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each record another with a different prompt; ``prompt`` says which records share one ``[N]``, but not all.

    The record a few places before, as few as let all differ: every answer is then one record's partner, as in TRL,
    which takes the one before. Where no number of places will do, some take the next before that differs.
    """
    size = len(prompt)
    places = np.arange(size)
    clashes = [int((prompt == np.roll(prompt, shift)).sum()) for shift in range(1, min(size, MOST_SHIFTS + 1))]
    chosen = (places - 1 - int(np.argmin(clashes))) % size
    while (clash := prompt[chosen] == prompt).any():
        chosen[clash] = (chosen[clash] - 1) % size
    return chosen
