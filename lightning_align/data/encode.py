"""Records to tokens: which ids, where the completion begins, which tokens carry loss.

A prompt is tokenised once and the completion is appended to it, so that training sees the ids that sampling makes:
prompt ids, then completion ids. The token that ends the assistant's turn carries loss, the header of the turn does not.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_align.data.templates import (
    ASSISTANT,
    Completion,
    ConversationError,
    Message,
    Prompt,
    conventions,
    raw_ids,
    render,
    tokenise,
    tokenise_each_once,
)
from lightning_align.data.turns import Turns, assistant_turns, inferred_turns, marked_turns

LossOn = Literal["completion", "assistant", "all"]
GUARD = "\n"


class Encoded(NamedTuple):
    """One sequence.

    Attributes:
        input_ids: Prompt and completion.
        loss_mask: Which tokens carry loss.
        prompt_length: Number of tokens before the first completion.
        split_seam: Whether a token would lie across prompt and completion if they were tokenised as one text.
        turns_without_loss: Turns of the assistant that should carry loss, but are not to be told from the others.
        other_header: Whether the template begins an answer with something else than its own generation prompt.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    prompt_length: int
    split_seam: bool = False
    turns_without_loss: int = 0
    other_header: bool = False

    @property
    def completion_mask(self) -> list[bool]:
        """Everything after the prompt."""
        return [index >= self.prompt_length for index in range(len(self.input_ids))]


# ---------------------------------------------------------------------- one at a time
def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids that sampling starts from: exactly one BOS where the tokenizer uses one; the generation prompt of a chat."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, *, finished: bool = True
) -> Encoded:
    """A prompt with its completion; one that is not ``finished`` lacks the token that would end it."""
    return encode_pairs(tokenizer, [prompt], [completion], finished=finished)[0]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], loss_on: LossOn = "assistant"
) -> Encoded:
    """A conversation with loss on the last turn (``completion``), on every assistant turn, or on everything."""
    return encode_conversations(tokenizer, [messages], loss_on)[0]


# ---------------------------------------------------------------------- many at once
def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Documents, each with EOS at its end, and BOS at its start where the tokenizer uses one."""
    return [_ended(ids, conventions(tokenizer).eos_id) for ids in tokenise(tokenizer, texts)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, places: Sequence[str] | None = None
) -> list[list[int]]:
    """:func:`encode_prompt` for many."""
    chats = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    chat_places = None if places is None else [places[index] for index in chats]
    conversations = [list(prompts[index]) for index in chats]
    rendered = render(tokenizer, conversations, add_generation_prompt=True, places=chat_places)  # type: ignore[arg-type]
    texts = dict(zip(chats, rendered, strict=True))
    return tokenise(tokenizer, [p if isinstance(p, str) else texts[index] for index, p in enumerate(prompts)])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    finished: bool = True,
    places: Sequence[str] | None = None,
) -> list[Encoded]:
    """:func:`encode_pair` for many; prompts that occur more than once are tokenised once."""
    plain: dict[int, tuple[str, str]] = {}
    chats: dict[int, list[Message]] = {}
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not isinstance(prompt, str):
            answer = [{"role": ASSISTANT, "content": completion}] if isinstance(completion, str) else completion
            chats[index] = [*prompt, *answer]
        elif isinstance(completion, str):
            plain[index] = (prompt, completion)
        else:
            reason = (
                "the prompt is text but the completion is a list of messages: "
                "both must be text, or the prompt a list of messages too"
            )
            raise ConversationError(reason, places, index)
    targets = [
        [turn for turn in assistant_turns(messages) if turn >= len(prompts[index])] for index, messages in chats.items()
    ]
    chat_places = None if places is None else [places[index] for index in chats]
    turns = inferred_turns(tokenizer, list(chats.values()), targets, finished=finished, places=chat_places)
    for number, (found, own) in enumerate(zip(turns, targets, strict=True)):
        if len(found.spans) < len(own):
            raise ConversationError("the completion cannot be told from the prompt", chat_places, number)
    encoded = dict(zip(plain, _encode_plain(tokenizer, list(plain.values()), finished), strict=True))
    encoded |= dict(zip(chats, _encode_turns(tokenizer, turns), strict=True))
    return [encoded[index] for index in range(len(prompts))]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    loss_on: LossOn = "assistant",
    *,
    places: Sequence[str] | None = None,
) -> list[Encoded]:
    """:func:`encode_messages` for many.

    Args:
        tokenizer: Has a chat template. Its generation markers say what every assistant turn is; where it has none, the
            turns are found by rendering the conversation up to each of them.
        conversations: Lists of messages.
        loss_on: ``completion`` (the last message, which must be the assistant's), ``assistant`` or ``all``.
        places: Where each conversation comes from, for error messages.

    Raises:
        ConversationError: If no token carries loss, or the assistant's tokens cannot be told from the others.
    """
    targets = [_targets(messages, loss_on) for messages in conversations]
    for index, own in enumerate(targets):
        if not own and loss_on != "all":
            what = "does not end with the assistant's" if loss_on == "completion" else "has no assistant's"
            raise ConversationError(f"the conversation {what} message: there is nothing to learn", places, index)
    if loss_on == "assistant" and conventions(tokenizer).has_markers:
        return _encode_turns(tokenizer, marked_turns(tokenizer, conversations, places=places))
    encoded = _encode_turns(tokenizer, inferred_turns(tokenizer, conversations, targets, places=places))
    if loss_on == "all":
        return [row._replace(loss_mask=[True] * len(row.input_ids)) for row in encoded]
    return encoded


def _targets(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """The assistant's messages that are to be found; where everything is learnt, only the end of the last matters."""
    turns = assistant_turns(messages)
    return turns if loss_on == "assistant" else [turn for turn in turns[-1:] if turn == len(messages) - 1]


def encode_sft(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, Any]], places: Sequence[str], loss_on: LossOn
) -> list[Encoded]:
    """Demonstrations as long as they are."""
    whole = ["messages" in record or (loss_on != "completion" and _is_chat(record)) for record in records]
    dialogues = [index for index, is_whole in enumerate(whole) if is_whole]
    others = [index for index, is_whole in enumerate(whole) if not is_whole]
    conversations = encode_conversations(
        tokenizer,
        [_messages(records[index]) for index in dialogues],
        "assistant" if loss_on == "completion" else loss_on,
        places=[places[index] for index in dialogues],
    )
    encoded = dict(zip(dialogues, conversations, strict=True))
    pairs = encode_pairs(
        tokenizer,
        [records[index]["prompt"] for index in others],
        [records[index]["completion"] for index in others],
        places=[places[index] for index in others],
    )
    if loss_on == "all":
        pairs = [pair._replace(loss_mask=[True] * len(pair.input_ids)) for pair in pairs]
    encoded |= dict(zip(others, pairs, strict=True))
    return [encoded[index] for index in range(len(records))]


