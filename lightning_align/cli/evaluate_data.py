"""The records that ``evaluate`` reads, with every field that they have."""

from argparse import Namespace
from typing import Any

from lightning_align.data.readers import Loaded, load_records
from lightning_align.data.records import Kind
from lightning_align.data.sources import open_source
from lightning_align.errors import UserError, nearest


def read_records(options: Namespace, kind: Kind) -> tuple[Loaded, list[dict[str, Any]]]:
    """Records of a kind, at most ``--limit`` of them, and for each all fields of the row that it comes from.

    Raises:
        UserError: The data cannot be read, or no record has a field that ``--by`` names.
    """
    loaded = load_records(
        options.data,
        kind,
        split=options.split,
        columns=read_columns(options),
        on_bad_record=options.on_bad_record,
    )
    records, places = _first(loaded, options.limit)
    fields = [dict(record) for record in records]
    if options.by and kind != "sft":  # demonstrations are beside the prompts
        rows = {row.place: row.fields for row in open_source(options.data, kind, options.split, None).rows}
        fields = [{**_known(rows.get(place)), **record} for place, record in zip(places, records, strict=True)]
        for name in options.by:
            there = sorted({key for record in fields for key in record})
            if name not in there:
                raise UserError(
                    f"--by {name}: no record of {options.data} has that field{nearest(name, there)} "
                    f"(there are {', '.join(there)})"
                )
    return Loaded(records, places, loaded.report), fields


def _first(loaded: Loaded, limit: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What was made of the first so many records of the data: a ranking gives several pairs, of one place."""
    first = set(list(dict.fromkeys(loaded.places))[:limit])
    kept = [index for index, place in enumerate(loaded.places) if place in first]
    return [loaded.records[index] for index in kept], [loaded.places[index] for index in kept]


def read_columns(options: Namespace) -> dict[str, str]:
    """Our field names to those in the data."""
    return dict(_pair(word) for word in options.columns)


def _known(fields: Any) -> dict[str, Any]:
    return fields if isinstance(fields, dict) else {}


def _pair(word: str) -> tuple[str, str]:
    ours, equals, theirs = word.partition("=")
    if not equals or not theirs:
        raise UserError(f"--columns takes OURS=THEIRS, not '{word}'")
    return ours, theirs
