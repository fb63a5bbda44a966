"""Tier 2: the tests of the operations once more, with the very same Triton source under Triton's interpreter.

Interpreter and compiler cannot share a process, so the tests run again in one of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

NAMES = ("gae", "shaped", "token_stats", "linear", "policy_loss", "pref", "regressions")
FILES = [f"test_kernels_{name}.py" for name in NAMES]


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_the_kernels_pass_the_tests_of_their_operations() -> None:
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / name) for name in FILES)]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
