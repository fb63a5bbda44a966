"""What a transformers model is told about padding and packing: positions, masks, sliding windows.

A 2-D mask with positions serves padded rows. Packed rows take additive 4-D masks of the model's dtype: boolean ones are
silently wrong under eager attention, and positions alone leak across documents.

A document whose positions start at k > 0 is a *branch*: it goes on from the first k tokens of the last document in its
row that starts at 0. So a prompt is encoded once for several answers, which do not see each other.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"
MASKABLE_ATTENTION = ("eager", "sdpa")
_separates: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """``cumsum(mask) − 1`` clamped at 0: positions ``[B, T]`` that do not depend on the side or amount of padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def predictable_tokens(attention_mask: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Tokens ``[B, T]`` that have a predecessor in their own document, so that the state before them exists."""
    real = attention_mask.bool()
    result = torch.zeros_like(real)
    result[:, 1:] = real[:, 1:] & real[:, :-1]
    if document_ids is not None:
        result[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    return result


def attention_inputs(
    model_config: PretrainedConfig,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of a model call: ``attention_mask``, ``position_ids``, and no cache.

    Args:
        model_config: Says which layers attend within a window.
        attention_mask: ``[B, T]``, true for real tokens.
        position_ids: ``[B, T]``; by default counted from the mask, restarting with every document. Branches need them.
        document_ids: ``[B, T]``, −1 for padding; None, or at most document 0 in every row, means unpacked.
        dtype: Of the model's activations, for the additive mask.

    Raises:
        ValueError: If packed rows meet an attention other than full or sliding-window.
    """
    packed = document_ids is not None and bool((document_ids > 0).any())
    if not packed:
        if position_ids is None:
            position_ids = positions_from_mask(attention_mask)
        return {"attention_mask": attention_mask.bool(), "position_ids": position_ids, "use_cache": False}
    assert document_ids is not None
    if position_ids is None:
        position_ids = _positions_in_documents(document_ids)
    config = model_config.get_text_config()
    visible = _visible(attention_mask, document_ids, position_ids)
    masks = {
        kind: _additive(
            _within_window(visible, position_ids, config.sliding_window) if kind == SLIDING else visible, dtype
        )
        for kind in _attention_kinds(config)
    }
    mask: Tensor | dict[str, Tensor] = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}


def _attention_kinds(config: PretrainedConfig) -> list[str]:
    """The kinds of attention among the layers; without ``layer_types`` a window means that all layers have it."""
    fields = config.to_dict()
    kinds = sorted(set(fields.get("layer_types") or ())) or [SLIDING if fields.get("sliding_window") else FULL]
    if not set(kinds) <= {FULL, SLIDING}:
        raise ValueError(f"packed rows need full or sliding-window attention, this model has {', '.join(kinds)}")
    return kinds


def can_pack(config: PretrainedConfig) -> bool:
    """Whether packed rows have masks for every layer, as far as the configuration tells."""
    try:
        return bool(_attention_kinds(config.get_text_config()))
    except ValueError:
        return False


def _latest(marked: Tensor) -> Tensor:
    """Index of the last marked token of the row up to each token ``[B, T]``; 0 before the first."""
    index = torch.arange(marked.shape[1], device=marked.device).expand_as(marked)
    return torch.where(marked, index, 0).cummax(1).values


def _starts(document_ids: Tensor) -> Tensor:
    """First tokens of documents, and of padding."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def _positions_in_documents(document_ids: Tensor) -> Tensor:
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - _latest(_starts(document_ids))


def _visible(attention_mask: Tensor, document_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Which keys a query sees ``[B, T, T]``: earlier real tokens of its document, and those that it goes on from.

    Padding sees itself, not nothing.
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    visible = document_ids[:, :, None] == document_ids[:, None, :]
    starts = _starts(document_ids)
    first = position_ids.gather(1, _latest(starts))  # position at which the token's document starts
    trunk = document_ids.gather(1, _latest(starts & (position_ids == 0)))
    before = position_ids[:, None, :] < first[:, :, None]
    visible |= (document_ids[:, None, :] == trunk[:, :, None]) & before
    visible &= attention_mask.bool()[:, None, :] & causal
    return visible | torch.eye(length, dtype=torch.bool, device=document_ids.device)


def _within_window(visible: Tensor, position_ids: Tensor, window: int) -> Tensor:
    return visible & (position_ids[:, :, None] - position_ids[:, None, :] < window)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)[:, None]


def unpack_rows(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch with every document in a row of its own, padded on the right; other entries as they are.

    Args:
        batch: ``document_ids`` ``[B, T]`` (−1 for padding) and further tensors of that shape.
    """
    documents = batch["document_ids"]
    shape = documents.shape
    # documents are numbered within a row; number them through
    keys = torch.where(
        documents >= 0, documents + torch.arange(len(documents), device=documents.device)[:, None] * shape[1], -1
    )
    _, row, lengths = keys[keys >= 0].unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    size = (len(lengths), int(lengths.max()) if len(lengths) else 0)
    unpacked = {}
    for name, values in batch.items():
        if values.shape != shape:
            unpacked[name] = values
            continue
        unpacked[name] = values.new_zeros(size).index_put((row, column), values[keys >= 0])
    filled = torch.arange(size[1], device=row.device) < lengths[:, None]
    unpacked["document_ids"] = torch.where(filled, 0, -1)
    return unpacked


def keeps_documents_apart(model: PreTrainedModel, otherwise: str) -> bool:
    """Whether the model keeps the documents of a row apart; tried once per model object.

    Args:
        model: A causal language model.
        otherwise: What is done where it does not, for the warning.
    """
    if model not in _separates:
        _separates[model] = check_packing(model)
        if not _separates[model]:
            warnings.warn(
                f"{type(model).__name__} cannot keep packed documents apart: {otherwise}",
                stacklevel=3,
            )
    return _separates[model]


def documents_apart(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The batch as it is, or unpacked where the model does not keep the documents of a row apart."""
    if not bool((batch["document_ids"] > 0).any()):
        return batch
    otherwise = "every document gets a row of its own (data.packing none saves the detour)"
    return batch if keeps_documents_apart(model, otherwise) else unpack_rows(batch)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every submodule gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> bool:
    """Whether documents packed into one row get the same hidden states as alone, tried on random tokens.

    The last of them is a branch of the one before.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in MASKABLE_ATTENTION or not can_pack(config):
        return False
    decoder = model.get_decoder()
    parameter = next(decoder.parameters())
    lengths, shared = (5, 9, 3), 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, sum(lengths)), generator=generator).to(parameter.device)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(parameter.device)
    positions = _positions_in_documents(documents) + torch.where(documents == 2, shared, 0)
    first, second, branch = ids.split(lengths, dim=1)
    with evaluation_mode(model), torch.autocast(parameter.device.type, enabled=False):
        inputs = attention_inputs(config, torch.ones_like(ids), positions, documents, dtype=parameter.dtype)
        packed = decoder(input_ids=ids, **inputs).last_hidden_state.split(lengths, dim=1)
        whole = (first, second, torch.cat([second[:, :shared], branch], 1))
        for part, states in zip(whole, packed, strict=True):
            inputs = attention_inputs(config, torch.ones_like(part))
            alone = decoder(input_ids=part, **inputs).last_hidden_state[:, -states.shape[1] :]
            limit = TOLERANCE[parameter.dtype] * (1 + alone.abs().max())
            if not bool((states - alone).abs().max() <= limit):
                return False
    return True
