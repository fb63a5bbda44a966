"""What the frontier of several runs says, in words and as a table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_align.lab.findings import kl_text
from lightning_align.lab.frontier import front
from lightning_align.lab.frontier_tracks import Track

COLUMNS = ("kl_se", "proxy", "proxy_se", "gold", "gold_se", "heldout", "heldout_se", "win_rate", "win_rate_se")
WORDS = {"heldout": "held-out score", "win_rate": "win rate", "proxy": "reward"}  # in the place of the true score
FIELDS = ("method", "run", "step", "samples", "kl", *COLUMNS, "pareto")


def headline(summary: Mapping[str, Any]) -> str:
    """Which methods gain at the common KL, and which of them the most; what was gained, if it is not the true score."""
    rows, at = summary["methods"], f"At KL {kl_text(summary['kl'])}"
    if not any(row["best"]["gain"]["n"] for row in rows.values()):
        return "No run has a second checkpoint: one point says nothing of a gain"
    known = {name: row["at_kl"] for name, row in rows.items() if row["at_kl"]["n"]}
    if not known:
        return f"No method reaches KL {kl_text(summary['kl'])}"
    first = max(known, key=lambda name: known[name]["value"])
    word = WORDS.get(summary["score"])
    without = "" if word is None else "; no true score was found"
    if len(known) == 1:
        what = first if word is None else f"the {word} of {first}"
        return f"{at} {what} is {known[first]['value']:+.2f} from its start{without}"
    sure = sum(row["ci"][0] > 0 for row in known.values())
    most = "most" if word is None else f"most {word}"
    return (
        f"{at} {first} gains {most}, {known[first]['value']:+.2f}; the 95 % interval of "
        f"{sure} of {len(known)} methods is above 0{without}"
    )


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each method."""
    told = []
    word = WORDS.get(summary["score"])
    gained = "" if word is None else f"{word} "
    for name, row in summary["methods"].items():
        at_kl, top = row["at_kl"], row["best"]
        text = f"  {name} ({row['runs']} run{'s' * (row['runs'] != 1)}): "
        if top["gain"]["n"]:
            text += f"{gained}at KL {kl_text(summary['kl'])} {told_gain(at_kl)}"
            if "at_samples" in row:
                text += f"; at {summary['samples']:,.0f} samples {told_gain(row['at_samples'])}"
            drawn = "" if math.isnan(top["samples"]) else f" after {top['samples']:,.0f} samples"
            text += f"; at best {top['gain']['value']:+.3f} at KL {top['kl']:.2f}{drawn}"
        else:
            text += f"one point, {word or 'true score'} {top[summary['score']]:.3f} at KL {top['kl']:.2f}"
        if "win_rate_there" in top:
            text += f", where it wins {top['win_rate_there']['value']:.0%}"
        told.append(text)
    return told


def told_gain(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """A gain with its interval."""
    if not estimate["n"]:
        return "not reached"
    low, high = estimate["ci"]
    ends = "" if low != low else f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{estimate['value']:+.{digits}f}{ends}"


def to_csv(tracks: Sequence[Track]) -> str:
    """Every point; ``pareto`` is 1 for those that no other beats."""
    kept = {(id(track), point.step) for track, point in front(tracks)}
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(FIELDS)
    for track in tracks:
        for point, drawn in zip(track.points, track.samples, strict=True):
            cells = (point.step, drawn, point.kl, *(getattr(point, name) for name in COLUMNS))
            on_front = int((id(track), point.step) in kept)
            writer.writerow([track.method, track.run, *("" if cell != cell else cell for cell in cells), on_front])
    return out.getvalue()
