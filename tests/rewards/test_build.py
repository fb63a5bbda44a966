"""From a configuration to parts: what a source is read as, and one line for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_align.errors import UserError
from lightning_align.rewards.build import PartSpec, build_reward, parse_reward
from lightning_align.rewards.function import FunctionReward
from lightning_align.rewards.playground import PlaygroundReward


def test_one_source_is_one_part() -> None:
    assert parse_reward("runs/reward") == [PartSpec("reward", "runs/reward", 1.0)]
    assert parse_reward("org/model", default_name="gold") == [PartSpec("gold", "org/model", 1.0)]


def test_a_mapping_names_and_weighs_parts() -> None:
    spec = {"help": "runs/a", "safe": {"source": "runs/b", "weight": 2}, "brief": {"source": "rewards.py:brief"}}
    assert parse_reward(spec) == [
        PartSpec("help", "runs/a", 1.0),
        PartSpec("safe", "runs/b", 2.0),
        PartSpec("brief", "rewards.py:brief", 1.0),
    ]


def test_the_playground_reports_its_aspects_without_counting_them() -> None:
    assert parse_reward("playground", default_name="gold") == [
        PartSpec("gold", "playground", 1.0),
        PartSpec("helpfulness", "playground:helpfulness", 0.0),
        PartSpec("safety", "playground:safety", 0.0),
    ]
    names = [part.name for part in parse_reward({"true": {"source": "playground", "weight": 0.5}, "learned": "runs/r"})]
    assert names == ["true", "learned", "true_helpfulness", "true_safety"]
    assert [part.name for part in parse_reward({"safe": "playground:safety"})] == ["safe"]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("playground", "playground"),
        ("playground:safety", "playground"),
        ("rewards.py:brief", "function"),
        ("folder/rewards.py:brief", "function"),
        ("package.module.function", "function"),
        ("runs/reward", "learned"),
        ("org/model.v2", "learned"),
        ("model", "learned"),
    ],
)
def test_what_a_source_is_read_as(source: str, kind: str) -> None:
    assert PartSpec("x", source, 1.0).kind == kind


def test_a_path_that_exists_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PartSpec("x", "llama.v2", 1.0).kind == "function"
    (tmp_path / "llama.v2").mkdir()
    assert PartSpec("x", "llama.v2", 1.0).kind == "learned"


def test_build_loads_every_part(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def brief(completions):\n    return [-float(len(text)) for text in completions]\n")
    reward = build_reward({"gold": "playground", "brief": {"source": f"{path}:brief", "weight": 0.1}})
    scorers = {part.name: part.scorer for part in reward.parts}
    assert isinstance(scorers["brief"], FunctionReward)
    assert {type(scorers[name]) for name in ("gold", "gold_helpfulness", "gold_safety")} == {PlaygroundReward}
    scores = reward.score(["translate fen . answer :"], [" red ."], finished=[True], records=[{}])
    assert scores.total.tolist() == pytest.approx([3 * 0.84 - 0.1 * 6])
    assert scores.parts["gold_safety"].tolist() == [1.0]


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "reward is {}: give a source, or a mapping of name to {source, weight}"),
    "a number": (3, "reward is 3: give a source"),
    "a list": (["runs/a"], "reward is ['runs/a']: give a source"),
    "unnamed": ({1: "runs/a"}, "reward part 1 has no name"),
    "no source": ({"a": {"weight": 1.0}}, "reward part 'a' is {'weight': 1.0}: give a source"),
    "unknown key": ({"a": {"source": "x", "wieght": 1.0}}, "reward part 'a' has an unknown key 'wieght'"),
    "weight": ({"a": {"source": "x", "weight": "much"}}, "reward part 'a' has weight 'much': give a finite number"),
    "infinite": ({"a": {"source": "x", "weight": float("inf")}}, "reward part 'a' has weight inf"),
    "nan": ({"a": {"source": "x", "weight": float("nan")}}, "reward part 'a' has weight nan"),
    "yes": ({"a": {"source": "x", "weight": True}}, "reward part 'a' has weight True"),
    "no weight": ({"a": {"source": "x", "weight": 0}}, "reward parts a all have weight 0: at least one must count"),
    "same name": ({"gold": "playground", "gold_safety": "runs/s"}, "reward part 'gold_safety' is there twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_before_anything_is_loaded(case: str) -> None:
    spec, message = BAD[case]
    with pytest.raises(UserError) as caught:
        parse_reward(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unknown_aspects_are_one_line() -> None:
    with pytest.raises(
        UserError, match="reward playground:charm is unknown: the playground has gold, helpfulness, safety"
    ):
        build_reward("playground:charm")


def test_specifications_survive_json() -> None:
    spec = {"gold": {"source": "playground", "weight": 0.5}}
    assert parse_reward(json.loads(json.dumps(spec))) == parse_reward(spec)
