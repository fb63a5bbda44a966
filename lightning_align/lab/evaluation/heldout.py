"""Held-out loss of a policy: how likely it finds completions that people wrote."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_align.data.encode import Encoded, encode_sft
from lightning_align.lab.evaluation.intervals import Estimate, ratios
from lightning_align.lab.evaluation.sampling import Policy, Prompts
from lightning_align.lab.overopt import Array
from lightning_align.models.loading import max_positions
from lightning_align.models.logprobs import token_stats

LARGEST = 700.0  # e^709 is the largest double


def heldout_metrics(policy: Policy, demonstrations: Prompts, *, seed: int = 0) -> tuple[dict[str, Estimate], int]:
    """``heldout_loss``, nats per token of the completions, and ``perplexity``, its exponential; bootstrap over records.

    Returns:
        Both, and how many records were left out for being longer than the model's context.
    """
    nll, tokens, left_out = completion_nll(policy, demonstrations.records, demonstrations.places)
    loss = ratios({"loss": (nll, tokens)}, seed=seed)["loss"]
    value, low, high = np.exp(np.minimum([loss.value, loss.low, loss.high], LARGEST))
    perplexity = Estimate(float(value), float(low), float(high), loss.n, float(value) * loss.se)
    return {"heldout_loss": loss, "perplexity": perplexity}, left_out


@torch.no_grad()
def completion_nll(
    policy: Policy, records: Sequence[dict[str, Any]], places: Sequence[str]
) -> tuple[Array, Array, int]:
    """Negative log-likelihood and number of tokens of each record's completion ``[R]``, and how many were too long."""
    encoded = encode_sft(policy.tokenizer, records, places, "completion")
    limit = max_positions(policy.model.config)
    fitting = [row for row in encoded if limit is None or len(row.input_ids) <= limit]
    fitting.sort(key=lambda row: -len(row.input_ids))
    nll, tokens = [], []
    size = policy.settings.batch_size
    for start in range(0, len(fitting), size):
        rows = fitting[start : start + size]
        ids, mask, attention = (tensor.to(policy.device) for tensor in _padded(rows))
        logp = token_stats(policy.model, ids, attention, mask=mask).logp
        nll.append((-logp.double().sum(1)).cpu().numpy())
        tokens.append(mask.sum(1).cpu().numpy())
    empty = np.zeros(0)
    return np.concatenate([empty, *nll]), np.concatenate([empty, *tokens]), len(encoded) - len(fitting)


def _padded(rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, loss mask and attention mask ``[B, T]``, padded on the right. The first token has nothing to predict it."""
    shape = len(rows), max(len(row.input_ids) for row in rows)
    ids = torch.zeros(shape, dtype=torch.int64)
    mask, attention = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        mask[index, 1:length] = torch.tensor(row.loss_mask[1:], dtype=torch.bool)
        attention[index, :length] = True
    return ids, mask, attention
