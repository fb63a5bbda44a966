"""From the forms in which people keep records to the canonical fields, record by record.

Each kind may be written in several forms (``FORMS``); the first whose fields a record has reads it. What was converted
is said in words, for the report.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_align.data.implicit import extract_prompt
from lightning_align.data.records import (
    Kind,
    Record,
    RecordError,
    check_side,
    check_text,
    is_messages,
    validate,
)

# fields that a record may well have under another name; named in the error, never taken without being asked
SYNONYMS = {
    "prompt": ("question", "query", "input", "instruction"),
    "completion": ("answer", "response", "output", "solution", "target"),
    "text": ("content", "document", "article"),
    "chosen": ("preferred", "winner", "better"),
    "rejected": ("dispreferred", "loser", "worse"),
    "label": ("is_good", "thumbs_up"),
    "score": ("rating", "reward"),
}
# ShareGPT's names of the roles
SHAREGPT = {"human": "user", "gpt": "assistant"}
# columns under which a reward function gets something else
RESERVED = ("prompts", "completions", "finished")
ORDER: tuple[Kind, ...] = ("preference", "ranked", "unpaired", "scored", "sft", "prompt", "text")  # the richest first
MIXED = "text beside messages → messages"


class Reading(NamedTuple):
    """What a form made of a record.

    Attributes:
        records: Unchecked records with canonical fields.
        conversion: What was done, for the report; None if nothing had to be.
    """

    records: list[Record]
    conversion: str | None = None


@dataclass(frozen=True)
class Form:
    """A way to write records of a kind: the fields that tell it, and how it is read."""

    kind: Kind
    needs: tuple[str, ...]
    read: Callable[[Record], Reading]
    uses: tuple[str, ...] = ()


def read_record(kind: Kind, fields: Record) -> tuple[list[Record], str | None, list[str]]:
    """Canonical records of a kind, the conversion (None if none was needed) and the fields that were left out.

    Args:
        kind: The kind.
        fields: Fields of one record, without nulls.

    Raises:
        RecordError: If the fields do not make a record of this kind, or a field is wrong.
    """
    form = find_form(kind, fields)
    if form is None:
        raise missing(kind, fields)
    reading = form.read(fields)
    records = [validate(kind, record) for record in reading.records]
    used = {*records[0], *form.needs, *form.uses}
    return records, reading.conversion, [name for name in fields if name not in used]


def find_form(kind: Kind, fields: Collection[str]) -> Form | None:
    """The form of this kind whose fields are all there."""
    return next((form for form in FORMS if form.kind == kind and set(form.needs) <= set(fields)), None)


def source_kind(kind: Kind, fields: Mapping[str, Any]) -> Kind | None:
    """The kind as which a record is read when ``kind`` is wanted: ``kind`` itself where it can be, or what it is."""
    if kind == "sft" and isinstance(fields.get("label"), bool) and find_form("unpaired", fields):
        return "unpaired"  # the completion may be one that was disapproved of
    return kind if find_form(kind, fields) else detect_kind(fields)


def detect_kind(fields: Mapping[str, Any]) -> Kind | None:
    """The kind of a record by its fields, the richest if several fit; None if none does."""
    present = [name for name, value in fields.items() if value is not None]
    return next((kind for kind in ORDER if find_form(kind, present)), None)


def missing(kind: Kind, fields: Collection[str]) -> RecordError:
    """The error for a record that lacks fields of its kind: which one, what there is, what may be meant."""
    forms = [form for form in FORMS if form.kind == kind]
    best = max(forms, key=lambda form: len(set(form.needs) & set(fields)) / len(form.needs))
    others = [field for field in fields if field not in best.needs]
    lacking = [name for name in best.needs if name not in fields]
    meant = {name: field for name in lacking if (field := _meant(name, others))}
    hint = ", which `columns` can rename"
    if kind in ("preference", "ranked") and find_form("unpaired", fields):
        hint = "; this is an unpaired record, which DPOModule learns from with --model.loss_type kto"
    elif meant:
        hint = f"; did you mean columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in meant.items())}}}?"
    return RecordError(
        lacking[0],
        "is missing",
        f"a record of kind {kind} needs {' and '.join(best.needs)}{hint}",
        found=f"there is {', '.join(fields)}" if fields else "the record is empty",
    )


def _meant(name: str, fields: Collection[str]) -> str | None:
    """The field that may be the missing one under another name."""
    known = [field for field in SYNONYMS.get(name, ()) if field in fields]
    return next(iter(known + difflib.get_close_matches(name, fields, n=1, cutoff=0.7)), None)


# --------------------------------------------------------------------------------------------- one form of a record
def _as_it_is(fields: Record) -> Reading:
    return Reading([fields])


def _answered(fields: Record) -> Reading:
    return _one_form(fields, "completion")


def _one_form(fields: Record, *answers: str) -> Reading:
    """Texts stay texts and messages stay messages; where one side is a conversation, all become one."""
    sides = [fields[name] for name in ("prompt", *answers)]
    if len({is_messages(side) for side in sides}) == 1:
        return Reading([fields])
    record = fields | {name: _spoken(fields[name]) for name in answers} | {"prompt": _asked(fields["prompt"])}
    return Reading([record], MIXED)


def _spoken(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _asked(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _ranking(fields: Record) -> Reading:
    completions = fields["completions"]
    if not isinstance(completions, list) or len({is_messages(side) for side in (fields["prompt"], *completions)}) == 1:
        return Reading([fields])
    spoken = {"prompt": _asked(fields["prompt"]), "completions": [_spoken(answer) for answer in completions]}
    return Reading([fields | spoken], MIXED)


def _pair(fields: Record) -> Reading:
    """A preference with its prompt, which conversational sides may repeat."""
    prompt, sides = fields["prompt"], {name: fields[name] for name in ("chosen", "rejected")}
    if all(is_messages(side) and side[0]["role"] != "assistant" for side in sides.values()):
        if isinstance(prompt, str):  # the sides hold the whole conversation, of which the text is only a part
            return _implicit(fields)
        if is_messages(prompt) and all(side[: len(prompt)] == prompt for side in sides.values()):
            rest = {name: side[len(prompt) :] for name, side in sides.items()}
            return Reading([fields | rest], "prompt repeated in its answers → once")
    return _one_form(fields, "chosen", "rejected")


def _implicit(fields: Record) -> Reading:
    """A preference whose prompt is what its sides share."""
    sides, conversion = extract_prompt(fields["chosen"], fields["rejected"])
    return Reading([fields | sides], conversion)


def _sharegpt(fields: Record) -> Reading:
    """``conversations`` of ``{from, value}`` (TRL's ``maybe_convert_to_chatml``, roles included)."""
    turns = fields["conversations"]
    messages = [_sharegpt_turn(turn) for turn in turns] if isinstance(turns, list) else turns
    return Reading([fields | {"messages": check_side("conversations", messages)}], "conversations → messages")


def _sharegpt_turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def _alpaca(fields: Record) -> Reading:
    """``instruction``, ``input``, ``output``: what the user asks and the assistant answers."""
    record = {"prompt": _ask(fields, fields), "completion": _spoken(check_text("output", fields["output"]))}
    return Reading([fields | record], "instruction and output → messages")


def _instances(fields: Record) -> Reading:
    """One instruction with several inputs and outputs: one record each."""
    records = []
    for instance in _list_instances(fields):
        answer = _spoken(check_text("instances[].output", instance.get("output")))
        records.append(fields | {"prompt": _ask(fields, instance), "completion": answer})
    return Reading(records, "instruction and instances → messages")


def _instruction(fields: Record) -> Reading:
    """The prompts of instructions, whose outputs are further columns."""
    instances = _list_instances(fields) if "instances" in fields else [fields]
    rest = {name: value for name, value in fields.items() if name not in ("instruction", "input", "instances")}
    records = []
    for instance in instances:
        output = {"output": instance["output"]} if instance.get("output") else {}
        records.append(rest | output | {"prompt": _ask(fields, instance)})
    return Reading(records, "instruction → prompt")


def _list_instances(fields: Record) -> list[Record]:
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise RecordError("instances", "is not a list of {input, output}", "write at least one")
    return instances


def _ask(fields: Record, instance: Record) -> list[Record]:
    """The user's message: the instruction and, below it, the input."""
    content = check_text("instruction", fields["instruction"])
    further = instance.get("input")
    if further is not None and not (isinstance(further, str) and not further.strip()):
        content += "\n\n" + check_text("input", further)
    return [{"role": "user", "content": content}]


def _prompt(fields: Record) -> Reading:
    """A prompt with every further column."""
    return Reading([{name: value for name, value in fields.items() if name not in RESERVED}])


FORMS = (
    Form("text", ("text",), _as_it_is),
    Form("sft", ("prompt", "completion"), _answered),
    Form("sft", ("messages",), _as_it_is),
    Form("sft", ("conversations",), _sharegpt),
    Form("sft", ("instruction", "output"), _alpaca, ("input",)),
    Form("sft", ("instruction", "instances"), _instances),
    Form("prompt", ("prompt",), _prompt),
    Form("prompt", ("instruction",), _instruction, ("input", "instances")),
    Form("preference", ("prompt", "chosen", "rejected"), _pair),
    Form("preference", ("chosen", "rejected"), _implicit),
    Form("ranked", ("prompt", "completions", "ranks"), _ranking),
    Form("ranked", ("prompt", "completions", "scores"), _ranking),
    Form("unpaired", ("prompt", "completion", "label"), _answered),
    Form("scored", ("prompt", "completion", "score"), _answered),
)
