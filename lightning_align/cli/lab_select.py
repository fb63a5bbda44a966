"""``lab select``: which checkpoint of a run to keep, why, and what each policy would have cost."""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align.cli.lab_files import pair, write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError
from lightning_align.run.directory import METRICS_FILE

if TYPE_CHECKING:
    from lightning_align.lab.regret import Regret
    from lightning_align.lab.runs import Curve
    from lightning_align.lab.select import Choice, KnownPeak

HELDOUT = "heldout"
PREFERRED = {HELDOUT: "heldout_lower", "win_rate": "length_controlled_win_rate"}  # columns that go before


def main(argv: Sequence[str]) -> int:
    """Write ``selection.json``, and of several runs ``regret.png``."""
    options = _options(argv)

    from lightning_align.lab.figures import png
    from lightning_align.lab.regret import as_dict, draw_regret, regrets
    from lightning_align.lab.summary import to_json

    given = _given_peaks(options.fit)
    named = dict(options.columns)
    curves = [_read(run, named) for run in options.run]
    choices = [_choose(run, curve, options, given) for run, curve in zip(options.run, curves, strict=True)]
    if options.export is not None and choices[0].checkpoint is None:
        raise UserError(f"{options.run[0]} has no checkpoint to export: give a run directory that kept some")
    table, silent = regrets(curves, budget=options.budget, given=given)
    _tell_regret(options, curves, table, silent)
    one = options.run[0] if options.run[0].is_dir() else options.run[0].parent
    out = options.out or (one if len(curves) == 1 else Path())
    content = {
        "format": 1,
        "budget": options.budget,
        "fits": [str(file) for file in options.fit],
        "runs": [_row(run, choice) for run, choice in zip(options.run, choices, strict=True)],
        "regret": as_dict(table),
    }
    outputs = {out / "selection.json": to_json(content).encode()}
    if len(curves) > 1 and table:
        outputs[out / "regret.png"] = png(draw_regret(table))
    write_all(outputs)
    print(f"wrote {', '.join(map(str, outputs))}")
    if options.export is not None and choices[0].checkpoint is not None:
        from lightning_align.cli.export import export_checkpoint

        export_checkpoint(options.run[0], choices[0].checkpoint, options.export)
        print(f"wrote {options.export}")
    return 0


def _options(argv: Sequence[str]) -> Namespace:
    parser = OptionParser("lab select", "Name the checkpoint to keep, and why.")
    parser.add_argument("run", type=Path, nargs="+", help="run directories or CSVs; several are seeds of one method")
    parser.add_argument(
        "--policy", choices=("auto", "gold", "heldout", "winrate", "peak", "knee", "budget"), default="auto",
        help="auto: the first of gold, heldout, winrate, peak (with --fit), knee and budget that the run allows",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="KL", help="choose no checkpoint with more KL than this")
    parser.add_argument(
        "--fit", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="overopt.json of earlier runs"
    )
    parser.add_argument(
        "--columns", nargs="+", action="extend", type=pair, default=[], metavar="FIELD=NAME", help="of CSVs"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run; of several the current folder)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write the checkpoint as a Hugging Face model")
    options = parser.parse_args(argv)
    if options.budget is not None and not options.budget > 0:
        raise UserError(f"--budget is {options.budget:g}: give a KL above 0")
    if options.export is not None and len(options.run) > 1:
        raise UserError("--export writes the checkpoint of one run: give one")
    if options.export is not None and options.export.exists():
        raise UserError(f"{options.export} exists: give another --export")
    return options


def _given_peaks(files: Sequence[Path]) -> "list[KnownPeak]":
    """The peaks of ``--fit``; files without one are named."""
    from lightning_align.lab.regret import read_peaks

    given, without = read_peaks(files)
    for file in without:
        print(f"{file} has no peak and is left out")
    if files and not given:
        raise UserError("none of the --fit files has a peak: give others, or leave --fit out")
    return given


