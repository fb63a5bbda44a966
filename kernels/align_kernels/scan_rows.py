"""What the scan operations in tensors share: the scan itself, and sequences in rows.

x_t = b_t + a_t x_{t+1} is solved in blocks of 32 tokens: within all blocks at once by a loop over 32 tokens, across
blocks by the same scheme, a 32nd of the size. The data is touched a fixed number of times, where doubling touches it
log₂ T times and a loop over time pays for T dispatches. Padded rollouts are worked off in bundles of rows that stay in
cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32
BUNDLE = 2**17  # tokens worked on at once: a handful of float32 tensors of this size stays in the last level of cache


def scan(b: Tensor, a: Tensor | float) -> Tensor:
    """x_t = b_t + a_t x_{t+1} along dim 1 of ``[R, T]``, with 0 beyond the end; ``a`` is one number or one a token."""
    rows, length = b.shape
    width = min(BLOCK, length)
    x = _time_major(b, width)
    lines = x.unbind(0)
    if isinstance(a, float):
        for t in range(width - 2, -1, -1):
            lines[t].add_(lines[t + 1], alpha=a)
        across: Tensor | float = a**width
        reach = (a ** torch.arange(width, 0, -1, dtype=torch.float64, device=b.device)).to(b.dtype)[:, None]
    else:
        reach = _time_major(a, width)  # becomes the product of the factors from a token to the end of its block
        factors = reach.unbind(0)
        for t in range(width - 2, -1, -1):
            lines[t].addcmul_(factors[t], lines[t + 1])
            if length > width:
                factors[t].mul_(factors[t + 1])
        across = reach[0].view(rows, -1)
    if length > width:
        blocks = scan(x[0].view(rows, -1), across)
        x.addcmul_(reach, pad(blocks[:, 1:], (0, 1)).flatten())
    return x.t().reshape(rows, -1)[:, :length]


def _time_major(x: Tensor, width: int) -> Tensor:
    """``[R, T]`` → a new ``[width, R · blocks]``, zeros behind the last token."""
    short = -x.shape[1] % width
    x = pad(x, (0, short)) if short else x
    return x.reshape(-1, width).t().clone(memory_format=torch.contiguous_format)


class Part:
    """A bundle of rows of a padded rollout, or a packed one as a single row.

    Args:
        rows: The rows; all of them for a packed rollout.
        cu_seqlens: Boundaries of the packed sequences, None for a padded rollout.

    Attributes:
        sequences: Which sequences are in it.
        ends: Index into ``[R, T]`` of the last token of each of them that is not empty.
    """

    def __init__(self, rows: slice, cu_seqlens: Tensor | None) -> None:
        self.packed = cu_seqlens is not None
        self.sequences = rows
        self.ends: tuple[slice | int | Tensor, ...] = (slice(None), -1)
        if cu_seqlens is not None:
            self.lengths = cu_seqlens.diff().long()
            self.filled = self.lengths > 0
            self.ends = (0, cu_seqlens[1:][self.filled].long() - 1)

    def cut(self, x: Tensor) -> Tensor:
        """This part of ``[B, T]`` or ``[N]`` as ``[R, T]``, a view."""
        return x[None] if self.packed else x[self.sequences]

    def sums(self, x: Tensor) -> Tensor:
        """Σ over each sequence of ``[R, T]``."""
        if self.packed:
            return torch.segment_reduce(x[0], "sum", lengths=self.lengths, initial=0)
        return x.sum(1)

    def spread(self, x: Tensor) -> Tensor:
        """One number per sequence, to broadcast over ``[R, T]``."""
        return x.repeat_interleave(self.lengths)[None] if self.packed else x[:, None]

    def add_to_last(self, x: Tensor, valid: Tensor, amount: Tensor) -> None:
        """Adds each sequence's amount to ``x`` ``[R, T]`` at its last valid token, if it has any."""
        position = torch.where(valid, torch.arange(x.shape[1], device=x.device), -1)
        if self.packed:
            last = torch.segment_reduce(position[0].double(), "max", lengths=self.lengths, initial=-1).long()
            x[0].scatter_add_(0, last.clamp(min=0), torch.where(last < 0, 0.0, amount))
        else:
            last = position.amax(1)
            x.scatter_add_(1, last.clamp(min=0)[:, None], torch.where(last < 0, 0.0, amount)[:, None])


