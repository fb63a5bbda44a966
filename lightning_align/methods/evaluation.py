"""The evaluation of online methods: one sample for each held-out prompt, at temperature 1."""

import math
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor

from lightning_align.losses.kl import sequence_kl
from lightning_align.losses.masked import Metrics
from lightning_align.methods.base import add_sums, ratios
from lightning_align.methods.measures import (
    column_sums,
    length_columns,
    part_columns,
    sample_rows,
    score_columns,
    with_deviations,
)
from lightning_align.models.logprobs import TokenStats
from lightning_align.rewards.base import Scores
from lightning_align.rollout.types import Rollout

SEEDS = 1 << 39  # evaluations draw beyond the seeds of any iteration, and within those of the run
SAMPLE_ROWS = 16  # rows of the sample table at each evaluation
SQUARED = "_squared"  # ends the name of a mean of squares, from which a standard error comes


def evaluation_seeds(batch: Mapping[str, Any], run: int) -> list[int]:
    """One seed a prompt, from its tokens: the same however prompts are spread over batches and processes.

    Args:
        batch: Prompts; the copies of one draw different samples.
        run: First of the sampling seeds that belong to the run.
    """
    keys = [crc32(np.asarray(ids, dtype=np.int64).tobytes()) for ids in batch["prompt_ids"]]
    return [run + SEEDS + key + copy for key, copy in zip(keys, batch["copy"], strict=True)]


class Evaluation:
    """What one pass over the held-out prompts has measured so far, in this process.

    Attributes:
        sums: Sums behind the metrics.
        samples: Rows of the sample table.
    """

    def __init__(self) -> None:
        self.sums: Metrics = {}
        self.samples: list[dict[str, Any]] = []

    def add(
        self, rollout: Rollout, stats: TokenStats, proxy: Scores, gold: Scores | None, further: Mapping[str, Tensor]
    ) -> None:
        """Add samples; ``stats`` has their entropies and exact KL to the reference, ``further`` other columns."""
        assert stats.kl is not None
        assert stats.entropy is not None
        kl = sequence_kl(stats.kl, rollout.completion_mask)
        columns = {"lab/kl": kl, **score_columns(proxy, gold), **further}
        squares = {f"{name}{SQUARED}": values.double() ** 2 for name, values in columns.items()}
        sums = column_sums({**columns, **squares, **length_columns(rollout), **part_columns(proxy)})
        sums["entropy"] = (stats.entropy.sum(), rollout.completion_mask.sum())
        add_sums(self.sums, sums)
        self.samples += sample_rows(rollout, proxy, gold, kl)


def with_standard_errors(total: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Ratios of sums, with ``…_se`` of the mean over prompts in the place of each mean of squares."""
    metrics = ratios(total)
    for squared in [name for name in metrics if name.endswith(SQUARED)]:
        name = squared.removesuffix(SQUARED)
        count = total[name][1]
        variance = max(0.0, metrics.pop(squared) - metrics[name] ** 2)
        if count > 1:
            metrics[f"{name}_se"] = math.sqrt(variance / (count - 1))
    return with_deviations(metrics)
