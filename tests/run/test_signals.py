"""The first signal waits for the step to end, the second does not; before the first step none waits."""

import os
import signal

import pytest

from lightning_align.run.signals import STAGE_VARIABLE, Interrupted, StopRequest


def test_first_signal_waits_second_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.defer(True)
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_before_the_first_step_a_signal_interrupts_at_once() -> None:
    with StopRequest(), pytest.raises(Interrupted, match="SIGINT"):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stage_stops_when_its_pipeline_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    monkeypatch.setenv(STAGE_VARIABLE, str(parent))
    with StopRequest() as stop:
        assert not stop.requested
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        assert stop.requested
    monkeypatch.setenv(STAGE_VARIABLE, str(parent))
    with StopRequest() as stop:
        assert stop.requested  # it had gone before the stage was up


def test_a_run_started_by_hand_may_outlive_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    monkeypatch.delenv(STAGE_VARIABLE, raising=False)
    with StopRequest() as stop:
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        assert not stop.requested
