"""One readable line out of jsonargparse's errors."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping

from lightning_align.errors import nearest


def subclasses(base: type) -> dict[str, type]:
    """Every imported subclass of ``base`` by its short name."""
    found: dict[str, type] = {}
    children: list[type] = base.__subclasses__()
    for child in children:
        found |= {child.__name__: child} | subclasses(child)
    return found


def leaves(base: type) -> dict[str, type]:
    """Those of :func:`subclasses` that nothing else is built on: the ones to choose from."""
    return {name: cls for name, cls in sorted(subclasses(base).items()) if not cls.__subclasses__()}


def option_names(cls: type) -> list[str]:
    """Names a class accepts: its own keyword arguments and, through ``**kwargs``, those of its bases."""
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = list(inspect.signature(vars(parent)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names


def _all_names(base: type) -> list[str]:
    """What any of the classes to choose from accepts."""
    return list(dict.fromkeys(name for cls in leaves(base).values() for name in option_names(cls)))


def explain(error: argparse.ArgumentError, bases: Mapping[str, type], options: Iterable[str]) -> str:
    """One line for a parsing error: which option, what is wrong with it, and the nearest name where a name is wrong.

    Args:
        error: What jsonargparse raised.
        bases: Base class of each section (``model``, ``data``).
        options: All option strings of the parser.
    """
    text = str(error)
    options = [*options, *(f"--{section}.{name}" for section in bases for name in _all_names(bases[section]))]
    key = match.group(1) if (match := re.search(r'Parser key "([^"]+)"', text)) else ""
    known = subclasses(bases[key]) if key in bases else {}
    if match := re.search(
        r"Problem with given class_path '([^']+)':\s*(.+?)(?:\n\s*- Expected|\n\s*Given value|$)", text, re.S
    ):
        name = match.group(1).rsplit(".", 1)[-1]
        return _explain_class(key, name, known.get(name), match.group(2), text[match.start(2) :])
    pattern = r"Expected a dot import path string: ?(\S*)|Expected a path but (.*) either not accessible"
    if known and (match := re.search(pattern, text)):
        name = match.group(1) or match.group(2) or ""
        choices = list(leaves(bases[key]))
        hint = nearest(name, choices) or f" (there are {', '.join(choices)})"
        return f"unknown {key} class '{name}'{hint}"
    if match := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        return f"unknown option {match.group(1)}{_nearest_option(match.group(1).split('=')[0], options)}"
    if match := re.search(r"^the following arguments are required: (.+)", text):
        section = match.group(1).split(", ")[-1]
        classes = f" with one of {', '.join(leaves(bases[section]))}" if section in bases else ""
        return f"no {section} is given: give --config FILE, or --{section}{classes}"
    if match := re.search(r"File does not exist: '?([^'\n]+)'?", text):
        return f"file {match.group(1).strip()} does not exist (--{key or 'config'})"
    if match := re.search(r"Problems parsing config:(.*)", text, re.S):
        return f"the configuration is not valid YAML: {' '.join(match.group(1).split())}"
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _unknown_key(match.group(1), match.group(2), options)
    if match := re.search(r"(?:Option|Key|Nested key) '([^']+)' is not (?:accepted|expected)", text):
        return _unknown_key(key, match.group(1), options)
    if known and "Not a valid subclass" in text:
        return f"{key} must be a class, or a mapping with class_path and init_args"
    if key and not known and (reason := _mistyped(key, text)):
        return reason
    return _flat(text)


def _explain_class(section: str, name: str, cls: type | None, text: str, whole: str) -> str:
    """A problem inside the arguments of a class; ``text`` is the beginning of the ``whole`` complaint."""
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        option = match.group(1)
        if option == "class_path":
            return f"{section} has options beside class_path: they belong under {section}.init_args"
        hint = nearest(option, option_names(cls)) if cls is not None else ""
        return f"unknown option {section}.{option} of {name}{hint}"
    if match := re.search(r"the following arguments are required: (.+)", text):
        options = ", ".join(f"{section}.{option.strip()}" for option in match.group(1).split(","))
        return f"{name} needs {options}"
    if match := re.search(r'Parser key "([^"]+)":\s*(.*)', text, re.S):
        option = f"{section}.{match.group(1)}"
        return _mistyped(option, whole) or f"{option}: {_flat(match.group(2))}"
    if cls is None:
        return f"unknown {section} class '{name}': {_flat(text)}"
    return f"{section} ({name}): {_flat(text)}"


TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null"}
TYPES |= {"dict": "a mapping", "list": "a list", "Sequence": "a list", "Iterable": "a list"}


def _mistyped(option: str, text: str) -> str | None:
    """``option is …: give …`` where a value is of the wrong type; None if that is not the matter."""
    value = re.search(r"Got value: (.*)", text) or re.search(r"Given value: (.*)", text)
    expected = re.search(r"Subtypes: \[(.*)\]", text) or re.search(r"Expected an? (.*?)(?:\. Got value|\n|$)", text)
    if value is None or expected is None:
        return None
    names = re.sub(r"typing\.Literal\[([^\]]*)\]", "", expected.group(1))
    choices = [
        c.strip(" '") for group in re.findall(r"Literal\[([^\]]*)\]", expected.group(1)) for c in group.split(",")
    ]
    kinds = [TYPES.get(name, name) for name in re.findall(r"(?:^|[\s.'])(\w+)(?=['\[,]|$)", names)]
    wanted = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    given = value.group(1).strip()
    return f"{option} is {given}: give {' or '.join([*wanted, *dict.fromkeys(kinds)])}{nearest(given, choices)}"


def _unknown_key(section: str, option: str, options: Iterable[str]) -> str:
    full = f"{section}.{option}" if section and not option.startswith(section) else option
    return f"unknown option {full}{_nearest_option(full, [name.lstrip('-') for name in options])}"


def _nearest_option(option: str, options: Iterable[str]) -> str:
    """The nearest option; where no section is given, that whose last part is nearest."""
    known = [name for name in options if name.startswith("--") == option.startswith("--") and "help" not in name]
    if "." in option:
        return nearest(option, known)
    last = {name.rsplit(".", 1)[-1].lstrip("-"): name for name in reversed(known)}
    match = difflib.get_close_matches(option.lstrip("-"), last, n=1, cutoff=0.7)
    return f"; did you mean '{last[match[0]]}'?" if match else ""


def _flat(text: str) -> str:
    """One line, without the repetition of types and values that jsonargparse ends with."""
    text = re.split(r"\n\s*Given value type:", text)[0]
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(text.split()))
