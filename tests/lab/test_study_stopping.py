"""When to stop: policies are compared on the same runs, and fits stay with their method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_align.lab.grid import Cell
from lightning_align.lab.runs import Curve
from lightning_align.lab.study_stopping import stopping

MakeCurve = Callable[..., Curve]
Curves = dict[str, list[tuple[Cell, Curve]]]


@pytest.fixture
def runs(make_curve: MakeCurve, law: Callable[..., Any]) -> Callable[..., list[tuple[Cell, Curve]]]:
    """Seeds of a method whose gold rises and falls; without a knee in the reward of those that are named."""

    def make(
        method: str, seeds: Sequence[int], straight: Sequence[int] = (), noise: float = 0.02
    ) -> list[tuple[Cell, Curve]]:
        found = []
        for seed in seeds:
            curve = make_curve(lambda d: law(d, 0.55, 0.35), noise=noise, seed=seed)
            bend = [replace(point, proxy=point.d if seed in straight else math.sqrt(point.d)) for point in curve.points]
            cell = Cell(method, {"seed": str(seed)}, Path(method) / f"seed={seed}", 1.0)
            found.append((cell, replace(curve, points=bend)))
        return found

    return make


def _rows(html: str) -> dict[str, list[str]]:
    """Cells by the first of their row."""
    lines = html.split("<tbody>")[1].split("</tr>")
    rows = [[cell.split(">", 1)[1].split("</td>")[0] for cell in line.split("<td")[1:]] for line in lines]
    return {row[0]: row[1:] for row in rows if row}


def test_a_fit_of_another_method_says_nothing(runs: Callable[..., Any]) -> None:
    _, (table, note, *_) = stopping({"ppo": runs("ppo", [0]), "dpo": runs("dpo", [1])})
    assert "peak" not in _rows(table)
    assert "peak is not here: no other run of the same method has a fitted peak" in note
    _, (table, note, *_) = stopping({"ppo": runs("ppo", [0, 1])})
    assert _rows(table)["peak"][-1] == "2"
    assert "peak is not here" not in note


def test_policies_are_compared_on_the_same_runs(runs: Callable[..., Any]) -> None:
    """In one of three runs there is no knee: the mean of last is not that of all of its runs."""
    own: Curves = {"ppo": runs("ppo", [0, 1]), "dpo": runs("dpo", [2], straight=[2])}
    headline, (table, note, kept, _) = stopping(own)
    rows = _rows(table)
    assert (rows["knee"][-1], rows["last"][-1]) == ("2", "3")
    assert "on average over the 2 of 3 runs in which all that are compared could choose" in headline
    assert "policies are compared in the runs in which all of them could" in note
    assert _rows(kept)["dpo seed=2"][2:] == ["–", "–"]


def test_a_policy_of_few_runs_is_not_compared(runs: Callable[..., Any]) -> None:
    """A knee in one run of four would leave one run to compare in."""
    headline, (table, *_) = stopping({"ppo": runs("ppo", [0, 1, 2, 3], straight=[1, 2, 3])})
    rows = _rows(table)
    assert (rows["knee"][-1], rows["peak"][-1], rows["last"][-1]) == ("1", "4", "4")
    assert "peak gives away least" in headline
    assert "on average over 4 runs; clear of last" in headline
    assert "knee" not in headline


def test_no_option_of_another_command_is_asked_for(runs: Callable[..., Any]) -> None:
    _, html = stopping({"ppo": runs("ppo", [0], straight=[0])})
    for option in ("--fit", "--budget", "--columns"):
        assert option not in "".join(html)
    assert "budget" not in "".join(html)
    assert "knee is not here: the reward of no run has a knee" in html[1]


def test_clear_is_what_the_differences_of_the_runs_say(runs: Callable[..., Any]) -> None:
    headline, (table, *_) = stopping({"ppo": runs("ppo", [0, 1, 2, 3])})
    best = min((row for row in _rows(table).items() if row[0] != "gold"), key=lambda item: float(item[1][0]))
    assert headline.startswith(f"without its own true score {best[0]} gives away least, ")
    assert "on average over 4 runs" in headline
    assert "last" in headline.split("; clear of")[1]  # it is worse in every run
    headline, (table, *_) = stopping({"ppo": runs("ppo", [0, 1, 2, 3], noise=0.05)})
    assert "peak gives away least" in headline
    assert "; clear of knee and last" in headline
    assert _rows(table)["knee"][1].startswith("−")  # the mean's own interval holds 0: the runs differ, not the rules
    one, _ = stopping({"ppo": runs("ppo", [0])})
    assert "in one run; not clear of last" in one  # a single run clears nothing


def test_the_checkpoints_to_keep_are_named(runs: Callable[..., Any]) -> None:
    own: Curves = {"ppo": runs("ppo", [0]), "dpo": runs("dpo", [2])}
    headline, (*_, kept, note) = stopping(own)
    rule = headline.split("score ")[1].split()[0]
    assert f"step by {rule}" in kept
    rows = _rows(kept)
    assert list(rows) == ["ppo seed=0", "dpo seed=2"]
    for (_, curve), (step, kl, step_too, kl_too) in zip(
        [pair for pairs in own.values() for pair in pairs], rows.values(), strict=True
    ):
        by_step = {point.step: point for point in curve.points}
        assert by_step[int(step)].kl == pytest.approx(float(kl), rel=0.05, abs=0.01)
        assert by_step[int(step_too)].kl == pytest.approx(float(kl_too), rel=0.05, abs=0.01)
        assert by_step[int(step)].gold > max(point.gold for point in curve.points) - 0.1
    assert "--export" in note


def test_the_peak_keeps_checkpoints_too(runs: Callable[..., Any]) -> None:
    """Where no reward has a knee, the other seeds' peak is the best way."""
    headline, (*_, kept, _) = stopping({"ppo": runs("ppo", [0, 1, 2], straight=[0, 1, 2])})
    assert "score peak gives away least" in headline
    assert all(abs(float(row[3]) - 3.1) < 1.5 for row in _rows(kept).values())
