"""What the benchmarks share: the machine, where results go, and how variants are timed."""

import csv
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_align.run.environment import git_commit, hardware, versions

RESULTS = Path(__file__).parent / "results"


def device_name(device: str = "cpu") -> str:
    """What the hardware is called in paths, such as ``cpu-2-core`` or ``nvidia-h100-80gb-hbm3``."""
    if device == "cpu":
        return f"cpu-{hardware()['cpu_cores']}-core"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def result_folder(device: str = "cpu") -> Path:
    """The folder for this machine's results."""
    folder = RESULTS / device_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> dict[str, Any]:
    """Hardware, versions, commit, and how busy the machine was."""
    return hardware() | {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Timing:
    """Repeated measurements of one variant: wall and CPU seconds, and units of work done, a run each."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    work: list[int] = field(default_factory=list)

    def add(self, wall: float, cpu: float, work: int) -> None:
        """Note one run."""
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.work.append(work)

    def rates(self, clock: Literal["wall", "cpu"] = "wall") -> list[float]:
        """Units a second of each run. CPU seconds are what other processes on the machine disturb less."""
        return [work / spent for work, spent in zip(self.work, getattr(self, clock), strict=True)]

    @property
    def rate(self) -> float:
        """Median of units a wall second."""
        return statistics.median(self.rates())

    @property
    def spread(self) -> tuple[float, float]:
        """10 % and 90 % quantile of units a wall second."""
        rates = torch.tensor(self.rates())
        return float(rates.quantile(0.1)), float(rates.quantile(0.9))

    def summary(self) -> dict[str, Any]:
        """Medians and spread by name, for a row of a table."""
        low, high = self.spread
        return {
            "runs": len(self.wall),
            "work": statistics.median(self.work),
            "wall_seconds": statistics.median(self.wall),
            "cpu_seconds": statistics.median(self.cpu),
            "per_wall_second": self.rate,
            "per_wall_second_p10": low,
            "per_wall_second_p90": high,
            "per_cpu_second": statistics.median(self.rates("cpu")),
        }


def interleave(variants: Mapping[str, Callable[[int], int]], rounds: int) -> dict[str, Timing]:
    """Time variants in turn, so that what else the machine does hits all of them alike.

    Args:
        variants: Each takes the number of the round and returns how many units of work it did.
        rounds: Timed rounds; one before them warms up.
    """
    timings = {name: Timing() for name in variants}
    names = list(variants)
    for number in range(-1, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            wall, cpu = time.perf_counter(), time.process_time()
            work = variants[name](number)
            if number >= 0:
                timings[name].add(time.perf_counter() - wall, time.process_time() - cpu, work)
    return timings


def speedup(ours: Timing, theirs: Timing, clock: Literal["wall", "cpu"] = "wall") -> float:
    """How many times as fast ours is: the median over rounds of the ratio within a round."""
    rates = zip(ours.rates(clock), theirs.rates(clock), strict=True)
    return statistics.median(rate / their_rate for rate, their_rate in rates)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of cells, the first row its head, in columns of even width."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])
