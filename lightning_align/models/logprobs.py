"""Log-probs, entropy, exact KL and correctness of tokens: the one place where logits become statistics.

Hidden states of the decoder are gathered at the rows that predict a wanted token, and only those meet the output layer,
in chunks: the logits of a whole batch ``[B, T, V]`` never exist. Statistics are float32 (float64 for float64 models).
"""

import warnings
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_align.models.linear_stats import Head, RowStats, linear_row_stats, logits_row_stats
from lightning_align.models.lora import WithoutAdapter, adapted_weight, has_dropout, in_use, is_adapted
from lightning_align.models.masks import TOLERANCE, attention_inputs, predictable_tokens

# Multipliers of the logits by the name of their configuration field, as (name, whether it divides).
LOGIT_SCALES = (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False))
_expressible: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TokenStats(NamedTuple):
    """Statistics of tokens ``[B, T]``, token-aligned, 0 (false) outside the mask; None where not asked for.

    Args:
        logp: Log-probability of each token in nats.
        entropy: Of the distribution that the token was drawn from, in nats.
        kl: Exact KL of that distribution from the reference's, in nats.
        correct: Whether the token has the highest probability.
        mean_logit: Mean over the vocabulary of the logits that it was drawn with (not divided by the temperature),
            without gradient; None too where the output layer has a soft-cap.
        mean_logp: Mean over the vocabulary of the log-probabilities, in nats.
    """

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    correct: Tensor | None
    mean_logit: Tensor | None = None
    mean_logp: Tensor | None = None


