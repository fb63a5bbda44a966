"""``lab scaling``: laws and claims of a sweep over reward-model sizes, data and policy sizes."""

from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import write_all
from lightning_align.cli.options import OptionParser


def main(argv: Sequence[str]) -> int:
    """Write ``scaling.json``, ``scaling.csv`` and a picture for each sweep that is there."""
    parser = OptionParser("lab scaling", "Fit over-optimisation laws of a sweep, and judge the claims about them.")
    parser.add_argument("run", type=Path, metavar="FOLDER", help="of a pipeline with axes, or a CSV (docs/scaling.md)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the pipeline's, or that of the CSV)")
    options = parser.parse_args(argv)

    from lightning_align.lab.figures import png
    from lightning_align.lab.scaling import fit_laws, missing_cells, without_law
    from lightning_align.lab.scaling_claims import STATEMENTS, assess
    from lightning_align.lab.scaling_figures import draw
    from lightning_align.lab.scaling_runs import read_sweep
    from lightning_align.lab.scaling_words import summarise, to_csv, told
    from lightning_align.lab.summary import to_json

    runs, left_out = read_sweep(options.run)
    laws = fit_laws(runs)
    left_out += without_law(runs)
    findings = assess(laws)
    out = options.out or (options.run.parent if options.run.is_file() else options.run)
    outputs = {
        out / "scaling.json": to_json(summarise(laws, findings, left_out)).encode(),
        out / "scaling.csv": to_csv(laws).encode(),
        **{out / f"scaling_{name}.png": png(figure) for name, figure in draw(laws, findings).items()},
    }
    write_all(outputs)
    censored = sum(law.censored is not None for law in laws)
    print(f"{len(laws)} run{'s' * (len(laws) != 1)}, {censored} with a censored peak")
    for reason in left_out:
        print(f"  left out: {reason}")
    for cell in missing_cells(laws):
        print(f"  missing: {cell}")
    for finding in findings:
        print(f"  {finding.claim} {STATEMENTS[finding.claim]}: {finding.verdict} ({told(finding)}); {finding.reason}")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0
