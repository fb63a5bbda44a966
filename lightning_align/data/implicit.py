"""Preferences whose prompt is not apart, but what chosen and rejected share (TRL's ``extract_prompt``)."""

import re
from collections.abc import Sequence
from typing import Any

from lightning_align.data.records import Record, RecordError, check_side

TRANSCRIPT = re.compile(r"\s*Human:")
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Record, str]:
    """Prompt, chosen and rejected, and what was done, of sides that are texts, transcripts or lists of messages.

    Raises:
        RecordError: If a side is empty or of a wrong form, or they are equal or share nothing.
    """
    chosen, rejected = check_side("chosen", chosen), check_side("rejected", rejected)
    if chosen == rejected:
        raise RecordError("rejected", "equals chosen", "give different answers")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if TRANSCRIPT.match(chosen) and TRANSCRIPT.match(rejected):
            turns = parse_transcript("chosen", chosen), parse_transcript("rejected", rejected)
            return _split_messages(*turns), "hh transcripts → prompt and answers"
        return _split_text(chosen, rejected), "shared beginning → prompt"
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(chosen, rejected), "shared messages → prompt"
    raise RecordError("rejected", "is not of chosen's form", "make both texts, or both lists of messages")


def parse_transcript(name: str, text: str) -> list[Record]:
    """Messages of a ``\\n\\nHuman: … \\n\\nAssistant: …`` transcript.

    Turns of one speaker in a row become one, because chat templates refuse two.
    """
    parts = TURN.split("\n\n" + text.lstrip())[1:]
    messages: list[Record] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = SPEAKERS[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        raise RecordError(name, "ends with the human's turn", "a transcript ends with the assistant's answer")
    if not messages[-1]["content"]:
        raise RecordError(name, "is empty", "the assistant's last turn needs content, or leave the record out")
    return messages


def _split_text(chosen: str, rejected: str) -> Record:
    """A space before the answers stays with them."""
    shared = _num_shared(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise RecordError(None, "chosen and rejected share no beginning", "give the prompt as a field of its own")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _split_messages(chosen: list[Record], rejected: list[Record]) -> Record:
    """The shared turns are the prompt, as long as both sides go on with the assistant."""
    start = _num_shared(chosen, rejected)
    while start and not all(len(side) > start and side[start]["role"] == "assistant" for side in (chosen, rejected)):
        start -= 1
    if not start:
        raise RecordError(
            None, "chosen and rejected share no turn that both answer", "give the prompt as a field of its own"
        )
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
