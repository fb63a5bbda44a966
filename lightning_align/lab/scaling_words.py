"""What a sweep says, as JSON, as a table and in words."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from lightning_align.lab.findings import number
from lightning_align.lab.scaling import Law, missing_cells, reward_sweep
from lightning_align.lab.scaling_claims import STATEMENTS, Finding
from lightning_align.lab.scaling_laws import coefficient_laws, foretell_largest, joint_law, loss_law

COLUMNS = (
    *("reward_parameters", "comparisons", "policy_parameters", "seed", "reward_loss", "reward_accuracy", "start"),
    *("points", "d_max", "alpha", "beta", "d_peak", "R_peak", "censored", "seconds", "run"),
)


def summarise(laws: Sequence[Law], findings: Sequence[Finding], left_out: Sequence[str]) -> dict[str, Any]:
    """Content of ``scaling.json``."""
    by_reward = reward_sweep(laws)
    return {
        "format": 1,
        "n": len(laws),
        "censored": sum(law.censored is not None for law in laws),
        "left_out": list(left_out),
        "missing": missing_cells(laws),
        "parameters": "without embeddings",
        "claims": [
            {
                "claim": finding.claim,
                "statement": STATEMENTS[finding.claim],
                "estimate": finding.estimate.value,
                "ci": [finding.estimate.low, finding.estimate.high],
                "n": finding.estimate.n,
                "verdict": finding.verdict,
                "reason": finding.reason,
                "runs": [str(run) for run in finding.runs],
                **finding.details,
            }
            for finding in findings
        ],
        "coefficients": coefficient_laws(by_reward),
        "joint": joint_law(by_reward),
        "largest_foretold": foretell_largest(by_reward),
        "reward_loss": loss_law(by_reward),
        "seconds": math.fsum(run.measured.seconds for run in laws),
        "runs": [dict(zip(COLUMNS, _row(law), strict=True)) for law in laws],
    }


def _row(law: Law) -> list[Any]:
    run = law.measured
    return [
        *(run.reward_parameters, run.comparisons, run.policy_parameters, run.seed, run.reward_loss),
        *(run.reward_accuracy, law.start, len(run.d), float(run.d.max()), law.fit.alpha, law.fit.beta),
        *(law.peak_d, law.peak_gain, law.censored or "", run.seconds),
        str(run.run) if run.run is not None else "",
    ]


def to_csv(laws: Sequence[Law]) -> str:
    """A line for each run; what is censored or unknown is empty."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for law in laws:
        writer.writerow(["" if cell != cell else cell for cell in _row(law)])
    return out.getvalue()


def told(finding: Finding) -> str:
    """The estimate in words."""
    estimate = finding.estimate
    if not estimate.n:
        return "not measured"
    ends = "" if estimate.low != estimate.low else f" ({number(estimate.low, 3)} to {number(estimate.high, 3)})"
    return f"{number(estimate.value, 3)}{ends}, {estimate.n} seeds"
