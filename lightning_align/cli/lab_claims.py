"""``lab claims``: what the runs of sweeps say of claims, each with a verdict."""

from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import write_all
from lightning_align.cli.options import OptionParser


def main(argv: Sequence[str]) -> int:
    """Write ``claims.json`` and ``claims.png``; a claim whose runs are not there was not measured, and says so."""
    parser = OptionParser("lab claims", "Judge claims by the runs of pipelines with a seed axis.")
    parser.add_argument("run", nargs="+", type=Path, help="folders of pipelines whose runs count")
    parser.add_argument("--claims", type=Path, required=True, help="file of claims (docs/claims.md)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first of the pipelines')")
    options = parser.parse_args(argv)

    from lightning_align.lab.claims import assess_all, counts, headline
    from lightning_align.lab.claims_figure import draw_claims, told
    from lightning_align.lab.claims_file import read_claims
    from lightning_align.lab.figures import png
    from lightning_align.lab.grid import load_grid
    from lightning_align.lab.summary import to_json

    claims = read_claims(options.claims)
    cells = [cell for folder in options.run for cell in load_grid(folder)]
    results = assess_all(claims, cells, options.run)
    out = options.out or options.run[0]
    outputs = {
        out / "claims.json": to_json(
            {"format": 1, "counts": counts(results), "claims": [result.as_dict() for result in results]}
        ).encode(),
        out / "claims.png": png(draw_claims(results)),
    }
    write_all(outputs)
    print(headline(results))
    for result in results:
        print(f"  {result.claim.name}: {told(result)}; {result.reason}")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0
