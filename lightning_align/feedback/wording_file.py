"""A judge's wording from a YAML file; what the file leaves out is as in the built-in ``default``."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from lightning_align.feedback.fields import check_template, fault, mapping, read_file
from lightning_align.feedback.wording import BUILT_IN, DEFAULT, Exemplar, JudgeWording

FIELDS = tuple(field.name for field in fields(JudgeWording) if field.name != "source")
EXEMPLAR_FIELDS = tuple(field.name for field in fields(Exemplar))
NEEDED = {"comparison": ("prompt", "first", "second"), "rating": ("prompt", "completion")}


def read_wording(source: str) -> JudgeWording:
    """A built-in wording (``default``, ``playground``, ``playground:safety``, …) or a YAML file of its fields.

    Raises:
        UserError: There is no such file, or a field of it is unknown or not what it should be.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]
    content = read_file("wording", source, BUILT_IN)
    given = mapping(source, "", content, FIELDS)
    wording = replace(
        DEFAULT,
        source=source,
        **{name: _READERS.get(name, _text)(source, name, value) for name, value in given.items()},
    )
    _check_templates(wording)
    return wording


def _check_templates(wording: JudgeWording) -> None:
    for name, needed in NEEDED.items():
        known = (*needed, "principle") if name == "comparison" else needed
        named = check_template(wording.source, name, getattr(wording, name), needed=needed, known=known)
        if name == "comparison" and ("principle" in named) != bool(wording.principles):
            what = "names {principle}, but there are no principles" if "principle" in named else "lacks {principle}"
            raise fault(wording.source, name, f"{what}: give both, or neither")


# ---------------------------------------------------------------------------------------------------------- fields
def _text(source: str, place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise fault(source, place, f"is {value!r}: give a text, in quotes")
    return value


def _reply(source: str, place: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise fault(source, place, f"is {value!r}: give the text that a reply begins with, in quotes")
    return value


def _list(source: str, place: str, value: Any, *, least: int = 0) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise fault(source, place, f"is {value!r}: give a list{f' of at least {least}' if least else ''}")
    return value


def _options(source: str, place: str, value: Any) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or len(value) != 2:
        raise fault(source, place, f"is {value!r}: give two replies, or two lists of forms of a reply")
    options = []
    for index, forms in enumerate(value):
        listed = _list(source, f"{place}[{index}]", forms if isinstance(forms, list) else [forms], least=1)
        options.append(tuple(_reply(source, f"{place}[{index}]", form) for form in listed))
    if set(options[0]) & set(options[1]):
        raise fault(source, place, "has the same reply for both answers")
    return tuple(options)


def _ratings(source: str, place: str, value: Any) -> tuple[str, ...]:
    ratings = tuple(
        _reply(source, f"{place}[{i}]", item) for i, item in enumerate(_list(source, place, value, least=2))
    )
    if len(set(ratings)) < len(ratings):
        raise fault(source, place, "names a rating twice")
    return ratings


def _principles(source: str, place: str, value: Any) -> tuple[str, ...]:
    return tuple(_reply(source, f"{place}[{index}]", item) for index, item in enumerate(_list(source, place, value)))


def _exemplars(source: str, place: str, value: Any) -> tuple[Exemplar, ...]:
    return tuple(_exemplar(source, f"{place}[{i}]", item) for i, item in enumerate(_list(source, place, value)))


def _exemplar(source: str, place: str, value: Any) -> Exemplar:
    given = mapping(source, place, value, EXEMPLAR_FIELDS)
    for name in ("prompt", "first", "second", "preferred"):
        if name not in given:
            raise fault(source, f"{place}.{name}", "is missing")
    preferred = given["preferred"]
    if preferred not in (1, 2) or isinstance(preferred, bool):
        raise fault(source, f"{place}.preferred", f"is {preferred!r}: give 1 or 2")
    texts = {name: _text(source, f"{place}.{name}", given[name]) for name in given if name != "preferred"}
    return Exemplar(**texts, preferred=preferred)


def _flag(source: str, place: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fault(source, place, f"is {value!r}: give true or false")
    return value


_READERS: dict[str, Callable[[str, str, Any], Any]] = {
    **{"options": _options, "ratings": _ratings, "principles": _principles, "exemplars": _exemplars, "plain": _flag},
}
