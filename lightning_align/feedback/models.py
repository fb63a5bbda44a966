"""Language models that are asked: for a text, or for how likely they find each of a few replies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.data.encode import encode_pairs, encode_prompts
from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.journal import key_of
from lightning_align.models.loading import load_causal_lm, load_tokenizer, max_positions
from lightning_align.models.logprobs import next_token_logps
from lightning_align.models.lora import fingerprint_of_base
from lightning_align.rollout.engine import Engine, build_engine
from lightning_align.rollout.types import SamplingParams

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Args:
        text: Without special tokens.
        finished: Whether it ended by itself.
        failed: Whether the model could not be asked, so that the text is empty.
    """

    text: str
    finished: bool
    failed: bool = False


class LanguageModel(Protocol):
    """A model by what it can be asked.

    Attributes:
        name: Which one, in messages.
        chat: Whether it reads conversations: a question to it is best put as a user's message.
    """

    name: str
    chat: bool

    def key(self) -> str:
        """Equal for models that answer alike, for caches."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What asking took, by name, where there is something to count: retries, failures."""
        ...

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
        """``params.num_samples`` replies to every prompt, one seed each; those of a prompt side by side."""
        ...

    def option_logps(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Tensor:
        """Log-probs of each option as the beginning of a reply ``[P, K]`` float32 on the CPU.

        An option that another one begins with (1 and 10) counts only where the reply does not go on to be that other.
        A row is NaN where the model could not be asked.
        """
        ...


class LocalModel:
    """A causal language model in this process.

    Args:
        name: What messages call it.
        model: In evaluation mode, on its device.
        tokenizer: Its own.
        engine: Samples from it; by default a new one.
        batch_size: Most sequences in a forward pass.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: Engine | None = None,
        batch_size: int = 128,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.chat = tokenizer.chat_template is not None
        self.engine = engine or build_engine("auto", model, tokenizer, max_batch=batch_size)

    @classmethod
    def load(cls, source: str, *, dtype: str = "auto", batch_size: int = 128) -> "LocalModel":
        """From a run, a path or a hub id, to the GPU if there is one."""
        tokenizer = load_tokenizer(source)
        model = load_causal_lm(source, tokenizer=tokenizer, dtype=dtype).eval().requires_grad_(False)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(source, model, tokenizer, batch_size=batch_size)

    def key(self) -> str:
        """See :meth:`LanguageModel.key`; a hash of samples of the weights, as long as they are frozen."""
        return key_of(fingerprint_of_base(self.model), str(self.tokenizer.chat_template))

    def counts(self) -> Mapping[str, int]:
        """Nothing: what is asked here answers."""
        return {}

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
        """See :meth:`LanguageModel.sample`; raises :class:`UserError` for a prompt that leaves no room for a reply."""
        ids = encode_prompts(self.tokenizer, prompts)
        self._check_room(ids, params.max_new_tokens)
        rollout = self.engine.generate(ids, params, seeds=seeds)
        return [
            Reply(text, reason != "length")
            for text, reason in zip(rollout.completions, rollout.finish_reason, strict=True)
        ]

    def _check_room(self, ids: Sequence[Sequence[int]], new: int) -> None:
        limit = max_positions(self.model.config)
        longest = max(map(len, ids), default=0)
        if limit is not None and longest + new > limit:
            raise UserError(
                f"model {self.name} has {limit} positions, but a question to it takes {longest} tokens and the reply "
                f"up to {new}: shorten the question or the texts in it, or ask a model that reads more"
            )

    @torch.no_grad()
    def option_logps(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Tensor:
        """See :meth:`LanguageModel.option_logps`."""
        if not prompts:
            return torch.empty(0, len(options))
        pairs = encode_pairs(
            self.tokenizer,
            [prompt for prompt in prompts for _ in options],
            [option for _ in prompts for option in options],
            finished=False,
        )
        replies = [tuple(pair.input_ids[pair.prompt_length :]) for pair in pairs]
        if not all(replies):
            raise UserError(f"model {self.name}: an option among {', '.join(map(repr, options))} has no tokens")
        before = [tuple(pair.input_ids[: pair.prompt_length]) for pair in pairs]
        if not all(before):
            raise UserError(f"model {self.name} is asked a question that has no tokens")
        self._check_room(before, max(map(len, replies)))
        logp = self._logps(before, replies).view(len(prompts), len(options))
        size = len(options)
        return torch.stack([_exact(logp[p], replies[p * size : (p + 1) * size]) for p in range(len(prompts))])

    def _logps(self, before: Sequence[Tokens], replies: Sequence[Tokens]) -> Tensor:
        """Log-probs of replies after what is before them ``[N]``; beginnings that several share are read once."""
        wanted: dict[Tokens, set[int]] = {}
        for start, reply in zip(before, replies, strict=True):
            for place, token in enumerate(reply):
                wanted.setdefault(start + reply[:place], set()).add(token)
        rows = sorted(_rows(wanted).items(), key=lambda row: -len(row[0]))
        known: dict[tuple[Tokens, int], float] = {}
        for begin in range(0, len(rows), self.batch_size):
            known |= self._read(rows[begin : begin + self.batch_size], wanted)
        return torch.tensor(
            [
                sum(known[start + reply[:place], token] for place, token in enumerate(reply))
                for start, reply in zip(before, replies, strict=True)
            ]
        )

    def _read(
        self, rows: Sequence[tuple[Tokens, list[Tokens]]], wanted: Mapping[Tokens, set[int]]
    ) -> dict[tuple[Tokens, int], float]:
        """Log-probs of the wanted tokens after the beginnings of some rows."""
        width, device = len(rows[0][0]), self.model.device
        ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row, _ in rows], device=device)
        attention = torch.tensor([[slot < len(row) for slot in range(width)] for row, _ in rows], device=device)
        after = torch.zeros_like(attention)
        for index, (_, beginnings) in enumerate(rows):
            after[index, [len(beginning) - 1 for beginning in beginnings]] = True
        logp = next_token_logps(self.model, ids, attention, after=after)
        read = [beginning for _, beginnings in rows for beginning in beginnings]
        entries = [(index, token) for index, beginning in enumerate(read) for token in wanted[beginning]]
        where, tokens = torch.tensor(entries, device=device).unbind(1)
        values = logp[where, tokens].tolist()
        return {(read[index], token): value for (index, token), value in zip(entries, values, strict=True)}


def _rows(beginnings: Iterable[Tokens]) -> dict[Tokens, list[Tokens]]:
    """The longest of some beginnings of texts, each with those that it begins with, shortest first."""
    rows: dict[Tokens, list[Tokens]] = {}
    row: Tokens = ()
    for beginning in sorted(beginnings, reverse=True):  # right after those that go on from it
        if not _begins(row, beginning):
            row = beginning
        rows.setdefault(row, []).insert(0, beginning)
    return rows


def _begins(reply: Tokens, other: Tokens) -> bool:
    """Whether a reply begins with another one, or is it."""
    return reply[: len(other)] == other


def _exact(logp: Tensor, replies: Sequence[Tokens]) -> Tensor:
    """Log-probs ``[K]`` of the replies that begin with these tokens, without those that go on to be a longer option."""
    exact = logp.clone()
    for i, short in enumerate(replies):
        longer = {other: k for k, other in enumerate(replies) if len(other) > len(short) and _begins(other, short)}
        # 100 is already in what begins with 10
        shortest = [k for other, k in longer.items() if not any(o != other and _begins(other, o) for o in longer)]
        if shortest:
            rest = torch.logsumexp(logp[shortest], 0) - logp[i]
            exact[i] = logp[i] + torch.log1p(-rest.exp().clamp(max=1))
    return exact
