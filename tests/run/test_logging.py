"""Metrics and samples on disk, and a mirror that never fails a run."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.run.logging import FileLogger, WandbMirror, log_samples, read_table, wandb_mode


def test_rows_appear_at_once_and_columns_may_come_late(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    logger.log_metrics({"loss": torch.tensor(0.5)}, step=1)
    logger.log_metrics({"loss": 1 / 3, "eval/loss": 2.0}, step=2)
    logger.log_metrics({"loss": float("nan")}, step=3)
    header, rows = read_table(tmp_path / "run" / "metrics.csv")
    assert header == ["step", "eval/loss", "loss"]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[1]["loss"]) == 1 / 3  # every digit is kept
    assert rows[0]["eval/loss"] == ""
    assert rows[2]["loss"] == "nan"


def test_rewind_then_continue_equals_never_interrupted(tmp_path: Path) -> None:
    def log(logger: FileLogger, steps: range) -> None:
        for step in steps:
            logger.log_metrics({"loss": step / 7, **({"late": step} if step >= 4 else {})}, step=step)
            log_samples([logger], [{"prompt": "p", "score": step / 3}], step=step)

    whole = FileLogger(tmp_path / "whole")
    log(whole, range(1, 9))
    first = FileLogger(tmp_path / "cut")
    log(first, range(1, 4))
    state = first.state_dict()
    log(first, range(4, 7))  # lost with the process
    with (tmp_path / "cut" / "metrics.csv").open("a") as file:
        file.write("7,0.12")  # killed in the middle of a row
    second = FileLogger(tmp_path / "cut")
    second.rewind(state)
    assert read_table(tmp_path / "cut" / "metrics.csv")[0] == ["step", "loss"]
    log(second, range(4, 9))
    for name in ("metrics.csv", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_rewind_to_nothing_removes_the_files(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    logger.log_metrics({"a": 1}, step=1)
    logger.log_samples([{"prompt": "x"}], step=1)
    logger.rewind({"metrics": 0, "samples": 0})
    assert list(tmp_path.iterdir()) == []


def test_lost_rows_are_reported(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    logger.log_metrics({"a": 1}, step=1)
    with pytest.warns(UserWarning, match="lost rows"):
        FileLogger(tmp_path).rewind({"metrics": 5, "samples": 0})


def test_samples_are_strict_json(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    messages = [{"role": "user", "content": "grüß\ndich"}]
    logger.log_samples([{"prompt": messages, "score": float("nan"), "kl": torch.tensor(0.25)}], step=4)
    row = json.loads((tmp_path / "samples.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 4, "prompt": messages, "score": None, "kl": 0.25}


def fake_wandb(monkeypatch: pytest.MonkeyPatch, *, fails: bool, logged_in: bool = True) -> dict[str, Any]:
    seen: dict[str, Any] = {"rows": []}

    class Run:
        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            return None

        def log(self, row: dict[str, Any]) -> None:
            if fails:
                raise ConnectionError("the network\nis gone")
            seen["rows"].append(row)

        def finish(self, exit_code: int) -> None:
            seen["exit_code"] = exit_code

    def init(**kwargs: Any) -> Run:
        seen["init"] = kwargs
        return Run()

    module = types.SimpleNamespace(init=init, login=lambda **kwargs: logged_in, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_mirror_failure_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    fake_wandb(monkeypatch, fails=True)
    mirror = WandbMirror(tmp_path, "offline", {})
    for step in range(3):
        mirror.log_metrics({"loss": 1.0}, step=step)
    mirror.finalize("success")
    texts = [str(warning.message) for warning in recwarn if "Weights & Biases" in str(warning.message)]
    assert texts == ["Weights & Biases is switched off for this run: ConnectionError: the network is gone"]


def test_mirror_is_lazy_and_offline_without_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_wandb(monkeypatch, fails=False, logged_in=False)
    mirror = WandbMirror(tmp_path / "run", "online", {"a": 1})
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="no Weights & Biases login"):
        mirror.log_metrics({"loss": torch.tensor(2.0)}, step=5)
    assert seen["init"]["mode"] == "offline"
    assert seen["rows"] == [{"loss": 2.0, "step": 5}]
    mirror.finalize("success")
    assert seen["exit_code"] == 0


def test_mode_is_offline_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # a login changes nothing
    assert wandb_mode(None) == "offline"
    assert wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.warns(UserWarning, match="WANDB_MODE"):
        assert wandb_mode(None) == "offline"


@pytest.mark.slow
def test_real_wandb_offline(tmp_path: Path) -> None:
    mirror = WandbMirror(tmp_path / "run", "offline", {"a": 1})
    mirror.log_metrics({"loss": 1.0}, step=1)
    mirror.log_samples([{"prompt": "p", "score": 0.5}], step=1)
    mirror.log_samples([{"prompt": "q", "score": None}], step=2)
    mirror.finalize("success")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
