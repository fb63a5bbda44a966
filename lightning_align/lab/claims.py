"""Claims of the field as experiments: two arms over several seeds, the effect with its interval, and a verdict."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lightning_align.errors import UserError, nearest
from lightning_align.lab.claims_file import Arm, Claim
from lightning_align.lab.claims_measures import GAIN, measure, shared_error_of_gains
from lightning_align.lab.evaluation.intervals import Estimate, student, widened
from lightning_align.lab.grid import Cell

Verdict = Literal["supported", "contradicted", "undecided"]
SCALING_FILE = "scaling.json"
FEWEST_SEEDS = 3  # no verdict from fewer
NOT_MEASURED = "not measured"  # in the place of a verdict, where no pair of runs has a number


@dataclass(frozen=True)
class Result:
    """What the runs say of a claim.

    Attributes:
        claim: The claim.
        a: The measure of each run of the first arm, by the labels that tell the pairs apart.
        b: The same of the second; empty without one.
        effect: Mean over pairs of a minus b (of a, without a second arm), with Student's interval over them.
        verdict: See :func:`judge`.
        reason: Why, in a sentence.
        runs: Every run it rests on.
    """

    claim: Claim
    a: Mapping[str, float]
    b: Mapping[str, float]
    effect: Estimate
    verdict: Verdict
    reason: str
    runs: Sequence[Path]

    @property
    def outcome(self) -> str:
        """The verdict, or :data:`NOT_MEASURED` where there was nothing to decide by."""
        return self.verdict if math.isfinite(self.effect.value) else NOT_MEASURED

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        claim = self.claim
        return {
            "name": claim.name,
            "hypothesis": claim.hypothesis,
            "source": claim.source,
            "measure": claim.measure.described,
            "arms": [str(claim.a), *([str(claim.b)] if claim.b else [])],
            "expect": claim.expect,
            "margin": claim.margin,
            "a": dict(self.a),
            "b": dict(self.b),
            "effect": self.effect.as_dict(),
            "verdict": self.outcome,
            "reason": self.reason,
            "runs": [str(run) for run in self.runs],
        }


def assess(claim: Claim, cells: Sequence[Cell]) -> Result:
    """Measure both arms, pair the runs whose other labels are the same, and judge.

    Runs are paired by every label that the claim does not fix, the seed among them: what they share (a start, a reward
    model) then leaves the difference. A gain over the start without a second arm keeps the start's error, which all of
    its runs may share: the interval holds it.
    """
    arms = [_arm(claim.a, cells), _arm(claim.b, cells) if claim.b is not None else None]
    for arm, found in zip((claim.a, claim.b), arms, strict=True):
        if arm is not None and not found:
            stages = dict.fromkeys(cell.stage for cell in cells)
            near = "" if arm.stage in stages else nearest(arm.stage, stages)
            return _result(claim, {}, {}, [], f"no finished run of {arm}{near}")
    first, second = arms[0] or {}, arms[1]
    keys = [key for key in first if second is None or key in second]
    a = {key: measure(first[key].run, claim.measure) for key in keys}
    b = {key: measure(second[key].run, claim.measure) for key in keys} if second is not None else {}
    runs = [first[key].run for key in keys] + ([second[key].run for key in keys] if second is not None else [])
    alone = second is None and claim.measure.kind == GAIN
    return _result(claim, a, b, runs, "", shared=shared_error_of_gains(runs) if alone else 0.0)


def _arm(arm: Arm | None, cells: Sequence[Cell]) -> dict[str, Cell]:
    """Runs of an arm by the labels that it leaves open, in words; without any the one run is called ``run``."""
    if arm is None:
        return {}
    found = {}
    for cell in cells:
        if cell.stage == arm.stage and all(cell.axes.get(axis) == label for axis, label in arm.labels.items()):
            rest = {axis: label for axis, label in cell.axes.items() if axis not in arm.labels}
            found[" ".join(f"{axis}={label}" for axis, label in rest.items()) or "run"] = cell
    return found


def _result(
    claim: Claim, a: dict[str, float], b: dict[str, float], runs: Sequence[Path], problem: str, *, shared: float = 0.0
) -> Result:
    differences = np.array([value - (b[key] if b else 0.0) for key, value in a.items()])
    known = differences[np.isfinite(differences)]
    effect = widened(student(known), shared)
    verdict, reason = judge(effect, claim.expect, claim.margin)
    missing = len(differences) - len(known)
    if problem:
        reason = problem
    elif missing and len(known) < FEWEST_SEEDS:
        reason = f"{missing} of {len(differences)} pairs lack {claim.measure.described}; {reason}"
    return Result(claim, a, b, effect, verdict, reason, runs)


def judge(effect: Estimate, expect: str, margin: float) -> tuple[Verdict, str]:
    """Supported or contradicted by a 95 % interval that leaves no other reading, else undecided.

    Args:
        effect: With its interval.
        expect: ``more`` (above 0), ``less`` (below 0) or ``equal`` (within the margin: two one-sided tests, not the
            absence of a difference).
        margin: Of ``equal``.
    """
    if effect.n < FEWEST_SEEDS:
        return "undecided", f"{effect.n} pair{'s' * (effect.n != 1)} of runs; no verdict from fewer than {FEWEST_SEEDS}"
    low, high = effect.low, effect.high
    if expect == "equal":
        if -margin < low and high < margin:
            return "supported", f"the interval lies within ±{margin:g}"
        if low > margin or high < -margin:
            return "contradicted", f"the interval lies outside ±{margin:g}"
        return "undecided", f"the interval reaches beyond ±{margin:g} and into it"
    if expect == "less":
        low, high = -high, -low
    if low > 0:
        return "supported", f"the interval lies {'above' if expect == 'more' else 'below'} 0"
    if high < 0:
        return "contradicted", f"the interval lies {'below' if expect == 'more' else 'above'} 0"
    return "undecided", "the interval holds 0"


def assess_all(claims: Sequence[Claim], cells: Sequence[Cell], folders: Sequence[Path]) -> list[Result]:
    """Judge all of them; the laws' verdicts come from the ``scaling.json`` of those folders that have one.

    Of several the last that measured a law counts.
    """
    laws: dict[str, dict[str, Any]] = {}
    for folder in folders:
        laws |= {law: row for law, row in _laws(folder).items() if law not in laws or row.get("n")}
    return [from_scaling(claim, laws) if claim.scaling else assess(claim, cells) for claim in claims]


def read_scaling(folder: Path) -> dict[str, dict[str, Any]]:
    """What ``lab scaling`` wrote of each claim; nothing without its file.

    Raises:
        UserError: The file is damaged, or has no number for any claim.
    """
    laws = _laws(folder)
    if laws and not any(row.get("n") for row in laws.values()):
        raise UserError(
            f"{folder / SCALING_FILE} has a number for none of the claims: run lab scaling on the folder of a sweep "
            "with several sizes (docs/scaling.md)"
        )
    return laws


def _laws(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / SCALING_FILE
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
        return {str(row["claim"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run lab scaling again") from error


def from_scaling(claim: Claim, rows: Mapping[str, Mapping[str, Any]]) -> Result:
    """A claim that ``lab scaling`` has judged, from the ``claims`` of its JSON."""
    row = rows.get(str(claim.scaling))
    if row is None:
        return _result(claim, {}, {}, [], f"no scaling.json has {claim.scaling}: run lab scaling on the sweep first")
    value, (low, high) = row["estimate"], row["ci"]
    as_number = [math.nan if end is None else float(end) for end in (value, low, high)]
    effect = Estimate(as_number[0], as_number[1], as_number[2], int(row["n"]))
    runs = [Path(run) for run in row.get("runs", [])]
    return Result(claim, {}, {}, effect, row["verdict"], row["reason"], runs)


def headline(results: Sequence[Result]) -> str:
    """How many of the claims hold here."""
    told = ", ".join(f"{number} {name}" for name, number in counts(results).items() if name != NOT_MEASURED)
    without = counts(results)[NOT_MEASURED]
    return f"{len(results)} claim{'s' * (len(results) != 1)}: {told}" + (
        f"; {without} {NOT_MEASURED}" if without else ""
    )


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many have each outcome."""
    return {name: sum(r.outcome == name for r in results) for name in (*get_args(Verdict), NOT_MEASURED)}
