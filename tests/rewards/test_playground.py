"""The gold score as a reward."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.playground import gold, records
from lightning_align.rewards.playground import Aspect, PlaygroundReward

Ask = Callable[..., Tensor]


@pytest.mark.parametrize("aspect", ["gold", "helpfulness", "safety"])
def test_aspects_are_those_of_gold(aspect: Aspect, ask: Ask) -> None:
    made = records("sft", size=60)
    scores = ask(PlaygroundReward(aspect), [r["completion"] for r in made], [r["prompt"] for r in made])
    expected = [getattr(gold(record["prompt"], record["completion"]), aspect) for record in made]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))


def test_of_a_conversation_the_last_user_turn_counts(ask: Ask) -> None:
    turns = [
        {"role": "user", "content": "translate zib ."},
        {"role": "assistant", "content": "cat ."},
        {"role": "user", "content": "translate fen ."},
    ]
    assert ask(PlaygroundReward(), ["red ."], [turns]).item() == pytest.approx(gold("translate fen .", "red .").gold)


def test_comp_5_foreign_prompts_have_no_gold_and_change_nothing(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    scorer, prompts = PlaygroundReward(), ["translate fen .", "what is love ?", "translate fen ."]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = ask(scorer, ["red ."] * 3, prompts)
            assert scores.isnan().tolist() == [False, True, False]
            assert scores[0] == scores[2] == pytest.approx(gold("translate fen .", "red .").gold)
    assert scorer.num_failed == 2
    assert len(caplog.messages) == 1
    assert "'what is love ?'" in caplog.messages[0]


@pytest.mark.parametrize("prompt", ["what is love ?", [{"role": "system", "content": "translate fen ."}]])
def test_data_that_are_not_the_playgrounds_stop_at_once(prompt: object, ask: Ask) -> None:
    with pytest.raises(UserError, match="its gold score reads its own prompts only"):
        ask(PlaygroundReward(), ["red .", "red ."], [prompt, prompt])
