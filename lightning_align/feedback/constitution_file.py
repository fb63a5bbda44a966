"""A constitution from a YAML file::

principles:
  - name: harm                       # left out: its number
    critique_request: Say how the answer could harm someone.
    revision_request: Rewrite the answer without what could harm someone.
preferences: [Choose the answer that harms nobody.]   # for comparisons; optional
examples: [{prompt: …, completion: …, critique_request: …, critique: …, revision_request: …, revision: …}]
templates: {critique: …, revision: …}                 # of questions in plain text; optional
"""

from dataclasses import fields, replace
from typing import Any

from lightning_align.errors import UserError
from lightning_align.feedback.constitution import BUILT_IN, Constitution, Example, Principle, Templates
from lightning_align.feedback.fields import check_template, fault, mapping, read_file

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
    content = read_file("constitution", source, BUILT_IN)
    read = mapping(source, "", content, ("principles", "preferences", "examples", "templates"))
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
    read = {"name": str(index + 1), **mapping(source, place, value, names)}
    return Principle(**{name: _text(source, f"{place}.{name}", read.get(name)) for name in names})


def _example(source: str, place: str, value: Any) -> Example:
    names = tuple(part.name for part in fields(Example))
    read = mapping(source, place, value, names)
    return Example(**{name: _text(source, f"{place}.{name}", read.get(name)) for name in names})


def _templates(source: str, value: Any) -> Templates:
    names = tuple(part.name for part in fields(Templates))
    changes: dict[str, Any] = {}
    for name, given in mapping(source, "templates", value, names).items():
        place = f"templates.{name}"
        if name.endswith("_stop"):
            stops = enumerate(_list(source, place, given))
            changes[name] = tuple(_text(source, f"{place}[{index}]", text, blank=True) for index, text in stops)
        else:
            changes[name] = _text(source, place, given, blank=name == "separator")
        if name in NEEDED:
            needed = NEEDED[name]
            known = dict.fromkeys((*needed, *(NEEDED["critique"] if "critique" in needed else ())))
            check_template(source, place, changes[name], needed=needed, known=list(known))
    return replace(Templates(), **changes)


def _list(source: str, place: str, value: Any) -> list[Any]:
    if value is None:
        raise fault(source, place, "is missing")
    if not isinstance(value, list):
        raise fault(source, place, f"is {value!r}: give a list")
    return value


def _text(source: str, place: str, value: Any, *, blank: bool = False) -> str:
    if value is None:
        raise fault(source, place, "is missing")
    if not isinstance(value, str):
        raise fault(source, place, f"is {value!r}: give a text, in quotes")
    if not value or not (blank or value.strip()):
        raise fault(source, place, "is empty: give a text")
    return value if blank else value.strip()
