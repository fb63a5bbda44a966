"""Which part of a rendered conversation is the assistant's: whole turns with their end, without their header."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_align.data.templates import (
    ASSISTANT,
    Conventions,
    Message,
    Span,
    conventions,
    place_prefix,
    render,
    render_marked,
)
from lightning_align.errors import UserError


class Turns(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: What the template makes of it; nothing follows the end of the last turn, if that is the assistant's.
        spans: The assistant's turns as character spans, each through the token that ends it.
        needs_eos: Whether the template ends the last turn with no special token, so that EOS must be added.
    """

    text: str
    spans: list[Span]
    needs_eos: bool


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]


def marked_turns(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    places: Sequence[str] | None = None,
) -> list[Turns]:
    """Every assistant turn, by the template's own generation markers."""
    texts, spans = render_marked(tokenizer, conversations, places=places)
    known = conventions(tokenizer)
    result = []
    for index, (text, own) in enumerate(zip(texts, spans, strict=True)):
        if not any(stop > start for start, stop in own):
            raise UserError(
                f"{place_prefix(places, index)}the chat template's markers enclose none of the conversation"
            )
        ends_with_answer = conversations[index][-1]["role"] == ASSISTANT
        result.append(_with_ends(text, own, known, ends_with_answer, True))
    return result


def inferred_turns(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    targets: Sequence[Sequence[int]],
    *,
    finished: bool = True,
    places: Sequence[str] | None = None,
) -> list[Turns]:
    """The turns ``targets`` of each conversation, by comparing renderings.

    A turn is what stands between the conversation up to it, with the generation prompt, and the one through it.

    Raises:
        UserError: If the template rewrites a turn once something follows it, so that neither is a prefix of the whole.
    """
    texts = render(tokenizer, conversations, places=places)
    turns = [(index, turn) for index, own in enumerate(targets) for turn in own]
    turn_places = None if places is None else [places[index] for index, _ in turns]
    before = render(
        tokenizer, [conversations[i][:turn] for i, turn in turns], add_generation_prompt=True, places=turn_places
    )
    inner = [(i, turn) for i, turn in turns if turn + 1 < len(conversations[i])]
    rendered = render(tokenizer, [conversations[i][: turn + 1] for i, turn in inner])
    through = dict(zip(inner, rendered, strict=True))
    known = conventions(tokenizer)
    spans: list[list[Span]] = [[] for _ in texts]
    for (index, turn), head in zip(turns, before, strict=True):
        start, stop = len(head), _shared_length(texts[index], through.get((index, turn), texts[index]), known)
        if not texts[index].startswith(head) or stop is None or stop <= start:
            raise UserError(
                f"{place_prefix(places, index)}message {turn + 1} cannot be told from its surroundings, because the "
                "chat template rewrites messages once others follow: use a template with {% generation %} markers, or "
                "records of prompt and completion"
            )
        spans[index].append((start, stop))
    return [
        _with_ends(text, own, known, bool(turns) and turns[-1] == len(messages) - 1, finished)
        for text, own, messages, turns in zip(texts, spans, conversations, targets, strict=True)
    ]


def _shared_length(text: str, prefix: str, known: Conventions) -> int | None:
    """How much of ``text`` is ``prefix``; what some templates put at the end of every conversation is left out."""
    while not text.startswith(prefix):
        shorter = prefix[: _last_piece(prefix, known)]
        if shorter == prefix:
            return None
        prefix = shorter
    return len(prefix)


def _last_piece(text: str, known: Conventions) -> int:
    """Where the white space or special token that ends ``text`` begins; its length if it ends with neither."""
    stripped = len(text.rstrip())
    if stripped < len(text):
        return stripped
    tail = known.tail.search(text)
    assert tail is not None
    pieces = list(known.special.finditer(text, tail.start()))
    return pieces[-1].start() if pieces else len(text)


def _with_ends(text: str, spans: list[Span], known: Conventions, last_is_target: bool, finished: bool) -> Turns:
    ends = [_end(text, span, known) for span in spans]
    stops = [stop if end is None else end[1] for (_, stop), end in zip(spans, ends, strict=True)]
    needs_eos = False
    if last_is_target:
        (start, stop), end = spans[-1], ends[-1]
        needs_eos = finished and end is None
        if not finished:
            tail = known.tail.search(text, start, stop)
            stops[-1] = tail.start() if tail is not None else stop
        text = text[: stops[-1]]
    return Turns(text, [(start, stop) for (start, _), stop in zip(spans, stops, strict=True)], needs_eos)


def _end(text: str, span: Span, known: Conventions) -> Span | None:
    """The special token that ends a turn: among those that close its span, or the template's own just behind it."""
    start, stop = span
    tail = known.tail.search(text, start, stop)
    assert tail is not None
    closing = list(known.special.finditer(text, tail.start(), stop))
    own = [found for found in closing if found.group() == known.turn_end]
    if closing:
        return (own or closing)[0].span()
    behind = known.special.search(text, stop)
    if behind is not None and behind.group() == known.turn_end and not text[stop : behind.start()].strip():
        return behind.span()
    return None
