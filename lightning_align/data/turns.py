"""Which part of a rendered conversation is the assistant's: whole turns with their end, without their header."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_align.data.templates import (
    ASSISTANT,
    OTHER_PROBE,
    PROBE,
    Conventions,
    ConversationError,
    Message,
    Span,
    conventions,
    render,
    render_marked,
)


class Turns(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: What the template makes of it; nothing follows the end of the last turn, if that is the assistant's.
        spans: The assistant's turns as character spans, each through the token that ends it.
            One that begins somewhere but whose end is not found is empty.
        needs_eos: Whether the template ends the last turn with no special token, so that EOS must be added.
        num_unfound: Turns of the assistant that are not found.
        other_header: Whether some turn begins with something else than the generation prompt.
    """

    text: str
    spans: list[Span]
    needs_eos: bool
    num_unfound: int = 0
    other_header: bool = False


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
            raise ConversationError("the chat template's markers enclose none of the conversation", places, index)
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

    A turn is what stands between the conversation up to it, with the generation prompt, and the one through it. A
    template may write a turn differently once others follow (Qwen3 drops what was thought): such a turn is not found.

    Raises:
        ConversationError: If none of the turns of a conversation is found.
    """
    texts = render(tokenizer, conversations, places=places)
    turns = [(index, turn) for index, own in enumerate(targets) for turn in own]
    starts = _starts(tokenizer, conversations, turns, texts, places)
    inner = [(i, turn) for i, turn in turns if turn + 1 < len(conversations[i])]
    inner_places = None if places is None else [places[i] for i, _ in inner]
    rendered = render(tokenizer, [conversations[i][: turn + 1] for i, turn in inner], places=inner_places)
    through = dict(zip(inner, rendered, strict=True))
    known = conventions(tokenizer)
    result = []
    for index, (text, own, messages) in enumerate(zip(texts, targets, conversations, strict=True)):
        spans = {}
        for turn in own:
            start = starts[index, turn]
            stop = _shared_length(text, through.get((index, turn), text), known)
            if start is not None:  # where a turn begins is worth knowing even if its end is not
                spans[turn] = (start.at, start.at if stop is None else max(start.at, stop))
        found = [turn for turn, (start_at, stop_at) in spans.items() if start_at < stop_at]
        if own and not found:
            reason = (
                f"message {own[-1] + 1} cannot be told from its surroundings, because the chat template writes "
                "messages differently once others follow: use a template with {% generation %} markers"
            )
            raise ConversationError(reason, places, index)
        ended = _with_ends(text, list(spans.values()), known, len(messages) - 1 in found, finished)
        differs = any(start is not None and not start.as_prompted for start in (starts[index, turn] for turn in own))
        result.append(ended._replace(num_unfound=len(own) - len(found), other_header=differs))
    return result


class _Start(NamedTuple):
    """Where a turn begins, and whether just behind the generation prompt."""

    at: int
    as_prompted: bool


def _starts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    turns: Sequence[tuple[int, int]],
    texts: Sequence[str],
    places: Sequence[str] | None,
) -> dict[tuple[int, int], _Start | None]:
    """Where each (conversation, message) begins in its text: behind the generation prompt, up to white space.

    A template whose generation prompt is not what it writes before an answer (DeepSeek-R1 opens a thought) is asked for
    two different answers: the turn begins behind what they share. None for a turn that is not found.
    """
    own_places = None if places is None else [places[index] for index, _ in turns]
    before = [conversations[index][:turn] for index, turn in turns]
    heads = render(tokenizer, before, add_generation_prompt=True, places=own_places)
    found: dict[tuple[int, int], _Start | None] = {}
    for key, head in zip(turns, heads, strict=True):
        shared = len(_common(texts[key[0]], head))
        found[key] = _Start(shared, shared == len(head)) if shared >= len(head.rstrip()) else None
    unclear = [(key, messages) for key, messages in zip(turns, before, strict=True) if found[key] is None]
    probes = [
        render(tokenizer, [[*messages, {"role": ASSISTANT, "content": probe}] for _, messages in unclear])
        for probe in (PROBE, OTHER_PROBE)
    ]
    for (key, _), first, second in zip(unclear, *probes, strict=True):
        head = _common(first, second)
        if texts[key[0]].startswith(head):
            found[key] = _Start(len(head), False)
    return found


def _common(first: str, second: str) -> str:
    """What both begin with."""
    if first.startswith(second):
        return second
    return commonprefix([first, second])  # noqa: RUF071 (they are no paths)


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
    ends = [_end(text, span, known) if span[0] < span[1] else None for span in spans]
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
