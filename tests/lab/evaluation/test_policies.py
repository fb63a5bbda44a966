"""Two policies against each other, and what their samples are scored with."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_align.lab.evaluation.length_control import length_controlled
from lightning_align.lab.evaluation.policies import best_of, compare, control_length
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


def test_the_best_of_n_is_the_mean_over_all_subsets_of_n_samples() -> None:
    draw = np.random.default_rng(2)
    proxy, gold = draw.normal(size=(5, 6)), draw.normal(size=(5, 6))
    proxy[0, 1] = proxy[1, 2:] = np.nan  # five samples with a score, and two
    rows = best_of(Samples([[""] * 6] * 5, {"proxy": proxy, "gold": gold}), seed=0)
    assert [row["n"] for row in rows] == [1, 2, 4]
    for row in rows:
        n, means = row["n"], []
        for scores, values in zip(proxy, gold, strict=True):
            known = np.flatnonzero(~np.isnan(scores))
            chosen = [max(subset, key=lambda k: scores[k]) for subset in combinations(known, n)]
            if chosen:
                means.append((scores[chosen].mean(), values[chosen].mean()))
        expected = np.mean(means, axis=0)
        assert [row[name]["value"] for name in ("proxy", "gold")] == pytest.approx(list(expected))
        assert row["proxy"]["n"] == len(means) == (4 if n == 4 else 5)
        assert row["proxy"]["ci"][0] < row["proxy"]["value"] < row["proxy"]["ci"][1]
        assert row["kl_bound"] == pytest.approx(np.log(n) - (n - 1) / n)
    assert best_of(Samples([[""]] * 5, {"proxy": proxy[:, :1]})) == []
    assert best_of(Samples([[""] * 6] * 5, {"gold": gold})) == []


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
