"""StopOverOptimisation on real runs: they end at the evaluation that its rule names, and stay ended."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightning_align.callbacks.stop import StopOverOptimisation, peak_kl
from lightning_align.cli.main import run as command
from lightning_align.errors import UserError

STOP = "lightning_align.callbacks.stop.StopOverOptimisation"
SHORTER = """
def shorter(completions, **columns):
    return [-float(len(text.split())) for text in completions]

def broken(completions, **columns):
    return [None] * len(completions)
"""


def callback(**options: Any) -> dict[str, Any]:
    return {"trainer.callbacks": [{"class_path": STOP, "init_args": options}]}


@pytest.fixture
def drifting(ppo_options: dict[str, Any]) -> dict[str, Any]:
    """PPO that goes far at once, evaluated after every iteration."""
    return {**ppo_options, "model.iterations": 40, "model.kl_coef": 0.0, "model.eval_every": 1, "model.gold": None}


@pytest.fixture
def parted(world: Any, drifting: dict[str, Any]) -> dict[str, Any]:
    """Longer answers are learnt, and the held-out reward likes short ones."""
    (world.root / "stop_rewards.py").write_text(SHORTER)
    parts = {
        "long": {"source": "@rewards.py:length"},
        "heldout": {"source": "@stop_rewards.py:shorter", "weight": 0.0},
    }
    return {**drifting, "model.reward": parts}


def evaluations(run: Any, name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in run.rows if name in row}


def expected_stop(run: Any, patience: int) -> int | None:
    """By the rule, from what the run logged: the first evaluation that ends ``patience`` falls in a row."""
    proxy, heldout = evaluations(run, "eval/lab/proxy"), evaluations(run, "eval/rewards/heldout/mean")
    steps = sorted(proxy)
    parts = [proxy[b] > proxy[a] and heldout[b] < heldout[a] for a, b in pairwise(steps)]
    ends = (i for i in range(patience, len(parts) + 1) if all(parts[i - patience : i]))
    return next((steps[i] for i in ends), None)


# ------------------------------------------------------------------ runs
def test_budget_from_a_yaml_ends_the_run_at_the_evaluation_beyond_it(
    world: Any, drifting: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.root / "stop.yaml"
    config.write_text(
        f"trainer:\n  callbacks:\n    - class_path: {STOP}\n      init_args: {{policy: budget, kl: 0.3}}\n"
    )
    run = world.fit({"config": "@stop.yaml", **drifting, "model.eval_every": 2})
    kl = evaluations(run, "eval/lab/kl")
    last = max(kl)
    assert 0 < last < 40
    assert kl[last] > 0.3
    assert all(value <= 0.3 for step, value in kl.items() if step != last)
    assert run.status["status"] == "finished"
    assert run.status["step"] == last
    assert list((run.path / "checkpoints").glob(f"step={last:05d}-*.ckpt"))
    assert run.weights
    assert f"stopped after iteration {last}: KL" in capsys.readouterr().out


def test_peak_is_read_from_an_earlier_run(world: Any, drifting: dict[str, Any]) -> None:
    (world.root / "overopt.json").write_text(json.dumps({"kl_peak": 0.3}))
    peak = world.fit({**drifting, **callback(policy="peak", fit=str(world.root / "overopt.json"))})
    budget = world.fit({**drifting, **callback(policy="budget", kl=0.3)})
    assert evaluations(peak, "eval/lab/kl") == evaluations(budget, "eval/lab/kl")


def test_heldout_ends_the_run_after_patience_falls_and_it_stays_ended(world: Any, parted: dict[str, Any]) -> None:
    options = {**parted, **callback(policy="heldout", patience=2), "model.lr_scheduler_type": "constant"}
    whole = world.fit(options)
    end = max(evaluations(whole, "eval/lab/kl"))
    assert end < 40
    assert expected_stop(whole, 2) == end
    world.fork(options, "--resume", name=whole.path.name)
    told = (world.root / f"{whole.path.name}.log").read_text()
    assert f"is at step {end}, where StopOverOptimisation ended it: heldout has fallen and the proxy risen in 2" in told
    assert max(evaluations(whole, "eval/lab/kl")) == end
    assert command(["lab", "select", str(whole.path)]) == 0  # which finds the same scores by itself
    (chosen,) = json.loads((whole.path / "selection.json").read_text())["runs"]
    scores = evaluations(whole, "eval/rewards/heldout/mean")
    assert chosen["policy"] == "heldout"
    assert chosen["step"] <= max(scores, key=lambda step: scores[step])
    first = world.fit({**options, "model.iterations": end - 1})  # it ends with one fall behind it
    assert expected_stop(first, 2) is None
    world.fork(options, "--resume", name=first.path.name)
    assert expected_stop(first, 2) == max(evaluations(first, "eval/lab/kl")) == end


def test_scores_that_are_missing_stop_nothing(world: Any, parted: dict[str, Any]) -> None:
    broken = {**parted["model.reward"], "heldout": {"source": "@stop_rewards.py:broken", "weight": 0.0}}
    options = {**parted, "model.reward": broken, "model.iterations": 2, **callback(policy="heldout", patience=1)}
    assert max(evaluations(world.fit(options), "eval/lab/kl")) == 2


# ------------------------------------------------------------------ what it refuses
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**callback(policy="gold")}, "policy gold needs a true score: set model.gold"),
        ({**callback(policy="heldout")}, "needs a part of model.reward of that name, with weight 0"),
        ({**callback(policy="budget", kl=1.0), "model.eval_every": 0}, "this run has none: set model.eval_every"),
        ({**callback(policy="budget", kl=1.0), "data.val_path": None, "data.val_fraction": 0.0}, "hold prompts out"),
        ({**callback(policy="budget")}, "StopOverOptimisation.kl is None: give a KL above 0 for policy budget"),
        ({**callback(policy="peak", fit="nowhere.json")}, "fit nowhere.json is not an overopt.json"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    world: Any, drifting: dict[str, Any], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.fit({**drifting, "model.iterations": 1, **changes}, code=2)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not run.path.exists()


def test_an_offline_method_is_refused(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "SFTModule", "model.model": "@sft", "data": "SFTDataModule", "data.path": "@sft.jsonl"}
    run = world.fit({**options, "data.val_path": "@sft_val.jsonl", **callback(policy="budget", kl=1.0)}, code=2)
    assert "StopOverOptimisation is for online methods" in capsys.readouterr().err
    assert not run.path.exists()


def test_a_heldout_reward_that_is_learnt_from_is_refused(
    world: Any, parted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = {**parted["model.reward"], "heldout": {"source": "@rewards.py:commas", "weight": 0.5}}
    world.fit({**parted, "model.reward": learnt, **callback(policy="heldout")}, code=2)
    assert "model.reward.heldout.weight is 0.5: a held-out reward needs weight 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "budget", "kl": 0.0}, "kl is 0.0"),
        ({"policy": "gold", "kl": 2.0}, "none for policy gold"),
        ({"policy": "budget", "kl": 2.0, "fit": "overopt.json"}, "none for policy budget"),
        ({"policy": "gold", "patience": 0}, "patience is 0: give at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StopOverOptimisation(**options)


def test_a_fit_without_a_peak_is_refused(tmp_path: Path, write: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="has no peak"):
        peak_kl(write('{"kl_peak": null}'))
    with pytest.raises(UserError, match="is not an overopt"):
        peak_kl(write("[]"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """A file with this text."""

    def put(text: str) -> Path:
        path = tmp_path / "overopt.json"
        path.write_text(text)
        return path

    return put
