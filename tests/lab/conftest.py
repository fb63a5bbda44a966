"""Runs and curves with a known law, written as the trainer writes them."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_align.lab.analysis import Analysis, analyse
from lightning_align.lab.runs import Curve, Point, load_curve
from lightning_align.run.logging import FileLogger

MakeRun = Callable[..., Path]
MakeCurve = Callable[..., Curve]
ATTACK = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"


def gao(d: Any, alpha: float, beta: float) -> Any:
    """d(α − β ln d), 0 at 0."""
    return d * (alpha - beta * np.log(np.where(d > 0, d, 1.0)))


@pytest.fixture(scope="session")
def law() -> Callable[..., Any]:
    return gao


@pytest.fixture
def make_curve() -> MakeCurve:
    """Points at KL 0 … ``d_max``² with gold ``1 + R(d)`` plus noise, and a proxy that rises with d."""

    def make(
        shape: Callable[[Any], Any], *, count: int = 17, d_max: float = 3.5, noise: float = 0.0, seed: int = 0
    ) -> Curve:
        generator = np.random.default_rng(seed)
        d = np.linspace(0.0, d_max, count)
        gold = 1 + shape(d) + generator.normal(0, noise, count)
        points = [
            Point(5 * i, kl=float(x * x), proxy=float(0.8 * x), gold=float(y))
            for i, (x, y) in enumerate(zip(d, gold, strict=True))
        ]
        return Curve("synthetic", points)

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run directory: metrics through the library's own logger, samples, checkpoints, status."""

    def make(
        name: str = "ppo",
        *,
        kl: Sequence[float],
        proxy: Sequence[float],
        gold: Sequence[float] | None = None,
        prefix: str = "eval/lab/",
        every: int = 5,
        completions: Sequence[str] = ("fine",),
        prompts: Sequence[Any] = ("say something",),
    ) -> Path:
        run = tmp_path / name
        logger = FileLogger(run)
        for index in range(len(kl)):
            step = index * every
            logger.log_metrics({"loss/policy_avg": 0.5}, step=step)
            row = {f"{prefix}kl": kl[index], f"{prefix}proxy": proxy[index]}
            if gold is not None:
                row[f"{prefix}gold"] = gold[index]
            logger.log_metrics(row, step=step)
            scores = {"proxy": proxy[index], "gold": None if gold is None else gold[index], "finish_reason": "eos"}
            logger.log_samples(
                [{"prompt": p, "completion": c, **scores} for p, c in zip(prompts, completions, strict=True)], step=step
            )
            checkpoint = run / "checkpoints" / f"step={step:05d}-kl={kl[index]:.3f}.ckpt"
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_bytes(b"weights")
        (run / "run.json").write_text(json.dumps({"status": "finished", "seed": 3, "versions": {"torch": "2"}}))
        (run / "config.yaml").write_text("model:\n  class_path: PPOModule\n")
        return run

    return make


@pytest.fixture
def peaked() -> dict[str, list[float]]:
    """Rise and fall over 17 evaluations: R(d) = d(0.55 − 0.35 ln d), d* = 1.77, R* = 0.62."""
    generator = np.random.default_rng(1)
    d = np.linspace(0.0, 3.5, 17)
    gold = 1.5 + gao(d, 0.55, 0.35) + generator.normal(0, 0.02, 17)
    return {"kl": (d**2).tolist(), "proxy": (0.8 * d).tolist(), "gold": gold.tolist()}


@pytest.fixture(scope="session")
def peak_kl() -> float:
    """KL of the peak of :func:`peaked`."""
    return math.exp(0.55 / 0.35 - 1) ** 2


@pytest.fixture
def analysis(make_run: MakeRun, peaked: dict[str, list[float]]) -> Analysis:
    """Of a run that rises and falls and whose samples try to be markup."""
    return analyse(load_curve(make_run(**peaked, prompts=[ATTACK, "plain"], completions=["a & b", ATTACK])))
