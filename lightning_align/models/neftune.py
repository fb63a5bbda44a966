"""Noise on the embeddings of training batches (NEFTune, Jain et al. 2023, 2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def embedding_noise(model: PreTrainedModel, alpha: float, document_ids: Tensor) -> Iterator[None]:
    """For a while, embeddings of a batch's tokens get U(−1, 1) · alpha / √(L · H) while the model is in training mode.

    Args:
        model: A language model of width H.
        alpha: 5 to 15.
        document_ids: ``[B, T]``, −1 for padding, which gets none; L is the length of a token's document, so that
            neither padding nor packing changes how much noise there is.
    """
    lengths = document_lengths(document_ids)

    def add(module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not module.training or output.shape[:-1] != lengths.shape:  # another batch, as a test of the model
            return None
        bound = torch.where(lengths > 0, alpha / torch.sqrt(lengths * output.shape[-1]), 0.0)
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * bound[..., None].to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def document_lengths(document_ids: Tensor) -> Tensor:
    """Tokens of each token's document ``[B, T]``; 0 for padding."""
    places = document_ids.long() + 1  # padding is 0
    counts = places.new_zeros(len(places), int(places.max()) + 1)
    counts.scatter_add_(1, places, torch.ones_like(places))
    return torch.where(places > 0, counts.gather(1, places), 0)
