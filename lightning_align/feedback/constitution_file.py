"""A constitution from a YAML file::

principles:
  - name: harm                       # left out: its number
    critique_request: Say how the answer could harm someone.
    revision_request: Rewrite the answer without what could harm someone.
preferences: [Choose the answer that harms nobody.]   # for comparisons; optional
examples: [{prompt: …, completion: …, critique_request: …, critique: …, revision_request: …, revision: …}]
templates: {critique: …, revision: …}                 # of questions in plain text; optional
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from lightning_align.errors import UserError, nearest
from lightning_align.feedback.constitution import BUILT_IN, Constitution, Example, Principle, Templates

NEEDED = {
    "critique": ("prompt", "completion", "critique_request"),
    "revision": ("prompt", "completion", "critique", "revision_request"),
    "revision_alone": ("prompt", "completion", "revision_request"),
}


def read_constitution(source: str) -> Constitution:
    """A built-in constitution (``playground``, ``default``) or a YAML file.

    Raises:
        UserError: There is no such file, or a field of it is missing, unknown or not what it should be.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"constitution {source}: there is no such file{nearest(source, BUILT_IN)} (built in: {', '.join(BUILT_IN)})"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"constitution {source} cannot be read: {' '.join(str(error).split())}") from error
    read = _mapping(source, "", content, ("principles", "preferences", "examples", "templates"))
    rules = _list(source, "principles", read.get("principles"))
    if not rules:
        raise UserError(f"{source}: field principles is empty: give at least one principle")
    principles = [_principle(source, index, rule) for index, rule in enumerate(rules)]
    for index, rule in enumerate(principles):
        if rule.name in [other.name for other in principles[:index]]:
            raise UserError(f"{source}: field principles[{index}].name: {rule.name!r} is there twice, rename one")
    preferences = _list(source, "preferences", read.get("preferences", []))
    examples = _list(source, "examples", read.get("examples", []))
    return Constitution(
        source,
        tuple(principles),
        tuple(_text(source, f"preferences[{index}]", text) for index, text in enumerate(preferences)),
        tuple(_example(source, f"examples[{index}]", example) for index, example in enumerate(examples)),
        _templates(source, read.get("templates", {})),
    )


def _principle(source: str, index: int, value: Any) -> Principle:
    names = tuple(part.name for part in fields(Principle))
    place = f"principles[{index}]"
    read = {"name": str(index + 1), **_mapping(source, place, value, names)}
    return Principle(**{name: _text(source, f"{place}.{name}", read.get(name)) for name in names})


def _example(source: str, place: str, value: Any) -> Example:
    names = tuple(part.name for part in fields(Example))
    read = _mapping(source, place, value, names)
    return Example(**{name: _text(source, f"{place}.{name}", read.get(name)) for name in names})


def _templates(source: str, value: Any) -> Templates:
    names = tuple(part.name for part in fields(Templates))
    changes: dict[str, Any] = {}
    for name, given in _mapping(source, "templates", value, names).items():
        place = f"templates.{name}"
        if name.endswith("_stop"):
            stops = enumerate(_list(source, place, given))
            changes[name] = tuple(_text(source, f"{place}[{index}]", text, blank=True) for index, text in stops)
        else:
            changes[name] = _text(source, place, given, blank=name == "separator")
        if name in NEEDED:
            _check_template(source, place, changes[name], NEEDED[name])
    return replace(Templates(), **changes)


def _check_template(source: str, place: str, text: str, needed: Sequence[str]) -> None:
    known = dict.fromkeys((*needed, *(NEEDED["critique"] if "critique" in needed else ())))
    try:
        named = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise UserError(f"{source}: field {place}: {error}; a brace that is meant as one is written twice") from error
    for name in named:
        if name not in known:
            raise UserError(f"{source}: field {place} has no {{{name}}} to fill in (there are {', '.join(known)})")
    for name in needed:
        if name not in named:
            raise UserError(f"{source}: field {place} lacks {{{name}}}")


def _mapping(source: str, place: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    where = f"field {place}" if place else "the file"
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {where} is {type(value).__name__}: give a mapping of {', '.join(names)}")
    for name in value:
        if name not in names:
            inside = f"{place}.{name}" if place else name
            raise UserError(
                f"{source}: unknown field {inside}{nearest(str(name), names)} (there are {', '.join(names)})"
            )
    return dict(value)


def _list(source: str, place: str, value: Any) -> list[Any]:
    if value is None:
        raise UserError(f"{source}: field {place} is missing")
    if not isinstance(value, list):
        raise UserError(f"{source}: field {place} is {value!r}: give a list")
    return value


def _text(source: str, place: str, value: Any, *, blank: bool = False) -> str:
    if value is None:
        raise UserError(f"{source}: field {place} is missing")
    if not isinstance(value, str):
        raise UserError(f"{source}: field {place} is {value!r}: give a text, in quotes")
    if not value or not (blank or value.strip()):
        raise UserError(f"{source}: field {place} is empty: give a text")
    return value if blank else value.strip()
