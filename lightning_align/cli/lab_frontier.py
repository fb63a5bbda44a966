"""``lab frontier``: several runs and methods over KL and over samples."""

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_align.cli.lab_files import pair, write_all
from lightning_align.cli.options import OptionParser
from lightning_align.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write ``frontier.png``, ``.json`` and ``.csv``; runs whose folders have one name are seeds of one method."""
    parser = OptionParser("lab frontier", "Draw the true score of several runs over KL and over samples, and compare.")
    parser.add_argument("run", type=Path, help="run directory, or a CSV with columns step, kl, proxy, gold")
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="RUN", help="another; may be given several times"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (default: the current one)")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="FIELD=NAME", help="columns of CSVs, such as gold=judge"
    )
    parser.add_argument("--kl", type=float, help="KL to compare at, in nats (default: the largest that all reach)")
    parser.add_argument("--samples", type=float, help="also compare after so many answers of the policy")
    options = parser.parse_args(argv)
    for name in ("kl", "samples"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value:g}: give a number above 0")

    from lightning_align.lab.figures import png
    from lightning_align.lab.frontier import (
        common_kl,
        draw_frontier,
        headline,
        lines,
        load_tracks,
        summarise,
        to_csv,
    )

    columns = dict(pair(word) for word in options.columns)
    tracks = load_tracks([options.run, *options.against], columns=columns)
    summary = summarise(tracks, common_kl(tracks) if options.kl is None else options.kl, options.samples)
    outputs = {
        options.out / "frontier.png": png(draw_frontier(tracks, summary)),
        options.out / "frontier.json": json.dumps(summary, indent=2).encode(),
        options.out / "frontier.csv": to_csv(tracks).encode(),
    }
    write_all(outputs)
    print("\n".join([headline(summary), *lines(summary), f"wrote {', '.join(map(str, outputs))}"]))
    return 0
