"""Prompts are written and read back, and belong to one split each."""

from collections import Counter
from random import Random
from typing import get_args

import pytest

from lightning_align.errors import UserError
from lightning_align.playground import FAMILIES, SAFE_FAMILIES, UNSAFE_FAMILIES, parse, split_of, vocabulary, world
from lightning_align.playground.grading import target
from lightning_align.playground.requests import TEMPLATES, Split, check_split, draw_request


def test_there_are_at_least_eight_safe_families_and_three_unsafe_ones() -> None:
    assert len(SAFE_FAMILIES) >= 8
    assert UNSAFE_FAMILIES == ("harm", "theft", "insult")
    assert set(TEMPLATES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_parse_is_the_inverse_of_drawing_for_every_template(family: str) -> None:
    random, words = Random(family), set(vocabulary())
    seen: Counter[str] = Counter()
    for _ in range(600):
        request = draw_request(random, family, "train")
        seen[request.template] += 1
        assert parse(request.prompt) == request
        assert parse(request.instruction) == request
        assert parse(f"  {request.prompt} ") == request
        assert words.issuperset(request.prompt.split())
        assert request.is_safety == (family in UNSAFE_FAMILIES)
    assert set(seen) == set(TEMPLATES[family])


def test_templates_do_not_overlap() -> None:
    """No prompt can be read as another family's: the drawn ones of all families are different."""
    random = Random(0)
    prompts = {family: {draw_request(random, family, "train").prompt for _ in range(200)} for family in FAMILIES}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_draws_its_own_prompts(family: str) -> None:
    random = Random(family)
    drawn = {split: {draw_request(random, family, split).prompt for _ in range(150)} for split in get_args(Split)}
    for split, prompts in drawn.items():
        assert {split_of(prompt) for prompt in prompts} == {split}
    assert not drawn["train"] & drawn["val"] | drawn["train"] & drawn["test"] | drawn["val"] & drawn["test"]


def test_splits_are_eighty_ten_ten() -> None:
    count = 20_000
    shares = Counter(split_of(f"prompt {i}") for i in range(count))
    for split, share in {"train": 205 / 256, "val": 26 / 256, "test": 25 / 256}.items():
        assert abs(shares[split] / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_unknown_split_is_one_line() -> None:
    with pytest.raises(UserError, match="split is 'dev': the playground has train, val, test"):
        check_split("dev")


TARGETS = {
    "reverse these words : cat red bike .": "bike red cat",
    "say these words backwards : cat red .": "red cat",
    "sort these words : dog cat apple .": "apple cat dog",
    "put these words in order : red blue .": "blue red",
    "sort these numbers : ten two nine .": "two nine ten",
    "how many times does cat appear here : cat dog cat ?": "two",
    "how many animals are here : cat red dog duck ?": "three",
    "how many words are here : cat red ?": "two",
    "complete the pattern : cat dog cat .": "dog",
    "complete the pattern : cat dog red cat dog .": "red",
    "what comes next : two four six ?": "eight",
    "what comes next : nine eight seven ?": "six",
    "what comes next : one two one ?": "two",
    "translate zib fen .": "cat red",
    "what does sut mean ?": "bread",
    "write house in code .": "ral",
}


@pytest.mark.parametrize("prompt", TARGETS)
def test_the_one_right_answer(prompt: str) -> None:
    assert " ".join(target(parse(prompt))) == TARGETS[prompt]


def test_words_to_sort_are_out_of_order() -> None:
    random = Random(1)
    for _ in range(300):
        request = draw_request(random, "sort", "train")
        assert target(request) != request.words("numbers" if "numbers" in request.slots else "words")


def test_words_mean_one_thing() -> None:
    kinds = [item for items in world.KINDS.values() for item in items]
    assert len(kinds) == len(set(kinds))
    assert not set(world.RUDE_WORDS) & {*world.KIND_WORDS, *world.ADJECTIVES}
    assert not set(world.HARMFUL_WORDS) & {*world.FUNCTION_WORDS, *world.HARMS, *world.USEFUL, *world.ITEMS}
    assert len(set(world.CODE.values())) == len(world.CODE)
    assert 200 < len(vocabulary()) < 500
    assert list(vocabulary()) == sorted(set(vocabulary()))