def _is_chat(record: Mapping[str, Any]) -> bool:
    return not isinstance(record["prompt"], str)


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(record["messages"]) if "messages" in record else [*record["prompt"], *record["completion"]]


# ---------------------------------------------------------------------- joining
def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], finished: bool
) -> list[Encoded]:
    """The completion's ids are those within the whole text, unless a token lies across the seam."""
    heads = tokenise_each_once(tokenizer, (prompt for prompt, _ in pairs))
    whole = tokenise(tokenizer, [prompt + completion for prompt, completion in pairs])
    split = [ids[: len(heads[prompt])] != heads[prompt] for ids, (prompt, _) in zip(whole, pairs, strict=True)]
    alone = iter(_continuations(tokenizer, [text for (_, text), across in zip(pairs, split, strict=True) if across]))
    eos = conventions(tokenizer).eos_id
    result = []
    for ids, (prompt, _), across in zip(whole, pairs, split, strict=True):
        head = heads[prompt]
        tail = next(alone) if across else ids[len(head) :]
        tail = _ended(tail, eos) if finished else tail
        result.append(Encoded(head + tail, [False] * len(head) + [True] * len(tail), len(head), across))
    return result


def _encode_turns(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Turns]) -> list[Encoded]:
    """As for plain text, with a seam at both ends of every turn."""
    ids_of = tokenise_each_once(tokenizer, (c.text[:bound] for c in conversations for bound in _bounds(c)))
    eos = conventions(tokenizer).eos_id
    result = []
    for conversation in conversations:
        bounds = _bounds(conversation)
        heads = [ids_of[conversation.text[:bound]] for bound in bounds]
        ids = heads[-1]
        split = any(ids[: len(head)] != head for head in heads)
        if split:
            parts = [conversation.text[a:b] for a, b in pairwise(bounds)]
            pieces = [heads[0], *_continuations(tokenizer, parts)]
        else:
            pieces = [heads[0], *(ids[len(a) : len(b)] for a, b in pairwise(heads))]
        if conversation.needs_eos:
            pieces[len(conversation.spans) * 2 - 1].append(eos)
        mask = [number % 2 == 1 for number, piece in enumerate(pieces) for _ in piece]
        ids = [i for piece in pieces for i in piece]
        found = (conversation.num_unfound, conversation.other_header)
        result.append(Encoded(ids, mask, len(pieces[0]), split, *found))
    return result


def _bounds(conversation: Turns) -> list[int]:
    """Where pieces end: text before the first turn, the turn, text before the next, …, the end."""
    return [*(bound for span in conversation.spans for bound in span), len(conversation.text)]


def _continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that go on after others. The guard keeps a tokenizer from treating them as the start of a text."""
    (guard,) = raw_ids(tokenizer, [GUARD])
    guarded = raw_ids(tokenizer, [GUARD + text for text in texts])
    alone = raw_ids(tokenizer, texts)
    return [
        ids[len(guard) :] if ids[: len(guard)] == guard else plain for ids, plain in zip(guarded, alone, strict=True)
    ]
