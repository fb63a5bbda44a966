"""The rollout benchmark measures what agrees, refuses what does not, and writes what it found."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import common, rollout
from benchmarks.common import Timing, interleave, speedup
from benchmarks.rollout_cases import (
    EOS,
    Reference,
    build_policy,
    build_tokenizer,
    check_agreement,
    pad_left,
    real_tokens,
    unequal_prompts,
)
from lightning_align.rollout import StaticCacheEngine


def test_it_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for name, value in (("NEW_TOKENS", 3), ("PROMPT_TOKENS", 4), ("LONGEST", 4), ("BATCHES", (2, 3)), ("PROMPTS", 3)):
        monkeypatch.setattr(rollout, name, value)
    rollout.main(["--rounds", "1"])
    (folder,) = tmp_path.iterdir()
    assert folder.name == common.device_name()
    assert {path.name for path in folder.iterdir()} == {"rollout.csv", "rollout.json", "rollout.png"}
    found = json.loads((folder / "rollout.json").read_text())
    assert {"processor", "git_commit", "cpu_cores", "versions"} <= set(found["machine"])
    assert len(found["completion_lengths"]) == 3 * rollout.SAMPLES
    rows = list(csv.DictReader((folder / "rollout.csv").open()))
    assert [row["batch"] for row in rows if row["variant"] == rollout.OURS] == ["2", "3"]
    assert all(float(row["per_wall_second"]) > 0 for row in rows)
    assert "PPO's rollout" in capsys.readouterr().out


def test_an_engine_that_differs_is_not_timed() -> None:
    model, prompts = build_policy(1 / 32), unequal_prompts(4)
    engine = StaticCacheEngine(model, build_tokenizer())
    assert "4 of 4 greedy completions identical" in check_agreement(model, engine, prompts, 6)
    model.model.layers[2].mlp.up_proj.weight.data *= 1.5  # the engine is not told
    with pytest.raises(SystemExit, match="not timed"):
        check_agreement(model, engine, prompts, 6)


def test_the_policy_ends_completions_as_often_as_asked() -> None:
    model = build_policy(1 / 32)
    with torch.no_grad():
        odds = model(torch.tensor([ids[:4] for ids in unequal_prompts(64)])).logits.log_softmax(-1)[..., EOS].mean()
    assert abs(math.exp(float(odds)) - 1 / 32) < 0.02


def test_both_ways_to_the_references_log_probs_agree() -> None:
    reference, prompts = Reference(build_policy(1 / 4), 8), unequal_prompts(5)
    kept, from_kept = reference.sample_with_logits(prompts, 3, samples=2)
    computed, from_forward = reference.sample_with_forward(prompts, 3, samples=2)
    real = real_tokens(kept)
    assert torch.equal(kept, computed)
    assert len(set(real.sum(1).tolist())) > 2
    torch.testing.assert_close(from_kept[real], from_forward[real], atol=1e-4, rtol=1e-5)


def test_prompts_are_padded_on_the_left_and_completions_end_with_eos() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert real_tokens(torch.tensor([[5, EOS, EOS, 0], [EOS, 0, 0, 0], [5, 6, 7, 8]])).sum(1).tolist() == [2, 1, 4]


def test_variants_take_turns_and_are_compared_within_a_round() -> None:
    calls: list[tuple[str, int]] = []
    timings = interleave({name: lambda number, name=name: calls.append((name, number)) or 5 for name in "ab"}, rounds=2)
    assert calls == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [len(timing.wall) for timing in timings.values()] == [2, 2]
    fast = Timing(wall=[1.0, 2.0, 4.0], cpu=[1.0, 1.0, 1.0], work=[10, 10, 20])
    slow = Timing(wall=[2.0, 6.0, 16.0], cpu=[3.0, 3.0, 3.0], work=[10, 10, 20])
    assert speedup(fast, slow) == pytest.approx(3.0)
    assert speedup(fast, slow, "cpu") == pytest.approx(3.0)
    assert fast.rate == pytest.approx(5.0)
