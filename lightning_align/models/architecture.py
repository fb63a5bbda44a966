"""Architectures to initialise from scratch, read from YAML and checked before anything is built."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from lightning_align.errors import UserError

TOKENIZER_SETTINGS = {"vocab_size", "algorithm", "bos"}


@dataclass(frozen=True)
class Architecture:
    """A model to initialise: ``{architecture: llama, hidden_size: …, tokenizer: {train: {…}} or {path: …}}``.

    Args:
        file: Where it was read from, for messages.
        model_type: Name of the architecture in transformers.
        fields: Configuration fields; the vocabulary size comes from the tokenizer.
        tokenizer_plan: Arguments of ``train_tokenizer``, or None when there is a tokenizer to load.
        tokenizer_path: Run directory, folder or hub id of a tokenizer, or None when one is trained.
    """

    file: str
    model_type: str
    fields: dict[str, Any]
    tokenizer_plan: dict[str, Any] | None
    tokenizer_path: str | None

    def config(self, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
        """The transformers configuration for a tokenizer; :class:`UserError` on fields that do not fit together."""
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = set(AutoConfig.for_model(self.model_type).to_dict())
        for name in self.fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise UserError(f"{self.file}: {self.model_type} has no field {name}{hint}")
        try:
            return AutoConfig.for_model(self.model_type, **self.fields, **special, vocab_size=len(tokenizer))
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"{self.file}: {' '.join(str(error).split())}") from error


def read_architecture(file: str) -> Architecture:
    """Read and check a YAML file of an architecture."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "architecture" not in content or "tokenizer" not in content:
        raise UserError(f"{file}: an architecture file needs the keys `architecture` (e.g. llama) and `tokenizer`")
    fields = dict(content)
    model_type, tokenizer = fields.pop("architecture"), fields.pop("tokenizer")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1)
        raise UserError(f"{file}: unknown architecture {model_type}" + (f": did you mean {near[0]}?" if near else ""))
    if "vocab_size" in fields:
        raise UserError(f"{file}: vocab_size comes from the tokenizer: remove it, or set tokenizer.train.vocab_size")
    plan, path = _read_tokenizer(file, tokenizer)
    return Architecture(file, model_type, fields, plan, path)


def _read_tokenizer(file: str, tokenizer: object) -> tuple[dict[str, Any] | None, str | None]:
    if not isinstance(tokenizer, dict) or set(tokenizer) not in ({"train"}, {"path"}):
        raise UserError(f"{file}: tokenizer needs either `train: {{vocab_size, algorithm}}` or `path`")
    if "path" in tokenizer:
        beside = Path(file).parent / str(tokenizer["path"])
        return None, str(beside if beside.is_dir() else tokenizer["path"])
    plan = tokenizer["train"]
    if not isinstance(plan, dict) or not {"vocab_size", "algorithm"} <= set(plan) <= TOKENIZER_SETTINGS:
        raise UserError(f"{file}: tokenizer.train needs vocab_size and algorithm (words or bpe), and may have bos")
    if not isinstance(plan["vocab_size"], int) or plan["algorithm"] not in ("words", "bpe"):
        raise UserError(f"{file}: tokenizer.train.vocab_size must be a whole number and algorithm words or bpe")
    return dict(plan), None
