"""One readable line out of jsonargparse's errors, and the option names of TRL."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli.main import nearest
from lightning_align.errors import UserError

# TRL's name -> ours. Used only where the old name means nothing and the new one does (FIELD 1.3).
MODEL_ALIASES = {
    "model_name_or_path": "model",
    "sft_model_path": "model",
    "reward_model_path": "reward",
    "rloo_k": "samples_per_prompt",
    "num_generations": "samples_per_prompt",
    "init_kl_coef": "kl_coef",
    "response_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "num_ppo_epochs": "num_epochs",
    "num_iterations": "num_epochs",
    "torch_dtype": "dtype",
}
DATA_ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "dataset_name": "path",
    "max_seq_length": "max_length",
    "packing_strategy": "packing",
}
TRAINER_ALIASES = {
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "logging_steps": "log_every_n_steps",
    "num_train_epochs": "max_epochs",
    "eval_steps": "val_check_interval",
}


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
    if key and not known and (reason := _mistyped(key, text)):
        return reason
    return _flat(text)


def _explain_class(section: str, name: str, cls: type | None, text: str, whole: str) -> str:
    """A problem inside the arguments of a class; ``text`` is the beginning of the ``whole`` complaint."""
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        option = match.group(1)
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


# --------------------------------------------------------------------------------------- TRL's option names
def translate_options(argv: Sequence[str], bases: Mapping[str, type]) -> tuple[list[str], list[str]]:
    """Replace TRL's option names in the command line and in its config files.

    Returns:
        The new arguments (a changed config file is given inline) and one notice per replaced name.
    """
    notices: list[str] = []
    configs = {word: _read_config(word) for word in _values_of(argv, ("--config", "-c"))}
    classes = _classes(argv, list(configs.values()), bases)
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name in ("--config", "-c") and equals and value in configs:
            result.append(name + "=" + _translate_config(value, configs[value], classes, notices))
        elif name.startswith("--"):
            result.append("--" + _rename(name[2:], classes, notices) + equals + value)
        else:
            result.append(_translate_config(word, configs[word], classes, notices) if word in configs else word)
    return result, notices


def classes_first(argv: Sequence[str], bases: Mapping[str, type]) -> list[str]:
    """The words with ``--model CLASS`` before the first ``--model.option``, which would be read as the old class's."""
    words = list(argv)
    for section in bases:
        start = next((i for i, word in enumerate(words) if word.startswith(f"--{section}.")), len(words))
        for index in range(start, len(words)):
            if words[index] == f"--{section}" or words[index].startswith(f"--{section}="):
                chosen = words[index : index + (1 if "=" in words[index] else 2)]
                words[index : index + len(chosen)] = []
                words[start:start] = chosen
                start += len(chosen)
    return words


def _values_of(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    values = [after for word, after in pairwise(argv) if word in names]
    return values + [word.split("=", 1)[1] for word in argv if "=" in word and word.split("=", 1)[0] in names]


def _read_config(path: str) -> Any:
    """The content of a config file; None if it is to be read (and refused) by the parser."""
    file = Path(path)
    if "\n" in path or not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} is no configuration: it must be a mapping, with keys model, data and so on")
    return content


def _classes(argv: Sequence[str], configs: Sequence[Any], bases: Mapping[str, type]) -> dict[str, type]:
    """The class chosen for each section, as far as it is known by a short or dotted name."""
    chosen: dict[str, type] = {}
    for section, base in bases.items():
        names = [config[section]["class_path"] for config in configs if _has_class(config, section)]
        names += _values_of(argv, (f"--{section}",))
        known = subclasses(base)
        found = [known[name.rsplit(".", 1)[-1]] for name in names if name.rsplit(".", 1)[-1] in known]
        chosen[section] = found[-1] if found else base
    return chosen


def _has_class(config: Any, section: str) -> bool:
    return isinstance(config, dict) and isinstance(config.get(section), dict) and "class_path" in config[section]


def _rename(option: str, classes: Mapping[str, type], notices: list[str]) -> str:
    """Our name of a dotted option if it is one of TRL's; itself otherwise."""
    section, _, rest = option.partition(".")
    if not rest:
        section, rest = "", option
    name = rest.removeprefix("init_args.")
    if section not in ("", "model") or ("model" in classes and name in option_names(classes["model"])):
        return option
    new = None
    if name in MODEL_ALIASES and MODEL_ALIASES[name] in option_names(classes["model"]):
        new = f"model.{MODEL_ALIASES[name]}"
    elif name in DATA_ALIASES and DATA_ALIASES[name] in option_names(classes["data"]):
        new = f"data.{DATA_ALIASES[name]}"
    elif name in TRAINER_ALIASES:
        new = f"trainer.{TRAINER_ALIASES[name]}"
    if new is None:
        return option
    notices.append(f"{option} is called {new} here")
    return new


def _translate_config(word: str, config: Any, classes: Mapping[str, type], notices: list[str]) -> str:
    """The config with our names, inline; the word itself if nothing had to be renamed."""
    if not isinstance(config, dict):
        return word
    before = len(notices)
    model = config.get("model")
    options = model.get("init_args", model) if isinstance(model, dict) else {}
    for holder, prefix in ((config, ""), (options if isinstance(options, dict) else {}, "model.")):
        for name in list(holder):
            new = _rename(prefix + str(name), classes, notices)
            if new != prefix + str(name):
                _put(config, new, holder.pop(name))
    return word if len(notices) == before else yaml.safe_dump(config, sort_keys=False)


def _put(config: dict[str, Any], dotted: str, value: Any) -> None:
    section, _, name = dotted.partition(".")
    target = config.setdefault(section, {})
    if section in ("model", "data") and ("class_path" in target or "init_args" in target):
        target = target.setdefault("init_args", {})
    target.setdefault(name, value)
