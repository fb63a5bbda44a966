"""A decoder-only transformer over another module's weights, with a static key-value cache.

Two entry points: `prefill` runs whole prompts, `step` one token of every active row. Rows need no common length: a
row's token at position t lies in slot t of its cache, so prompts are padded on the right and what follows overwrites
the padding.

Axes: n rows, p prompt slots, h hidden, H query heads, K key-value heads, D head dimension, G = H / K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_align.rollout.cache import KVCache
from lightning_align.rollout.projection import Projection


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm when it has a bias."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """One block. ``qkv`` yields query, key and value heads side by side, ``up`` gate and up projection when gated.

    Rotary pairs are neighbours in ``qkv`` (dimension 2i with 2i + 1): a rotation is then one complex product.
    """

    attention_norm: Norm
    qkv: Projection
    out: Projection
    mlp_norm: Norm
    up: Projection
    down: Projection
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    window: int | None = None
    rope: str | None = None


@dataclass(frozen=True)
class DecoderPlan:
    """Everything the forward needs of a model; ``rope`` maps positions to rotations, by the name a layer asks for."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Projection
    activation: Callable[[Tensor], Tensor]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool = True
    rope: Callable[[Tensor], dict[str, Tensor]] | None = None
    positions: Tensor | None = None
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None


