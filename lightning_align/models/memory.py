"""How much memory training will take, from sizes alone: said before anything is loaded."""

import torch

from align_kernels import logits_memory

FP32 = 4
# Values of the width that a decoder layer keeps per token for the backward pass; measured on a Llama of 2.7 times the
# width in its gated MLP, without attention scores.
ACTIVATIONS_PER_LAYER = 22


def estimate_memory(
    *,
    trained_bytes: int,
    frozen_bytes: int,
    tokens_per_microbatch: int,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    optimizer_bytes: int | None = None,
    dtype_bytes: int = 4,
    gradient_checkpointing: bool = False,
) -> dict[str, int]:
    """Peak of training in bytes, by part and as ``total``; good to about a factor of 1.5.

    Args:
        trained_bytes: Parameters of all models that learn.
        frozen_bytes: Parameters of all that do not (reference, reward, the base of adapters).
        tokens_per_microbatch: Rows × padded length of one forward pass.
        hidden_size: Width of the model.
        num_layers: Its decoder layers.
        vocab_size: Its tokens.
        optimizer_bytes: States of the optimiser; by default AdamW's.
        dtype_bytes: Bytes per activation.
        gradient_checkpointing: Whether only the inputs of layers are kept.
    """
    per_layer = tokens_per_microbatch * hidden_size * dtype_bytes
    if gradient_checkpointing:
        activations = per_layer * (num_layers + ACTIVATIONS_PER_LAYER)
    else:
        activations = per_layer * num_layers * ACTIVATIONS_PER_LAYER
    parts = {
        "parameters": trained_bytes + frozen_bytes,
        "gradients": trained_bytes,
        "optimizer": 2 * trained_bytes if optimizer_bytes is None else optimizer_bytes,
        "activations": activations,
        "logits": logits_memory(tokens_per_microbatch, vocab_size, torch.float32, torch.device("cpu")),
    }
    return parts | {"total": sum(parts.values())}
