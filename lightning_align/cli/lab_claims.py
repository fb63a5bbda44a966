"""``lab claims``: what the runs of sweeps say of claims, each with a verdict."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_align.cli.lab_files import write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

SCALING_FILE = "scaling.json"


def main(argv: Sequence[str]) -> int:
    """Write ``claims.json`` and ``claims.png``; a claim whose runs are not there is undecided, and says so."""
    parser = OptionParser("lab claims", "Judge claims by the runs of pipelines with a seed axis.")
    parser.add_argument("run", nargs="+", type=Path, help="folders of pipelines whose runs count")
    parser.add_argument("--claims", type=Path, required=True, help="file of claims (docs/claims.md)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first of the pipelines')")
    options = parser.parse_args(argv)

    from lightning_align.lab.claims import assess, from_scaling, headline
    from lightning_align.lab.claims_figure import draw_claims, told
    from lightning_align.lab.claims_file import read_claims
    from lightning_align.lab.figures import png
    from lightning_align.lab.grid import load_grid
    from lightning_align.lab.summary import to_json

    claims = read_claims(options.claims)
    cells = [cell for folder in options.run for cell in load_grid(folder)]
    scaling: dict[str, dict[str, Any]] = {}
    for folder in options.run:
        if (folder / SCALING_FILE).is_file():
            scaling |= _scaling(folder / SCALING_FILE)
    results = [from_scaling(claim, scaling) if claim.scaling else assess(claim, cells) for claim in claims]
    out = options.out or options.run[0]
    outputs = {
        out / "claims.json": to_json({"format": 1, "claims": [result.as_dict() for result in results]}).encode(),
        out / "claims.png": png(draw_claims(results)),
    }
    write_all(outputs)
    print(headline(results))
    for result in results:
        print(f"  {result.claim.name}: {result.verdict} ({told(result)}); {result.reason}")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0


def _scaling(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
        return {str(row["claim"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run lab scaling again") from error
