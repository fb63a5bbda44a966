"""Two policies against each other, and what their samples are scored with."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_align.lab.evaluation.length_control import length_controlled
from lightning_align.lab.evaluation.policies import compare, control_length
from lightning_align.lab.evaluation.sampling import Samples, score_columns
from lightning_align.rewards.build import build_reward
from lightning_align.rollout.types import Rollout


def test_a_win_rate_of_one_half_is_what_chance_gives() -> None:
    texts, even = [["x"]] * 40, np.arange(40)[:, None] % 2
    samples, other = (Samples(texts, {"gold": scores.astype(float)}) for scores in (even, 1 - even))
    found = compare(samples, other, judge="gold")
    assert found["win_rate"]["value"] == 0.5
    assert found["win_rate"]["p"] == 1.0
    better = compare(Samples(texts, {"gold": np.full((40, 1), 2.0)}), other, judge="gold")
    assert better["win_rate"]["p"] < 1e-3


def test_eval_7_where_length_decides_longer_answers_gain_nothing() -> None:
    draw = np.random.default_rng(0)

    def answers(mean: float) -> Samples:
        lengths = draw.normal(mean, 10, (600, 2)).round().clip(1).astype(int)
        liked = lengths + draw.normal(0, 10, lengths.shape)
        return Samples([["x" * n for n in row] for row in lengths], {"gold": liked})

    longer, other = answers(60), answers(50)
    assert compare(longer, other, judge="gold")["win_rate"]["value"] > 0.65
    (rate,) = control_length([longer], other, judge="gold", tie_eps=0.0, seed=0)
    assert rate.value == pytest.approx(0.5, abs=0.05)


def test_the_unit_of_length_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    results, longer = (draw.random((1, 200)) < 0.6).astype(float), draw.normal(0.5, 1, (1, 200))
    tokens, characters = (length_controlled(results, unit * longer, replicates=20)[0] for unit in (1, 40))
    assert characters.value == pytest.approx(tokens.value, rel=1e-9)


def test_what_was_cut_off_is_scored_as_unfinished(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def done(completions, finished):\n    return [float(end) for end in finished]\n")
    ids, count = torch.ones(3, 2, dtype=torch.long), torch.arange(3)
    rollout = Rollout(
        *(ids, ids > 0, torch.tensor([[False, True]] * 3), torch.zeros(3, 2), count * 0 + 1, count),
        finish_reason=["eos", "length", "stop"],
        completions=["a"] * 3,
        records=[{"prompt": "p"}] * 3,
    )
    assert score_columns("proxy", build_reward(f"{file}:done"), rollout)["proxy"].tolist() == [1.0, 0.0, 1.0]
