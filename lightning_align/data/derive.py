"""Records of one kind out of records of another, where there is only one way to do it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from lightning_align.data.records import Kind, Record, RecordError, is_conversational, is_tie

# What a record of most kinds may say of itself as a whole, and what a kind can take over from another.
SAID = ("weight", "aspect", "strength", "margin", "soft_label")
CARRIED: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(("preference", "ranked", "unpaired", "scored"), ("weight", "aspect")),
    **{"sft": ("weight",), "prompt": (), "text": ()},
}
WEIGHTLESS = "its weight is 0"


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


class Derived(NamedTuple):
    """What was made of records.

    Attributes:
        items: The new records.
        dropped: Reason and place of each record that rightly gave none (a tie has no better side), and of each pair
            whose answers are equal.
        lost: Of how many records a field has no place in the new ones, by its name.
    """

    items: list[Item]
    dropped: list[tuple[str, str]]
    lost: Counter[str]


class Derivation(NamedTuple):
    """How one record becomes records of another kind, and why it may become none."""

    make: Callable[[Record], list[Record]]
    none_because: str = ""


def derivable(source: Kind, wanted: Kind) -> bool:
    """Whether records of kind ``wanted`` can be made of records of kind ``source``."""
    return (source, wanted) in DERIVATIONS or (source == "scored" and wanted in ("ranked", "preference"))


def derive(source: Kind, wanted: Kind, items: Iterable[Item], on_error: Callable[[str, RecordError], None]) -> Derived:
    """Records of kind ``wanted`` from canonical records of kind ``source``.

    Args:
        source: Kind of the items.
        wanted: Kind to make, see :func:`derivable`.
        items: Records with their places.
        on_error: Called with place and fault of a record from which none can be made.
    """
    if source == "scored":
        return _from_scores(wanted, items, on_error)
    derivation = DERIVATIONS[source, wanted]
    made: list[Item] = []
    dropped: list[tuple[str, str]] = []
    lost: Counter[str] = Counter()
    for place, record, extras in items:
        if record.get("weight") == 0:
            dropped.append((WEIGHTLESS, place))
            continue
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
        carried = {name: record[name] for name in CARRIED[wanted] if name in record}
        lost.update(name for name in SAID if name in record and name not in carried)
        made += [Item(place, {**keep, **new, **carried}, {}) for new in different]
    return Derived(made, dropped, lost)


def _from_scores(wanted: Kind, items: Iterable[Item], on_error: Callable[[str, RecordError], None]) -> Derived:
    """Scored completions, gathered by prompt (and by what is judged), are a ranking."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        key = [item.record["prompt"], item.record.get("aspect")]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(item)
    ranked: list[Item] = []
    dropped: list[tuple[str, str]] = []
    lost: Counter[str] = Counter()
    for group in groups.values():
        weighty = [item for item in group if item.record.get("weight") != 0]
        dropped += [(WEIGHTLESS, item.place) for item in group if item.record.get("weight") == 0]
        if len(weighty) == 1:
            dropped.append(("its prompt has no second scored completion", weighty[0].place))
        elif weighty:
            ranked.append(Item(weighty[0].place, _gathered([item.record for item in weighty], lost), {}))
    if wanted == "ranked":
        return Derived(ranked, dropped, lost)
    made, further, also_lost = derive("ranked", wanted, ranked, on_error)
    return Derived(made, dropped + further, lost + also_lost)


def _gathered(records: Sequence[Record], lost: Counter[str]) -> Record:
    """The ranking of scored completions; it has a weight where they have the same."""
    first = records[0]
    weights = [record["weight"] for record in records if "weight" in record]
    common = len(weights) == len(records) and len(set(weights)) == 1
    if not common and weights:
        lost["weight"] += len(weights)
    return {
        "prompt": first["prompt"],
        "completions": [record["completion"] for record in records],
        "scores": [record["score"] for record in records],
        **({"weight": first["weight"]} if common else {}),
        **({"aspect": first["aspect"]} if "aspect" in first else {}),
    }


# ------------------------------------------------------------------------------------------------- record by record
def _pairs(record: Record) -> list[Record]:
    """Every pair of a ranking that is no tie."""
    completions, order = record["completions"], _order(record)
    pairs = []
    for first, second in combinations(range(len(completions)), 2):
        if order[first] != order[second]:
            better, worse = (first, second) if order[first] < order[second] else (second, first)
            sides = {"chosen": completions[better], "rejected": completions[worse]}
            pairs.append({"prompt": record["prompt"], **sides})
    return pairs


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
    return [{"prompt": record["prompt"], "completion": answer, "score": score} for answer, score in answers]


def _unpaired(record: Record) -> list[Record]:
    """TRL's ``unpair_preference_dataset``; a tie has no better side."""
    if is_tie(record):
        return []
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": record["prompt"], "completion": record[side], "label": label} for side, label in sides]


def _ranking(record: Record) -> list[Record]:
    completions = [record["chosen"], record["rejected"]]
    ranks = [1, 1 if is_tie(record) else 2]
    return [{"prompt": record["prompt"], "completions": completions, "ranks": ranks}]


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
