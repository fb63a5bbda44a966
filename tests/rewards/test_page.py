"""docs/rewards.md: its function and its configuration work as they stand there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from lightning_align.rewards.build import build_reward, parse_reward
from lightning_align.rewards.function import FunctionReward, load_function

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
Ask = Callable[..., Tensor]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    return str(found)


def test_the_function_scores(tmp_path: Path, ask: Ask) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(block("python"))
    scorer = FunctionReward(load_function(f"{path}:brief"), "brief")
    records = [{"prompt": "2 + 2", "answer": "4"}, {"prompt": "why ?"}]
    scores = ask(scorer, ["it is 4", "because"], ["2 + 2", "why ?"], records)
    assert scores[0].item() == pytest.approx(1 - 0.07)
    assert scores[1].isnan()


def test_the_configuration_is_understood() -> None:
    options = yaml.safe_load(block("yaml"))["model"]["init_args"]
    parts = parse_reward(options["reward"])
    assert [(part.name, part.kind, part.weight) for part in parts] == [
        ("helpful", "learned", 1.0),
        ("brief", "function", 0.1),
        ("exact", "function", 2.0),
    ]
    gold = build_reward(options["gold"], default_name="gold")
    assert [(part.name, part.weight) for part in gold.parts] == [("gold", 1.0), ("helpfulness", 0.0), ("safety", 0.0)]
