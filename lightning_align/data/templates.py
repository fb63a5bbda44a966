"""What a tokenizer and its chat template agree on: how a sequence begins, how a turn ends, how messages are written."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_align.errors import UserError

Message = dict[str, Any]
Prompt = str | list[Message]
Completion = str | list[Message]
Span = tuple[int, int]

ASSISTANT = "assistant"
PROBE, OTHER_PROBE = "Ja.", "Non."  # answers that no template contains, different from the first character
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


class ConversationError(UserError):
    """What is wrong with one conversation; others may be fine.

    Attributes:
        reason: What is wrong, without its place, so that equal faults count together.
    """

    def __init__(self, reason: str, places: Sequence[str] | None, index: int) -> None:
        super().__init__(f"{place_prefix(places, index)}{reason}")
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Conventions:
    """How sequences of a tokenizer begin and end.

    Attributes:
        bos_id: Begins every sequence; None where the tokenizer adds none by itself.
        eos_id: Ends a completion of plain text.
        turn_end: The special token that the chat template puts after an assistant's words; None where there is none.
        turn_end_id: Its id.
        special: One special token, as a regular expression: not BOS, and not the one for unknown words.
        tail: White space and special tokens at the end of a text.
        has_markers: Whether the template marks what the assistant generates.
    """

    bos_id: int | None
    eos_id: int
    turn_end: str | None
    turn_end_id: int | None
    special: re.Pattern[str]
    tail: re.Pattern[str]
    has_markers: bool

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that say "finished": EOS and the end of a turn."""
        return frozenset({self.eos_id} | ({self.turn_end_id} if self.turn_end_id is not None else set()))


def conventions(tokenizer: PreTrainedTokenizerBase) -> Conventions:
    """The conventions of a tokenizer, found out once by asking it."""
    return _conventions(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _conventions(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str | None) -> Conventions:
    if eos_token is None:
        raise UserError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
    bos_id = tokenizer.bos_token_id
    tokens = "|".join(re.escape(token) for token in sorted(_special_tokens(tokenizer), key=len, reverse=True))
    special = re.compile(tokens)
    turn_end = _turn_end(tokenizer, special)
    return Conventions(
        bos_id=bos_id if bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id] else None,
        eos_id=tokenizer.eos_token_id,
        turn_end=turn_end,
        turn_end_id=None if turn_end is None else raw_ids(tokenizer, [turn_end])[0][0],
        special=special,
        tail=re.compile(rf"(?:\s|{tokens})*\Z"),
        has_markers=GENERATION_MARKER.search(template) is not None,
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (special - {tokenizer.unk_token, tokenizer.bos_token}) | {str(tokenizer.eos_token)}


def _turn_end(tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]) -> str | None:
    if tokenizer.chat_template is None:
        return None
    question = {"role": "user", "content": "a"}
    try:
        (text,) = render(tokenizer, [[question, {"role": ASSISTANT, "content": PROBE}]])
    except UserError:
        return None
    found = special.search(text.rpartition(PROBE)[2])
    return found.group() if found is not None else None


def raw_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as they stand: nothing is added, nothing cut."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that begin a sequence: BOS first where the tokenizer uses one, exactly once."""
    bos = conventions(tokenizer).bos_id
    rows = raw_ids(tokenizer, texts)
    return rows if bos is None else [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]


def tokenise_each_once(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """:func:`tokenise` by text."""
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, tokenise(tokenizer, unique), strict=True))


def place_prefix(places: Sequence[str] | None, index: int) -> str:
    """``"pairs.jsonl line 7: "`` in front of a message, where the place is known."""
    return f"{places[index]}: " if places is not None else ""


# ---------------------------------------------------------------------- rendering
def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool = False,
    places: Sequence[str] | None = None,
) -> list[str]:
    """Conversations as the text that the chat template makes of them.

    Args:
        tokenizer: Has a chat template.
        conversations: Lists of messages.
        add_generation_prompt: End with the header of an assistant's turn.
        places: Where each conversation comes from, for error messages.

    Raises:
        UserError: If there is no chat template.
        ConversationError: If it refuses a conversation.
    """
    batch = _checked(tokenizer, conversations, places)
    try:
        return _apply(tokenizer, batch, add_generation_prompt) if batch else []
    except TEMPLATE_ERRORS:
        _blame(tokenizer, batch, add_generation_prompt, places)


def render_marked(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    places: Sequence[str] | None = None,
) -> tuple[list[str], list[list[Span]]]:
    """:func:`render`, and the character spans between the template's generation markers."""
    batch = _checked(tokenizer, conversations, places)
    try:
        special: dict[str, Any] = tokenizer.special_tokens_map
        return render_jinja_template(  # type: ignore[return-value]
            conversations=batch,
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **special,
        )
    except TEMPLATE_ERRORS:
        _blame(tokenizer, batch, False, places)


def _checked(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], places: Sequence[str] | None
) -> list[list[Message]]:
    if tokenizer.chat_template is None and conversations:
        raise UserError(
            f"{place_prefix(places, 0)}the record is a conversation, but the tokenizer has no chat template: "
            "use a tokenizer that has one, or records of plain text"
        )
    return [list(messages) for messages in conversations]


def _apply(tokenizer: PreTrainedTokenizerBase, batch: list[list[Message]], add_generation_prompt: bool) -> list[str]:
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        batch, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _blame(
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[Message]],
    add_generation_prompt: bool,
    places: Sequence[str] | None,
) -> NoReturn:
    """Find the conversation that the template refuses and say so."""
    for index, messages in enumerate(batch):
        try:
            _apply(tokenizer, [messages], add_generation_prompt)
        except TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ConversationError(f"the chat template refuses the conversation: {reason}", places, index) from error
    raise AssertionError("the template refused the conversations together, but none of them alone")
