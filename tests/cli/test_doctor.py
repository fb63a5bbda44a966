"""``doctor``: says what is there and tries the parts everything stands on."""

from typing import Any

import pytest
import torch

from lightning_align.cli import doctor


def test_report_and_self_test(desk: Any) -> None:
    answer = desk.done("doctor")
    assert answer.err == ""
    for part in ("versions", "machine", "extras", "kernels", "self-test"):
        assert f"\n{part}\n" in f"\n{answer.out}"
    assert torch.__version__ in answer.out
    assert answer.out.count("ok (largest difference") == 2
    assert "FAILED" not in answer.out


def test_the_self_test_can_be_left_out(desk: Any) -> None:
    assert "self-test" not in desk.done("doctor", "--no-test").out


def test_a_failed_check_is_said_and_is_the_exit_code(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_logprobs", lambda: 1.0)
    answer = desk.run("doctor")
    assert answer.code == 1
    assert "token log-probs FAILED (largest difference 1.0e+00, allowed 1e-04)" in answer.out


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton          missing: pip install 'lightning-align[gpu]' (fused GPU kernels)" in doctor._extras()


def test_which_kernels_run_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_kernels._dispatch.ENVIRONMENT", "auto,gae=reference")
    lines = doctor._kernels()
    assert "gae                    reference" in lines
    assert any(line.startswith("linear_token_logprobs  ") for line in lines)
    if not torch.cuda.is_available():
        assert "no triton: there are no Triton kernels for cpu tensors" in lines


def test_unknown_option(desk: Any) -> None:
    assert desk.refused("doctor", "--no-tests") == (
        "unknown option --no-tests; did you mean '--no-test'? (see lightning-align doctor --help)"
    )
