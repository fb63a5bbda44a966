"""Fields of the users' YAML files (constitutions, wordings, claims): read, and refused in one line that names them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from lightning_align.errors import UserError, nearest


def read_file(kind: str, source: str, built_in: Iterable[str] = ()) -> Any:
    """What a YAML file says.

    Args:
        kind: What it is, for messages.
        source: The file.
        built_in: Names that stand for no file, to compare a mistyped one with.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    path = Path(source)
    known = list(built_in)
    if not path.is_file():
        offer = f" (built in: {', '.join(known)})" if known else ""
        raise UserError(f"{kind} {source}: there is no such file{nearest(source, known)}{offer}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{kind} {source} cannot be read: {' '.join(str(error).split())}") from error


def fault(source: str, place: str, what: str) -> UserError:
    """The error that names a field of a file."""
    return UserError(f"{source}: field {place} {what}")


def mapping(source: str, place: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """A mapping with none but these fields; ``place`` is empty for the whole file."""
    if not isinstance(value, Mapping):
        where = f"field {place}" if place else "the file"
        raise UserError(f"{source}: {where} is {type(value).__name__}: give a mapping of {', '.join(names)}")
    for name in value:
        if name not in names:
            inside = f"{place}.{name}" if place else str(name)
            raise UserError(
                f"{source}: unknown field {inside}{nearest(str(name), names)} (there are {', '.join(names)})"
            )
    return dict(value)


def check_template(source: str, place: str, text: str, *, needed: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in braces of a template: each ``needed`` one, and none but the ``known``."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise fault(source, place, f"{error}; a brace that is meant as one is written twice") from error
    for name in named:
        if name not in known:
            raise fault(source, place, f"has no {{{name}}} to fill in (there are {', '.join(known)})")
    for name in needed:
        if name not in named:
            raise fault(source, place, f"lacks {{{name}}}")
    return named
