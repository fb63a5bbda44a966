"""The benchmark measures what is right, says what is wrong or absent, and writes what it found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import align_kernels as K
from benchmarks import kernels
from benchmarks.kernel_cases import MAKERS, cases
from benchmarks.kernel_measure import Bench, Pass, quantiles
from benchmarks.kernel_report import fill
from benchmarks.kernel_run import measure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(CPU, runs=2)


def test_it_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "K5,K6", "--shapes", "small", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    (folder,) = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".png"}
    found = json.loads(next(folder.glob("*.json")).read_text())
    assert {"processor", "git_commit", "threads", "copy_bytes_per_second"} <= set(found["machine"])
    ours = [row for row in found["rows"] if row["variant"] == "ours: native"]
    assert len(ours) == 4
    assert all(row["status"] == "ok" and row["ms"] > 0 and len(row["samples"]["total"]) == 5 for row in ours)
    assert "| K5 gae" in capsys.readouterr().out


@pytest.mark.parametrize("op", [op for op, maker in MAKERS.items() if maker.__name__ in K.__all__])
def test_every_operation_passes_its_own_gate(op: str, bench: Bench) -> None:
    (case,) = [c for c in cases([op], ["small"], CPU, torch.float32) if c.shape.endswith(("[64, 24]", "512]"))]
    ours = {name: variant for name, variant in case.variants.items() if name.startswith(("ours", "eager"))}
    rows = measure(replace(case, variants=ours, rows=case.slice_rows), bench, skip_compiled=True)
    for row in rows:
        assert row["status"] == ("absent" if "triton" in row["variant"] else "ok"), row
    assert any(row["variant"].startswith("ours: native") for row in rows)


def test_what_is_wrong_gets_no_time(bench: Bench) -> None:
    case = cases(["K5"], ["small"], CPU, torch.float32)[0]
    right: Any = case.variants["eager: doubling"]

    def wrong(**inputs: Tensor) -> tuple[Tensor, ...]:
        advantages, returns = right(**inputs)
        return advantages * 1.001, returns

    def broken(**inputs: Tensor) -> tuple[Tensor, ...]:
        raise KeyError("no such thing")

    variants = {"right": right, "wrong": wrong, "broken": broken, "absent": "not here"}
    rows = {row["variant"]: row for row in measure(replace(case, variants=variants), bench, skip_compiled=True)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "broken": "failed",
        "absent": "absent",
    }
    assert [name for name, row in rows.items() if "ms" in row] == ["right"]
    assert rows["wrong"]["why"].startswith("output off by")


def test_peak_memory_is_what_was_held_at_once(bench: Bench) -> None:
    def work(x: Tensor) -> tuple[Tensor, ...]:
        doubled = x * 2
        return (doubled + (x + 1),)

    held = bench.peak(Pass(work, {"x": torch.ones(2**18)}, (), ()).forward)
    assert held == pytest.approx(3 * 2**20, rel=0.01)


def test_a_page_gets_the_figures_of_the_operations_that_ran() -> None:
    page = "# Page\n<!-- figures K5 -->\nold\n<!-- end -->\ntext\n<!-- figures K6 -->\nkept\n<!-- end -->\n"
    row = {"op": "K5", "name": "gae", "shape": "[1, 2]", "variant": "x", "status": "absent", "why": "not here"}
    facts = {"processor": "a CPU", "threads": 1, "dtype": "float32", "versions": {"torch": "2.13.0"}}
    filled = fill(page, [row], facts)
    assert "old" not in filled
    assert "a CPU, 1 thread(s), float32, torch 2.13.0:\n\n| op" in filled
    assert filled.endswith("text\n<!-- figures K6 -->\nkept\n<!-- end -->\n")
    assert fill(filled, [row], facts) == filled


def test_quantiles_of_runs() -> None:
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([float(i) for i in range(11)]) == (1.0, 5.0, 9.0)


def test_wrong_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"--ops: K9 is none of K1, K2"):
        kernels.main(["--ops", "K9"])
