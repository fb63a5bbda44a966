"""Tier 3: every kernel compiles for every target inside its limits, and the tool that says so can refuse."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "aot_check.py"
MODULES = sorted(f"align_kernels.{path.stem}" for path in (ROOT / "kernels" / "align_kernels").glob("*_kernel.py"))


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The variable may come from the tests of tier 2, which run in this very environment.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aot_check", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_keeps_its_limits_on_every_target(module: str, tmp_path: Path) -> None:
    done = run_tool(module, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert all(row["status"] == "ok" and row["spill"] == 0 and row["regs"] > 0 for row in rows)


def test_the_tool_refuses_kernels_that_spill_or_do_not_compile() -> None:
    done = run_tool("--self-test", "--targets", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OVER: regs" in done.stdout
    assert "FAIL: ValueError: no type given for" in done.stdout
    assert "self-test: passed" in done.stdout


def test_the_tool_and_the_interpreter_exclude_each_other() -> None:
    done = run_tool("--self-test", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "separate processes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "name at least one module"),
        (["json"], 1, "json has no AOT_SPECS"),
        (["no_such_module"], 1, "No module named 'no_such_module'"),
        (["--self-test", "--targets", "sm_xyz"], 2, "unknown target 'sm_xyz'"),
    ],
)
def test_wrong_calls_are_named(arguments: list[str], status: int, message: str) -> None:
    done = run_tool(*arguments)
    assert done.returncode == status
    assert message in done.stderr


def test_numbers_are_read_from_what_the_compilers_print(tool: ModuleType) -> None:
    log = "ptxas info: 0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nptxas info: Used 77 registers"
    assert tool.ptxas_numbers(log) == (77, 20)
    assert tool.ptxas_numbers("") == (None, None)
    assert tool.amd_numbers(".vgpr_count:  40\n.vgpr_spill_count: 2\n.sgpr_spill_count: 1") == (40, 3)


def test_limits_of_a_target_override_those_of_all(tool: ModuleType) -> None:
    spec = tool.AotSpec(fn=None, signature={}, name="x", limits={"regs": 64, "sm_90": {"regs": 80}})
    assert spec.limits_for("sm_90") == {"regs": 80, "spill": 0, "shared": 232448}
    assert spec.limits_for("gfx942") == {"regs": 64, "spill": 0, "shared": 65536}
    wrong = tool.AotSpec(fn=None, signature={}, name="x", limits={"registers": 64})
    with pytest.raises(ValueError, match=r"x: unknown limits \['registers'\]"):
        wrong.limits_for("sm_90")
