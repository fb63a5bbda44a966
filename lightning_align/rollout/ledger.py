"""The book an engine keeps while it samples: tokens, log-probs, who has finished and why; at the end, a Rollout.

Axes: N sequences of a request, n of them at a step, S steps.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models.loading import max_positions
from lightning_align.rollout.sampling import choose, uniforms
from lightning_align.rollout.types import FinishReason, Rollout, SamplingParams

REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
RUNNING, EOS, STOP, LENGTH = range(4)  # codes of a sequence's state; REASONS[code - 1] names the last three
TAIL_MARGIN = 4  # tokens decoded beyond a stop string's bytes: decoders may treat the first ones differently


class Ledger:
    """Everything that is known about the sequences of one request.

    Args:
        prompt_ids: Token ids of each prompt, unpadded.
        params: How to sample.
        seeds: One per completion, samples of a prompt side by side: len(prompt_ids) · num_samples.
        records: One per prompt, or None.
        model: Its configuration gives the longest sequence and further end-of-sequence tokens, its head the vocabulary.
        tokenizer: Ends sequences, pads, and turns tokens into text.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        records: Sequence[dict[str, Any]] | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.num_sequences = len(prompt_ids) * params.num_samples
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        _check_request(prompt_ids, self.num_sequences, seeds, records)
        _check_prompts(prompt_ids, self.vocabulary)
        _check_lengths(prompt_ids, params, model)
        self.prompt_ids = prompt_ids
        self.params = params
        self.records = records if records is not None else [{} for _ in prompt_ids]
        self.tokenizer = tokenizer
        self.device = model.device
        steps = params.max_new_tokens
        self.codes_by_token = _token_codes(eos_ids(model, tokenizer), self.vocabulary).to(self.device)
        self.uniforms = uniforms(seeds, steps).to(self.device).view(-1)
        self.tokens = torch.zeros(self.num_sequences * steps, dtype=torch.int64, device=self.device)
        self.logp = torch.zeros(self.num_sequences * steps, dtype=torch.float32, device=self.device)
        self.codes = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.device)
        longest = max((len(text.encode()) for text in params.stop_strings), default=0)
        self.tail = longest + TAIL_MARGIN

    def draw(self, logits: Tensor, sequences: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Choose and note the next token of some sequences.

        Args:
            logits: [n, V] float32.
            sequences: Which sequences, [n] int64.
            steps: How many tokens each has so far, [n] int64.

        Returns:
            tokens [n] int64, and whether each sequence has now ended [n] bool.
        """
        where = sequences * self.params.max_new_tokens + steps
        tokens, logp = choose(logits, self.params, self.uniforms[where])
        self.tokens[where] = tokens
        self.logp[where] = logp
        lengths = steps + 1
        self.lengths[sequences] = lengths
        codes = self.codes_by_token[tokens]
        if self.params.stop_strings:
            codes = self._apply_stop_strings(codes, sequences.tolist(), lengths.tolist())
        codes = torch.where((codes == RUNNING) & (lengths == self.params.max_new_tokens), LENGTH, codes)
        self.codes[sequences] = codes
        return tokens, codes != RUNNING

    def _apply_stop_strings(self, codes: Tensor, sequences: list[int], lengths: list[int]) -> Tensor:
        """Mark the running sequences whose last token completed a stop string."""
        running = (codes == RUNNING).tolist()
        rows = [row for row, is_running in enumerate(running) if is_running]
        tails = []
        for row in rows:
            end = sequences[row] * self.params.max_new_tokens + lengths[row]
            tails.append(self.tokens[end - min(lengths[row], self.tail) : end].tolist())
        # special tokens stay in the text: a stop string may be one
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        hits = [row for row, text in zip(rows, texts, strict=True) if any(s in text for s in self.params.stop_strings)]
        codes[hits] = STOP
        return codes

    def rollout(self) -> Rollout:
        """What was sampled, once every sequence has ended."""
        steps = self.params.max_new_tokens
        lengths, device = self.lengths, self.device
        prompts = [torch.tensor(ids, dtype=torch.int64) for ids in self.prompt_ids]
        index = torch.arange(len(prompts)).repeat_interleave(self.params.num_samples)
        prompt_lengths = torch.tensor([len(ids) for ids in self.prompt_ids])[index].to(device)
        width = int((prompt_lengths + lengths).max())
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad_id(self.tokenizer))[index].to(device)
        input_ids = torch.nn.functional.pad(input_ids, (0, width - input_ids.shape[1]), value=pad_id(self.tokenizer))

        step = torch.arange(steps, device=device)
        rows, columns = torch.nonzero(step < lengths[:, None], as_tuple=True)
        target = prompt_lengths[rows] + columns
        input_ids[rows, target] = self.tokens.view(-1, steps)[rows, columns]
        engine_logp = torch.zeros(input_ids.shape, dtype=torch.float32, device=device)
        engine_logp[rows, target] = self.logp.view(-1, steps)[rows, columns]
        if bool(engine_logp.isnan().any()):
            raise UserError("sampling: the model's logits are not numbers (NaN): its weights have diverged")

        slots = torch.arange(width, device=device)
        attention_mask = slots < (prompt_lengths + lengths)[:, None]
        tokens = self.tokens.view(-1, steps).tolist()
        kept = [ids[:length] for ids, length in zip(tokens, lengths.tolist(), strict=True)]
        return Rollout(
            input_ids=input_ids,
            attention_mask=attention_mask,
            completion_mask=attention_mask & (slots >= prompt_lengths[:, None]),
            engine_logp=engine_logp,
            prompt_lengths=prompt_lengths,
            prompt_index=index.to(device),
            finish_reason=[REASONS[code - 1] for code in self.codes.tolist()],
            completions=self._texts(kept, index.tolist()),
            records=[self.records[prompt] for prompt in index.tolist()],
        )

    def _texts(self, completions: list[list[int]], prompts: list[int]) -> list[str]:
        """Completions as text: what they add to the text of their prompts.

        Some decoders (SentencePiece's) drop the space before the first word of whatever they are given.
        """
        before = self._decode([list(ids) for ids in self.prompt_ids])
        pairs = zip(prompts, completions, strict=True)
        whole = self._decode([[*self.prompt_ids[prompt], *ids] for prompt, ids in pairs])
        alone = self._decode(completions)
        return [
            text.removeprefix(before[prompt]) if text.startswith(before[prompt]) else by_itself
            for prompt, text, by_itself in zip(prompts, whole, alone, strict=True)
        ]

    def _decode(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a sequence: the tokenizer's, and those of the model's generation config that are special tokens.

    Chat models end a turn with a token of their own, which only the generation config names. Its defaults name ordinary
    words too when a model has another tokenizer than its class was made for: hence the second condition.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    candidates = {named} if isinstance(named, int) else set(named or ())
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id}
    return sorted({tokenizer.eos_token_id} | ((candidates & special) - others))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for the padding; masks, not ids, say what is padding, so the end-of-sequence token will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _token_codes(end_ids: Sequence[int], vocabulary: int) -> Tensor:
    """What each token does to a sequence, [V] int64 of RUNNING or EOS."""
    codes = torch.full((vocabulary,), RUNNING)
    for token in end_ids:
        if not 0 <= token < vocabulary:
            raise UserError(f"end-of-sequence token {token} is outside the model's vocabulary of {vocabulary} tokens")
        codes[token] = EOS
    return codes


def _check_request(
    prompt_ids: Sequence[Sequence[int]],
    num_sequences: int,
    seeds: Sequence[int],
    records: Sequence[dict[str, Any]] | None,
) -> None:
    if not prompt_ids:
        raise ValueError("generate needs at least one prompt")
    if len(seeds) != num_sequences:
        raise ValueError(f"{len(seeds)} seeds for {num_sequences} completions: give one per completion")
    if records is not None and len(records) != len(prompt_ids):
        raise ValueError(f"{len(records)} records for {len(prompt_ids)} prompts: give one per prompt")


def _check_prompts(prompt_ids: Sequence[Sequence[int]], vocabulary: int) -> None:
    for number, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"prompt {number} has no tokens: give a text or a beginning-of-sequence token")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise UserError(
                f"prompt {number} has tokens {min(ids)} to {max(ids)}, outside the model's vocabulary of {vocabulary}: "
                "use the tokenizer that belongs to the model"
            )


def _check_lengths(prompt_ids: Sequence[Sequence[int]], params: SamplingParams, model: PreTrainedModel) -> None:
    limit = max_positions(model.config)
    if limit is None:  # no position embeddings, no limit
        return
    longest = max(range(len(prompt_ids)), key=lambda number: len(prompt_ids[number]))
    needed = len(prompt_ids[longest]) + params.max_new_tokens
    if needed > limit:
        raise UserError(
            f"prompt {longest} has {len(prompt_ids[longest])} tokens; with max_new_tokens {params.max_new_tokens} "
            f"that is {needed}, but the model has {limit} positions: shorten the prompts or lower max_new_tokens"
        )
