"""The protocol of sampling engines, and how one is chosen."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_align.errors import UserError
from lightning_align.models.masks import evaluation_mode
from lightning_align.rollout.hf import GenerateEngine
from lightning_align.rollout.static import StaticCacheEngine
from lightning_align.rollout.types import Rollout, SamplingParams

EngineName = Literal["auto", "static", "generate"]


class Engine(Protocol):
    """Anything that samples completions."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        records: Sequence[dict[str, Any]] | None = None,
    ) -> Rollout:
        """Draw ``params.num_samples`` completions of every prompt.

        Args:
            prompt_ids: Token ids of each prompt, unpadded, of any length.
            params: How to sample.
            seeds: One per completion, the samples of a prompt side by side: len(prompt_ids) · num_samples. A completion
                is a function of its prompt, seed and parameters; the global random state is neither read nor changed.
            records: One per prompt; they come back with every completion.

        Returns:
            One row per completion, in the order of the prompts.
        """
        ...

    def refresh(self) -> None:
        """Take up the model's present weights; to be called after an update."""
        ...


def build_engine(
    name: EngineName, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_batch: int = 128
) -> Engine:
    """The engine called ``name``; ``auto`` is ours if it reproduces the model's logits, else ``generate`` (warns)."""
    if name == "generate":
        return GenerateEngine(model, tokenizer, max_batch)
    if name not in ("auto", "static"):
        raise UserError(f"engine {name!r} does not exist: use auto, static or generate")
    try:
        engine = StaticCacheEngine(model, tokenizer, max_batch)
        check_logits(engine)
    except UserError as error:
        if name == "static":
            raise
        warnings.warn(f"sampling with transformers' generate: {error}", stacklevel=2)
        return GenerateEngine(model, tokenizer, max_batch)
    return engine


@torch.no_grad()
def check_logits(engine: StaticCacheEngine) -> None:
    """Compare the engine's logits with the model's on two short sequences; a UserError when they differ."""
    model = engine.model
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    size = embedding.num_embeddings
    prompts = [[(7 * position + 3) % size for position in range(length)] for length in (6, 3)]
    with evaluation_mode(model), torch.autocast(model.device.type, enabled=False):  # it would round one side only
        ours = engine.logits(prompts)
        theirs = torch.stack([model(torch.tensor([ids], device=model.device)).logits[0, -1].float() for ids in prompts])
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    if not difference < tolerance:
        raise UserError(
            f"engine static does not reproduce the logits of this {type(model).__name__} "
            f"(relative difference {difference:.2g}): use engine generate"
        )
