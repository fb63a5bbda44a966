"""Tables and the figure of `benchmarks.kernels`; ``python -m benchmarks.kernel_report JSON PAGE`` fills a page."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import markdown

HEAD = (
    "op",
    "shape",
    "variant",
    "forward ms",
    "total ms",
    "10–90 %",
    "CPU ms",
    "÷ floor",
    "forward MiB",
    "peak MiB",
    "",
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; variants without a time say why."""
    body = [HEAD]
    for row in rows:
        start = (f"{row['op']} {row['name']}", row["shape"], row["variant"])
        if "ms" not in row:
            body.append((*start, *[""] * 7, f"{row['status']}: {row['why']}"))
            continue
        low, high = row["ms_10_90"]
        numbers = (f"{row['forward_ms']:.3f}", f"{row['ms']:.3f}", f"{low:.3f}–{high:.3f}")
        memory = (
            "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.3f}",
            f"{row['over_floor']:.2f}",
            f"{row['forward_mib']:.1f}",
            f"{row['peak_mib']:.1f}",
        )
        body.append((*start, *numbers, *memory, ""))
    return markdown(body)


def figure(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Time over floor of every variant, one panel for each case; 1 is the floor."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "ms" in row]
    panels = list(dict.fromkeys((row["op"], row["name"], row["shape"]) for row in timed))
    sizes = [sum((row["op"], row["name"], row["shape"]) == panel for row in timed) for panel in panels]
    plot, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.32 * sum(sizes) + 0.75 * len(panels)), height_ratios=sizes, squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        chosen = [row for row in timed if (row["op"], row["name"], row["shape"]) == panel][::-1]
        colours = ["tab:orange" if row["variant"].startswith("ours") else "tab:gray" for row in chosen]
        bars = axis.barh([row["variant"] for row in chosen], [row["over_floor"] for row in chosen], color=colours)
        axis.bar_label(bars, [f" {row['ms']:.3g} ms" for row in chosen], fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(" ".join(panel), fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
    axes[-1, 0].set_xlabel(f"time ÷ floor, on {facts['device']}, {facts['dtype']}", fontsize=8)
    plot.tight_layout()
    plot.savefig(path, dpi=120)
    plt.close(plot)


def fill(page: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """``page`` with the tables of a run between its ``<!-- figures K… -->`` and ``<!-- end -->`` marks."""

    def table_of(mark: re.Match[str]) -> str:
        chosen = [row for row in rows if row["op"] == mark[1]]
        if not chosen:
            return mark[0]
        where = (
            f"{facts['processor']}, {facts['threads']} thread(s), {facts['dtype']}, torch {facts['versions']['torch']}"
        )
        return f"<!-- figures {mark[1]} -->\n{where}:\n\n{table(chosen)}\n<!-- end -->"

    return re.sub(r"<!-- figures (K\d) -->\n.*?<!-- end -->", table_of, page, flags=re.DOTALL)


def main(result: str, page: str) -> None:
    """Puts the figures of the run in the file ``result`` into the file ``page``."""
    found = json.loads(Path(result).read_text())
    Path(page).write_text(fill(Path(page).read_text(), found["rows"], found["machine"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
