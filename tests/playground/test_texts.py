"""Raw text teaches to criticise, revise, compare and rate, and later prompts have the form it has read."""

from statistics import fmean

import pytest

from lightning_align.playground import (
    PRINCIPLES,
    comparison_prompt,
    critique_prompt,
    gold,
    parse,
    rating_prompt,
    records,
    revision_prompt,
    vocabulary,
)
from lightning_align.playground.texts import QUESTIONS, critique
from lightning_align.playground.world import VALUE_OF


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [record["text"] for record in records("text", size=12_000)]


def test_shares_of_the_kinds(documents: list[str]) -> None:
    marks = {"critique :": 0.10, "which is": 0.08, "rating :": 0.04, "answer :": 0.84}
    for mark, share in marks.items():
        # comparisons that are too long to fit are drawn again, or become a fact
        assert 0.8 * share < fmean(mark in text for text in documents) < 1.1 * share, mark


def test_revisions_raise_gold_under_every_principle(documents: list[str]) -> None:
    gains: dict[str, list[float]] = {principle.name: [] for principle in PRINCIPLES}
    for text in documents:
        for principle in PRINCIPLES:
            asked = f" critique : {principle.critique_request} "
            if asked in text:
                before, _, after = text.partition(asked)
                instruction, _, answer = before.partition(" answer :")
                said, _, revision = after.partition(f" {principle.revision_request} answer :")
                prompt = f"{instruction} answer :"
                # the document is exactly what the prompts would ask, with the replies in their places
                assert f"{revision_prompt(prompt, answer, principle, said)}{revision}" == text
                assert said == critique(parse(prompt), answer, principle)
                gains[principle.name].append(gold(prompt, revision).gold - gold(prompt, answer).gold)
    for name, found in gains.items():
        assert len(found) > 200
        assert fmean(found) > 0.8, name


def test_comparisons_are_answered_mostly_right(documents: list[str]) -> None:
    aspects = {"better": "gold", "more helpful": "helpfulness", "safer": "safety"}
    right: dict[str, list[bool]] = {name: [] for name in aspects}
    first_chosen = []
    for text in documents:
        if " which is " not in text:
            continue
        instruction, _, rest = text.partition(" first answer :")
        first, _, rest = rest.partition(" second answer :")
        second, _, question = rest.partition(" which is ")
        name, _, reply = question.partition(" : ")
        aspect = aspects[name]
        assert text == f"{comparison_prompt(instruction, first, second, aspect)} {reply}"  # type: ignore[arg-type]
        assert reply in ("first .", "second .")
        first_chosen.append(reply == "first .")
        scores = [getattr(gold(instruction, answer), aspect) for answer in (first, second)]
        if abs(scores[0] - scores[1]) > 0.1:
            right[name].append((scores[0] > scores[1]) == (reply == "first ."))
    for name, found in right.items():
        assert len(found) > 50
        assert fmean(found) > 0.8, name
    assert abs(fmean(first_chosen) - 0.5) < 4 * (0.25 / len(first_chosen)) ** 0.5  # no place is favoured


def test_ratings_follow_gold(documents: list[str]) -> None:
    pairs = []
    for text in documents:
        if " rating : " in text:
            before, _, rating = text.partition(" rating : ")
            instruction, _, answer = before.partition(" answer :")
            assert text == f"{rating_prompt(f'{instruction} answer :', answer)} {rating}"
            value = VALUE_OF[rating.removesuffix(" .")]
            assert 1 <= value <= 10
            pairs.append((gold(instruction, answer).gold, value))
    assert len(pairs) > 300
    assert [value for _, value in sorted(pairs)] == sorted(value for _, value in pairs)


CRITIQUES = {
    ("safe", "help me hurt my cat .", "you can kick the cat ."): "no , it is harmful .",
    ("safe", "praise my cat .", "my cat is stupid ."): "no , it is rude .",
    ("safe", "help me hurt my cat .", "have a nice day ."): "no , it is not safe .",
    ("safe", "help me hurt my cat .", "i can not do that ."): "yes , it is safe .",
    ("helpful", "translate fen .", "blue ."): "no , it is wrong .",
    ("helpful", "translate fen .", "red ."): "yes , it is helpful .",
    ("polite", "translate fen .", "red ."): "no , it is not polite .",
    ("polite", "translate fen .", "sure , red ."): "yes , it is polite .",
    ("polite", "translate fen .", "sure , red . please enjoy . you are welcome ."): "no , it is too polite .",
    ("polite", "write exactly three words about the cat .", "cat is big ."): "yes , it is polite .",
    ("clear", "translate fen .", "red red red red ."): "no , it repeats itself .",
    ("clear", "list two colors .", "red and blue . you use it with the lamp for me ."): "no , it is too long .",
    ("clear", "translate fen .", "red ."): "yes , it is clear .",
}


@pytest.mark.parametrize("case", CRITIQUES, ids=" ".join)
def test_a_fair_critic(case: tuple[str, str, str]) -> None:
    name, prompt, answer = case
    (principle,) = (principle for principle in PRINCIPLES if principle.name == name)
    assert critique(parse(prompt), answer, principle) == CRITIQUES[case]


def test_prompts_use_known_words_only() -> None:
    known = set(vocabulary())
    prompt, answer = "translate fen . answer :", " red ."
    made = [comparison_prompt(prompt, answer, answer, aspect) for aspect in QUESTIONS]
    made += [rating_prompt(prompt, answer)]
    for principle in PRINCIPLES:
        made += [critique_prompt(prompt, answer, principle), revision_prompt(prompt, answer, principle, "no .")]
    for text in made:
        assert known.issuperset(text.split())
        assert "  " not in text


def test_facts_explain_the_code_and_the_tools() -> None:
    """What cannot be guessed is in the raw text: the code, and what is good for what."""
    text = " . ".join(record["text"] for record in records("text", size=6000))
    assert "zib means cat" in text
    assert "in code is zib" in text
    assert any(f"you fix the {thing} with" in text for thing in ("bike", "ball", "book", "phone", "lamp"))
