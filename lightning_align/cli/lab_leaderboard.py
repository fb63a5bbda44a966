"""``lab leaderboard``: all methods at the same KL and sample budget, in one table."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError

TOLD = {"gold": "true score", "kl": "KL", "win_rate": "win rate"}  # of each method in the terminal


def main(argv: Sequence[str]) -> int:
    """Write ``leaderboard.html``, ``.png``, ``.json`` and ``.csv``."""
    parser = OptionParser("lab leaderboard", "Compare methods at the same KL and sample budget.")
    parser.add_argument("run", nargs="+", type=Path, help="runs, or folders of pipelines; measured by lab frontier")
    parser.add_argument(
        "--kl", type=float, default=math.inf, help="KL budget: the farthest checkpoint within it counts"
    )
    parser.add_argument("--samples", type=float, default=math.inf, help="budget of answers drawn in training")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first of the folders given)")
    options = parser.parse_args(argv)
    for name in ("kl", "samples"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} is {getattr(options, name):g}: give a number above 0")

    from lightning_align.lab.figures import png
    from lightning_align.lab.findings import number
    from lightning_align.lab.leaderboard import (
        BEST_OF_N_NOTE,
        board,
        find_runs,
        headline,
        load_entries,
        note,
        summarise,
        to_csv,
    )
    from lightning_align.lab.leaderboard_page import draw_leaderboard, render
    from lightning_align.lab.summary import to_json

    entries = load_entries(find_runs(options.run), kl=options.kl, samples=options.samples)
    rows = board(entries)
    title = headline(rows, options.kl)
    about = f"{note(entries, options.kl, options.samples)} {BEST_OF_N_NOTE}"
    out = options.out or options.run[0]
    outputs = {
        out / "leaderboard.png": png(draw_leaderboard(rows, title)),
        out / "leaderboard.html": render(rows, entries, title, about).encode(errors="replace"),
        out / "leaderboard.json": to_json(summarise(rows, entries, options.kl, options.samples)).encode(),
        out / "leaderboard.csv": to_csv(entries).encode(),
    }
    write_all(outputs)
    print(title)
    for method, row in rows.items():
        told = [f"{word} {number(row[name].value)}" for name, word in TOLD.items() if name in row]
        told += [f"{row['samples'].value:,.0f} samples"] if "samples" in row else []
        print(f"  {method}: {', '.join(told)}")
    print(f"  {BEST_OF_N_NOTE}")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0
