"""Judges: position bias taken out, answers swapped, ratings, and questions that are never put twice."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.journal import Journal
from lightning_align.feedback.judges import CachedJudge, FunctionJudge, Judge, Pair, preferences
from lightning_align.feedback.models import LocalModel, Reply
from lightning_align.feedback.wording import BUILT_IN, DEFAULT
from lightning_align.feedback.wording_file import read_wording
from lightning_align.playground import texts
from lightning_align.rollout.types import SamplingParams

PROMPTS = ["list two animals . answer :", "count to three . answer :", "say hello . answer :"]
FIRST = [" cat , dog .", " one , two , three .", " hello ."]
SECOND = [" dog .", " one .", " no ."]


class Scripted:
    """A language model that says what a function of the question says."""

    name, chat = "scripted", False

    def __init__(self, logps: Callable[[str], list[float]]) -> None:
        self.logps = logps
        self.asked: list[str] = []

    def key(self) -> str:
        return "scripted"

    def counts(self) -> Mapping[str, int]:
        return {}

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
        assert params.greedy
        return [Reply("the first is longer", True, failed="hello" in str(prompt)) for prompt in prompts]

    def option_logps(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Tensor:
        self.asked += [str(prompt) for prompt in prompts]
        return torch.tensor([self.logps(str(prompt)) for prompt in prompts])


def value(metrics: Mapping[str, tuple[Tensor, Tensor]], name: str) -> float:
    return float(metrics[name][0] / metrics[name][1])


def test_aif_1_a_bias_for_a_place_alone_comes_out_as_a_half() -> None:
    judge = Judge(Scripted(lambda _: [math.log(0.9), math.log(0.1)]), DEFAULT)
    label, metrics = preferences(judge, PROMPTS, FIRST, SECOND)
    torch.testing.assert_close(label, torch.full((3,), 0.5))
    assert value(metrics, "ai/position_bias") == 1
    assert value(metrics, "ai/mass") == pytest.approx(1)
    given, _ = preferences(judge, PROMPTS, FIRST, SECOND, orders="given")
    torch.testing.assert_close(given, torch.full((3,), 0.9))


def test_aif_2_swapped_answers_have_the_other_probability(local_model: Callable[..., LocalModel]) -> None:
    judge = Judge(local_model(), DEFAULT)
    label, _ = preferences(judge, PROMPTS, FIRST, SECOND)
    swapped, _ = preferences(judge, PROMPTS, SECOND, FIRST)
    torch.testing.assert_close(label, 1 - swapped, rtol=0, atol=1e-6)
    assert (label - 0.5).abs().min() > 1e-4


def test_aif_3_constant_log_probs_are_rated_zero() -> None:
    rating = Judge(Scripted(lambda _: [math.log(0.05)] * 10), DEFAULT).rate(PROMPTS, FIRST)
    torch.testing.assert_close(rating.reward, torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(rating.mass, torch.full((3,), 0.5))


def test_a_clamp_is_done_before_the_average_and_failed_reasons_leave_no_label() -> None:
    sure = Scripted(lambda text: [0.0, -30.0] if text.index(" cat") < text.index(" dog .") else [-0.1, -2.0])
    judge = Judge(sure, DEFAULT, bounds=(0.4, 0.6), rationale_tokens=8)
    pairs = [Pair(PROMPTS[0], FIRST[0], SECOND[0]), Pair(PROMPTS[2], FIRST[2], SECOND[2])]
    found = judge.compare([pairs[0]])
    torch.testing.assert_close(found.first_wins, torch.tensor([0.6]))
    assert "Rationale: the first is longer\n\nPreferred Response=" in sure.asked[-1]
    sure.logps = lambda _: [0.0, -30.0]
    failed = judge.compare(pairs)
    assert failed.first_wins.isnan().tolist() == [False, True]
    label, metrics = preferences(judge, PROMPTS[::2], FIRST[::2], SECOND[::2])
    assert label.isnan().tolist() == [False, True]
    assert value(metrics, "ai/unanswered") == 0.5


def test_principles_are_the_same_in_both_orders_and_averaged_over_all() -> None:
    wording = read_wording("default")
    with pytest.raises(UserError, match="names no principle in its comparison"):
        wording.with_principles(["be kind"])
    asked = Scripted(lambda text: [0.0, -1.0] if "safer" in text else [-2.0, 0.0])
    all_three = BUILT_IN["playground"].with_principles(list(texts.QUESTIONS.values()))
    with pytest.raises(UserError, match="the playground compares by better, more helpful, safer, not by 'saferr'; did"):
        BUILT_IN["playground"].with_principles(["saferr"])
    drawn = Judge(asked, all_three)
    for prompt, first, second in zip(PROMPTS, FIRST, SECOND, strict=True):
        drawn.compare([Pair(prompt, first, second), Pair(prompt, second, first)])
        one, other = asked.asked[-2:]
        assert one.split("which is")[1] == other.split("which is")[1]
    found = Judge(asked, all_three, principles="all").compare([Pair(PROMPTS[0], FIRST[0], SECOND[0])])
    expected = (torch.sigmoid(torch.tensor([1.0, -2.0, -2.0]))).mean()
    torch.testing.assert_close(found.first_wins[0], expected)


def test_questions_of_the_playground_are_those_of_its_text_and_chats_get_messages() -> None:
    wording = BUILT_IN["playground:safety"]
    question = wording.compare(PROMPTS[0], FIRST[0], SECOND[0], "safer")
    assert wording.compare_finally(question) == texts.comparison_prompt(PROMPTS[0], FIRST[0], SECOND[0], "safety")
    asked = Scripted(lambda _: [0.0, 0.0])
    asked.chat = True
    Judge(asked, wording).compare([Pair(PROMPTS[0], FIRST[0], SECOND[0])])
    Judge(asked, DEFAULT).compare([Pair(PROMPTS[0], FIRST[0], SECOND[0])])
    assert asked.asked[0].endswith("which is safer :")
    assert asked.asked[1].startswith("[{'role': 'user', 'content': 'You are an expert rater")


def test_aif_5_what_was_said_is_never_asked_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def longer(prompts: list[str], first: list[str], second: list[str]) -> list[float | None]:
        calls.append(len(prompts))
        return [
            None if "hello" in p else float(len(a) > len(b)) for p, a, b in zip(prompts, first, second, strict=True)
        ]

    for attempt in range(2):
        judge = CachedJudge(FunctionJudge(longer, "longer"), Journal(tmp_path / "journal"), chunk=2)
        label, _ = preferences(judge, PROMPTS, FIRST, SECOND)
        assert label.tolist()[:2] == [1, 1]
        assert label[2].isnan()
        assert (judge.num_asked, judge.num_cached, judge.num_failed) == ((6, 0, 2), (2, 4, 2))[attempt]
    assert calls == [2, 2, 2, 2]


@pytest.mark.parametrize("result", [[0.5], [0.5, 1.5, 0], ["a", 0, 0], [True, None, "x"]])
def test_a_function_that_returns_something_else_is_refused(result: list[object]) -> None:
    with pytest.raises(UserError, match="judge mine returned"):
        FunctionJudge(lambda *_: result, "mine").compare([Pair("p", "a", "b")] * 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compare: x", "unknown field compare; did you mean 'comparison'"),
        ("comparison: '{prompt} {first}'", "field comparison lacks {second}"),
        ("comparison: '{prompt} {first} {second} {third}'", "field comparison has no {third} to fill in"),
        ("principles: [be kind]", "field comparison lacks {principle}: give both, or neither"),
        ("options: ['1']", "field options is ['1']: give two replies"),
        ("options: ['1', '1']", "field options has the same reply for both answers"),
        ("exemplars: [{prompt: a, first: b, second: c}]", "field exemplars[0].preferred is missing"),
        ("exemplars: [{prompt: a, first: b, second: c, preferred: 3}]", "field exemplars[0].preferred is 3"),
        ("ratings: ['1']", "field ratings is ['1']: give a list of at least 2"),
        ("[1]", "the file is list"),
    ],
)
def test_wordings_are_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_wording(str(path))
    assert message in str(caught.value)


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        "preamble: Choose.\nexemplars: [{prompt: q, first: a, second: b, preferred: 2}]\n"
        "comparison: '{prompt}|{first}|{second}|{principle}'\nprinciples: [kind]\noptions: [[A, ' A'], [B]]\n"
    )
    wording = read_wording(str(path))
    question = wording.compare_finally(wording.compare("p", " x", "y ", "kind"))
    ending = "Preferred Response="
    assert question == f"Choose.\n\nq|a|b|kind\n\n{ending}B\n\np|x|y|kind\n\n{ending}"
    assert wording.ratings == DEFAULT.ratings
