"""The optimisers to choose from: that they learn and resume, and what is said where one is not there."""

import shutil
import sys
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from torch import nn

from lightning_align.errors import UserError
from lightning_align.methods.optimizers import build_optimizer, check_optimizer, state_bytes

SFT = {
    **{"model": "SFTModule", "model.model": "@pretrain", "model.learning_rate": 3e-3, "data": "SFTDataModule"},
    **{"data.path": "@sft.jsonl", "data.val_path": "@sft_val.jsonl", "data.batch_size": 8, "trainer.max_epochs": 3},
}
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


@pytest.fixture(params=["adamw", "adafactor", *EIGHT_BIT])
def name(request: pytest.FixtureRequest) -> str:
    if request.param in EIGHT_BIT:
        pytest.importorskip("bitsandbytes")
    return request.param


def test_it_fits_a_line(name: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)  # 8-bit states begin at 4,096 values
    x = torch.randn(256, 64)
    target = x @ torch.randn(64, 64) / 8
    groups = [{"params": [layer.weight], "weight_decay": 0.0, "lr": 1e-2}, {"params": [layer.bias], "lr": 1e-2}]
    optimizer = build_optimizer(name, groups, learning_rate=1e-2, betas=(0.9, 0.99), epsilon=1e-8)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_gradients_are_clipped_after_the_loss_scale_is_divided_out() -> None:
    """What Lightning does under ``16-mixed``: it divides first, except for optimisers that say they do so."""
    weight = nn.Parameter(torch.ones(4))
    groups = [{"params": [weight], "weight_decay": 0.0}]
    optimizer = build_optimizer("adamw", groups, learning_rate=1e-2, betas=(0.9, 0.99), epsilon=1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((3 * weight).sum()).backward()
    if not _optimizer_handles_unscaling(optimizer):
        scaler.unscale_(optimizer)
    assert nn.utils.clip_grad_norm_([weight], 1.0) == 6.0
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.full((4,), 0.99))


def test_pre_5_it_resumes_bit_for_bit(world: Any, name: str) -> None:
    options = {**SFT, "model.optimizer": name}
    runs = [world.fork(options), world.fork(options, stop_at=4, code=130)]
    shutil.copytree(runs[1].path, world.root / f"{name}_again")
    runs[1] = world.fork(options, "--resume", name=f"{name}_again")
    assert repr(runs[0].rows) == repr(runs[1].rows)
    models = [(run.path / "model" / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]
    losses = [row["eval/loss"] for row in runs[0].rows if "eval/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_a_missing_library_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"model.optimizer {name} is of the package bitsandbytes, which"):
        check_optimizer(name)
    check_optimizer("adafactor")


def test_bytes_of_states() -> None:
    parameters = [(1000, 4000), (500, 1000)]
    assert state_bytes("adamw", parameters) == 10_000
    assert state_bytes("paged_adamw_8bit", parameters) == 3000
    assert state_bytes("adafactor", parameters) == 0
