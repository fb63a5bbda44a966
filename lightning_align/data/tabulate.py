"""From records of each kind to the arrays that a dataset is made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_align.data.encode import (
    Encoded,
    LossOn,
    encode_pairs,
    encode_prompts,
    encode_sft,
    encode_texts,
)
from lightning_align.data.records import STRENGTHS, is_tie
from lightning_align.data.tables import Arrays, Counts, Limit, encode_good, flat, joined, keep_last
from lightning_align.data.templates import Conventions, conventions

Record = Mapping[str, Any]
Ties = Literal["drop", "soft", "rao_kupper", "davidson"]  # all but the first keep them
CHUNK = 256  # records tokenised at once
NOTHING_LEFT = "no token left to learn from"
Row = tuple[list[int], list[bool], float, int]  # ids, loss mask, weight, index of the record


def chunks(records: Sequence[Record], places: Sequence[str]) -> Iterator[tuple[int, Sequence[Record], Sequence[str]]]:
    """So many records and their places at a time, with the index of the first."""
    for start in range(0, len(records), CHUNK):
        yield start, records[start : start + CHUNK], places[start : start + CHUNK]


# ---------------------------------------------------------------------- text and sft
def text_table(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str], limit: Limit | None
) -> tuple[Arrays, Counts]:
    """Documents with EOS. Without a limit they keep their length: packing cuts them without losing a token."""
    counts, parts = Counts(), []
    for first, chunk, own_places in chunks(records, places):
        rows: list[Row] = []
        for index, ids in enumerate(encode_texts(tokenizer, [record["text"] for record in chunk])):
            if limit is not None and not limit.admits({"document": len(ids)}, own_places[index], counts):
                continue
            kept = ids if limit is None else ids[: limit.tokens]
            counts.add_record(len(kept), len(kept) - 1, tokens_cut=len(ids) - len(kept))
            counts.add_sequence(had_end=True, has_end=len(kept) == len(ids))
            rows.append((kept, [True] * len(kept), 1.0, first + index))
        parts.append(_language_model_arrays(rows))
    return joined(parts, {"starts": "ids"}), counts


def sft_table(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    places: Sequence[str],
    limit: Limit,
    loss_on: LossOn,
    *,
    skip_bad: bool = False,
) -> tuple[Arrays, Counts]:
    """Demonstrations. A ``messages`` record has no completion of its own: its assistant turns take that place."""
    counts, parts, known = Counts(), [], conventions(tokenizer)
    encode = partial(encode_sft, tokenizer, loss_on=loss_on)
    for first, chunk, own_places in chunks(records, places):
        rows: list[Row] = []
        for index, encoded in enumerate(encode_good(encode, chunk, own_places, counts, skip_bad)):
            place, weight = own_places[index], float(chunk[index].get("weight", 1.0))
            if encoded is None:
                continue
            if weight == 0:
                counts.drop("its weight is 0", place)
                continue
            fitted = _fit(encoded, limit, place, counts, known)
            if fitted is not None:
                rows.append((*fitted, weight, first + index))
        parts.append(_language_model_arrays(rows))
    return joined(parts, {"starts": "ids"}), counts


def _fit(
    encoded: Encoded, limit: Limit, place: str, counts: Counts, known: Conventions
) -> tuple[list[int], list[bool]] | None:
    """Ids and loss mask, cut to the limit; None for a record that is dropped, and counted."""
    ids, mask = encoded.input_ids, encoded.loss_mask
    start = mask.index(True) if True in mask else len(mask)
    lengths = start, len(ids) - start
    if not limit.admits({"prompt": lengths[0], "completion": lengths[1]}, place, counts):
        return None
    before, after = limit.split(*lengths)
    head = keep_last(ids[:start], before, known.bos_id)
    kept, kept_mask = head + ids[start : start + after], [False] * len(head) + mask[start : start + after]
    if not any(kept_mask[1:]):
        counts.drop(NOTHING_LEFT, place)
        return None
    had_end, has_end = _ends(ids, mask, known), _ends(kept, kept_mask, known)
    counts.add_record(len(kept), sum(kept_mask[1:]), tokens_cut=len(ids) - len(kept))
    counts.add_sequence(had_end=had_end, has_end=has_end, encoded=encoded)
    return kept, kept_mask


def _ends(ids: list[int], mask: list[bool], known: Conventions) -> bool:
    return bool(mask) and mask[-1] and ids[-1] in known.end_ids


def _language_model_arrays(rows: Sequence[Row]) -> Arrays:
    ids, starts = flat([row[0] for row in rows], np.int32)
    return {
        "ids": ids,
        "starts": starts,
        "mask": flat([row[1] for row in rows], np.bool_)[0],
        "weight": np.array([row[2] for row in rows], dtype=np.float32),
        "record": np.array([row[3] for row in rows], dtype=np.int64),
    }


# ---------------------------------------------------------------------- prompts
def prompt_table(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    places: Sequence[str],
    limit: Limit,
    *,
    skip_bad: bool = False,
) -> tuple[Arrays, Counts]:
    """Prompts; one that is too long loses its beginning."""
    counts, parts, bos = Counts(), [], conventions(tokenizer).bos_id

    def encode(prompts: Sequence[Any], own_places: Sequence[str]) -> list[list[int]]:
        return encode_prompts(tokenizer, prompts, places=own_places)

    for first, chunk, own_places in chunks(records, places):
        rows, kept_records = [], []
        prompts = [record["prompt"] for record in chunk]
        for index, ids in enumerate(encode_good(encode, prompts, own_places, counts, skip_bad)):
            if ids is None:
                continue
            if not ids:
                counts.drop("the prompt has no token", own_places[index])
            elif limit.admits({"prompt": len(ids)}, own_places[index], counts):
                kept = keep_last(ids, limit.tokens, bos)
                counts.add_record(len(kept), 0, tokens_cut=len(ids) - len(kept))
                rows.append(kept)
                kept_records.append(first + index)
        values, starts = flat(rows, np.int32)
        parts.append({"ids": values, "starts": starts, "record": np.array(kept_records, dtype=np.int64)})
    return joined(parts, {"starts": "ids"}), counts


# ---------------------------------------------------------------------- preferences
@dataclass(frozen=True)
class Pair:
    """Two answers of a prompt, by number, and what is known about the comparison."""

    chosen: int
    rejected: int
    label: float = 1.0  # probability that chosen is the better one; ½ for a tie
    margin: float = float("nan")
    strength: int = -1


class Group(NamedTuple):
    """A prompt with its answers.

    Attributes:
        rows: Tokens of prompt and answer, one row an answer.
        prompt_length: Tokens of the prompt.
        pairs: Those that are compared.
        ranks: Of the answers; 1 is best.
        scores: Of the answers; NaN where there is none.
        weight: Of the record.
        record: Its index.
    """

    rows: list[list[int]]
    prompt_length: int
    pairs: list[Pair]
    ranks: list[int]
    scores: list[float]
    weight: float
    record: int


def preference_table(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    places: Sequence[str],
    limit: Limit,
    ties: Ties,
    *,
    skip_bad: bool = False,
) -> tuple[Arrays, Counts]:
    """Comparisons, rankings and scored answers: a prompt with its answers, each once, and the pairs that are compared.

    All answers of a prompt see the same part of it. A scored or labelled answer is alone with its prompt, and has
    no pairs.
    """
    counts, parts, known = Counts(), [], conventions(tokenizer)
    encode = partial(_encode_answers, tokenizer)
    for first, chunk, own_places in chunks(records, places):
        groups = []
        encoded = encode_good(encode, chunk, own_places, counts, skip_bad)
        for index, (record, rows) in enumerate(zip(chunk, encoded, strict=True)):
            if rows is None:
                continue
            weight = float(record.get("weight", 1.0))
            if weight == 0:
                counts.drop("its weight is 0", own_places[index])
                continue
            ranks = _ranks(record)
            group = _group(rows, _pairs(record, ranks, ties), own_places[index], limit, counts, known)
            if group is not None:
                groups.append(Group(*group, ranks, _scores(record), weight, first + index))
        parts.append(_preference_arrays(groups))
    return joined(parts, {"starts": "ids", "groups": "prompt_length", "pair_groups": "chosen"}), counts


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], places: Sequence[str]
) -> list[list[Encoded]]:
    """The answers of each record."""
    answers = [_answers(record) for record in records]
    prompts = [record["prompt"] for record, own in zip(records, answers, strict=True) for _ in own]
    where = [place for place, own in zip(places, answers, strict=True) for _ in own]
    encoded = iter(encode_pairs(tokenizer, prompts, [answer for own in answers for answer in own], places=where))
    return [[next(encoded) for _ in own] for own in answers]


def _answers(record: Record) -> list[Any]:
    if "completions" in record:
        return list(record["completions"])
    return [record["completion"]] if "completion" in record else [record["chosen"], record["rejected"]]


def _ranks(record: Record) -> list[int]:
    """Rank of each answer, 1 is best, without gaps."""
    if "completion" in record:
        return [1]
    if "completions" not in record:
        return [1, 1 if is_tie(record) else 2]
    order = record["ranks"] if "ranks" in record else [-score for score in record["scores"]]
    places = {value: place for place, value in enumerate(sorted(set(order)), 1)}
    return [places[value] for value in order]


def _scores(record: Record) -> list[float]:
    """Score of each answer, NaN where there is none; a label is 1 or 0."""
    if "completion" in record:
        return [float(record["score"] if "score" in record else record["label"])]
    return list(record.get("scores", [float("nan")] * len(_answers(record))))


def _pairs(record: Record, ranks: Sequence[int], ties: Ties) -> list[Pair]:
    if "chosen" in record:
        pair = Pair(
            0,
            1,
            0.5 if is_tie(record) else float(record.get("soft_label", 1.0)),
            float(record.get("margin", "nan")),
            STRENGTHS.index(record["strength"]) if "strength" in record else -1,
        )
        return [] if ties == "drop" and is_tie(record) else [pair]
    pairs = []
    for a, b in combinations(range(len(ranks)), 2):
        if ranks[a] != ranks[b]:
            pairs.append(Pair(a, b) if ranks[a] < ranks[b] else Pair(b, a))
        elif ties != "drop":
            pairs.append(Pair(a, b, label=0.5))
    return pairs


def _group(
    rows: list[Encoded], pairs: list[Pair], place: str, limit: Limit, counts: Counts, known: Conventions
) -> tuple[list[list[int]], int, list[Pair]] | None:
    """Answers with the shared prompt in front, its length, and the pairs; None for a record that is dropped."""
    alone = len(rows) == 1
    if not pairs and not alone:
        counts.drop("its answers tie", place)
        return None
    # a tokenizer that joins the prompt's end to an answer cannot do so here: the prompt is the same for all of them
    prompt = rows[0].input_ids[: rows[0].prompt_length]
    answers = [row.input_ids[row.prompt_length :] for row in rows]
    longest = max(len(answer) for answer in answers)
    if not limit.admits({"prompt": len(prompt), "longest answer": longest}, place, counts):
        return None
    before, after = limit.split(len(prompt), longest)
    head = keep_last(prompt, before, known.bos_id)
    kept = [answer[:after] for answer in answers]
    pairs = [pair for pair in pairs if kept[pair.chosen] != kept[pair.rejected]]
    if not pairs and not alone:
        counts.drop("its answers are the same tokens", place)
        return None
    cut = len(prompt) - len(head) + sum(len(a) - len(b) for a, b in zip(answers, kept, strict=True))
    counts.add_record(sum(len(head) + len(a) for a in kept), sum(len(a) for a in kept), tokens_cut=cut)
    for row, whole, part in zip(rows, answers, kept, strict=True):
        had_end = whole[-1:] != [] and whole[-1] in known.end_ids
        counts.add_sequence(had_end=had_end, has_end=had_end and len(part) == len(whole), encoded=row)
    return [head + answer for answer in kept], len(head), pairs


def _preference_arrays(groups: Sequence[Group]) -> Arrays:
    ids, starts = flat([row for group in groups for row in group.rows], np.int32)
    pairs = [pair for group in groups for pair in group.pairs]
    return {
        "ids": ids,
        "starts": starts,
        "prompt_length": np.array([group.prompt_length for group in groups for _ in group.rows], dtype=np.int32),
        "rank": np.array([rank for group in groups for rank in group.ranks], dtype=np.int32),
        "score": np.array([score for group in groups for score in group.scores], dtype=np.float32),
        "groups": _starts([len(group.rows) for group in groups]),
        "chosen": np.array([pair.chosen for pair in pairs], dtype=np.int32),
        "rejected": np.array([pair.rejected for pair in pairs], dtype=np.int32),
        "label": np.array([pair.label for pair in pairs], dtype=np.float32),
        "margin": np.array([pair.margin for pair in pairs], dtype=np.float32),
        "strength": np.array([pair.strength for pair in pairs], dtype=np.int8),
        "pair_groups": _starts([len(group.pairs) for group in groups]),
        "weight": np.array([group.weight for group in groups], dtype=np.float32),
        "record": np.array([group.record for group in groups], dtype=np.int64),
    }


def _starts(lengths: Sequence[int]) -> Any:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
