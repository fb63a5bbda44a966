"""Runs the cases of `benchmarks.kernels` and writes what was found."""

import argparse
import dataclasses
import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, device_name, machine
from benchmarks.kernel_baselines import Variant
from benchmarks.kernel_cases import HEADS, MAKERS, Case, cases
from benchmarks.kernel_measure import MIB, Bench, Pass, Samples, quantiles
from benchmarks.kernel_report import figure, table

Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs and gradients
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(options: argparse.Namespace) -> int:
    """Measures all cases; 1 if a variant of this project is wrong."""
    device = torch.device(options.device) if options.device != "auto" else default_device()
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    shapes = chosen(options.shapes or ("llama" if device.type == "cuda" else "small,cpu"), list(HEADS), "--shapes")
    ops = chosen(options.ops, list(MAKERS), "--ops")
    bench = Bench(device, 5 if options.quick else options.runs)
    facts = machine() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["processor"],
        "state": state(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_second": bench.bandwidth,
    }
    rows: list[dict[str, Any]] = []
    for case in cases(ops, shapes, device, dtype):
        rows += measure(case, bench, skip_compiled=options.quick)
        print(table(rows[-len(case.variants) :]), flush=True)
    write(facts, rows, (Path(options.out) if options.out else RESULTS) / device_name(str(device)))
    return 1 if any(row["status"] == "wrong" and row["variant"].startswith("ours") for row in rows) else 0


def measure(case: Case, bench: Bench, *, skip_compiled: bool) -> list[dict[str, Any]]:
    """A row for each variant of a case."""
    inputs = case.make(case.slice_rows)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = whole(case, case.reference, wide).both()
    rows, ready = {}, {}
    full = case.make(case.rows)
    for name, variant in case.variants.items():
        row = {"op": case.op, "name": case.name, "shape": case.shape, "variant": name, "status": "ok"}
        rows[name] = row
        if skip_compiled and name.startswith("torch.compile"):
            row |= {"status": "absent", "why": "--quick"}
        elif isinstance(variant, str):
            row |= {"status": "absent", "why": variant}
        else:
            problem = failure(case, variant, inputs, expected)
            if problem is None:
                ready[name] = variant
            else:
                row |= problem
    passes = {name: whole(case, variant, full) for name, variant in ready.items()}
    floor = case.floor(bench)
    for name, samples in bench.interleaved(passes).items():
        rows[name] |= figures(samples, floor)
    return list(rows.values())


def whole(case: Case, variant: Variant, inputs: dict[str, Tensor]) -> Pass:
    """A variant on the inputs that are timed."""
    work = Pass(variant, inputs, case.leaves, ())
    work.upstream = upstream(work.forward())
    return work


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same random gradient for the same output of every variant."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    draws = (torch.randn(x.shape, device=x.device, generator=generator) for x in outputs)
    return [draw.to(x.dtype) for draw, x in zip(draws, outputs, strict=True)]


# ------------------------------------------------------------------ correct first
def failure(case: Case, variant: Variant, inputs: dict[str, Tensor], expected: Results) -> dict[str, str] | None:
    """Why a variant gets no time: it does not run here, or it is wrong."""
    try:
        found = whole(case, variant, inputs).both()
    except Exception as error:  # other people's code: whatever it raises is the finding
        return {"status": "failed", "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    for kind, measure, results, wanted, bound in (
        ("output", largest, found[0], expected[0], case.tolerance[0]),
        ("gradient", distance, found[1], expected[1], case.tolerance[1]),
    ):
        for x, y in zip(results, wanted, strict=True):
            off = measure(x.detach().double(), y.detach())
            if not off <= bound:
                return {"status": "wrong", "why": f"{kind} off by {off:.1e}, allowed {bound:.1e}"}
    return None


def largest(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to 1 + the largest value."""
    return float((x - y).abs().max() / (1 + y.abs().max()))


def distance(x: Tensor, y: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((x - y).norm() / y.norm())


# ------------------------------------------------------------------ results
def figures(samples: Samples, floor: tuple[float, float]) -> dict[str, Any]:
    """Milliseconds, ratio to the floor, MiB, and all samples."""
    low, middle, high = quantiles(samples.total)
    return {
        "forward_ms": quantiles(samples.forward or samples.total)[1] * 1e3,
        "ms": middle * 1e3,
        "ms_10_90": [low * 1e3, high * 1e3],
        "cpu_ms": quantiles(samples.cpu)[1] * 1e3 if samples.cpu else None,
        "floor_ms": floor[1] * 1e3,
        "over_floor": middle / floor[1],
        "forward_mib": samples.forward_bytes / MIB,
        "peak_mib": samples.total_bytes / MIB,
        "samples": dataclasses.asdict(samples),
    }


def write(facts: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """JSON with everything, a table, and the figure of time over floor."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels-{datetime.date.today().isoformat()}"
    stem.with_suffix(".json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    stem.with_suffix(".md").write_text(
        "\n".join(f"- {k}: {v}" for k, v in facts.items() if v) + "\n\n" + table(rows) + "\n"
    )
    figure(rows, facts, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .md, .png")


def state(device: torch.device) -> str:
    """Clocks, temperature and driver of a GPU."""
    if device.type != "cuda":
        return ""
    query = "clocks.sm,clocks.mem,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
    return f"{query}: {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(text: str, allowed: list[str], option: str) -> list[str]:
    """Names separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise SystemExit(f"{option}: {', '.join(unknown) or 'nothing'} is none of {', '.join(allowed)}")
    return names
