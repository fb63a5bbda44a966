"""Records of one kind out of records of another, where there is only one way to do it."""

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

from lightning_align.data.records import Kind, Record, RecordError, is_conversational


class Item(NamedTuple):
    """A record on its way.

    Attributes:
        place: Where it comes from, for messages.
        record: Its canonical fields.
        extras: Its further columns, which only prompts keep.
    """

    place: str
    record: Record
    extras: Record


class Derivation(NamedTuple):
    """How one record becomes records of another kind, and why it may become none."""

    make: Callable[[Record], list[Record]]
    none_because: str = ""


def derivable(source: Kind, wanted: Kind) -> bool:
    """Whether records of kind ``wanted`` can be made of records of kind ``source``."""
    return (source, wanted) in DERIVATIONS or (source == "scored" and wanted in ("ranked", "preference"))


def derive(
    source: Kind, wanted: Kind, items: Iterable[Item], on_error: Callable[[str, RecordError], None]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Records of kind ``wanted`` from canonical records of kind ``source``.

    Args:
        source: Kind of the items.
        wanted: Kind to make, see :func:`derivable`.
        items: Records with their places.
        on_error: Called with place and fault of a record from which none can be made.

    Returns:
        The new records, and reason and place of each record that rightly gave none (a tie has no better side), and
        of each pair whose answers are equal.
    """
    if source == "scored":
        return _from_scores(wanted, items, on_error)
    derivation = DERIVATIONS[source, wanted]
    made: list[Item] = []
    dropped: list[tuple[str, str]] = []
    for place, record, extras in items:
        try:
            records = derivation.make(record)
        except RecordError as error:
            on_error(place, error)
            continue
        if not records:
            dropped.append((derivation.none_because, place))
        different = [new for new in records if not _is_equal_pair(new)]
        dropped += [("pairs of equal answers", place)] * (len(records) - len(different))
        keep = extras if wanted == "prompt" else {}
        made += [Item(place, {**keep, **new}, {}) for new in different]
    return made, dropped


def _from_scores(
    wanted: Kind, items: Iterable[Item], on_error: Callable[[str, RecordError], None]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Scored completions, gathered by prompt (and by what is judged), are a ranking."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        key = [item.record["prompt"], item.record.get("aspect")]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(item)
    ranked = [
        Item(
            group[0].place,
            {
                "prompt": group[0].record["prompt"],
                "completions": [item.record["completion"] for item in group],
                "scores": [item.record["score"] for item in group],
                **_aspect(group[0].record),
            },
            {},
        )
        for group in groups.values()
        if len(group) > 1
    ]
    dropped = [
        ("its prompt has no second scored completion", group[0].place) for group in groups.values() if len(group) == 1
    ]
    if wanted == "ranked":
        return ranked, dropped
    made, further = derive("ranked", wanted, ranked, on_error)
    return made, dropped + further


# ------------------------------------------------------------------------------------------------- record by record
def _pairs(record: Record) -> list[Record]:
    """Every pair of a ranking that is no tie."""
    completions, order = record["completions"], _order(record)
    pairs = []
    for first, second in combinations(range(len(completions)), 2):
        if order[first] != order[second]:
            better, worse = (first, second) if order[first] < order[second] else (second, first)
            sides = {"chosen": completions[better], "rejected": completions[worse]}
            pairs.append({"prompt": record["prompt"], **sides, **_aspect(record)})
    return pairs


def _aspect(record: Record) -> Record:
    """What is judged, if it says so."""
    return {"aspect": record["aspect"]} if "aspect" in record else {}


def _is_equal_pair(record: Record) -> bool:
    return "chosen" in record and record["chosen"] == record["rejected"]


def _order(record: Record) -> list[float]:
    """One number a completion, the lowest for the best."""
    return record["ranks"] if "ranks" in record else [-score for score in record["scores"]]


def _best(record: Record) -> list[Record]:
    order = _order(record)
    return [{"prompt": record["prompt"], "completion": record["completions"][order.index(min(order))]}]


def _scores(record: Record) -> list[Record]:
    if "scores" not in record:
        raise RecordError("scores", "is missing", "ranks alone say nothing of how good an answer is")
    answers = zip(record["completions"], record["scores"], strict=True)
    said = _aspect(record)
    return [{"prompt": record["prompt"], "completion": answer, "score": score, **said} for answer, score in answers]


def _unpaired(record: Record) -> list[Record]:
    """TRL's ``unpair_preference_dataset``; a tie has no better side."""
    if record.get("tie"):
        return []
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": record["prompt"], "completion": record[side], "label": label} for side, label in sides]


def _ranking(record: Record) -> list[Record]:
    completions = [record["chosen"], record["rejected"]]
    ranks = [1, 1 if record.get("tie") else 2]
    return [{"prompt": record["prompt"], "completions": completions, "ranks": ranks, **_aspect(record)}]


def _chosen(record: Record) -> list[Record]:
    return [{"prompt": record["prompt"], "completion": record["chosen"]}]


def _approved(record: Record) -> list[Record]:
    return [{"prompt": record["prompt"], "completion": record["completion"]}] if record["label"] else []


def _prompt(record: Record) -> list[Record]:
    """The prompt, or a conversation up to the last answer."""
    if "prompt" in record:
        return [{"prompt": record["prompt"]}]
    turns = record["messages"]
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RecordError("messages", "has no turn before the assistant's", "there is no prompt in it")
    return [{"prompt": turns}]


def _text(record: Record) -> list[Record]:
    if is_conversational(record):
        raise RecordError(None, "is a conversation, not a text", "train on it with SFTDataModule, or give `text`")
    return [{"text": record["prompt"] + record["completion"]}]


DERIVATIONS: dict[tuple[Kind, Kind], Derivation] = {
    ("sft", "prompt"): Derivation(_prompt),
    ("sft", "text"): Derivation(_text),
    ("preference", "prompt"): Derivation(_prompt),
    ("preference", "sft"): Derivation(_chosen),
    ("preference", "unpaired"): Derivation(_unpaired, "a tie has no better side"),
    ("preference", "ranked"): Derivation(_ranking),
    ("ranked", "preference"): Derivation(_pairs, "all its answers tie"),
    ("ranked", "sft"): Derivation(_best),
    ("ranked", "scored"): Derivation(_scores),
    ("unpaired", "sft"): Derivation(_approved, "its label is false"),
}