def parts(tokens: Tensor, cu_seqlens: Tensor | None) -> Iterator[Part]:
    """Bundles of rows of padded ``tokens`` ``[B, T]``, or all of packed ones ``[N]``; none without tokens."""
    if not tokens.numel():
        return
    if cu_seqlens is not None:
        yield Part(slice(None), cu_seqlens)
        return
    batch, length = tokens.shape
    rows = max(1, BUNDLE // length)
    for start in range(0, batch, rows):
        yield Part(slice(start, start + rows), None)


class Steps:
    """Which tokens of a part are steps of its episodes, and what comes after each.

    Args:
        part: Where the sequences end.
        mask: True on steps ``[R, T]``; None if every token is one.
        mode: ``skip`` passes over other tokens, ``stop`` lets them end the episode.
    """

    def __init__(self, part: Part, mask: Tensor | None, mode: str) -> None:
        self.part, self.mask, self.mode = part, mask, mode
        self.off = None if mask is None else ~mask
        # With one run of steps a row there is nothing to skip or to stop at. (To ask a GPU would be to wait for it.)
        self.one_run = mask is None or (not part.packed and mask.device.type == "cpu" and not _interrupted(mask))

    def zeroed(self, x: Tensor) -> Tensor:
        """``x`` with 0 where there is no step, whatever stands there."""
        return x if self.off is None else x.masked_fill(self.off, 0)

    def following(self, value: Tensor, bootstrap: Tensor | None, done: Tensor | None) -> Tensor:
        """Value of the state after each step, from :meth:`zeroed` values; ``bootstrap`` ``[S]`` after the last one."""
        behind: Tensor | float = 0.0
        if bootstrap is not None:
            behind = bootstrap.to(value.dtype)[self.part.filled if self.part.packed else self.part.sequences]
        if not self.one_run:
            value = self._nearest(value, behind)
        after = torch.empty_like(value)
        after[:, :-1] = value[:, 1:]
        after[self.part.ends] = behind
        if self.mask is not None and self.one_run and bootstrap is not None:
            last = self.mask.clone()
            last[:, :-1] &= ~self.mask[:, 1:]
            after = torch.where(last, self.part.spread(behind), after)  # type: ignore[arg-type]
        return after if done is None else after.masked_fill(done, 0)

    def _nearest(self, value: Tensor, behind: Tensor | float) -> Tensor:
        """``skip``: value of the nearest step at or after each token, or what is behind; ``stop``: its own, or that."""
        assert self.mask is not None
        carried = value.clone() if self.mode == "skip" else torch.zeros_like(value)
        passing = self.mask.logical_not().to(value.dtype)
        carried[self.part.ends] = torch.where(self.mask[self.part.ends], carried[self.part.ends], behind)
        passing[self.part.ends] = 0
        nearest = scan(carried, passing)
        return nearest if self.mode == "skip" else nearest + value

    def decay(self, rate: float, like: Tensor, done: Tensor | None, weights: Tensor | None) -> Tensor | float:
        """What the advantage of the next step is multiplied by: ``rate``, times ``weights`` where there is a step."""
        if self.one_run and done is None and weights is None and not self.part.packed:
            return rate
        decay = torch.full_like(like, rate) if weights is None else weights * rate
        if self.off is not None:
            decay.masked_fill_(self.off, 1.0 if self.mode == "skip" else 0.0)
        if done is not None:
            decay.masked_fill_(done if self.mask is None else done & self.mask, 0)
        decay[self.part.ends] = 0
        return decay


def _interrupted(mask: Tensor) -> bool:
    """Whether a row of ``[R, T]`` has more than one run."""
    starts = mask[:, 1:] > mask[:, :-1]
    return bool((starts.sum(1) + mask[:, 0] > 1).any())
