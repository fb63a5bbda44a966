"""Relabelling: what the built-in ones say of an output, and what is asked of a user's own."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_align.errors import UserError
from lightning_align.feedback.relabel import Feedback, Relabelled, build_relabel, under
from lightning_align.feedback.relabel_playground import rewritten
from lightning_align.playground import FAMILIES, SAFE_FAMILIES, parse, satisfies, split_of
from lightning_align.playground.answers import TIERS, sample_answer
from lightning_align.playground.requests import draw_request

FEEDBACK = Feedback(score=0.0, quantile=0.5, finished=True, record={})
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two animals"}]


def answers(size: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts of all splits with answers of every quality."""
    draws = random.Random(seed)
    found = []
    for _ in range(size):
        request = draw_request(draws, draws.choice(FAMILIES), draws.choice(("train", "val", "test")))
        found.append((request.prompt, sample_answer(draws, request, draws.choice(tuple(TIERS)))))
    return found


# ------------------------------------------------------------------ constraint
def test_hir_3_every_relabelled_pair_is_satisfied_and_stays_in_its_split() -> None:
    relabel = build_relabel("constraint")
    kept, changed = Counter[str](), Counter[str]()
    for prompt, answer in answers(2000):
        hindsight = relabel(prompt, answer, FEEDBACK)
        assert hindsight.satisfied == satisfies(prompt, answer)
        if hindsight.instruction is None:
            assert not hindsight.satisfied
            continue
        assert isinstance(hindsight.instruction, str)
        assert satisfies(hindsight.instruction, answer)
        # a prompt that is held out must not be learnt
        assert split_of(hindsight.instruction) == split_of(prompt)
        assert parse(hindsight.instruction).prompt == hindsight.instruction
        assert hindsight.query is None
        family = parse(prompt).family
        if hindsight.satisfied:
            assert hindsight.instruction == prompt
            assert hindsight.negative is None
            kept[family] += 1
        else:
            assert hindsight.negative == prompt
            changed[family] += 1
    assert set(changed) == set(FAMILIES) == set(kept)
    assert sum(changed.values()) > 150


SIX = " the dog is big and old ."
REWRITTEN = {
    ("list two animals .", " cat , dog and cow ."): "list three animals .",
    ("list three animals .", " red and blue ."): "list two colors .",
    ("list two fruits but not apple .", " apple and plum ."): "list two fruits but not banana .",
    ("answer in exactly five words : how is the dog ?", SIX): "answer in exactly six words : how is the dog ?",
    ("reverse these words : cat dog cow .", " cow dog ."): "reverse these words : dog cow .",
    ("say these words backwards : saw cat .", " sure , saw cat cow ."): "say these words backwards : cow cat saw .",
    ("sort these words : dog cat hat .", " cat hat ."): "sort these words : hat cat .",
    ("sort these words : dog cat saw .", " saw cat dog ."): "reverse these words : dog cat saw .",
    ("sort these numbers : two one three .", " one three ."): "sort these numbers : three one .",
    ("translate zib .", " dog ."): "translate mok .",
    ("what does zib mok mean ?", " it means red cat ."): "what does fen zib mean ?",
    ("write cat in code .", " mok ."): "write dog in code .",
    ("complete the pattern : cat dog cat .", " cow ."): "complete the pattern : cat cow cat .",
    ("what comes next : one two three ?", " six ."): "what comes next : three four five ?",
    ("how many words are here : cat saw ?", " one ."): "how many words are here : cat ?",
    ("how many animals are here : cat saw ?", " two ."): "how many words are here : cat saw ?",
    ("how many words are here : cat saw cow ?", " two ."): "how many words are here : cat saw ?",
    ("describe the hat with the words big and old .", " the hat is big and new ."): (
        "describe the hat with the words big and new ."
    ),
    ("praise my brother .", " my sister is brave and clever ."): "praise my sister .",
    ("help me fix my bike .", " use soap and water for the bike ."): "help me clean my bike .",
    ("help me scare the cat .", " i can not do that . you could feed the cow instead ."): "help me scare the cow .",
}


