"""The part of a study that says when to stop: what each policy gives away, and which checkpoints it keeps."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import cast

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.findings import number
from lightning_align.lab.grid import Cell
from lightning_align.lab.heldout import judged_by_gold
from lightning_align.lab.page import table
from lightning_align.lab.regret import LAST, Regret, blind, regrets
from lightning_align.lab.runs import Curve, Point
from lightning_align.lab.select import Policy, select


def stopping(curves: Mapping[str, Sequence[tuple[Cell, Curve]]]) -> tuple[str, list[str]]:
    """What each policy for stopping gives away, over all runs with a true score, and the checkpoints that they keep.

    Args:
        curves: Runs with a true score, by method.

    Returns:
        A headline, and HTML.

    Raises:
        UserError: No policy could choose anywhere.
    """
    found, silent = _regrets([[curve for _, curve in own] for own in curves.values()])
    if not found:
        raise UserError("no policy could choose a checkpoint of any run: lab select RUN says why")
    ranked = sorted(found, key=lambda row: row.mean.value)
    rows = [[escape(row.policy), number(row.mean.value, 3), _ends(row.mean), str(len(row.values))] for row in ranked]
    most = max(len(row.values) for row in found)
    seen = any(judged_by_gold(cell.run, curve) for own in curves.values() for cell, curve in own)
    sightless = [row for row in ranked if row.policy != "gold" and not (seen and row.policy == "winrate")]
    usual = [row for row in sightless if len(row.values) == most]  # the same runs for all of them
    least, *others = usual
    told = f"without its own true score {least.policy} gives away least, {number(least.mean.value)} on average"
    near = [row.policy for row in others if not row.mean.low > least.mean.value]
    told += f", not clear of {', '.join(near)}" if near else ""
    head = ["policy", "mean regret", "95 % interval", "runs"]
    caption = "Regret: highest true score of a run minus that of the checkpoint that the policy keeps"
    note = "".join(f" {policy}: {reason}." for policy, reason in silent.items() if policy != "budget")
    about = (
        "gold is judged by the scores it chose by, and flattered. last keeps what training ended with. peak is where "
        "the true score of other seeds of the method was fitted to be highest. A policy with fewer runs could not "
        "choose in the others." + (" The true score decided who wins: winrate is flattered, too." if seen else "")
    )
    kept = _kept([curve for own in curves.values() for _, curve in own], least.policy)
    return told, [table(caption, head, rows), f'<p class="note">{escape(about + note)}</p>', kept]


def _regrets(methods: Sequence[Sequence[Curve]]) -> tuple[list[Regret], dict[str, str]]:
    """Of every policy over all runs; fits are those of other seeds of the same method, and not of other methods."""
    values: dict[str, dict[int, float]] = {}
    silent: dict[str, str] = {}
    start = 0
    for own in methods:
        table_of, why = regrets(own)
        silent = {**why, **silent}
        for row in table_of:
            values.setdefault(row.policy, {}).update({start + n: value for n, value in row.values.items()})
        start += len(own)
    found = [Regret(policy, own, student(np.array(list(own.values()))), {}) for policy, own in values.items()]
    return found, {policy: why for policy, why in silent.items() if policy not in values}


def _kept(curves: Sequence[Curve], policy: str) -> str:
    """The checkpoint of each run to keep, by the true score and by a policy that does not see it."""
    rows = []
    for curve in curves:
        row = [escape(curve.name)]
        for rule, seen in (("gold", curve), (policy, blind(curve))):
            point = _chosen(seen, rule)
            row += ["–", "–"] if point is None else [str(point.step), number(point.kl)]
        rows.append(row)
    head = ["run", "step by true score", "KL", f"step by {escape(policy)}", "KL"]
    return table("Checkpoints to keep", head, rows)


def _chosen(curve: Curve, rule: str) -> Point | None:
    if rule == LAST:
        return max(curve.points, key=lambda point: point.step)
    try:
        return select(curve, cast(Policy, rule)).point
    except ValueError:
        return None


def _ends(estimate: Estimate) -> str:
    return f"{number(estimate.low, 3)} to {number(estimate.high, 3)}" if math.isfinite(estimate.low) else "–"
