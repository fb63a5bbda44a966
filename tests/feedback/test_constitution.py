"""Constitutions: the form of questions, the draw of principles, and what is said of a bad file."""

from collections import Counter
from pathlib import Path

import pytest
from scipy import stats

from lightning_align.errors import UserError
from lightning_align.feedback.constitution import BUILT_IN, PLAYGROUND, Constitution, Example, Principle
from lightning_align.feedback.constitution_file import read_constitution
from lightning_align.playground import texts

SHOUTING = Principle("quiet", "Is it loud?", "Say it quietly.")
EXAMPLE = Example("Hi!", "GO AWAY", "Is it loud?", "It is.", "Say it quietly.", "Please leave.")
GOOD = """
principles:
  - {name: quiet, critique_request: "Is it loud?", revision_request: Say it quietly.}
  - {critique_request: "Is it {odd}?", revision_request: Say it evenly.}
preferences: [Choose the quiet one.]
examples:
  - {prompt: Hi!, completion: GO AWAY, critique_request: "Is it loud?", critique: It is.,
     revision_request: Say it quietly., revision: Please leave.}
templates: {critique: "{prompt} {completion} | {critique_request}", critique_stop: ["\\n"], separator: "\\n"}
"""


def test_the_playgrounds_questions_have_the_form_that_its_models_have_read() -> None:
    prompt, completion = "list two animals . answer :", " cat and dog . "
    for rule, known in zip(PLAYGROUND.principles, texts.PRINCIPLES, strict=True):
        asked = PLAYGROUND.ask_critique(prompt, completion, rule)
        assert asked == texts.critique_prompt(prompt, completion, known)
        asked = PLAYGROUND.ask_revision(prompt, completion, rule, " no , it is rude .")
        assert asked == texts.revision_prompt(prompt, completion, known, " no , it is rude .")
        alone = PLAYGROUND.ask_revision(prompt, completion, rule, None)
        assert alone == f"{prompt} cat and dog . {known.revision_request} answer :"


def test_conversations_are_asked_in_messages_behind_the_system_and_the_examples() -> None:
    constitution = Constitution("mine", (SHOUTING,), examples=(EXAMPLE,))
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    critique = constitution.ask_critique(prompt, "HELLO ", SHOUTING)
    assert [turn["content"] for turn in critique] == [
        *("Be kind.", "Hi!", "GO AWAY", "Is it loud?", "It is.", "Hello", "HELLO", "Is it loud?"),
    ]
    revision = constitution.ask_revision(prompt, "HELLO", SHOUTING, "Yes.")
    assert [turn["content"] for turn in revision] == [
        *("Be kind.", "Hi!", "GO AWAY", "Is it loud?", "It is.", "Say it quietly.", "Please leave."),
        *("Hello", "HELLO", "Is it loud?", "Yes.", "Say it quietly."),
    ]
    alone = constitution.ask_revision(prompt, "HELLO", SHOUTING, None)
    assert [turn["content"] for turn in alone][-3:] == ["Hello", "HELLO", "Say it quietly."]
    assert [turn["content"] for turn in alone][1:5] == ["Hi!", "GO AWAY", "Say it quietly.", "Please leave."]
    for messages in (critique, revision, alone):
        roles = [turn["role"] for turn in messages[1:]]
        assert roles == [("user", "assistant")[index % 2] for index in range(len(roles))]
    assert prompt[-1]["content"] == "Hello"


def test_texts_with_braces_are_put_in_as_they_are() -> None:
    asked = PLAYGROUND.ask_critique("{prompt} {x} answer :", "{completion}", PLAYGROUND.principles[0])
    assert asked == "{prompt} {x} answer : {completion} critique : is it safe ?"


def test_cai_1_draws_are_fixed_uniform_and_independent() -> None:
    draws = [[PLAYGROUND.draw(f"key {k}", step).name for step in (1, 2)] for k in range(4000)]
    assert draws == [[PLAYGROUND.draw(f"key {k}", step).name for step in (1, 2)] for k in range(4000)]
    for step in (0, 1):
        assert stats.chisquare(list(Counter(row[step] for row in draws).values())).pvalue > 0.001
    both = Counter(map(tuple, draws))
    assert len(both) == 16
    assert stats.chisquare(list(both.values())).pvalue > 0.001


def test_a_file_is_read_with_all_its_fields(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    read = read_constitution(str(tmp_path / "mine.yaml"))
    assert [rule.name for rule in read.principles] == ["quiet", "2"]
    assert read.preferences == ("Choose the quiet one.",)
    assert read.examples == (EXAMPLE,)
    asked = read.ask_critique("Hello", "HELLO", read.principles[1])
    assert asked == "Hi! GO AWAY | Is it loud? It is.\nHello HELLO | Is it {odd}?"
    assert read.templates.critique_stop == ("\n",)
    assert read.requests == ("Is it loud?", "Say it quietly.", "Is it {odd}?", "Say it evenly.")
    assert read.key() != PLAYGROUND.key()
    (tmp_path / "other.yaml").write_text(GOOD)
    assert read_constitution(str(tmp_path / "other.yaml")).key() == read.key()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_ones_are_complete(name: str) -> None:
    constitution = read_constitution(name)
    assert len({rule.name for rule in constitution.principles}) == len(constitution.principles) >= 3
    assert constitution.preferences
    assert constitution.ask_critique("Hello", "Hi.", constitution.principles[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a", "the file is list: give a mapping of principles, preferences, examples, templates"),
        ("principles: [", "cannot be read: while parsing"),
        ("preferences: [a]", "field principles is missing"),
        ("principles: []", "field principles is empty: give at least one principle"),
        ("principles: a", "field principles is 'a': give a list"),
        ("principle: []", "unknown field principle; did you mean 'principles'?"),
        ("principles: [a]", "field principles[0] is str: give a mapping of name, critique_request, revision_request"),
        ("principles: [{critique_request: a}]", "field principles[0].revision_request is missing"),
        (
            "principles: [{critique_request: a, revision_reqest: b}]",
            "unknown field principles[0].revision_reqest; did you mean 'revision_request'?",
        ),
        (
            "principles: [{critique_request: a, revision_request: 3}]",
            "field principles[0].revision_request is 3: give a text, in quotes",
        ),
        ("principles: [{critique_request: ' ', revision_request: b}]", "field principles[0].critique_request is empty"),
        (
            "principles: [{name: x, critique_request: a, revision_request: b}, "
            "{name: x, critique_request: a, revision_request: b}]",
            "field principles[1].name: 'x' is there twice, rename one",
        ),
        (f"{GOOD.split('templates')[0]}templates: {{critique: '{{prompt}}'}}", "templates.critique lacks {completion}"),
        (
            f"{GOOD.split('templates')[0]}templates: {{critique: '{{answer}}'}}",
            "field templates.critique has no {answer} to fill in (there are prompt, completion, critique_request)",
        ),
        (f"{GOOD.split('templates')[0]}templates: {{revision: '{{'}}", "a brace that is meant as one is written twice"),
        (f"{GOOD.split('preferences')[0]}examples: [{{prompt: a}}]", "field examples[0].completion is missing"),
    ],
)
def test_a_bad_file_is_one_line_with_its_field(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_constitution(str(path))
    assert said in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_a_file_that_is_not_there_names_the_built_in_ones() -> None:
    with pytest.raises(UserError, match=r"no such file; did you mean 'playground'\? \(built in: playground, default\)"):
        read_constitution("playgrund")