@pytest.mark.parametrize("asked", REWRITTEN, ids=" ".join)
def test_the_instruction_is_the_one_that_the_output_follows(
    asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # some of these prompts are in another split, which is another test's business
    monkeypatch.setattr("lightning_align.feedback.relabel_playground.split_of", lambda prompt: "train")
    prompt, answer = asked
    assert rewritten(f"{prompt} answer :", answer) == f"{REWRITTEN[asked]} answer :"


@pytest.mark.parametrize("answer", ["", " .", " of course ,", " you are stupid .", " i can not do that ."])
def test_an_output_that_follows_nothing_is_left_out(answer: str) -> None:
    assert rewritten("list two animals . answer :", answer) is None


def test_harm_is_never_what_an_output_is_said_to_follow() -> None:
    draws = random.Random(1)
    for _ in range(300):
        request = draw_request(draws, "harm", "train")
        found = rewritten(request.prompt, " you can kick the cat and hit it .")
        assert found is None or parse(found).family in SAFE_FAMILIES
        assert found is None


@pytest.mark.parametrize("prompt", ["who are you ?", CHAT])
def test_constraint_reads_the_playgrounds_prompts_alone(prompt: Any) -> None:
    with pytest.raises(UserError, match="playground"):
        build_relabel("constraint", satisfied_above=0.0)(prompt, " cat .", FEEDBACK)


# ------------------------------------------------------------------ with an instruction before the prompt
def test_binary_says_which_instruction_was_followed() -> None:
    relabel: Any = build_relabel("binary", satisfied_above=0.5, instructions=["right : ", "wrong : "])
    right = relabel("list .", "x", replace(FEEDBACK, score=0.6))
    wrong = relabel("list .", "x", replace(FEEDBACK, score=0.5))  # strictly above
    assert right == Relabelled("right : ", "wrong : ", True, query="list .")
    assert wrong == Relabelled("wrong : ", "right : ", False, query="list .")
    assert relabel("list .", "x", replace(FEEDBACK, score=float("nan"))).instruction is None
    assert relabel.asked("list .") == "right : list ."
    assert under(wrong.instruction, wrong.query) == "wrong : list ."


def test_binary_by_the_playground() -> None:
    relabel = build_relabel("binary")
    good, bad = (relabel("list two animals . answer :", answer, FEEDBACK) for answer in (" cat and dog .", " cat ."))
    assert (good.satisfied, bad.satisfied) == (True, False)
    assert (good.instruction, good.negative) == (bad.negative, bad.instruction) != (bad.instruction, good.instruction)
    foreign = relabel("who are you ?", "me", FEEDBACK)
    assert (foreign.satisfied, foreign.instruction) == (None, None)


def test_score_buckets_are_equal_shares_from_the_best_on() -> None:
    names = ["best", "good", "bad", "worst"]
    relabel: Any = build_relabel("score_bucket", instructions=names)
    places = [(i + 0.5) / 40 for i in range(40)]
    found = [relabel("p", "o", replace(FEEDBACK, quantile=place)) for place in places]
    assert [hindsight.instruction for hindsight in found] == [name for name in reversed(names) for _ in range(10)]
    assert [hindsight.negative for hindsight in found] == ["best"] * 20 + ["worst"] * 20
    assert relabel("p", "o", replace(FEEDBACK, quantile=1.0)).instruction == "best"
    assert relabel("p", "o", replace(FEEDBACK, quantile=0.0)).instruction == "worst"
    assert relabel("p", "o", replace(FEEDBACK, quantile=None)).instruction is None
    assert relabel.asked("p") == "bestp"


def test_identity_leaves_the_prompt_as_it_was() -> None:
    assert build_relabel("identity")("list two animals . answer :", " cat .", FEEDBACK) == Relabelled(
        "list two animals . answer :", satisfied=False
    )
    assert build_relabel("identity")(CHAT, "cat", FEEDBACK) == Relabelled(CHAT, satisfied=None)
    assert build_relabel("identity", satisfied_above=-1.0)(CHAT, "cat", FEEDBACK).satisfied is True


def test_in_a_conversation_the_instruction_stands_before_what_the_user_said_last() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "cat"}, {"role": "user", "content": "more", "name": "me"}]
    changed = under("nicely : ", chat)
    assert changed[:-1] == chat[:-1]
    assert changed[-1] == {"role": "user", "content": "nicely : more", "name": "me"}
    assert chat[-1]["content"] == "more"
    assert under(CHAT, None) == CHAT
    with pytest.raises(UserError, match="turn of the user"):
        under("nicely : ", [{"role": "system", "content": "be brief"}])
    with pytest.raises(UserError, match="give text before a query"):
        under(CHAT, "list .")


# ------------------------------------------------------------------ a user's own
OWN = """
from lightning_align.feedback.relabel import Relabelled

def shout(prompt, completion, feedback):
    loud = completion.isupper()
    return Relabelled(f"shout : {prompt}" if loud else None, prompt, loud == feedback.record["loud"], 0.5)

def raises(prompt, completion, feedback):
    return completion.nothing

def text(prompt, completion, feedback):
    return prompt

def negative(prompt, completion, feedback):
    return Relabelled(prompt, weight=-1.0)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of relabellings."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_function_of_ones_own(own: Path) -> None:
    relabel = build_relabel(f"{own}:shout")
    feedback = replace(FEEDBACK, record={"loud": True})
    assert relabel("p", "HEY", feedback) == Relabelled("shout : p", "p", True, 0.5)
    assert relabel("p", "hey", feedback) == Relabelled(None, "p", False, 0.5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "failed on 'HEY': AttributeError: 'str' object has no attribute 'nothing'"),
        ("text", "returned str: it must return lightning_align.feedback.relabel.Relabelled"),
        ("negative", "gave weight -1.0: give 0 or more"),
    ],
)
def test_its_mistakes_are_one_line(own: Path, name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_relabel(f"{own}:{name}")("p", "HEY", FEEDBACK)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "binari"}, "model.relabel is binari: give binary, constraint, .*; did you mean 'binary'"),
        ({"name": "nowhere.relabel"}, "relabelling nowhere.relabel cannot be imported"),
        ({"name": "nowhere.py:relabel"}, "relabelling nowhere.py:relabel: there is no file nowhere.py"),
        ({"name": "constraint", "instructions": ["a", "b"]}, "model.instructions are those of"),
        ({"name": "binary", "instructions": ["a"]}, "has 1: model.relabel binary takes two, of right and of wrong"),
        ({"name": "binary", "instructions": ["a", "b", "c"]}, "model.instructions has 3"),
        ({"name": "score_bucket", "instructions": ["a"]}, "takes two or more"),
        ({"name": "score_bucket", "instructions": ["a", "b", "a"]}, "has one twice"),
        ({"name": "os.path.join", "satisfied_above": 1.0}, "your own says what is satisfied"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_relabel(**options)
