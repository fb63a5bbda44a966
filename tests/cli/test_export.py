"""``export``: a checkpoint becomes the model that the run itself wrote, or nothing."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_the_last_checkpoint_is_the_exported_model(scratch: Any, name: str) -> None:
    answer = scratch.done("export", f"runs/{name}", "--out=out/model")
    assert answer.out == "wrote out/model\n"
    ours, theirs = (scratch.root / folder for folder in ("out/model", f"runs/{name}/model"))
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for file in theirs.iterdir():
        if file.suffix != ".safetensors":
            assert (ours / file.name).read_bytes() == file.read_bytes(), file.name
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_an_earlier_checkpoint(scratch: Any) -> None:
    (start,) = (scratch.root / "runs" / "ppo" / "checkpoints").glob("step=00000-*.ckpt")
    scratch.done("export", str(start.relative_to(scratch.root)), "--out=start")
    first, sft = (load_file(scratch.root / folder / "model.safetensors") for folder in ("start", "runs/sft/model"))
    assert all(torch.equal(first[key], sft[key]) for key in sft)  # PPO had not begun


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs/sft"], "the following arguments are required: --out (see lightning-align export --help)"),
        (["runs/sft", "--out=docs"], "docs exists: give another --out"),
        (["runs/none", "--out=x"], "runs/none is neither a run directory nor a checkpoint in one"),
        (["runs/sft/checkpoints/none.ckpt", "--out=x"], "there is no checkpoint runs/sft/checkpoints/none.ckpt"),
        (["tiny.yaml", "--out=x"], "tiny.yaml is neither a run directory nor a checkpoint in one"),
        (["runs/sft", "--out=tiny.yaml/x"], "cannot write the model to tiny.yaml/x: Not a directory"),
    ],
)
def test_bad_input(desk: Any, words: list[str], line: str) -> None:
    assert desk.refused("export", *words) == line
