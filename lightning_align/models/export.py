"""Writing models in Hugging Face format."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models.adapter_files import write_adapter
from lightning_align.models.loading import quiet_transformers
from lightning_align.models.lora import merged


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write safetensors, configuration, tokenizer and chat template to ``folder``, which is whole whenever it exists.

    An earlier export under that name is replaced only once the new one is complete. Adapters become part
    of the weights.

    Args:
        model: A language model or the network of a reward model.
        tokenizer: Its tokenizer.
        folder: Where to write; parents are made.
    """
    with _replacing(Path(folder)) as temporary:
        whole = merged(model)
        _set_special_tokens(whole, tokenizer)
        with quiet_transformers():
            whole.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)


def save_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, base: str) -> None:
    """As :func:`save_model`, without the weights that ``base`` (a model argument) has already; ``peft`` can load it."""
    with _replacing(Path(folder)) as temporary:
        _set_special_tokens(model, tokenizer)
        with quiet_transformers():
            write_adapter(model, temporary, base)
            tokenizer.save_pretrained(temporary)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` in the end."""
    temporary, earlier = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "earlier"))
    try:
        for leftover in (temporary, earlier):  # of a process that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write the model to {folder}: {error.strerror}") from error
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, earlier)
            os.replace(temporary, folder)
            shutil.rmtree(earlier)
        else:
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write the model to {folder}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids that plain transformers needs: padding for batches of a classifier, EOS to stop generation."""
    if not model.can_generate() and tokenizer.pad_token_id == tokenizer.eos_token_id:
        # transformers reads the score at the last token that is not padding: with EOS for padding, one too early
        model.config.pad_token_id = None
        warnings.warn(
            "the reward model's tokenizer pads with EOS, so config.json names no pad token: plain transformers then "
            "scores one text at a time, where it would read batches at a wrong token; docs/reward.md has a way",
            stacklevel=2,
        )
    elif model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if not model.can_generate() or model.generation_config is None:
        return
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.bos_token_id is None:
        generation.bos_token_id = tokenizer.bos_token_id
    if generation.temperature not in (None, 1.0) or generation.top_p not in (None, 1.0):
        generation.do_sample = True  # transformers refuses to save sampling settings beside greedy decoding
