"""``lab report``: one page about a run, or about all runs of pipelines."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write ``report.html``: of pipelines a study of all methods, of a run its curve and every metric."""
    parser = OptionParser("lab report", "One page that works offline: of pipelines' folders, or of one run.")
    parser.add_argument("run", nargs="+", type=Path, help="folders of pipelines, or one run")
    parser.add_argument("--kl", type=float, default=math.inf, help="KL budget of the leaderboard")
    parser.add_argument("--claims", type=Path, help="file of claims to judge (docs/claims.md)")
    parser.add_argument("--title", help="heading of the page (default: the folder's name)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first one given)")
    options = parser.parse_args(argv)
    if not options.kl > 0:
        raise UserError(f"--kl is {options.kl:g}: give a number above 0")
    out = (options.out or options.run[0]) / "report.html"

    from lightning_align.lab.claims_file import read_claims
    from lightning_align.run.directory import is_run

    for place in options.run:
        if not place.is_dir():
            raise UserError(f"there is no folder {place}: give a run, or folders of pipelines")
    if options.claims is not None:
        read_claims(options.claims)  # refused before the long work

    single = next((place for place in options.run if is_run(place)), None)
    if single is not None:
        if len(options.run) > 1 or options.claims is not None:
            raise UserError(
                f"{single} is a run: a report is of one run alone, or of folders of pipelines, where --claims may stand"
            )
        text, told = _run(options.run[0], options.title)
    else:
        text, told = _study(options.run, options.kl, options.claims, options.title)
    write_all({out: text.encode(errors="replace")})
    print("\n".join([*told, f"wrote {out}"]))
    return 0


def _study(folders: Sequence[Path], kl: float, claims: Path | None, title: str | None) -> tuple[str, list[str]]:
    from lightning_align.lab.study import load_study, parts
    from lightning_align.lab.study_page import render_study

    found = parts(load_study(folders), kl=kl, claims=claims)
    name = title or ", ".join(folder.resolve().name for folder in folders)
    return render_study(name, found), [f"{part.name}: {part.headline}" for part in found]


def _run(run: Path, title: str | None) -> tuple[str, list[str]]:
    from lightning_align.lab.study_page import render_run

    text, headline = render_run(run, title)
    return text, [headline]
