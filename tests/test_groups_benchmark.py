"""The benchmark of group methods runs both sides, times what does the same, refuses the rest, and writes what it found.

TRL is not here: in its place stands the run that ours just did, with TRL's count of tokens.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import common, groups, groups_run, sides, training_cases
from benchmarks.groups_reward import share_of_vowels
from benchmarks.groups_run import NEW_TOKENS, ROWS, build_world, check_same, run_ours
from benchmarks.sides import OURS, THEIRS, Run, Side
from lightning_align.models.loading import load_causal_lm, load_tokenizer

TINY = {"size": 24, "vocabulary": 400, "hidden": 32, "layers": 1}
CASE = ("GRPO", 32)


def run(*, entropy: float = 8.0, reward: float = 0.4, length: float = NEW_TOKENS, tokens: int = 32) -> Run:
    """Two iterations as both sides log them."""
    rows = [
        {
            **{"loss": 0.0, "entropy": entropy, "reward": reward, "reward_std": 0.03},
            **{"completions/mean_length": length, "num_tokens": (step + 1.0) * ROWS * (tokens + NEW_TOKENS)},
        }
        for step in range(2)
    ]
    steps = [{"step": 1.0, "began": 105.0, "ended": 106.0, "cpu": 4.0}, {"began": 106.0, "ended": 110.0, "cpu": 5.5}]
    return Run(100.0, steps, rows, peak_mib=50.0)


def test_it_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(training_cases, "HH", Path("not there"))
    monkeypatch.setattr(groups_run, "NEW_TOKENS", 4)
    runs: list[Run] = []

    def theirs(*_: object) -> Run:
        rows = [{**row, "num_tokens": (at + 1) * ROWS * (8 + 4)} for at, row in enumerate(runs[-1].logged)]
        return replace(runs[-1], logged=rows)

    monkeypatch.setitem(groups_run.SIDES, OURS, lambda *case: runs.append(run_ours(*case)) or runs[-1])
    monkeypatch.setitem(groups_run.SIDES, THEIRS, theirs)
    monkeypatch.setattr(sides, "trl_versions", lambda python: {"trl": "none"})
    for name, value in TINY.items():
        monkeypatch.setattr(groups, name.upper(), value)
    monkeypatch.setattr(groups, "GOALS", {8: 1.5})
    groups.main(["--rounds", "1", "--steps", "2", "--methods", "RLOO", "--prompt-tokens", "8"])
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"groups.json", "groups.md"}
    found = json.loads((folder / "groups.json").read_text())
    assert {"trl", "processor", "git_commit", "versions"} <= found["machine"].keys()
    assert found["settings"]["completions_of_a_prompt"] == 8
    (ratio,) = found["ratios"]
    assert ratio["speed_cpu"] == ratio["peak"] == 1
    ours, their = (side["summary"] for side in found["runs"])
    assert ours["cpu_seconds_per_iteration"] == their["cpu_seconds_per_iteration"] > 0
    assert ours["peak_mib"] > 100
    table = (folder / "groups.md").read_text()
    assert "≥ 1.5 ×: missed, memory: met" in table
    assert table.splitlines()[-1] in capsys.readouterr().out


def test_sides_that_do_something_else_are_not_timed() -> None:
    check_same(CASE, run(), run(entropy=8.05, reward=0.41))
    for other, line in (
        (run(entropy=8.1), r"GRPO, prompt of 32: entropy of the first iteration is 8 here and 8\.1 in TRL"),
        (run(entropy=float("nan")), "entropy of the first iteration is 8 here and nan"),
        (run(reward=0.45), r"reward of the first iteration is 0\.4 here and 0\.45 in TRL"),
        (run(length=63.9), r"completions of TRL have 63\.9 tokens, not 64"),
        (run(tokens=33), "2 iterations here; in TRL 2 of 6,208 tokens instead of 6,144"),
        (replace(run(), logged=run().logged[:1]), "2 iterations here; in TRL 1 of 3,072 tokens"),
    ):
        with pytest.raises(SystemExit, match=line):
            check_same(CASE, run(), other)
    with pytest.raises(SystemExit, match="completions of lightning_align have 12 tokens"):
        check_same(CASE, run(length=12.0), run())


def test_seconds_are_those_of_an_iteration_and_the_first_is_left_out() -> None:
    side = Side()
    three = replace(run(), steps=[*run().steps, {"began": 110.0, "ended": 112.0, "cpu": 7.0}])
    side.add(three, skipped=1, batch=ROWS)
    found = groups.summary(side)
    assert found["seconds_per_iteration"] == pytest.approx(3.0)
    assert found["cpu_seconds_per_iteration"] == pytest.approx(1.5)
    assert found["samples_per_second"] == pytest.approx(ROWS / 3)


def test_goals_ask_for_speed_by_cpu_seconds_and_for_memory() -> None:
    assert groups.verdict(32, {"speed_cpu": 2.0, "peak": 1.0}) == "≥ 2 ×: met, memory: met"
    assert groups.verdict(256, {"speed_cpu": 2.9, "peak": 1.01}) == "≥ 3 ×: missed, memory: missed"
    assert groups.verdict(64, {"speed_cpu": 2.9, "peak": 1.01}) == ""


def test_the_policy_never_ends_and_prompts_are_of_one_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cases, "HH", Path("not there"))
    world = build_world(tmp_path, lengths=[32, 8], **TINY)
    tokenizer = load_tokenizer(str(world.policy))
    for tokens in (32, 8):
        prompts = [json.loads(line)["prompt"] for line in world.prompts(tokens).read_text().splitlines()]
        assert {len(tokenizer(prompt)["input_ids"]) for prompt in prompts} == {tokens}
    model = load_causal_lm(str(world.policy), tokenizer=tokenizer)
    with torch.no_grad():
        probability = model(torch.tensor([tokenizer(prompts[0])["input_ids"]])).logits.softmax(-1)
    assert probability[..., tokenizer.eos_token_id].max() < 1e-6
    assert probability.max() < 0.9  # samples differ


def test_the_reward_counts_vowels() -> None:
    assert share_of_vowels(["tea", "xyz", ""], prompts=["a"] * 3) == [pytest.approx(2 / 3), 0.0, 0.0]
