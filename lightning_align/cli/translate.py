"""What is done to a command line before it is parsed: TRL's option names become ours, classes go before options."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli.parsing import option_names, subclasses
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
    "optim": "optimizer",
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
    if not isinstance(content, dict):
        raise UserError(f"{path} is no configuration: it must be a mapping, with keys model, data and so on")
    for key, what in (
        ("stages", "a pipeline: give it to the command pipeline"),
        ("architecture", "an architecture: give it as --model.model"),
    ):
        if key in content:
            raise UserError(f"{path} is {what}")
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
