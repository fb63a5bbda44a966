"""How each supported architecture maps to a decoder plan.

A plan refers to the module's own parameters, except where it needs them otherwise: query, key and value projections are
joined (and their rotary pairs made neighbours), gate and up projections are joined, adapters are added to the weights,
and on a CPU large projections are packed. Those are copies, to be made again when the weights have changed: by building
another plan.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_align.errors import UserError
from lightning_align.models.lora import adapted_weight, base_layer, is_adapted
from lightning_align.rollout.decoder import DecoderPlan, Layer, Norm
from lightning_align.rollout.projection import Projection, make_projection

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # rotations that depend on the position alone


@torch.no_grad()
def build_plan(model: PreTrainedModel) -> DecoderPlan:
    """The plan of a model over its present weights; a UserError when no adapter fits it."""
    adapter = ADAPTERS.get(type(model).__name__)
    if adapter is None:
        known = ", ".join(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in ADAPTERS)
        raise UserError(f"engine static does not know {type(model).__name__} (it knows {known}): use engine generate")
    return adapter(model)


def _llama_plan(model: Any) -> DecoderPlan:
    return _gated_plan(model, windows=[None] * len(model.model.layers))


def _mistral_plan(model: Any) -> DecoderPlan:
    return _gated_plan(model, windows=[model.config.sliding_window] * len(model.model.layers))


def _qwen2_plan(model: Any) -> DecoderPlan:
    return _gated_plan(model, windows=_layer_windows(model))


def _qwen3_plan(model: Any) -> DecoderPlan:
    return _gated_plan(model, windows=_layer_windows(model), qk_norm=True)


def _gemma_plan(model: Any) -> DecoderPlan:
    _require_causal(model)
    return _gated_plan(model, windows=[None] * len(model.model.layers), norm_offset=1.0)


def _gemma2_plan(model: Any) -> DecoderPlan:
    _require_causal(model)
    return _gated_plan(
        model,
        windows=_layer_windows(model),
        norm_offset=1.0,
        sandwich=True,
        attention_softcap=model.config.attn_logit_softcapping,
        logit_softcap=model.config.final_logit_softcapping,
    )


def _gemma3_plan(model: Any) -> DecoderPlan:
    _require_causal(model)
    return _gated_plan(
        model,
        windows=_layer_windows(model),
        norm_offset=1.0,
        sandwich=True,
        qk_norm=True,
        rope_by_layer_type=True,
        logit_softcap=model.config.final_logit_softcapping,
    )


def _gpt2_plan(model: Any) -> DecoderPlan:
    config, trunk = model.config, model.transformer
    if config.add_cross_attention:
        raise UserError("engine static has no cross-attention (GPT-2 with add_cross_attention): use engine generate")
    layers = tuple(
        Layer(
            attention_norm=_layer_norm(block.ln_1),
            qkv=_projection(block.attn.c_attn),
            out=_projection(block.attn.c_proj),
            mlp_norm=_layer_norm(block.ln_2),
            up=_projection(block.mlp.c_fc),
            down=_projection(block.mlp.c_proj),
            scale=block.attn.scaling,
        )
        for block in trunk.h
    )
    return DecoderPlan(
        embedding=trunk.wte.weight,
        layers=layers,
        final_norm=_layer_norm(trunk.ln_f),
        head=_projection(model.lm_head),
        activation=trunk.h[0].mlp.act,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        gated=False,
        positions=trunk.wpe.weight,
    )


ADAPTERS: dict[str, Callable[[Any], DecoderPlan]] = {
    "LlamaForCausalLM": _llama_plan,
    "MistralForCausalLM": _mistral_plan,
    "Qwen2ForCausalLM": _qwen2_plan,
    "Qwen3ForCausalLM": _qwen3_plan,
    "GemmaForCausalLM": _gemma_plan,
    "Gemma2ForCausalLM": _gemma2_plan,
    "Gemma3ForCausalLM": _gemma3_plan,
    "GPT2LMHeadModel": _gpt2_plan,
}


def _gated_plan(
    model: Any,
    *,
    windows: list[int | None],
    norm_offset: float = 0.0,
    sandwich: bool = False,
    qk_norm: bool = False,
    rope_by_layer_type: bool = False,
    attention_softcap: float | None = None,
    logit_softcap: float | None = None,
) -> DecoderPlan:
    """Llama and its relatives: rotary attention, gated MLP, RMS norms (after the sub-blocks too under ``sandwich``)."""
    config, trunk = model.config, model.model
    head_dim = trunk.layers[0].self_attn.head_dim
    _require_fixed_rope(config.rope_parameters, by_layer_type=rope_by_layer_type)

    def norm(module: Any) -> Norm:
        weight = module.weight + norm_offset if norm_offset else module.weight
        return Norm(weight, module.eps if norm_offset else module.variance_epsilon)

    def head_norm(module: Any) -> Norm:
        plain = norm(module)
        return Norm(plain.weight[_neighbours(head_dim, module.weight.device)], plain.eps)

    layers = []
    for block, window in zip(trunk.layers, windows, strict=True):
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                attention_norm=norm(block.input_layernorm),
                qkv=_joined_qkv(attention.q_proj, attention.k_proj, attention.v_proj, head_dim),
                out=_projection(attention.o_proj),
                mlp_norm=norm(block.pre_feedforward_layernorm if sandwich else block.post_attention_layernorm),
                up=make_projection(*_joined([mlp.gate_proj, mlp.up_proj])),
                down=_projection(mlp.down_proj),
                scale=attention.scaling,
                query_norm=head_norm(attention.q_norm) if qk_norm else None,
                key_norm=head_norm(attention.k_norm) if qk_norm else None,
                attention_post_norm=norm(block.post_attention_layernorm) if sandwich else None,
                mlp_post_norm=norm(block.post_feedforward_layernorm) if sandwich else None,
                window=window,
                rope=attention.layer_type if rope_by_layer_type else "all",
            )
        )
    return DecoderPlan(
        embedding=trunk.embed_tokens.weight,
        layers=tuple(layers),
        final_norm=norm(trunk.norm),
        head=_projection(model.lm_head),
        activation=trunk.layers[0].mlp.act_fn,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rope=_rope(trunk, sorted({layer.rope for layer in layers if layer.rope}), by_layer_type=rope_by_layer_type),
        embedding_scale=trunk.embed_tokens.scalar_embed_scale if norm_offset else 1.0,
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
    )


def _layer_windows(model: Any) -> list[int | None]:
    return [layer.self_attn.sliding_window for layer in model.model.layers]


def _require_causal(model: Any) -> None:
    if model.config.use_bidirectional_attention:
        raise UserError("engine static has causal attention only, not use_bidirectional_attention: use engine generate")


def _require_fixed_rope(parameters: dict[str, Any], *, by_layer_type: bool) -> None:
    for part in parameters.values() if by_layer_type else (parameters,):
        if part is not None and part["rope_type"] not in FIXED_ROPE:
            raise UserError(f"engine static has no {part['rope_type']!r} rotary embedding: use engine generate")


def _rope(trunk: Any, names: list[str], *, by_layer_type: bool) -> Callable[[Tensor], dict[str, Tensor]]:
    """Rotations by position, as the model's own module computes them, [positions, D / 2] complex for each name."""

    def rotations(positions: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(trunk.embed_tokens.weight.dtype, torch.float32)
        like = torch.empty(0, dtype=wide, device=positions.device)
        tables = {}
        for name in names:
            arguments = (like, positions[None], name) if by_layer_type else (like, positions[None])
            cos, sin = trunk.rotary_emb(*arguments)
            half = cos.shape[-1] // 2
            tables[name] = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return tables

    return rotations


def _neighbours(head_dim: int, device: torch.device) -> Tensor:
    """The order of dimensions 0, D/2, 1, D/2 + 1, …: it makes the pairs that rotate together neighbours."""
    return torch.arange(head_dim, device=device).view(2, -1).t().reshape(-1)


def _joined_qkv(query: nn.Module, key: nn.Module, value: nn.Module, head_dim: int) -> Projection:
    """Query, key and value projection as one, query and key dimensions reordered: dot products are the same."""
    weight, bias = _joined([query, key, value])
    rotated = _linear(query)[0].shape[1] + _linear(key)[0].shape[1]
    order = torch.arange(weight.shape[1], device=weight.device)
    order[:rotated] = order[:rotated].view(-1, head_dim)[:, _neighbours(head_dim, weight.device)].reshape(-1)
    return make_projection(weight.t()[order].t(), None if bias is None else bias[order])


def _joined(modules: list[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight [in, out] and bias of several linear layers over the same input, side by side."""
    parts = [_linear(module) for module in modules]
    weight = torch.cat([part.t() for part, _ in parts]).t()
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([part.new_zeros(part.shape[1]) if bias is None else bias for part, bias in parts])


def _projection(module: nn.Module) -> Projection:
    return make_projection(*_linear(module))


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [in, out] and bias of a linear layer, with its adapter in a copy of the weight.

    What else may wrap one (quantisation, further adapters) is refused, not bypassed.
    """
    inner = base_layer(module) if is_adapted(module) else module
    if isinstance(inner, nn.Linear | Conv1D) and type(inner) in (nn.Linear, Conv1D):
        weight = adapted_weight(module) if is_adapted(module) else inner.weight
        return weight.t() if isinstance(inner, nn.Linear) else weight, inner.bias
    raise UserError(f"engine static reads plain linear layers, not {type(module).__name__}: use engine generate")


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.eps, module.bias)