def token_stats(
    model: nn.Module | WithoutAdapter,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mask: Tensor,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ref_model: nn.Module | WithoutAdapter | None = None,
    correct: bool = False,
    mean_logit: bool = False,
    mean_logp: bool = False,
) -> TokenStats:
    """Statistics of the masked tokens under ``model``: log softmax(logits[t − 1] / temperature)[input_ids[t]].

    Differentiable in ``model`` but for ``correct`` and ``mean_logit``; never with respect to ``ref_model``.

    Args:
        model: A causal language model of transformers, with adapters in it or without.
        input_ids: ``[B, T]``, padded on either side, or packed.
        attention_mask: ``[B, T]``, true for real tokens.
        mask: ``[B, T]``, tokens wanted. One without a predecessor in its document gets 0.
        position_ids: ``[B, T]``; by default counted from the mask.
        document_ids: ``[B, T]`` of packed rows, −1 for padding.
        temperature: Divides the logits, of the reference too.
        entropy: Whether to compute entropies.
        ref_model: Compute the exact KL from this model's distribution.
        correct: Whether to compare with the most likely token.
        mean_logit: Whether to compute means of logits.
        mean_logp: Whether to compute means of log-probs, for label smoothing.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    wanted = mask.bool() & predictable_tokens(attention_mask, document_ids)
    positions = wanted.reshape(-1).nonzero()[:, 0]
    labels = input_ids.reshape(-1)[positions]
    sequences = (input_ids, attention_mask, position_ids, document_ids)
    ref_logits: tuple[Tensor, Head | None] | None = None
    if ref_model is not None:
        with torch.no_grad(), in_use(ref_model) as network:
            ref_logits = _predicting_rows(network, sequences, positions)
    with in_use(model) as network:
        rows, head = _predicting_rows(network, sequences, positions)
    stats = _row_stats(rows, head, labels, temperature, entropy=entropy, correct=correct, reference=ref_logits)
    means = _mean_logits(rows, head) if mean_logit else None
    mean_logps = _mean_logps(rows, head, labels, stats.logp, temperature) if mean_logp else None
    shape = input_ids.shape
    return TokenStats(
        _scatter(stats.logp, positions, shape),
        None if stats.entropy is None else _scatter(stats.entropy, positions, shape),
        None if stats.kl is None else _scatter(stats.kl, positions, shape),
        None if stats.correct is None else _scatter(stats.correct, positions, shape),
        None if means is None else _scatter(means, positions, shape),
        None if mean_logps is None else _scatter(mean_logps, positions, shape),
    )


@torch.no_grad()
def next_token_logps(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, after: Tensor) -> Tensor:
    """Log-probs of all tokens of the vocabulary after the tokens of a mask, ``[N, V]`` in the order of the mask.

    Args:
        model: A causal language model of transformers.
        input_ids: ``[B, T]``, padded on either side.
        attention_mask: ``[B, T]``, true for real tokens.
        after: ``[B, T]``, true for N real tokens; few of them, as their whole distributions are kept.
    """
    positions = after.reshape(-1).nonzero()[:, 0] + 1
    rows, head = _predicting_rows(model, (input_ids, attention_mask, None, None), positions)
    logits = rows.to(torch.promote_types(rows.dtype, torch.float32)) if head is None else head.logits(rows)
    return logits.log_softmax(-1)


def _row_stats(
    rows: Tensor,
    head: Head | None,
    labels: Tensor,
    temperature: float,
    *,
    entropy: bool,
    correct: bool,
    reference: tuple[Tensor, Head | None] | None,
) -> RowStats:
    """Statistics of rows that are hidden states where there is a head for them, and logits where there is none."""
    if head is not None and (reference is None or reference[1] is not None):
        ref = None if reference is None or reference[1] is None else (reference[0], reference[1])
        return linear_row_stats(
            rows, head, labels, temperature=temperature, entropy=entropy, correct=correct, reference=ref
        )
    logits = rows if head is None else head.logits(rows)
    ref_logits = None
    if reference is not None:
        ref_logits = reference[0] if reference[1] is None else reference[1].logits(reference[0])
    return logits_row_stats(
        logits, labels, temperature=temperature, entropy=entropy, correct=correct, ref_logits=ref_logits
    )


def _mean_logits(rows: Tensor, head: Head | None) -> Tensor | None:
    """Mean over the vocabulary of the logits of rows, which are logits or what the head makes them of."""
    return (
        rows.detach().mean(1, dtype=torch.promote_types(rows.dtype, torch.float32))
        if head is None
        else head.mean_logits(rows)
    )


def _mean_logps(rows: Tensor, head: Head | None, labels: Tensor, logp: Tensor, temperature: float) -> Tensor:
    """Mean over the vocabulary of the log-probs of rows: that of the label, less what its logit has over the mean."""
    if head is not None and head.softcap is None:
        return logp - head.over_mean(rows, labels) / temperature
    logits = rows.to(torch.promote_types(rows.dtype, torch.float32)) if head is None else head.logits(rows)
    return logp - (logits.gather(1, labels[:, None])[:, 0] - logits.mean(1)) / temperature


def _predicting_rows(
    model: nn.Module, sequences: tuple[Tensor, Tensor, Tensor | None, Tensor | None], positions: Tensor
) -> tuple[Tensor, Head | None]:
    """Hidden states ``[N, H]`` before the wanted tokens with the head for them, or logits ``[N, V]`` and None."""
    assert isinstance(model, PreTrainedModel), f"token statistics need a transformers model, not {type(model).__name__}"
    input_ids, attention_mask, position_ids, document_ids = sequences
    inputs = attention_inputs(model.config, attention_mask, position_ids, document_ids, dtype=model.dtype)
    if head_is_expressible(model):
        output = model.get_decoder()(input_ids=input_ids, **inputs).last_hidden_state
        return output.flatten(0, 1).index_select(0, positions - 1), _head(model)
    output = model(input_ids=input_ids, **inputs).logits
    return output.flatten(0, 1).index_select(0, positions - 1), None


def _scatter(column: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return column.new_zeros(shape.numel()).index_copy(0, positions, column).view(shape)


# ---------------------------------------------------------------------- heads
def _head(model: PreTrainedModel) -> Head:
    """The output layer as weight, bias, soft-cap and scale."""
    layer = model.get_output_embeddings()
    weight = adapted_weight(layer) if is_adapted(layer) else layer.weight
    fields = model.config.get_text_config()
    scale = 1.0
    for name, divides in LOGIT_SCALES:
        value = getattr(fields, name, None)
        if value is not None:
            scale *= 1.0 / value if divides else value
    return Head(weight, layer.bias, softcap=getattr(fields, "final_logit_softcapping", None), scale=scale)


def head_is_expressible(model: PreTrainedModel) -> bool:
    """Whether the logits are weight, bias, scale and soft-cap of the decoder's hidden states.

    Tried once per model object on a few random tokens; a model that fails takes the plain path, with a warning.
    """
    if model not in _expressible:
        _expressible[model] = _try_head(model)
        if not _expressible[model]:
            warnings.warn(
                f"the output layer of {type(model).__name__} is more than a linear map with soft-cap and scale: "
                "log-probs take the plain path, which holds the logits of whole sequences",
                stacklevel=2,
            )
    return _expressible[model]


@torch.no_grad()
def _try_head(model: PreTrainedModel) -> bool:
    # a subclass (a quantised layer) may compute something else than its weight says, and so does dropout in an adapter
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear and not (is_adapted(layer) and not has_dropout(layer)):
        return False
    states: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 5), generator=torch.Generator().manual_seed(0)).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.autocast(model.device.type, enabled=False):  # which would round, and the tolerance is the weights'
        try:
            with torch.random.fork_rng(devices):  # dropout, where it is on, must not move the run's random numbers
                logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        if len(states) != 1 or states[0].shape[:2] != ids.shape:
            return False
        ours = _head(model).logits(states[0]).to(logits.dtype)
    return bool((ours - logits).abs().max() <= TOLERANCE[logits.dtype] * (1 + logits.abs().max()))
