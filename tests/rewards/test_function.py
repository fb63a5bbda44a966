"""Reward functions: TRL's signature, only what is asked for, and errors that name the function."""

import functools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.plugins import load_function
from lightning_align.rewards.function import FunctionReward

Ask = Callable[..., Tensor]
RECORDS = [{"prompt": "p", "answer": 4, "level": "easy"}, {"prompt": "q", "answer": 5}]


def received(function: Callable[..., Any], ask: Ask, **options: Any) -> Tensor:
    return ask(FunctionReward(function, "mine"), ["a", "bb"], ["p", "q"], RECORDS, **options)


def test_a_function_gets_what_it_asks_for_and_nothing_else(ask: Ask) -> None:
    def reward(completions: list[str], answer: list[int]) -> list[float]:
        assert completions == ["a", "bb"]
        return [float(value) for value in answer]

    assert received(reward, ask).tolist() == [4.0, 5.0]


def test_a_column_called_finished_does_not_stand_in_for_what_the_sampler_says(ask: Ask) -> None:
    def reward(completions: list[str], finished: list[Any]) -> list[float]:
        return [float(value is True) for value in finished]

    records = [{"prompt": "p", "finished": "no"}, {"prompt": "q", "finished": "no"}]
    assert ask(FunctionReward(reward, "mine"), ["a", "bb"], ["p", "q"], records).tolist() == [1.0, 1.0]


def test_keyword_functions_get_everything_once(ask: Ask) -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert prompts == ["p", "q"]
        assert columns == {"answer": [4, 5], "level": ["easy", None], "finished": [True, True]}
        return [1.0, 2.0]

    assert received(reward, ask).tolist() == [1.0, 2.0]


def test_defaults_may_stay_and_may_be_filled(ask: Ask) -> None:
    def reward(completions: list[str], bonus: float = 3.0, answer: Sequence[int] = ()) -> list[float]:
        return [bonus + value for value in answer]

    assert received(reward, ask).tolist() == [7.0, 8.0]


def test_partials_and_objects_are_functions(ask: Ask) -> None:
    class Scorer:
        def __call__(self, completions: list[str], scale: float = 2.0) -> list[float]:
            return [scale * len(text) for text in completions]

    assert received(Scorer(), ask).tolist() == [2.0, 4.0]
    assert received(functools.partial(Scorer(), scale=3.0), ask).tolist() == [3.0, 6.0]


