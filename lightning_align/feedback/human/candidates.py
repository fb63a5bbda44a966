"""What people are to rank: answers from a file, or sampled ones, without duplicates."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lightning_align.data.convert import read_record
from lightning_align.data.files import Row
from lightning_align.data.readers import fields_of, first_fields, load_records
from lightning_align.data.records import RecordError
from lightning_align.data.sources import open_source
from lightning_align.data.templates import Completion, Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import MOST_ANSWERS
from lightning_align.feedback.journal import key_of


class Candidates(NamedTuple):
    """A prompt, answers to it and where they were found."""

    prompt: Prompt
    answers: list[Completion]
    place: str


def read_responses(path: str, *, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Candidates]:
    """Answers to each prompt of a source.

    A record has ``completions``, a list (ranks and scores beside it are not read); or ``chosen`` and ``rejected``; or
    one ``completion``, and all answers to a prompt are those of its records, as ``generate --out`` writes them.

    Args:
        path, split, columns: See :func:`~lightning_align.data.readers.load_records`.

    Raises:
        UserError: The source cannot be read, or a record is bad.
    """
    fields = first_fields(path, split=split, columns=columns, wanted="ranked")
    if "completions" in fields:
        return [_of_list(row, columns or {}) for row in open_source(path, "ranked", split, None).rows]
    if "completion" not in fields:
        loaded = load_records(path, "ranked", split=split, columns=columns)
        return [
            Candidates(record["prompt"], record["completions"], place)
            for record, place in zip(loaded.records, loaded.places, strict=True)
        ]
    loaded = load_records(path, "sft", split=split, columns=columns)
    groups: dict[str, Candidates] = {}
    for record, place in zip(loaded.records, loaded.places, strict=True):
        group = groups.setdefault(key_of(record["prompt"]), Candidates(record["prompt"], [], place))
        group.answers.append(record["completion"])
    return list(groups.values())


def _of_list(row: Row, columns: Mapping[str, str]) -> Candidates:
    try:
        if isinstance(row.fields, RecordError):
            raise row.fields
        fields = {name: value for name, value in fields_of(row, columns).items() if name not in ("ranks", "scores")}
        completions = fields.get("completions")
        fields["ranks"] = [1] * len(completions) if isinstance(completions, list) else []  # such a record needs some
        (record,), _, _ = read_record("ranked", fields)
    except RecordError as error:
        raise UserError(f"{row.place}: {error}") from error
    return Candidates(record["prompt"], record["completions"], row.place)


def add_candidates(
    store: Store, found: Iterable[Candidates], *, most: int | None = None, seed: int = 0
) -> Counter[str]:
    """Put what can be ranked into a store.

    Args:
        store: Where to.
        found: Prompts with answers.
        most: Keep so many different answers of each prompt, drawn by ``seed`` (default: all).
        seed: Of that draw.

    Returns:
        Counts: ``added`` prompts and those that were ``there``; answers that are ``duplicates`` of others, ``empty`` or
        more than ``most`` (``surplus``); prompts left out with fewer than two answers, ``too_few``.

    Raises:
        UserError: A prompt has more than nine different answers and ``most`` is not given.
    """
    counts: Counter[str] = Counter()
    with store.together():
        for prompt, answers, place in found:
            full = [answer for answer in answers if _said(answer)]
            kept = list({_said(answer): answer for answer in reversed(full)}.values())[::-1]
            counts["empty"] += len(answers) - len(full)
            counts["duplicates"] += len(full) - len(kept)
            if most is not None and len(kept) > most:
                counts["surplus"] += len(kept) - most
                kept = sorted(kept, key=lambda answer: key_of(seed, prompt, answer))[:most]
            if len(kept) > MOST_ANSWERS:
                raise UserError(
                    f"{place}: {len(kept)} different answers, but a person ranks at most {MOST_ANSWERS}: "
                    f"--num_answers {MOST_ANSWERS} draws as many"
                )
            if len(kept) < 2:
                counts["too_few"] += 1
            else:
                counts["added" if store.add(prompt, kept, place) else "there"] += 1
    return counts


def said_of(counts: Mapping[str, int]) -> Iterator[str]:
    """A line for each count that is not 0."""
    texts = {
        "added": "prompts are new",
        "there": "prompts were there before",
        "duplicates": "answers equal another one to their prompt and are left out",
        "empty": "answers are empty and are left out",
        "surplus": "answers are more than --num_answers and are left out",
        "too_few": "prompts have fewer than two different answers and are left out",
    }
    yield from (f"{counts[name]:,} {text}" for name, text in texts.items() if counts[name])


def _said(answer: Completion) -> Any:
    """What makes answers equal: their texts, whatever the white space around them."""
    if isinstance(answer, str):
        return answer.strip()
    if len(answer) == 1 and set(answer[0]) == {"role", "content"}:
        return str(answer[0]["content"]).strip()
    return key_of(answer)
