"""What is asked of an engine, what it returns, and what a method adds to it.

Axes: B sequences, T padded length. Per-token tensors are token-aligned: entry t belongs to token t.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_align.errors import UserError

FinishReason = Literal["eos", "stop", "length"]
Indices = slice | Sequence[int] | Tensor
Fields = TypeVar("Fields", "Rollout", "Experience")


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    The log-probs an engine reports are those of softmax(logits / temperature) over the whole vocabulary, before top-k,
    top-p and min-p cut it: that is the distribution the training forward can reproduce.

    Args:
        max_new_tokens: Longest completion in tokens, the end-of-sequence token included.
        temperature: Divides the logits; also under ``greedy``, where it only changes the reported log-probs.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose mass reaches p (of what top-k left); 1 keeps all.
        min_p: Keep tokens at least this likely relative to the likeliest; 0 keeps all.
        num_samples: Completions per prompt.
        greedy: Take the likeliest token instead of drawing one.
        stop_strings: Texts that end a completion after the token that completes them, with finish reason ``stop``.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int = 1
    greedy: bool = False
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("stop_strings", all(self.stop_strings), "non-empty strings"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise UserError(f"sampling: {name} is {getattr(self, name)!r}: must be {wanted}")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the whole distribution, so that log-probs are not the sampler's."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Rollout:
    """Prompts with their completions, one row per completion, padded on the right.

    Rows keep the order of the prompts; the samples of one prompt are neighbours.

    Args:
        input_ids: Prompt and completion, [B, T] int64.
        attention_mask: True on prompt and completion, [B, T] bool.
        completion_mask: True on the completion including the token that ended it, [B, T] bool.
        engine_logp: Log-probs of the sampled tokens under the engine, [B, T] float32, 0 outside the completion.
        prompt_lengths: Tokens of the prompt, [B] int64.
        prompt_index: Which prompt of the request a row continues, [B] int64.
        finish_reason: Why each completion ended: ``eos``, ``stop`` or ``length`` (cut off).
        completions: Completions as text, without special tokens.
        records: The record of each row's prompt.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    engine_logp: Tensor
    prompt_lengths: Tensor
    prompt_index: Tensor
    finish_reason: list[FinishReason]
    completions: list[str]
    records: list[dict[str, Any]]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens of each completion, [B] int64."""
        return self.completion_mask.sum(1)

    def rows_of_prompts(self) -> list[list[int]]:
        """Row numbers of each prompt's completions, in the order of the prompts' first rows."""
        rows: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompt_index.tolist()):
            rows.setdefault(prompt, []).append(row)
        return list(rows.values())

    def completion_ids(self) -> list[list[int]]:
        """Token ids of each completion, the ending token included."""
        return [row[mask].tolist() for row, mask in zip(self.input_ids, self.completion_mask, strict=True)]

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout with its tensors on ``device``."""
        return _map_fields(self, lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def select(self, indices: Indices) -> "Rollout":
        """The rows at ``indices`` (positions or a mask), in that order, at the same padded length."""
        positions = _positions(indices)
        return _map_fields(self, lambda value: _take(value, positions))

    def cropped(self) -> "Rollout":
        """Without the columns on the right that are padding in every row."""
        width = int(self.attention_mask.any(0).sum())
        return _map_fields(self, lambda value: _crop(value, width))


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the loss needs; per-token tensors are [B, T] float32 and 0 outside the completion.

    Args:
        rollout: The samples.
        scores: Total score of each completion, [B].
        score_parts: Named parts of the score, each [B].
        logp: Log-probs under the sampling policy in the training forward (the "old" ones).
        ref_logp: Log-probs under the reference.
        values: Value of the state before each token.
        rewards: Per-token rewards.
        advantages: Advantages; of methods without a value function one a completion, [B].
        returns: Targets of the value function.
    """

    rollout: Rollout
    scores: Tensor
    score_parts: Mapping[str, Tensor] = field(default_factory=dict)
    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def input_ids(self) -> Tensor:
        """Prompt and completion, [B, T] int64."""
        return self.rollout.input_ids

    @property
    def attention_mask(self) -> Tensor:
        """True on prompt and completion, [B, T] bool."""
        return self.rollout.attention_mask

    @property
    def completion_mask(self) -> Tensor:
        """True on the completion, [B, T] bool."""
        return self.rollout.completion_mask

    def to(self, device: torch.device | str) -> "Experience":
        """The same experience with its tensors on ``device``."""
        moved = _map_fields(self, lambda value: value.to(device) if isinstance(value, Tensor | Rollout) else value)
        return replace(moved, score_parts={name: part.to(device) for name, part in self.score_parts.items()})

    def select(self, indices: Indices) -> "Experience":
        """The rows at ``indices`` (positions or a mask), in that order, at the same padded length."""
        positions = _positions(indices)
        return _map_fields(self, lambda value: _take(value, positions))

    def cropped(self) -> "Experience":
        """Without the columns on the right that are padding in every row."""
        width = int(self.attention_mask.any(0).sum())
        return _map_fields(self, lambda value: _crop(value, width))

    def without_learning(self) -> "Experience":
        """The first prompt's completions with nothing to learn from: a rank without any takes part in every step."""
        rows = self.select(self.rollout.rows_of_prompts()[0])
        return replace(
            rows, rollout=replace(rows.rollout, completion_mask=torch.zeros_like(rows.rollout.completion_mask))
        )

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator["Experience"]:
        """``count`` minibatches of a fresh shuffle of the prompts, as equal in prompts as possible.

        The completions of a prompt stay together: their prompt is encoded once. Where there are fewer prompts than
        ``count``, the last minibatches have nothing to learn: another rank may have more.
        """
        prompts = self.rollout.rows_of_prompts()
        order = torch.randperm(len(prompts), generator=generator)
        for part in order.tensor_split(count):
            rows = [row for prompt in part.tolist() for row in prompts[prompt]]
            yield self.select(rows) if rows else self.without_learning()


def with_completion(rollout: Rollout, ids: Sequence[int]) -> Rollout:
    """One row with other tokens in the place of its completion; their text and the engine's log-probs are not known."""
    (length,) = rollout.prompt_lengths.tolist()
    completion = rollout.input_ids.new_tensor([ids])
    input_ids = torch.cat([rollout.input_ids[:, :length], completion], dim=1)
    slots = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return replace(
        rollout,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
        completion_mask=slots >= length,
        engine_logp=rollout.engine_logp.new_zeros(input_ids.shape),
        completions=[""],
    )


def concatenate(parts: Sequence[Experience]) -> Experience:
    """The rows of all parts, padded to one length, prompts numbered through; parts have the same fields."""
    width = max(part.input_ids.shape[1] for part in parts)
    return _join([replace(part, rollout=_renumbered(part.rollout, number)) for number, part in enumerate(parts)], width)


def _renumbered(rollout: Rollout, part: int) -> Rollout:
    # far enough apart for any batch of prompts
    return replace(rollout, prompt_index=rollout.prompt_index + (part << 32))


def _join(values: Sequence[Any], width: int) -> Any:
    first = values[0]
    if isinstance(first, Rollout | Experience):
        columns = {item.name: [getattr(value, item.name) for value in values] for item in fields(first)}
        return type(first)(**{name: _join(column, width) for name, column in columns.items()})
    if isinstance(first, Mapping):
        return {name: _join([value[name] for value in values], width) for name in first}
    if isinstance(first, list):
        return [item for value in values for item in value]
    if first is None or first.ndim == 1:
        return None if first is None else torch.cat(list(values))
    return torch.cat([torch.nn.functional.pad(value, (0, width - value.shape[1])) for value in values])


def _map_fields(instance: Fields, function: Callable[[Any], Any]) -> Fields:
    return type(instance)(**{item.name: function(getattr(instance, item.name)) for item in fields(instance)})


def _positions(indices: Indices) -> slice | list[int]:
    """``indices`` with a mask [B] bool as the positions where it is true."""
    if isinstance(indices, slice):
        return indices
    if isinstance(indices, Tensor):
        return (indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices).tolist()
    return list(indices)


def _take(value: Any, indices: slice | list[int]) -> Any:
    """``value`` at ``indices``: along dimension 0 of tensors, in lists, and in everything a container holds."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _take(part, indices) for name, part in value.items()}
    if isinstance(value, Rollout):
        return value.select(indices)
    if isinstance(value, list):
        if isinstance(indices, slice):
            return value[indices]
        return [value[index] for index in indices]
    if isinstance(indices, slice):
        return value[indices]
    return value[torch.as_tensor(indices, dtype=torch.int64, device=value.device)]


def _crop(value: Any, width: int) -> Any:
    if isinstance(value, Rollout):
        return value.cropped()
    return value[:, :width] if isinstance(value, Tensor) and value.ndim == 2 else value


def by_length(rollout: Rollout, size: int) -> list[list[int]]:
    """Row numbers in groups of at most ``size`` rows of similar length, the longest first.

    The completions of a prompt are in one group, unless they are more than ``size``.
    """
    lengths = rollout.attention_mask.sum(1).tolist()
    prompts = sorted(rollout.rows_of_prompts(), key=lambda rows: -max(lengths[row] for row in rows))
    groups: list[list[int]] = []
    for rows in prompts:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            if groups and len(groups[-1]) + len(part) <= size:
                groups[-1] += part
            else:
                groups.append(part)
    return groups
