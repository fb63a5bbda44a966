"""One record token by token: which tokens carry loss, where EOS is, what the template added, what is cut."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from lightning_align.data.encode import Encoded, LossOn, encode_pairs, encode_prompts, encode_sft, encode_texts
from lightning_align.data.records import Kind
from lightning_align.data.tables import Limit
from lightning_align.data.templates import Conventions, Message, conventions, render

HERE = ["this record"]
SCORED = ("preference", "ranked", "unpaired", "scored")


class Token(NamedTuple):
    """A token of a sequence, as people read it.

    Attributes:
        id: In the vocabulary.
        text: What it stands for, white space made visible.
        loss: Whether it is learnt (of a preference: whether it belongs to the answer).
        part: ``prompt``, ``completion`` or ``text``.
        added: Whether it stands in no field of the record: BOS, EOS, the template.
        kept: Whether the limit leaves it.
        note: What is special about it.
    """

    id: int
    text: str
    loss: bool
    part: str
    added: bool
    kept: bool
    note: str


class Explained(NamedTuple):
    """One sequence of a record, under its name."""

    title: str
    tokens: list[Token]


def explain_record(
    record: Mapping[str, Any],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
) -> list[Explained]:
    """The sequences that a record becomes: one, or one an answer.

    Args:
        record: A canonical record.
        kind: Its kind.
        tokenizer: Of the model.
        loss_on: See ``SFTDataModule``.
        max_length: Longest sequence in tokens; beyond it tokens are marked as cut.
    """
    sequences = list(_encoded(record, kind, tokenizer, loss_on))
    known = conventions(tokenizer)
    kept = _kept([encoded for _, _, encoded in sequences], kind, max_length, known)
    result = []
    for (title, sources, encoded), own_kept in zip(sequences, kept, strict=True):
        added = _added(tokenizer, sources, encoded.input_ids)
        scored = max((i for i, is_kept in enumerate(own_kept) if is_kept), default=-1) if kind in SCORED else -1
        tokens = [
            Token(
                id=token,
                text=_visible(tokenizer, token),
                loss=encoded.loss_mask[index] and index > 0,
                part=_part(kind, index, encoded),
                added=added[index],
                kept=own_kept[index],
                note=_note(encoded.input_ids[index], known, bos=index == 0, scored=index == scored),
            )
            for index, token in enumerate(encoded.input_ids)
        ]
        result.append(Explained(title, tokens))
    return result


def render_record(
    record: Mapping[str, Any],
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn = "completion",
    max_length: int | None = None,
) -> Group:
    """:func:`explain_record` as tables to print."""
    explained = explain_record(record, kind, tokenizer, loss_on=loss_on, max_length=max_length)
    return Group(*(_table(sequence, kind) for sequence in explained))


def _table(sequence: Explained, kind: Kind) -> Table:
    learnt = sum(token.loss and token.kept for token in sequence.tokens)
    cut = sum(not token.kept for token in sequence.tokens)
    what = {"prompt": "", "text": f", {learnt} with loss", "sft": f", {learnt} with loss"}
    title = f"{sequence.title}: {len(sequence.tokens)} tokens{what.get(kind, f', {learnt} of the answer')}"
    table = Table(title=title + (f", {cut} cut" if cut else ""), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("#", "id"):
        table.add_column(name, justify="right")
    for name in ("token", "answer" if kind in SCORED else "loss", "part", ""):
        table.add_column(name)
    for number, token in enumerate(sequence.tokens):
        origin = f"{token.part}, added" if token.added else token.part
        note = ", ".join(filter(None, (token.note, "" if token.kept else "cut")))
        style = "dim" if not token.kept else "bold" if token.loss else ""
        cells = (str(number), str(token.id), token.text, "yes" if token.loss else "", origin, note)
        table.add_row(*map(escape, cells), style=style)
    return table


# ---------------------------------------------------------------------- sequences of a record
_Encoding = tuple[str, str | list[Any], Encoded]  # title, what the record itself says, tokens


def _encoded(
    record: Mapping[str, Any], kind: Kind, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[_Encoding]:
    if kind == "text":
        (ids,) = encode_texts(tokenizer, [record["text"]])
        yield "text", record["text"], Encoded(ids, [True] * len(ids), 0)
    elif kind == "prompt":
        (ids,) = encode_prompts(tokenizer, [record["prompt"]], places=HERE)
        yield "prompt", record["prompt"], Encoded(ids, [False] * len(ids), len(ids))
    elif kind == "sft":
        (encoded,) = encode_sft(tokenizer, [record], HERE, loss_on)
        source = record["messages"] if "messages" in record else _joined(record["prompt"], record["completion"])
        yield "demonstration", source, encoded
    else:
        answers = _answers(record)
        encodings = encode_pairs(tokenizer, [record["prompt"]] * len(answers), list(answers.values()))
        for (title, answer), encoded in zip(answers.items(), encodings, strict=True):
            yield title, _joined(record["prompt"], answer), encoded


def _answers(record: Mapping[str, Any]) -> dict[str, Any]:
    if "completions" in record:
        name = "ranks" if "ranks" in record else "scores"
        graded = enumerate(zip(record["completions"], record[name], strict=True), 1)
        return {f"completion {number} ({name[:-1]} {grade})": answer for number, (answer, grade) in graded}
    return {name: record[name] for name in ("chosen", "rejected", "completion") if name in record}


def _joined(prompt: str | list[Message], completion: str | list[Message]) -> str | list[Message]:
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        return prompt + completion
    return [*prompt, *(completion if isinstance(completion, list) else [])]


# ---------------------------------------------------------------------- what a token is
def _part(kind: Kind, index: int, encoded: Encoded) -> str:
    if kind == "text":
        return "text"
    return "prompt" if index < encoded.prompt_length else "completion"


def _note(token: int, known: Conventions, *, bos: bool, scored: bool) -> str:
    notes = ["BOS"] if bos and token == known.bos_id else []
    if token == known.eos_id:
        notes.append("EOS")
    elif token == known.turn_end_id:
        notes.append("end of turn")
    return ", ".join([*notes, "the score is read here"] if scored else notes)


def _visible(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    text = str(tokenizer.decode([token]))
    if "\ufffd" in text or not text:  # a part of a character
        return str(tokenizer.convert_ids_to_tokens(token))
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def _added(tokenizer: PreTrainedTokenizerBase, source: str | list[Message], ids: Sequence[int]) -> list[bool]:
    """Which tokens lie outside every field of the record; those that cannot be located count as inside."""
    if isinstance(source, str):
        text, contents = source, [source]
    else:
        (text,), contents = render(tokenizer, [source]), [message["content"] for message in source]
    if not tokenizer.is_fast:
        return [False] * len(ids)
    located = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first = 0 if list(ids[:1]) == located["input_ids"][:1] else 1  # BOS is not in the text
    spans = list(_spans(text, contents))
    result = [True] * len(ids)
    for index, (token, (start, stop)) in enumerate(zip(located["input_ids"], located["offset_mapping"], strict=True)):
        if index + first >= len(ids):
            break
        if ids[index + first] != token:  # the completion's first word was kept apart from the prompt's end
            return [False] * len(ids)
        result[index + first] = not any(start < end and stop > begin for begin, end in spans)
    return result


def _spans(text: str, contents: Sequence[str]) -> Iterator[tuple[int, int]]:
    position = 0
    for content in contents:
        wanted = content.strip() if content not in text else content
        start = text.find(wanted, position)
        if wanted and start >= 0:
            position = start + len(wanted)
            yield start, position


def _kept(sequences: Sequence[Encoded], kind: Kind, max_length: int | None, known: Conventions) -> list[list[bool]]:
    """What the limit leaves of each sequence, as in ``tabulate``."""
    if max_length is None or kind == "text":
        return [[True] * len(encoded.input_ids) for encoded in sequences]
    starts = [
        encoded.loss_mask.index(True) if True in encoded.loss_mask else len(encoded.loss_mask) for encoded in sequences
    ]
    longest = max(len(encoded.input_ids) - start for encoded, start in zip(sequences, starts, strict=True))
    before, after = Limit(max_length, "truncate").split(starts[0], longest)
    result = []
    for encoded, start in zip(sequences, starts, strict=True):
        kept = [index >= start - before and index < start + after for index in range(len(encoded.input_ids))]
        if before and before < start and encoded.input_ids[0] == known.bos_id:
            kept[0], kept[start - before] = True, False
        result.append(kept)
    return result