def _read(run: Path, named: Mapping[str, str]) -> "Curve":
    """The curve of a run, with the lower bound of held-out rewards and the fairer win rate where it has them."""
    from lightning_align.lab.heldout import TRAINED_METRIC, trained_beside
    from lightning_align.lab.runs import Table, curve_file, load_curve

    if not run.exists():
        return load_curve(run)  # which says so
    file = curve_file(run)
    table = Table.read(file)
    pairs = [pair for key, name in PREFERRED.items() for pair in ((key, name), (f"{key}_se", f"{name}_se"))]
    preferred = {key: name for key, name in pairs if table.count(name) and key.removesuffix("_se") not in named}
    in_training = file.name == METRICS_FILE and run.is_dir() and table.count(TRAINED_METRIC)
    if in_training and trained_beside(load_curve(run)):
        preferred[HELDOUT] = TRAINED_METRIC
    return load_curve(run, columns={**preferred, **named})


def _choose(run: Path, curve: "Curve", options: Namespace, given: "Sequence[KnownPeak]") -> "Choice":
    """The choice for a run, told with what casts doubt on it."""
    from lightning_align.lab.heldout import overlap
    from lightning_align.lab.regret import own_peak, pooled
    from lightning_align.lab.select import automatic, select

    peak = pooled(given)
    if (doubt := overlap(run, curve)) is not None:
        print(f"warning: {run}: {doubt}")
    policy = automatic(curve, peak=peak) if options.policy == "auto" else options.policy
    if policy == "peak" and peak is None:
        peak = own_peak(curve)
    try:
        choice = select(curve, policy, budget=options.budget, peak=peak)
    except ValueError as error:
        within = policy == "knee" and options.policy == "auto" and options.budget is not None
        if not within or all(not point.kl <= options.budget for point in curve.points):
            raise UserError(f"{run}: {error}") from error
        print(f"{run}: {str(error).partition(';')[0]}")
        choice = select(curve, "budget", budget=options.budget)
    print("\n".join([*_told(run, choice), *(f"  {line}" for line in curve.told_left_out())]))
    return choice


def _tell_regret(
    options: Namespace, curves: "Sequence[Curve]", table: "Sequence[Regret]", silent: Mapping[str, str]
) -> None:
    from lightning_align.lab.heldout import judged_by_gold
    from lightning_align.lab.regret import lines

    if not table:
        return
    by_gold = sum(judged_by_gold(run, curve) for run, curve in zip(options.run, curves, strict=True))
    if by_gold:
        print(f"warning: the true score decided who wins in {by_gold} of {len(curves)} runs: winrate is flattered")
    print("regret, gold of the best checkpoint minus gold of the chosen one; only gold has seen gold:")
    if options.budget is not None:
        print(
            f"  (best and last are those of the whole run: what the budget of KL {options.budget:g} costs is counted)"
        )
    print("\n".join(lines(table, silent, len(curves))))


def _told(run: Path, choice: "Choice") -> list[str]:
    said = [
        f"{run}: keep step {choice.point.step} (KL {choice.point.kl:.3g}), by {choice.policy}",
        f"  {choice.reason}",
    ]
    if choice.gold is not None:
        what = "predicted gain of gold" if choice.gain else "gold"
        known = math.isfinite(choice.gold.low) and math.isfinite(choice.gold.high)
        ends = f" ({choice.gold.low:.3f} to {choice.gold.high:.3f})" if known else ""
        said.append(f"  {what}: {choice.gold.estimate:.3f}{ends}")
    if choice.checkpoint is not None:
        exact = choice.checkpoint_step == choice.point.step
        note = "" if exact else f" (the nearest that was kept, of step {choice.checkpoint_step})"
        said.append(f"  checkpoint: {choice.checkpoint}{note}")
    return said


def _row(run: Path, choice: "Choice") -> Mapping[str, Any]:
    gold = choice.gold
    return {
        "run": str(run),
        "policy": choice.policy,
        "step": choice.point.step,
        "kl": choice.point.kl,
        "checkpoint": None if choice.checkpoint is None else str(choice.checkpoint),
        "checkpoint_step": choice.checkpoint_step,
        "gold": None if gold is None else {"value": gold.estimate, "ci": [gold.low, gold.high], "gain": choice.gain},
        "reason": choice.reason,
    }
