"""Samples as rows of a file, to look at, to resume from and to use again; and back to a rollout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_align.rewards.base import Scores
from lightning_align.rollout.types import Experience, Rollout


def rows_of(rollout: Rollout, proxy: Scores, logp: Tensor, ref_logp: Tensor) -> list[dict[str, Any]]:
    """One JSON object a completion, a ``scored`` record with what a method needs beside it.

    Args:
        rollout: The completions.
        proxy: Their scores; what has none gets null.
        logp: Their log-probs under the policy ``[B]``.
        ref_logp: Under the reference ``[B]``.
    """
    lengths, ids = rollout.prompt_lengths.tolist(), rollout.completion_ids()
    columns = {"score": proxy.proxy, **{f"score_{name}": part for name, part in proxy.parts.items()}}
    columns |= {"logp": logp, "ref_logp": ref_logp}
    numbers = {name: [None if v != v else v for v in values.tolist()] for name, values in columns.items()}
    return [
        {
            "prompt": record["prompt"],
            "completion": rollout.completions[row],
            **{name: values[row] for name, values in numbers.items()},
            "finish_reason": rollout.finish_reason[row],
            "prompt_ids": rollout.input_ids[row, : lengths[row]].tolist(),
            "completion_ids": ids[row],
            "prompt_columns": {name: value for name, value in record.items() if name != "prompt"},
        }
        for row, record in enumerate(rollout.records)
    ]


def experience_of(rows: Sequence[dict[str, Any]], per_prompt: int, device: torch.device) -> tuple[Experience, Scores]:
    """What :func:`rows_of` wrote, ``per_prompt`` rows of each prompt side by side.

    Log-probs are of whole completions, ``[B]``; the engine's of tokens are not kept, and 0.
    """
    lengths = torch.tensor([len(row["prompt_ids"]) for row in rows])
    ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
    width = max(map(len, ids))
    slots = torch.arange(width)
    attention = slots < torch.tensor([len(row) for row in ids])[:, None]
    rollout = Rollout(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        attention_mask=attention,
        completion_mask=attention & (slots >= lengths[:, None]),
        engine_logp=torch.zeros(len(rows), width),
        prompt_lengths=lengths,
        prompt_index=torch.arange(len(rows)) // per_prompt,
        finish_reason=[row["finish_reason"] for row in rows],
        completions=[row["completion"] for row in rows],
        records=[{"prompt": row["prompt"], **row["prompt_columns"]} for row in rows],
    ).to(device)

    def column(name: str) -> Tensor:
        values = [float("nan") if row[name] is None else row[name] for row in rows]
        return torch.tensor(values, dtype=torch.float32, device=device)

    parts = {name.removeprefix("score_"): column(name) for name in rows[0] if name.startswith("score_")}
    scores = column("score")
    experience = Experience(rollout, scores, parts, logp=column("logp"), ref_logp=column("ref_logp"))
    return experience, Scores(scores, parts, scores)
