"""The part of a study that says when to stop: what each policy gives away, and which checkpoints it keeps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import cast

import numpy as np

from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import Estimate, student
from lightning_align.lab.findings import kl_text, number
from lightning_align.lab.grid import SEED, Cell
from lightning_align.lab.heldout import judged_by_gold
from lightning_align.lab.page import table
from lightning_align.lab.regret import LAST, Regret, blind, own_peak, pooled, regrets
from lightning_align.lab.runs import Curve
from lightning_align.lab.select import KnownPeak, Policy, select

NEEDS = {  # of a policy that could choose nowhere; budget is not of this page
    "heldout": "no held-out reward was measured (lab frontier --recompute --heldout)",
    "winrate": "no win rate was measured (lab frontier --recompute)",
    "peak": "no other run of the same method has a fitted peak",
    "knee": "the reward of no run has a knee",
}


def stopping(curves: Mapping[str, Sequence[tuple[Cell, Curve]]]) -> tuple[str, list[str]]:
    """What each policy for stopping gives away, over all runs with a true score, and the checkpoints that they keep.

    Args:
        curves: Runs with a true score, by method.

    Returns:
        A headline, and HTML.

    Raises:
        UserError: No policy could choose anywhere.
    """
    found = _regrets([[curve for _, curve in own] for own in curves.values()])
    if not found:
        raise UserError("no policy could choose a checkpoint of any run: lab select RUN says why")
    ranked = sorted(found, key=lambda row: row.mean.value)
    rows = [[escape(row.policy), number(row.mean.value, 3), _ends(row.mean), str(len(row.values))] for row in ranked]
    most = max(len(row.values) for row in found)
    seen = any(judged_by_gold(cell.run, curve) for own in curves.values() for cell, curve in own)
    sightless = [row for row in ranked if row.policy != "gold" and not (seen and row.policy == "winrate")]
    least, *others = _comparable(sightless, most)
    head = ["policy", "mean regret", "95 % interval", "runs"]
    caption = "Regret: highest true score of a run minus that of the checkpoint that the policy keeps"
    there = {row.policy for row in found}
    about = "gold is judged by the scores it chose by, and flattered. last keeps what training ended with."
    if "peak" in there:
        about += " peak is where the true score of the method's other runs was fitted to be highest."
    if any(len(row.values) < most for row in found):
        about += (
            " A policy with fewer runs could not choose in the others; policies are compared in the runs in which all "
            "of them could, if those are half or more."
        )
    about += " One is clear of another where the 95 % interval of their difference, run by run, is above 0."
    about += " The true score decided who wins: winrate is flattered, too." if seen else ""
    absent = {policy: why for policy, why in NEEDS.items() if policy not in there}
    about += "".join(f" {policy} is not here: {why}." for policy, why in absent.items())
    html = [table(caption, head, rows), f'<p class="note">{escape(about)}</p>', *_kept(curves, least.policy)]
    return _told(least, others, most), html


def _comparable(rows: Sequence[Regret], runs: int) -> list[Regret]:
    """Policies in the runs in which all of them chose, the best first: as many as leave half of the runs."""
    chosen: list[Regret] = []
    shared: set[int] = set()
    for row in sorted(rows, key=lambda row: -len(row.values)):
        common = shared & set(row.values) if chosen else set(row.values)
        if 2 * len(common) >= runs:
            chosen.append(row)
            shared = common
    alike = [{run: row.values[run] for run in sorted(shared)} for row in chosen]
    same = [Regret(row.policy, own, _mean(own), {}) for row, own in zip(chosen, alike, strict=True)]
    return sorted(same, key=lambda row: row.mean.value)


def _mean(values: Mapping[int, float]) -> Estimate:
    return student(np.array(list(values.values())))


def _told(least: Regret, others: Sequence[Regret], runs: int) -> str:
    """Which policy gives away least, of those that see no true score of the run, and which are not told from it."""
    count = len(least.values)
    where = (
        f"{count} runs" if count == runs else f"the {count} of {runs} runs in which all that are compared could choose"
    )
    average = f"{number(least.mean.value)}{f' on average over {where}' if runs > 1 else ' in one run'}"
    if not others:
        return f"without its own true score only {least.policy} could choose: it gives away {average}"
    near = [row.policy for row in others if not _difference(row, least).low > 0]
    unclear = f"; not clear of {' and '.join(near)}" if near else f"; clear of {' and '.join(r.policy for r in others)}"
    return f"without its own true score {least.policy} gives away least, {average}{unclear}"


def _difference(more: Regret, less: Regret) -> Estimate:
    """Of two policies that chose in the same runs, run by run."""
    return _mean({run: value - less.values[run] for run, value in more.values.items()})


def _regrets(methods: Sequence[Sequence[Curve]]) -> list[Regret]:
    """Of every policy over all runs; fits are those of other runs of the same method, and not of other methods."""
    values: dict[str, dict[int, float]] = {}
    start = 0
    for own in methods:
        for row in regrets(own)[0]:
            values.setdefault(row.policy, {}).update({start + n: value for n, value in row.values.items()})
        start += len(own)
    return [Regret(policy, own, _mean(own), {}) for policy, own in values.items()]


def _kept(curves: Mapping[str, Sequence[tuple[Cell, Curve]]], policy: str) -> list[str]:
    """The checkpoint of each run to keep, by the true score and by a policy that does not see it."""
    rows = []
    for method, own in curves.items():
        fitted = [own_peak(curve) for _, curve in own] if policy == "peak" else []
        for index, (cell, curve) in enumerate(own):
            peak = pooled([fit for other, fit in enumerate(fitted) if other != index and fit is not None])
            scored = replace(curve, points=[point for point in curve.points if math.isfinite(point.gold)])
            rows.append(
                [escape(_name(method, cell)), *_choice(scored, "gold", None), *_choice(blind(scored), policy, peak)]
            )
    head = ["run", "step by true score", "KL", f"step by {escape(policy)}", "KL"]
    caption = (
        f"Checkpoints to keep: by the true score (gold), and by the rule that gave away least without it ({policy})"
    )
    told = "gold: the smallest KL within one standard error of the best. lab select RUN --export FOLDER writes it out."
    return [table(caption, head, rows), f'<p class="note">{escape(told)}</p>']


def _name(method: str, cell: Cell) -> str:
    return f"{method} {SEED}={cell.axes[SEED]}" if SEED in cell.axes else method


def _choice(curve: Curve, rule: str, peak: KnownPeak | None) -> tuple[str, str]:
    """Step and KL of what a rule keeps of a run."""
    if rule == LAST:
        point, kept = max(curve.points, key=lambda point: point.step), None
    else:
        try:
            choice = select(curve, cast(Policy, rule), peak=peak)
        except ValueError:  # nothing to choose by in this run
            return "–", "–"
        point, kept = choice.point, choice.checkpoint_step
    file = "" if kept in (None, point.step) else f"<br><small>nearest file: step {kept}</small>"
    return f"{point.step}{file}", kl_text(point.kl)


def _ends(estimate: Estimate) -> str:
    return f"{number(estimate.low, 3)} to {number(estimate.high, 3)}" if math.isfinite(estimate.low) else "–"