def test_conversations_get_assistant_messages(ask: Ask) -> None:
    conversation = [{"role": "user", "content": "hello"}]

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts == [conversation, "plain"]
        assert completions == [[{"role": "assistant", "content": "hi"}], "there"]
        return [1.0, 2.0]

    assert ask(FunctionReward(reward, "mine"), ["hi", "there"], [conversation, "plain"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "result", [[1, True], (1.0, 1.0), np.array([1.0, 1.0]), torch.ones(2), [np.float32(1), np.int64(1)]]
)
def test_any_sequence_of_numbers_will_do(result: Any, ask: Ask) -> None:
    scores = received(lambda completions: result, ask)
    assert scores.tolist() == [1.0, 1.0]
    assert scores.dtype == torch.float32


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda completions: [1.0], "reward mine returned 1 scores for 2 completions: one each is needed"),
    "a number": (lambda completions: 1.0, "reward mine returned float: it must return a list of numbers"),
    "text": (lambda completions: "ab", "reward mine returned str: it must return a list of numbers"),
    "a dictionary": (lambda completions: {}, "reward mine returned dict: it must return a list of numbers"),
    "words": (lambda completions: ["a", 1], "reward mine returned 'a' as a score: it must be a number or None"),
    "a column": (
        lambda completions, solution: [],
        "reward mine asks for 'solution', which the records lack; there is: answer, completions, finished, level, "
        "prompt, prompts",
    ),
    "a column, and takes the rest": (
        lambda completions, solution, **rest: [],
        "reward mine asks for 'solution', which the records lack; there is: answer, completions, finished, level, "
        "prompts",
    ),
    "leaves": (lambda completions: sys.exit(0), "reward mine tried to end the program: SystemExit: 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_functions_are_one_line(case: str, ask: Ask) -> None:
    function, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        received(function, ask)
    assert str(caught.value) == message


def test_coroutines_are_refused() -> None:
    async def reward(completions: list[str]) -> list[float]:
        return []

    with pytest.raises(UserError, match="reward mine is a coroutine function: give a plain one"):
        FunctionReward(reward, "mine")


def test_comp_5_failures_are_said_once_and_counted(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def reward(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        if "bad" in completions:
            raise KeyError("bad")
        return [float(len(text)) for text in completions]

    scorer = FunctionReward(reward, "mine")
    assert ask(scorer, ["a", "bb"]).tolist() == [1.0, 2.0]
    assert calls == [2]  # one call a batch while all is well
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            values = ask(scorer, ["a", "bad", "ccc"]).tolist()
            assert (values[0], values[2]) == (1.0, 3.0)
            assert math.isnan(values[1])
    assert calls == [2, 3, 1, 1, 1, 3, 1, 1, 1]
    assert (scorer.num_failed, scorer.num_scored) == (2, 6)
    (message,) = caplog.messages
    assert "reward mine failed on 1 completions (KeyError: 'bad')" in message


def test_a_function_that_fails_on_all_of_several_is_broken_and_one_that_fails_on_few_is_not(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    def reward(completions: list[str]) -> list[float]:
        if "" in completions:
            raise RuntimeError("first\nsecond")
        return [1.0 for _ in completions]

    scorer = FunctionReward(reward, "mine")
    with caplog.at_level(logging.WARNING):
        assert ask(scorer, [""]).isnan().all()
    (message,) = caplog.messages
    assert "reward mine failed on 1 completions (RuntimeError: first second)" in message
    assert ask(scorer, [""] * 3).isnan().all()
    assert (scorer.num_failed, scorer.num_scored) == (4, 0)
    with pytest.raises(UserError) as caught:
        ask(scorer, [""] * 4)
    assert str(caught.value) == "reward mine failed on all 4 completions of a batch: RuntimeError: first second"
    assert ask(scorer, ["", "a", "", ""]).isnan().tolist() == [True, False, True, True]


def test_functions_are_loaded_from_files(tmp_path: Path, ask: Ask) -> None:
    path = tmp_path / "my.rewards.py"
    path.write_text("def brief(completions):\n    return [-float(len(text)) for text in completions]\n")
    assert received(load_function(f"{path}:brief"), ask).tolist() == [-1.0, -2.0]


def test_functions_are_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    package = tmp_path / "my_package_of_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "brief.py").write_text("def brief(completions):\n    return [-float(len(text)) for text in completions]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    function = load_function("my_package_of_rewards.brief.brief")
    assert received(function, ask).tolist() == [-1.0, -2.0]


LOADING = {
    "no module": ("no_such_package.reward", "reward no_such_package.reward cannot be imported: No module named"),
    "no function": ("math.cubed", "reward math.cubed: math has no 'cubed'; its functions are: none"),
    "no callable": ("math.pi", "reward math.pi is float, not a function"),
    "no file": ("{folder}/none.py:f", "reward {folder}/none.py:f: there is no file {folder}/none.py"),
    "bad file": ("{folder}/bad.py:f", "reward {folder}/bad.py:f: running {folder}/bad.py failed: NameError: name 'x'"),
    "not in file": (
        "{folder}/good.py:f",
        "reward {folder}/good.py:f: {folder}/good.py has no 'f'; its functions are: g",
    ),
    "leaves": ("{folder}/leaves.py:f", "reward {folder}/leaves.py:f: running {folder}/leaves.py failed: SystemExit: 0"),
    "bad module": ("bad_reward_module.f", "reward bad_reward_module.f: importing bad_reward_module failed: NameError"),
}


@pytest.mark.parametrize("case", LOADING)
def test_loading_errors_are_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text("x + 1\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "bad_reward_module.py").write_text("x + 1\n")
    (tmp_path / "good.py").write_text("def g(completions): ...\ndef _hidden(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec, message = (text.format(folder=tmp_path) for text in LOADING[case])
    with pytest.raises(UserError) as caught:
        load_function(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
