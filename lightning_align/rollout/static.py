"""Our own sampler: a static key-value cache, rows that leave when they end, prompts that enter when there is room."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.rollout.adapters import build_plan
from lightning_align.rollout.decoder import Decoder
from lightning_align.rollout.ledger import Ledger
from lightning_align.rollout.types import Rollout, SamplingParams

REFILL_SHARE = 8  # a prefill waits until 1/8 of the rows are free: one of a few prompts costs nearly as much as a step
PREFILL_TOKENS = 8192  # prompt tokens in one prefill; bounds the memory of its activations


@dataclass(frozen=True)
class Unit:
    """A prompt and those of its sequences that enter the batch together."""

    prompt: int
    sequences: range


class StaticCacheEngine:
    """Samples from a transformers model through a decoder of our own that reads the model's weights.

    What a sequence draws depends on its prompt, seed and parameters, not on what else is in the batch (up to the
    rounding of matrix products of another size).

    Args:
        model: A causal language model of a supported architecture; other ones raise a UserError.
        tokenizer: Ends sequences and turns tokens into text.
        max_batch: Most sequences decoded at a time; more wait for a free row.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch: int = 128) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}: must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self._decoder = Decoder(build_plan(model))
        self._versions = self._weight_versions()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's weights again (the joined projections are copies; the old ones go first)."""
        del self._decoder
        self._decoder = Decoder(build_plan(self.model))
        self._versions = self._weight_versions()

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        records: Sequence[dict[str, Any]] | None = None,
    ) -> Rollout:
        """Draw ``params.num_samples`` completions of every prompt; see ``Engine.generate``."""
        ledger = Ledger(prompt_ids, params, seeds, records, self.model, self.tokenizer)
        if self._weight_versions() != self._versions:
            self.refresh()
        rows = min(self.max_batch, ledger.num_sequences)
        with torch.autocast(self.model.device.type, enabled=False):
            batch = Batch(self._decoder, ledger, rows)
            queue = _queue(prompt_ids, params.num_samples, rows)
            while queue or batch.size:
                if queue and batch.has_room(queue[0]):
                    batch.admit(queue)
                else:
                    batch.step()
        return ledger.rollout()

    @torch.no_grad()
    def logits(self, prompt_ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each prompt by prefill of all but its last token and one decoding step, [B, V] float32.

        For checking the decoder against the model's own forward.
        """
        heads = [list(ids[:-1]) for ids in prompt_ids]
        last = torch.tensor([ids[-1] for ids in prompt_ids], device=self.model.device)
        lengths = torch.tensor([len(ids) for ids in heads], device=self.model.device)
        longest = int(lengths.max()) + 1
        cache = self._decoder.new_cache(len(heads), longest)
        self._decoder.prefill(_padded(heads, self.model.device), lengths, cache, 0, 1)
        return self._decoder.step(last, lengths, cache, longest)

    def _weight_versions(self) -> list[tuple[int, int]]:
        """Changes whenever a parameter is updated in place or replaced."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.model.parameters()]


class Batch:
    """The rows being decoded: always the first ``size`` rows of the cache.

    Args:
        decoder: Runs the model.
        ledger: Chooses and keeps tokens.
        rows: Most sequences at a time.
    """

    def __init__(self, decoder: Decoder, ledger: Ledger, rows: int) -> None:
        self.decoder, self.ledger, self.rows = decoder, ledger, rows
        # the last token of a sequence is never decoded, so it needs no slot
        slots = max(len(ids) for ids in ledger.prompt_ids) + ledger.params.max_new_tokens - 1
        self.cache = decoder.new_cache(rows, slots)
        self.size = 0
        self.longest = 0
        empty = torch.zeros(rows, dtype=torch.int64, device=ledger.device)
        # per row: its sequence, its tokens in the cache, its sampled tokens, and the one to decode next
        self.sequences, self.lengths, self.sampled, self.tokens = (empty.clone() for _ in range(4))

    def has_room(self, unit: Unit) -> bool:
        """Whether to let waiting prompts in now."""
        return self.size == 0 or self.rows - self.size >= max(len(unit.sequences), self.rows // REFILL_SHARE)

    def admit(self, queue: deque[Unit]) -> None:
        """Prefill the next prompts and draw the first token of each of their sequences, which are rows from now on."""
        units = self._next_units(queue)
        device, samples = self.ledger.device, len(units[0].sequences)
        prompts = [self.ledger.prompt_ids[unit.prompt] for unit in units]
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        logits = self.decoder.prefill(_padded(prompts, device), lengths, self.cache, self.size, samples)
        rows = slice(self.size, self.size + len(units) * samples)
        self.sequences[rows] = torch.tensor([sequence for unit in units for sequence in unit.sequences], device=device)
        self.lengths[rows] = lengths.repeat_interleave(samples)
        self.sampled[rows] = 0
        self.size = rows.stop
        self._draw(logits.repeat_interleave(samples, 0), rows)

    def step(self) -> None:
        """Decode one token of every row."""
        rows = slice(0, self.size)
        logits = self.decoder.step(self.tokens[rows], self.lengths[rows], self.cache, self.longest + 1)
        self.lengths[rows] += 1
        self.longest += 1
        self._draw(logits, rows)

    def _next_units(self, queue: deque[Unit]) -> list[Unit]:
        """Waiting units that fit: free rows, prompt tokens of one prefill, as many samples as the first."""
        samples = len(queue[0].sequences)
        most = (self.rows - self.size) // samples
        units = [queue.popleft()]
        while queue and len(units) < most and len(queue[0].sequences) == samples:
            width = len(self.ledger.prompt_ids[queue[0].prompt])  # the queue is sorted: no earlier prompt is longer
            if (len(units) + 1) * width > PREFILL_TOKENS:
                break
            units.append(queue.popleft())
        return units

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """Draw the next token of ``rows`` and drop those that ended."""
        tokens, ended = self.ledger.draw(logits, self.sequences[rows], self.sampled[rows])
        self.tokens[rows] = tokens
        self.sampled[rows] += 1
        gone = (ended.nonzero().squeeze(1) + rows.start).tolist()
        if gone:
            self._drop(gone)
        if gone or rows.start or self.longest == 0:
            self.longest = int(self.lengths[: self.size].max()) if self.size else 0

    def _drop(self, gone: list[int]) -> None:
        """Fill the rows in ``gone`` with the last ones, so that the batch stays dense."""
        size = self.size - len(gone)
        ended = set(gone)
        source = [row for row in range(size, self.size) if row not in ended]
        if source:
            target = torch.tensor([row for row in gone if row < size], device=self.ledger.device)
            moved = torch.tensor(source, device=self.ledger.device)
            self.cache.move(moved, target)
            for column in (self.sequences, self.lengths, self.sampled, self.tokens):
                column[target] = column[moved]
        self.size = size


def _queue(prompt_ids: Sequence[Sequence[int]], num_samples: int, rows: int) -> deque[Unit]:
    """All sequences, shortest prompts first.

    Neighbours then need little padding, the rows of a batch have similar lengths (early ones are further along), and
    the cache grows only when it must.
    """
    order = sorted(range(len(prompt_ids)), key=lambda prompt: len(prompt_ids[prompt]))
    return deque(
        Unit(prompt, range(prompt * num_samples + first, prompt * num_samples + min(first + rows, num_samples)))
        for prompt in order
        for first in range(0, num_samples, rows)
    )


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Prompts padded on the right, [n, p]; what the padding holds is never read."""
    return pad_sequence([torch.tensor(ids, dtype=torch.int64) for ids in prompts], batch_first=True).to(device)
