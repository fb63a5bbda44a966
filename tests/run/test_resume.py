"""A run that is killed and resumed leaves the same files as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_align.errors import UserError
from lightning_align.run.checkpoints import check_checkpoint
from lightning_align.run.resume import random_state, set_random_state

DRIVER = Path(__file__).with_name("resume_driver.py")
SAME_FILES = ("metrics.csv", "samples.jsonl", "config.yaml")


@pytest.mark.parametrize(("seed", "accumulate", "every"), [(0, 1, 1), (1, 2, 3)])
def test_kill_and_resume_leaves_identical_files(tmp_path: Path, seed: int, accumulate: int, every: int) -> None:
    command = [sys.executable, str(DRIVER), str(tmp_path), str(seed), str(accumulate), str(every)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 3  # it was killed often enough to mean something
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in SAME_FILES:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    rows = (whole / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,")
    assert rows[-1].startswith("23,")  # the very last step is validated too
    first, second = (torch.load(run / "model" / "weights.pt", weights_only=True) for run in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    status = json.loads((killed / "run.json").read_text())
    assert status["status"] == "finished"
    assert status["resumed"] >= 3
    check_checkpoint(killed / "checkpoints" / "last.ckpt")
    kept = [f"step={step:05d}.ckpt" for step in range(4, 24, 4)]  # keep_every of the driver
    for run in (whole, killed):
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", *kept]
    for name in kept:
        first, second = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (whole, killed))
        assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])
        assert "optimizer_states" not in second  # weights only


def test_random_state_round_trip() -> None:
    import random

    import numpy as np

    state = random_state()
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand())
    set_random_state(state)
    assert drawn == (torch.rand(3).tolist(), random.random(), np.random.rand())


def test_checkpoint_that_is_cut_or_foreign_is_refused(tmp_path: Path) -> None:
    weights = {"state_dict": {"w": torch.zeros(50_000)}, "method": {}}
    path = tmp_path / "last.ckpt"
    torch.save(weights, path)
    check_checkpoint(path, to_train=False)
    with pytest.raises(UserError, match="weights only"):
        check_checkpoint(path)
    torch.save({**weights, "loops": {}, "callbacks": {}, "optimizer_states": []}, path)
    check_checkpoint(path)
    data = path.read_bytes()
    for content, expected in (
        (data[: len(data) // 2], "not a whole checkpoint"),
        (b"", "not a whole checkpoint"),
        (b"hello", "not a whole checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            check_checkpoint(path)
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        check_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        check_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        check_checkpoint(tmp_path / "none.ckpt")
