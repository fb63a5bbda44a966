"""What every online method measures of its samples, as columns with one number a completion ``[B]``."""

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
    columns = {"lab/proxy": proxy.total}
    if gold is not None:
        columns["lab/gold"] = gold.total
        if len(gold.parts) > 1:
            columns |= {f"lab/gold_{name}": part for name, part in gold.parts.items() if name != "gold"}
    return columns


def column_sums(columns: Mapping[str, Tensor]) -> Metrics:
    """Sum and count of each column; NaN (a completion without that score) leaves both."""
    return {name: (values.nansum(), (~values.isnan()).sum()) for name, values in columns.items()}


def sample_rows(rollout: Rollout, proxy: Scores, gold: Scores | None, kl: Tensor) -> list[dict[str, Any]]:
    """One row of the sample table for each completion: texts, KL, and every score by its name."""
    scores = {"proxy": proxy.total, **{f"reward_{name}": part for name, part in proxy.parts.items()}}
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