class Decoder:
    """Runs a plan."""

    def __init__(self, plan: DecoderPlan) -> None:
        self.plan = plan
        self.rotations: dict[str, Tensor] = {}

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for ``rows`` sequences of at most ``capacity`` tokens; the rotations are made ready too."""
        plan = self.plan
        if plan.rope is not None:
            self.rotations = plan.rope(torch.arange(capacity, device=plan.embedding.device))
        heads = (len(plan.layers), plan.num_kv_heads, plan.head_dim)
        return KVCache(*heads, rows=rows, capacity=capacity, like=plan.embedding)

    def prefill(self, ids: Tensor, lengths: Tensor, cache: KVCache, first_row: int, samples: int) -> Tensor:
        """Logits [n, V] after each of n prompts, whose keys and values go to ``samples`` cache rows each.

        Args:
            ids: Prompts padded on the right, [n, p].
            lengths: Tokens of each prompt, [n].
            cache: Where keys and values go, from row ``first_row`` on.
            first_row: The first row to write.
            samples: Rows that continue the same prompt.
        """
        plan = self.plan
        prompts, slots = ids.shape
        cache.reserve(min(slots + 1, cache.capacity))
        positions = torch.arange(slots, device=ids.device).repeat(prompts)
        x = self._embed(ids.view(-1), positions)
        rotations = {name: table[positions] for name, table in self.rotations.items()}
        last = torch.arange(prompts, device=ids.device) * slots + lengths - 1
        for number, layer in enumerate(plan.layers):
            heads = self._heads(layer, layer.attention_norm(x), rotations)
            keys_values = heads[:, plan.num_heads :].view(prompts, slots, 2, plan.num_kv_heads, plan.head_dim)
            cache.fill(number, first_row, keys_values, samples)
            query = heads[:, : plan.num_heads].view(prompts, slots, plan.num_heads, plan.head_dim)
            if number == len(plan.layers) - 1:
                # nothing after this reads the earlier positions
                x, query = x[last], query.flatten(0, 1)[last][:, None]
                attended = self._attend_prompt(layer, query, keys_values, lengths[:, None] - 1)
            else:
                rows = torch.arange(slots, device=ids.device).expand(prompts, slots)
                attended = self._attend_prompt(layer, query, keys_values, rows)
            x = self._finish_layer(layer, x, attended)
        return self._logits(x)

    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache, longest: int) -> Tensor:
        """Logits [n, V] after one more token of the first n cache rows.

        Args:
            tokens: [n].
            positions: Where each token stands, which is how many came before it, [n].
            cache: Keys and values of what came before; receives those of ``tokens``.
            longest: 1 + the largest position.
        """
        plan = self.plan
        rows = len(tokens)
        cache.reserve(longest)
        x = self._embed(tokens, positions)
        rotations = {name: table[positions] for name, table in self.rotations.items()}
        index = (cache.first_slot[:rows] + positions[:, None]).reshape(-1)
        masks = {
            window: self._step_mask(positions, cache.slots, window, x.dtype)
            for window in {layer.window for layer in plan.layers}
        }
        for number, layer in enumerate(plan.layers):
            heads = self._heads(layer, layer.attention_norm(x), rotations)
            cache.write(number, index, heads[:, plan.num_heads :])
            query = heads[:, : plan.num_heads].reshape(rows * plan.num_kv_heads, -1, plan.head_dim)
            keys, values = cache.read(number, rows)
            attended = _attention(query, keys, values, masks[layer.window], layer.scale, plan.attention_softcap)
            x = self._finish_layer(layer, x, attended.view(rows, -1))
        return self._logits(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self.plan.embedding)
        if self.plan.embedding_scale != 1:
            # rounded to the parameters' type first, as the models do
            x *= torch.tensor(self.plan.embedding_scale, dtype=x.dtype)
        return x if self.plan.positions is None else x.add_(self.plan.positions[positions])

    def _heads(self, layer: Layer, x: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        """Query, key and value heads, normalised and rotated, [tokens, H + 2K, D]."""
        plan = self.plan
        heads = layer.qkv(x).view(len(x), -1, plan.head_dim)
        rotated = heads[:, : plan.num_heads + plan.num_kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            rotated[:, : plan.num_heads] = layer.query_norm(rotated[:, : plan.num_heads])
            rotated[:, plan.num_heads :] = layer.key_norm(rotated[:, plan.num_heads :])
        if layer.rope is not None:
            _rotate_(rotated, rotations[layer.rope])
        return heads

    def _attend_prompt(self, layer: Layer, query: Tensor, keys_values: Tensor, positions: Tensor) -> Tensor:
        """Causal attention of queries [n, q, H, D] at ``positions`` [n, q] over their own prompts, [n · q, H · D]."""
        plan = self.plan
        prompts, slots = keys_values.shape[:2]
        keys, values = keys_values.permute(2, 0, 3, 1, 4)
        query = query.transpose(1, 2)
        if layer.window is None and plan.attention_softcap is None and query.shape[2] == slots:
            attended = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=layer.scale, enable_gqa=plan.num_heads != plan.num_kv_heads
            )
        else:
            group = plan.num_heads // plan.num_kv_heads
            mask = _additive_mask(positions, slots, layer.window, query.dtype)  # [n, q, p]
            mask = (
                mask[:, None, None]
                .expand(-1, plan.num_kv_heads, group, -1, -1)
                .reshape(prompts * plan.num_kv_heads, -1, slots)
            )
            attended = _attention(
                query.reshape(prompts * plan.num_kv_heads, -1, plan.head_dim),
                keys.flatten(0, 1),
                values.flatten(0, 1),
                mask,
                layer.scale,
                plan.attention_softcap,
            ).view(prompts, plan.num_heads, -1, plan.head_dim)
        return attended.transpose(1, 2).reshape(-1, plan.num_heads * plan.head_dim)

    def _finish_layer(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residuals and MLP; writes into ``x`` [tokens, h]."""
        if layer.attention_post_norm is None:
            x = layer.out.add_to(x, attended)
        else:
            x += layer.attention_post_norm(layer.out(attended))
        inner = layer.up(layer.mlp_norm(x))
        if self.plan.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.plan.activation(gate).mul_(up)
        else:
            inner = self.plan.activation(inner)
        if layer.mlp_post_norm is None:
            return layer.down.add_to(x, inner)
        x += layer.mlp_post_norm(layer.down(inner))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.plan.head(self.plan.final_norm(x)).float()
        if self.plan.logit_softcap is None:
            return logits
        return logits.div_(self.plan.logit_softcap).tanh_().mul_(self.plan.logit_softcap)

    def _step_mask(self, positions: Tensor, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask of one query per row, [n · K, 1 or G, slots]."""
        mask = _additive_mask(positions, slots, window, dtype)
        return mask[:, None].expand(-1, self.plan.num_kv_heads, -1).reshape(-1, 1, slots)


def _additive_mask(positions: Tensor, slots: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 on the slots a query at ``positions`` [...] may see, -inf elsewhere, [..., slots]."""
    distance = positions[..., None] - torch.arange(slots, device=positions.device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(distance.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention of [m, q, D] queries over [m, s, D] keys and values; the mask broadcasts to [m, q, s]."""
    if softcap is None:
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(query, keys.transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap) + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=wide).to(values.dtype), values)


def _rotate_(heads: Tensor, rotations: Tensor) -> None:
    """Rotate pairs of neighbouring dimensions of [tokens, heads, D] in place by complex numbers [tokens, D / 2]."""
    pairs = heads.unflatten(-1, (-1, 2))
    if heads.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(pairs).mul_(rotations[:, None])
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(rotations[:, None])))
