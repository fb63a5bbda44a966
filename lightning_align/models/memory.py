"""How much memory training will take, from sizes alone: said before anything is loaded."""

from lightning_align.models.linear_stats import CHUNK_BYTES, KEEP_BYTES

FP32 = 4
ADAM_STATES = 2
# Values of the width that a decoder layer keeps per token for the backward pass; measured on a Llama of 2.7 times the
# width in its gated MLP, without attention scores.
ACTIVATIONS_PER_LAYER = 22


def estimate_memory(
    *,
    parameters_trained: int,
    parameters_frozen: int,
    tokens_per_microbatch: int,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    dtype_bytes: int = 4,
    gradient_checkpointing: bool = False,
) -> dict[str, int]:
    """Peak of training with AdamW in bytes, by part and as ``total``; good to about a factor of 1.5.

    Args:
        parameters_trained: Of all models that learn.
        parameters_frozen: Of all that do not (reference, reward).
        tokens_per_microbatch: Rows × padded length of one forward pass.
        hidden_size: Width of the model.
        num_layers: Its decoder layers.
        vocab_size: Its tokens.
        dtype_bytes: Bytes per parameter, gradient and activation.
        gradient_checkpointing: Whether only the inputs of layers are kept.
    """
    trained = parameters_trained * dtype_bytes
    per_layer = tokens_per_microbatch * hidden_size * dtype_bytes
    if gradient_checkpointing:
        activations = per_layer * (num_layers + ACTIVATIONS_PER_LAYER)
    else:
        activations = per_layer * num_layers * ACTIVATIONS_PER_LAYER
    parts = {
        "parameters": trained + parameters_frozen * dtype_bytes,
        "gradients": trained,
        "optimizer": parameters_trained * dtype_bytes * ADAM_STATES,
        "activations": activations,
        "logits": min(2 * tokens_per_microbatch * vocab_size * FP32, KEEP_BYTES["cpu"] + 3 * CHUNK_BYTES["cpu"]),
    }
    return parts | {"total": sum(parts.values())}
