"""The seven kinds of records: their fields, and the checks that every record passes before anything is built on it.

A text is a ``str``; a conversation is a list of messages ``{"role": …, "content": …}``. Within a record all sides are
one or the other. Field names are TRL's where TRL has them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Kind = Literal["text", "sft", "prompt", "preference", "ranked", "unpaired", "scored"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROLES = ("system", "developer", "user", "assistant", "tool")
STRENGTHS = ("significantly", "better", "slightly", "negligibly")
ASPECTS = ("helpfulness", "safety")
Record = dict[str, Any]


class RecordError(ValueError):
    """A record that cannot be used.

    Args:
        field: Name of the field at fault; None for the record as a whole.
        reason: What is wrong, without values, so that equal faults count together.
        fix: What to do.
        found: What was found instead.

    Attributes:
        category: Field and reason, under which the fault is counted.
        cure: What was found, and what to do; empty where nothing was found that the reason does not say.
    """

    def __init__(self, field: str | None, reason: str, fix: str, *, found: str = "") -> None:
        self.category = f"field {field}: {reason}" if field else reason
        self.cure = f"{found}; {fix}" if found else ""
        super().__init__(f"{self.category}{f' ({found})' if found else ''}; {fix}")


def is_messages(value: Any) -> bool:
    """Whether a field is meant as a conversation (TRL's ``is_conversational``): a list of mappings with a role."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def is_tie(record: Mapping[str, Any]) -> bool:
    """Whether a preference has no better side: it is marked ``tie``, or its ``soft_label`` is ½."""
    return bool(record.get("tie")) or record.get("soft_label") == 0.5


def is_conversational(record: Mapping[str, Any]) -> bool:
    """Whether a record speaks in messages instead of plain text."""
    sides = [record.get(name) for name in ("messages", "prompt", "completion", "chosen", "rejected")]
    return any(is_messages(side) for side in sides)


def validate(kind: Kind, fields: Mapping[str, Any]) -> Record:
    """The canonical record of these fields; raises :class:`RecordError` naming the first field at fault.

    Numbers come out as floats, messages without their empty keys; records of kind ``prompt`` keep every further
    column, the other kinds keep only their own fields.
    """
    dialogue = kind == "sft" and "messages" in fields and not {"prompt", "completion"} <= set(fields)
    required, optional = _MESSAGES if dialogue else _SCHEMAS[kind]
    record: Record = {name: check(name, fields[name]) for name, check in required.items() if name in fields}
    for name in required:
        if name not in record:
            raise RecordError(name, "is missing", f"a record of kind {kind} needs {', '.join(required)}")
    record |= {name: check(name, fields[name]) for name, check in optional.items() if name in fields}
    if kind == "prompt":
        record = {**fields, **record}
    if kind in _RELATIONS:
        _RELATIONS[kind](record)
    return record


# ------------------------------------------------------------------------------------------ checks of one field
def check_text(name: str, value: Any) -> str:
    """A text that is not blank; raises :class:`RecordError`, as all checks do."""
    if not isinstance(value, str):
        raise RecordError(name, "is not a text", "write a text in quotes", found=_shown(value))
    if not value.strip():
        raise RecordError(name, "is empty", "write a text, or leave the record out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start + 1}"
            raise RecordError(name, "holds half a Unicode character", "write the text again", found=found) from error
    return value


def check_side(name: str, value: Any) -> str | list[Record]:
    """A text or a conversation."""
    return _messages(name, value) if isinstance(value, list) else check_text(name, value)


def _answer(name: str, value: Any) -> str | list[Record]:
    """A text or a list of messages, all the assistant's own if there is but one."""
    if not isinstance(value, list):
        return check_text(name, value)
    messages = _messages(name, value)
    for where, message in (("starts", messages[0]), ("ends", messages[-1])):
        if message["role"] != "assistant":
            raise RecordError(
                name, f"does not {where[:-1]} with the assistant", "give the answer alone", found=message["role"]
            )
    _learnable(name, messages)
    return messages


def _dialogue(name: str, value: Any) -> list[Record]:
    """A whole conversation to learn the assistant's turns of."""
    messages = _messages(name, value)
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError(name, "has no assistant turn", "there is nothing to learn from it")
    _learnable(name, messages)
    return messages


def _learnable(name: str, messages: list[Record]) -> None:
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise RecordError(name, "is empty", "an assistant's turn needs content, or leave the record out")


def _messages(name: str, value: Any) -> list[Record]:
    if not isinstance(value, list):
        raise RecordError(name, "is not a conversation", "give a list of {role, content}", found=_shown(value))
    if not value:
        raise RecordError(name, "is empty", "give at least one message {role, content}")
    return [_message(name, number, message) for number, message in enumerate(value, 1)]


def _message(name: str, number: int, message: Any) -> Record:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise RecordError(name, "holds something that is no message", "give {role, content}", found=where)
    present = {key: value for key, value in message.items() if value is not None}  # Arrow fills up with nulls
    if "role" not in present:
        raise RecordError(name, "has a message without a role", f"say who speaks: {', '.join(ROLES)}", found=where)
    role, content = present["role"], present.get("content", "" if "tool_calls" in present else None)
    if role not in ROLES:
        raise RecordError(name, "has an unknown role", f"roles are {', '.join(ROLES)}", found=f"{role!r} in {where}")
    content = _joined_parts(name, where, content)
    if not isinstance(content, str):
        raise RecordError(
            name, "has a message whose content is not a text", "write a text", found=f"{where}: {_shown(content)}"
        )
    if content.strip():
        check_text(name, content)
    return {**present, "content": content}


def _joined_parts(name: str, where: str, content: Any) -> Any:
    """The text of a content that is written as a list of parts; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError(
            name, "has a message with a part that is no text", 'parts are {"type": "text", "text": …}', found=where
        )
    return "".join(texts)  # type: ignore[arg-type] # all are texts


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(name, "is not a number", "write a number", found=_shown(value))
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise RecordError(name, "is not finite", "write a finite number, or leave the field out", found=str(number))
    return number


def _weight(name: str, value: Any) -> float:
    if (number := _number(name, value)) < 0:
        raise RecordError(name, "is negative", "a weight is 0 or more", found=str(value))
    return number


def _soft_label(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise RecordError(name, "is no probability", "write a number from ½ to 1", found=str(value))
    if number < 0.5:
        raise RecordError(name, "is below ½", "swap chosen and rejected, and write 1 − it", found=str(value))
    return number


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecordError(name, "is neither true nor false", "write true or false", found=_shown(value))
    return value


def _one_of(*known: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise RecordError(name, "is unknown", f"it is one of {', '.join(known)}", found=_shown(value))
        return str(value)

    return check


def _list_of(check: Callable[[str, Any], Any]) -> Callable[[str, Any], list[Any]]:
    def check_all(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise RecordError(name, "is not a list", "write a list", found=_shown(value))
        return [check(name, item) for item in value]

    return check_all


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(name, "holds something that is no whole number", "1 is best", found=_shown(value))
    return value


def _shown(value: Any) -> str:
    names = {"str": "a text", "list": "a list", "dict": "a mapping", "NoneType": "nothing", "bool": "a truth value"}
    text = repr(value)
    kind = names.get(type(value).__name__, type(value).__name__)
    return f"{text if len(text) <= 40 else text[:39] + '…'}, {kind}"


_Check = Callable[[str, Any], Any]
_JUDGED: dict[str, _Check] = {"weight": _weight, "aspect": _one_of(*ASPECTS)}
_MESSAGES: tuple[dict[str, _Check], dict[str, _Check]] = ({"messages": _dialogue}, {"weight": _weight})
_SCHEMAS: dict[Kind, tuple[dict[str, _Check], dict[str, _Check]]] = {
    "text": ({"text": check_text}, {}),
    "sft": ({"prompt": check_side, "completion": _answer}, {"weight": _weight}),
    "prompt": ({"prompt": check_side}, {"is_safety": _bool}),
    "preference": (
        {"prompt": check_side, "chosen": _answer, "rejected": _answer},
        {"strength": _one_of(*STRENGTHS), "margin": _number, "tie": _bool, "soft_label": _soft_label, **_JUDGED},
    ),
    "ranked": (
        {"prompt": check_side, "completions": _list_of(_answer)},
        {"ranks": _list_of(_rank), "scores": _list_of(_number), **_JUDGED},
    ),
    "unpaired": ({"prompt": check_side, "completion": _answer, "label": _bool}, _JUDGED),
    "scored": ({"prompt": check_side, "completion": _answer, "score": _number}, _JUDGED),
}
FIELDS = tuple(dict.fromkeys(name for schema in (*_SCHEMAS.values(), _MESSAGES) for part in schema for name in part))


# ------------------------------------------------------------------------------------------ checks between fields
def _one_form(record: Record, answers: Mapping[str, Any]) -> None:
    for name, answer in answers.items():
        if isinstance(record["prompt"], str) != isinstance(answer, str):
            raise RecordError(
                name, "is not of the prompt's form", "make both texts, or both lists of messages", found=_shown(answer)
            )


def _check_pair(record: Record) -> None:
    _one_form(record, {name: record[name] for name in ("chosen", "rejected")})
    if record["chosen"] == record["rejected"] and not record.get("tie"):
        raise RecordError("rejected", "equals chosen", "give different answers, or mark the record tie: true")
    if record.get("tie") and record.get("soft_label", 0.5) != 0.5:
        found = f"{record['soft_label']:g}"
        raise RecordError("soft_label", "contradicts tie: true", "leave one of them out", found=found)


def _check_completion(record: Record) -> None:
    if "completion" in record:
        _one_form(record, {"completion": record["completion"]})


def _check_ranking(record: Record) -> None:
    completions = record["completions"]
    if len(completions) < 2:
        raise RecordError("completions", "has fewer than two answers", "a ranking needs at least two")
    for completion in completions:
        _one_form(record, {"completions": completion})
    if "ranks" not in record and "scores" not in record:
        raise RecordError("ranks", "is missing", "give ranks (1 is best, equal is a tie) or scores, one an answer")
    for name in ("ranks", "scores"):
        if name in record and len(record[name]) != len(completions):
            found = f"{len(record[name])} for {len(completions)} completions"
            raise RecordError(name, "has the wrong length", "give one for each completion", found=found)
    if "ranks" in record and min(record["ranks"]) != 1:
        raise RecordError("ranks", "does not start at 1", "1 is best", found=f"the best is {min(record['ranks'])}")


_RELATIONS: dict[Kind, Callable[[Record], None]] = {
    "sft": _check_completion,
    "preference": _check_pair,
    "ranked": _check_ranking,
    "unpaired": _check_completion,
    "scored": _check_completion,
}
