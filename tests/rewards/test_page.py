"""docs/rewards.md: its function and its configuration work as they stand there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import yaml
from torch import Tensor

from lightning_align.plugins import load_function
from lightning_align.rewards.build import build_reward, parse_reward
from lightning_align.rewards.combination import How, LengthPenalty, Whiten
from lightning_align.rewards.function import FunctionReward
from lightning_align.rewards.spec import PART_KEYS, REWARD_KEYS, read_reward

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
Ask = Callable[..., Tensor]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_the_function_scores(tmp_path: Path, ask: Ask) -> None:
    path = tmp_path / "my_rewards.py"
    (function,) = blocks("python")
    path.write_text(function)
    scorer = FunctionReward(load_function(f"{path}:brief"), "brief")
    records = [{"prompt": "2 + 2", "answer": "4"}, {"prompt": "why ?"}]
    scores = ask(scorer, ["it is 4", "because"], ["2 + 2", "why ?"], records)
    assert scores[0].item() == pytest.approx(1 - 0.07)
    assert scores[1].isnan()


def test_the_configuration_is_understood() -> None:
    options = yaml.safe_load(blocks("yaml")[0])["model"]["init_args"]
    parts = parse_reward(options["reward"])
    assert [(part.name, part.kind, part.weight) for part in parts] == [
        ("helpful", "learned", 1.0),
        ("brief", "function", 0.1),
        ("exact", "function", 2.0),
        ("rater", "judge", 1.0),
    ]
    gold = build_reward(options["gold"], default_name="gold")
    assert [(part.name, part.weight) for part in gold.parts] == [("gold", 1.0), ("helpfulness", 0.0), ("safety", 0.0)]


def test_other_combinations_are_understood() -> None:
    gated, ensemble = (yaml.safe_load(text) for text in blocks("yaml")[1:])
    spec = read_reward(gated["model"]["init_args"]["reward"])
    assert spec.combination.how == "gate"
    assert spec.combination.length_penalty == LengthPenalty(0.01, 40)
    (part,) = parse_reward(ensemble["reward"])
    assert (part.how, part.uwo_coef, len(part.members)) == ("uwo", 0.1, 3)


def test_every_way_to_combine_is_described() -> None:
    for name in (*get_args(How), *get_args(Whiten), *REWARD_KEYS, *PART_KEYS):
        assert re.search(rf"`[^`\n]*\b{name}\b", PAGE) or f"{name}:" in PAGE, name
