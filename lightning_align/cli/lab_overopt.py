"""``lab overopt``: proxy and gold over KL, the fitted law, the checkpoint to keep."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.cli.lab_files import pair, write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

if TYPE_CHECKING:
    from lightning_align.lab.runs import Curve


def main(argv: Sequence[str]) -> int:
    """Write ``overopt.png``, ``.html`` and ``.json``; everything is computed before the first file is written."""
    parser = OptionParser(
        "lab overopt", "Draw reward and true score over KL, fit the law of over-optimisation, choose."
    )
    parser.add_argument(
        "run", nargs="+", type=Path, metavar="RUN",
        help="run directory, or a CSV with columns step, kl, proxy, gold; several are seeds of one method",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run, or the folder of the CSV)")
    parser.add_argument("--report", type=Path, help="file for the page (default: overopt.html beside the picture)")
    parser.add_argument("--form", choices=("rl", "bon"), default="rl", help="rl: d(α − β ln d); bon: d(α − β d)")
    parser.add_argument(
        "--intercept", choices=("fixed", "free"), default="fixed",
        help="free: fit the true score at the start instead of using the measured one (always, if none was measured)",
    )  # fmt: skip
    parser.add_argument(
        "--source", choices=("auto", "measured", "eval", "train", "plain", "trl"), default="auto",
        help="measured: a run's measured.csv; eval: eval/lab/…; train: lab/…; plain: kl, proxy, gold; "
        "trl: objective/… (default: the first there is)",
    )  # fmt: skip
    parser.add_argument(
        "--columns", nargs="+", type=pair, default=[], metavar="FIELD=NAME",
        help="columns of a CSV, such as kl=objective/kl",
    )  # fmt: skip
    parser.add_argument("--aspects", action="store_true", help="also draw helpfulness and safety over KL (aspects.png)")
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="RUN",
        help="another run to draw the aspects of beside this one's; may be given several times",
    )  # fmt: skip
    options = parser.parse_args(argv)
    columns = dict(options.columns)
    if options.source != "auto" and set(columns) - {"step"}:
        raise UserError("--source and --columns contradict each other: give one of them")

    from lightning_align.lab.analysis import analyse
    from lightning_align.lab.figures import draw, png
    from lightning_align.lab.findings import conclude
    from lightning_align.lab.overopt_page import render
    from lightning_align.lab.runs import load_curve
    from lightning_align.lab.summary import summarise, to_json

    run = options.run[0]
    out = options.out or (run if run.is_dir() else run.parent)
    curves = [load_curve(each, source=options.source, columns=columns) for each in options.run]
    if len(curves) > 1:
        if options.report or options.aspects or options.against:
            raise UserError("--report, --aspects and --against are for one run: give one, or leave them out")
        return _seeds(options, curves, out)
    analysis = analyse(curves[0], form=options.form, free_start=options.intercept == "free")
    finding = conclude(analysis)
    outputs = {
        out / "overopt.png": png(draw(analysis, finding)),
        options.report or out / "overopt.html": render(analysis, finding).encode(errors="replace"),
        out / "overopt.json": to_json(summarise(analysis, finding, run)).encode(),
    }
    runs = [run, *options.against]
    lines, more = aspects(runs, out) if options.aspects or options.against else ([], {})
    outputs |= more
    write_all(outputs)
    print(finding.headline)
    for sentence in (*finding.sentences, _told_source(curves[0]), *curves[0].told_left_out()):
        print(f"  {sentence}")
    if analysis.choice is not None and analysis.choice.checkpoint is not None:
        print(f"  checkpoint: {analysis.choice.checkpoint}")
    for line in lines:
        print(line)
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0


def _seeds(options: Namespace, curves: "Sequence[Curve]", out: Path) -> int:
    """Several runs of one method: ``overopt.png`` and ``.json``."""
    from lightning_align.lab.figures import png
    from lightning_align.lab.seeds import analyse_seeds, draw_seeds, headline, sentences, unlike
    from lightning_align.lab.summary import summarise_seeds, to_json

    if len({run.resolve() for run in options.run}) < len(options.run):
        raise UserError("a run is given twice: a run is one seed, give it once")
    for warning in unlike(curves):
        print(f"warning: {warning}")
    seeds = analyse_seeds(curves, form=options.form, free_start=options.intercept == "free")
    outputs = {
        out / "overopt.png": png(draw_seeds(seeds)),
        out / "overopt.json": to_json(summarise_seeds(seeds, options.run)).encode(),
    }
    write_all(outputs)
    read = [
        f"{run}: {line}"
        for run, curve in zip(options.run, curves, strict=True)
        for line in (_told_source(curve), *curve.told_left_out())
    ]
    print("\n".join([headline(seeds), *(f"  {told}" for told in (*sentences(seeds), *read))]))
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0


def _told_source(curve: "Curve") -> str:
    """Which numbers the points are."""
    return f"points read: {len(curve.points)} ({curve.description}, {curve.file})"


def aspects(runs: Sequence[Path], out: Path) -> tuple[list[str], dict[Path, bytes]]:
    """What helpfulness and safety do over KL in each run: lines to print, and files to write."""
    from lightning_align.lab.aspects import common_kl, draw_aspects, headline, load_policies, table
    from lightning_align.lab.figures import png

    policies = load_policies(runs)
    rows = table(policies)
    lines = [headline(policies)]
    for name, row in rows.items():
        lines.append(f"  {name}: " + ", ".join(f"{aspect} {_score(value)}" for aspect, value in row.items()))
    content = {"kl": common_kl(policies), "policies": rows}
    files = {
        out / "aspects.png": png(draw_aspects(policies)),
        out / "aspects.json": json.dumps(content, indent=2).encode(),
    }
    return lines, files


def _score(value: Mapping[str, float | None]) -> str:
    ends = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['score']:.3f}{ends}"
