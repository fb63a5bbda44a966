"""Fields with a name that is nearly one of ours: said where a reader would otherwise take another kind for granted."""

from collections.abc import Collection, Mapping

from lightning_align.data.convert import FORMS, ORDER, SYNONYMS, Form, find_form
from lightning_align.data.records import FIELDS, Kind
from lightning_align.errors import UserError, nearest

SHORTEST = 5  # letters of a name that others are taken for; `tie` and `text` are a letter from too many words
LONG = 7  # letters of a name in which two may be wrong
KNOWN = tuple(dict.fromkeys((*FIELDS, *(name for form in FORMS for name in (*form.needs, *form.uses)))))


def check_left_sides(columns: Mapping[str, str], kind: Kind | None) -> None:
    """Raise :class:`UserError` for a field of ``columns`` that no record has.

    Args:
        columns: Our field to their column.
        kind: What is wanted. Prompts may have any further column, for reward functions, and only what is nearly a
            field is refused; so too where the kind is not known yet.
    """
    for ours, theirs in columns.items():
        if ours in KNOWN:
            continue
        near = near_field(ours, KNOWN)
        if near is not None:
            raise UserError(f"columns renames {theirs!r} to {ours!r}, which is no field; did you mean '{near}'?")
        if kind not in ("prompt", None):
            needs = next(form.needs for form in FORMS if form.kind == kind)
            raise UserError(
                f"columns renames {theirs!r} to {ours!r}, which no record of kind {kind} has{nearest(ours, KNOWN)} "
                f"(it needs {' and '.join(needs)}; only prompts have columns of their own)"
            )


def what_it_looks_like(fields: Collection[str]) -> str | None:
    """A richer kind that a record would be of if some of its fields had our names, in one line; None if there is none.

    Args:
        fields: Names of the fields of a record.
    """
    found = next((form for kind in ORDER if (form := find_form(kind, fields))), None)
    richer = ORDER if found is None else ORDER[: ORDER.index(found.kind)]
    taken = () if found is None else (*found.needs, *found.uses)
    others = [name for name in fields if name not in taken and name not in KNOWN]
    for kind in richer:
        for form in (form for form in FORMS if form.kind == kind):
            meant = _meant(form, fields, others)
            if meant:
                return _said(kind, meant)
    return None


def near_field(name: str, known: Collection[str]) -> str | None:
    """The field that a name is one letter from, or two in a long one; None if there is none."""
    close = [
        (distance, field)
        for field in known
        if len(field) >= SHORTEST and 0 < (distance := edits(name, field)) <= (2 if len(field) >= LONG else 1)
    ]
    return min(close)[1] if close else None


def edits(one: str, other: str) -> int:
    """Letters to insert, remove, replace, or swap with their neighbour, to make one word the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1]


def _meant(form: Form, fields: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Every missing field of a form with the one that is probably meant; empty unless all are found."""
    lacking = [name for name in form.needs if name not in fields]
    meant: dict[str, str] = {}
    for name in lacking:
        known = [field for field in SYNONYMS.get(name, ()) if field in others]
        close = known or [field for field in others if near_field(field, (name,))]
        if close and close[0] not in meant.values():
            meant[name] = close[0]
    return meant if len(meant) == len(lacking) else {}


def _said(kind: Kind, meant: Mapping[str, str]) -> str:
    ours, theirs = (" and ".join(f"`{name}`" for name in names) for names in (meant, meant.values()))
    are, it = ("is missing", f"is {theirs} it") if len(meant) == 1 else ("are missing", f"are they {theirs}")
    renamed = " ".join(f"{name}={column}" for name, column in meant.items())
    return f"looks like {kind}, but {ours} {are}; {it}? (--columns {renamed})"
