"""From a configuration to parts: what a source is read as, and one line for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.errors import UserError
from lightning_align.rewards.build import PartSpec, build_reward, learned_sources, parse_reward
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


TWO = {"helpfulness": "runs/h", "safety": "runs/s"}
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
    "ensemble of one": (
        {"a": ["x"]},
        "reward part 'a' has source ['x']: an ensemble is a list of at least two sources",
    ),
    "member twice": ({"a": ["x", "y", "x"]}, "reward part 'a' names x twice: give different members"),
    "combines one": (
        {"a": {"source": "x", "combine": "uwo"}},
        "reward part 'a' has combine, but one source: give a list of sources for an ensemble",
    ),
    "unknown ensemble": (
        {"a": {"source": ["x", "y"], "combine": "uow"}},
        "reward part 'a' has combine 'uow'; did you mean 'uwo'? (there are mean, min, uwo)",
    ),
    "useless coefficient": (
        {"a": {"source": ["x", "y"], "uwo_coef": 0.5}},
        "reward part 'a' has uwo_coef, which combine mean does not use",
    ),
    "no parts": ({"combine": "gate"}, "reward has no parts: give parts, a mapping of name to {source, weight}"),
    "unknown combine": (
        {"combine": "gated", "parts": TWO},
        "reward has combine 'gated'; did you mean 'gate'? (there are sum, min, mean, uwo, gate)",
    ),
    "unknown option": ({"parts": TWO, "standardize": True}, "reward has an unknown key 'standardize'; did you mean"),
    "gate without safety": (
        {"combine": "gate", "parts": {"helpfulness": "runs/h", "harm": "runs/s"}},
        "reward combine gate chooses between helpfulness and safety, but no part safety counts",
    ),
    "gate on a measured part": (
        {"combine": "gate", "parts": {"helpfulness": "runs/h", "safety": {"source": "runs/s", "weight": 0}}},
        "reward combine gate chooses between helpfulness and safety, but no part safety counts",
    ),
    "weights in a gate": (
        {"combine": "gate", "parts": {"helpfulness": {"source": "runs/h", "weight": 2}, "safety": "runs/s"}},
        "reward part 'helpfulness' has weight 2, which combine gate has no use for: give 1, or 0 to measure it",
    ),
    "threshold": (
        {"combine": "gate", "parts": TWO, "threshold": 1.5},
        "reward has threshold 1.5: give a probability between 0 and 1",
    ),
    "whiten": ({"combine": "gate", "parts": TWO, "whiten": "all"}, "reward has whiten 'all' (there are batch, running"),
    "threshold of a sum": ({"parts": TWO, "threshold": 0.2}, "reward has threshold, which combine sum does not use"),
    "min of different scales": (
        {"combine": "min", "parts": TWO},
        "reward combine min compares scores of different scales: give standardise true, or assume_comparable true",
    ),
    "min of one": (
        {"combine": "min", "parts": {"a": "x"}, "standardise": True},
        "reward combine min needs at least two",
    ),
    "standardised function": (
        {"parts": {"a": "runs/a", "brief": "rewards.py:brief"}, "standardise": True},
        "reward standardise needs reward models, which know the mean and deviation of their scores; part 'brief' is",
    ),
    "standardise": ({"parts": TWO, "standardise": "yes"}, "reward has standardise 'yes': give true or false"),
    "coefficient": ({"combine": "uwo", "parts": TWO, "uwo_coef": -1}, "reward has uwo_coef -1: give a weight of the"),
    "length penalty": ({"parts": TWO, "length_penalty": 0.1}, "reward length_penalty is 0.1: give {coef, max_length}"),
    "length limit": (
        {"parts": TWO, "length_penalty": {"coef": 0.1, "max_length": -1}},
        "reward length_penalty has max_length -1: give a number of tokens",
    ),
    "named as the stage": (
        {"parts": {"length_penalty": "x"}, "length_penalty": {"coef": 0.1, "max_length": 5}},
        "reward part 'length_penalty' has the name of the stage after it: rename the part",
    ),
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


def test_the_parts_of_a_gate_are_read_as_log_odds_and_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        "def kind(completions):\n    return [2.0 for _ in completions]\n"
        "def careful(completions, caution):\n    return [float(value) for value in caution]\n"
    )
    spec = {
        "combine": "gate",
        "parts": {"helpfulness": f"{path}:kind", "safety": f"{path}:careful"},
        "whiten": "none",
        "threshold": 0.5,
        "length_penalty": {"coef": 0.5, "max_length": 3},
    }
    reward = build_reward(json.loads(json.dumps(spec)))
    records = [{"caution": 1}, {"caution": -1}, {"caution": 1, "is_safety": True}]
    scores = reward.score(["x"] * 3, ["a"] * 3, finished=[True] * 3, records=records, lengths=torch.tensor([3, 3, 5]))
    assert scores.total.tolist() == [2.0, -1.0, 0.0]
    assert list(scores.parts) == ["helpfulness", "safety", "length_penalty"]


def test_the_variance_of_named_parts_is_weighed_as_said(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def one(completions):\n    return [1.0]\n\ndef five(completions):\n    return [5.0]\n")
    spec = {"combine": "uwo", "uwo_coef": 0.5, "parts": {"a": f"{path}:one", "b": f"{path}:five"}}
    assert build_reward(spec).score(["x"], ["y"], finished=[True], records=[{}]).total.tolist() == [3 - 0.5 * 4]


def test_what_a_reward_asks() -> None:
    spec = {"a": ["runs/a", "runs/b"], "b": "runs/c", "c": "rewards.py:f", "d": "playground:safety"}
    assert learned_sources(spec) == ["runs/a", "runs/b", "runs/c"]
    (ensemble, *_) = parse_reward({**spec, "a": {"source": ["runs/a", "runs/b"], "combine": "uwo", "uwo_coef": 0.5}})
    assert (ensemble.members, ensemble.how, ensemble.uwo_coef) == (("runs/a", "runs/b"), "uwo", 0.5)


def test_unknown_aspects_are_one_line() -> None:
    with pytest.raises(
        UserError, match="reward playground:charm is unknown: the playground has gold, helpfulness, safety"
    ):
        build_reward("playground:charm")


def test_specifications_survive_json() -> None:
    spec = {"gold": {"source": "playground", "weight": 0.5}}
    assert parse_reward(json.loads(json.dumps(spec))) == parse_reward(spec)
