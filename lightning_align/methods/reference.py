"""The frozen reference of preference optimisation, and its log-probs on disk with what they were computed from."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from lightning_align.errors import UserError
from lightning_align.models.lora import adapters_off, plain_state

LogProbs = dict[str, NDArray[np.floating]]  # by split, one an answer; float64 in float64 runs, else float32
WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # on log-probs, of a configuration


@dataclass
class Frozen:
    """The reference, outside the module tree: it belongs neither in the checkpoint nor in the optimiser."""

    network: PreTrainedModel

    def join(self, policy: PreTrainedModel) -> None:
        """To the policy's device, and its dtype where ``trainer.precision`` has converted the policy.

        Only there: a conversion takes buffers along, which a network of few bits keeps in more.
        """
        if self.network is not policy:
            self.network.to(policy.device)  # type: ignore[arg-type]
            if self.network.dtype != policy.dtype:
                self.network.to(policy.dtype)  # type: ignore[arg-type]


def fingerprint(network: PreTrainedModel) -> str:
    """A hash of weights (adapters aside) and configuration: networks with another may have other log-probs."""
    digest = hashlib.blake2b(digest_size=20)
    config = {name: value for name, value in network.config.to_dict().items() if name not in WITHOUT_EFFECT}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    with adapters_off(network):
        state = plain_state(network)
    for name, values in sorted(state.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def read_log_probs(path: Path, origin: Mapping[str, str]) -> LogProbs | None:
    """What is kept in ``path``; None if there is no such file.

    Args:
        path: A file that :func:`write_log_probs` wrote.
        origin: What they must have been computed from, by its name.

    Raises:
        UserError: If they were computed from something else, or the file is damaged: nothing is computed anew in the
            place of what somebody may still want.
    """
    if not path.is_file():
        return None
    anew = (
        "to begin anew, give another --run.name or --overwrite, and another model.reference_cache where that option "
        "names this file"
    )
    try:
        with safe_open(path, framework="numpy") as file:
            known = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or holds no reference log-probs: restore it to resume its run; {anew}"
        ) from error
    for name, value in origin.items():
        if (known or {}).get(name) != value:
            raise UserError(
                f"{path} holds reference log-probs of another {name} than this run's: restore what they were computed "
                f"from to resume its run; {anew}"
            )
    return arrays


def write_log_probs(path: Path, log_probs: LogProbs, origin: Mapping[str, str]) -> None:
    """Keep log-probs; under another name first, so that whoever reads sees the whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(log_probs, name, metadata=dict(origin))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"reference log-probs cannot be kept in {path}: {error}") from error
