"""What every online method measures of its samples, as columns with one number a completion ``[B]``."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_align.losses.masked import Metrics
from lightning_align.rewards.base import Scores
from lightning_align.rollout.types import Rollout


def truncated(rollout: Rollout) -> Tensor:
    """Which completions hit the length limit ``[B]`` bool."""
    return torch.tensor([reason == "length" for reason in rollout.finish_reason], device=rollout.input_ids.device)


def length_columns(rollout: Rollout) -> dict[str, Tensor]:
    """The numbers behind ``completions/…``."""
    return {
        "completions/mean_length": rollout.completion_lengths.float(),
        "completions/clipped_ratio": truncated(rollout).float(),
    }


def score_columns(proxy: Scores, gold: Scores | None) -> dict[str, Tensor]:
    """``lab/proxy``, and where there is a gold score ``lab/gold`` with its parts."""
    columns = {"lab/proxy": proxy.proxy}
    if gold is not None:
        columns["lab/gold"] = gold.proxy
        if len(gold.parts) > 1:
            columns |= {f"lab/gold_{name}": part for name, part in gold.parts.items() if name != "gold"}
    return columns


def part_columns(scores: Scores) -> dict[str, Tensor]:
    """``rewards/<name>/mean`` of each part, and squares that :func:`with_deviations` takes the roots of."""
    columns = {}
    for name, part in scores.parts.items():
        columns[f"rewards/{name}/mean"] = part.double()
        columns[f"rewards/{name}/std"] = part.double() ** 2
    if scores.spreads:
        columns["rewards/ensemble_std"] = torch.cat(list(scores.spreads.values())).double() ** 2
    return columns


def with_deviations(metrics: dict[str, float]) -> dict[str, float]:
    """Standard deviations, and the root mean square of ensembles', in the place of mean squares."""
    for name in [name for name in metrics if name.startswith("rewards/") and name.endswith("std")]:
        mean = metrics.get(f"{name.removesuffix('std')}mean", 0.0)
        metrics[name] = math.sqrt(max(0.0, metrics[name] - mean**2))
    return metrics


def column_sums(columns: Mapping[str, Tensor]) -> Metrics:
    """Sum and count of each column; NaN (a completion without that score) leaves both."""
    return {name: (values.nansum(), (~values.isnan()).sum()) for name, values in columns.items()}


def sample_rows(rollout: Rollout, proxy: Scores, gold: Scores | None, kl: Tensor) -> list[dict[str, Any]]:
    """One row of the sample table for each completion: texts, KL, and every score by its name."""
    scores = {"proxy": proxy.proxy, **{f"reward_{name}": part for name, part in proxy.parts.items()}}
    if len(proxy.parts) == 1:
        scores.pop(next(f"reward_{name}" for name in proxy.parts))
    if gold is not None:
        scores |= {name.removeprefix("lab/"): column for name, column in score_columns(proxy, gold).items()}
    table = {name: column.tolist() for name, column in {**scores, "kl": kl}.items()}
    return [
        {
            "prompt": record["prompt"],
            "completion": completion,
            **{name: column[index] for name, column in table.items()},
            "finish_reason": reason,
        }
        for index, (record, completion, reason) in enumerate(
            zip(rollout.records, rollout.completions, rollout.finish_reason, strict=True)
        )
    ]
