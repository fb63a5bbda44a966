"""What the parser sees in a text."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.playground import world
from lightning_align.playground.reading import (
    affirmed,
    answer_words,
    claims,
    dangling,
    declines,
    distance,
    offers,
    repetitions,
    without_politeness,
)


def words(text: str) -> list[str]:
    return text.split()


FEW_WORDS = st.lists(st.sampled_from(["cat", "dog", "red"]), max_size=6)


def test_what_is_denied_is_not_said() -> None:
    assert affirmed(words("it is not red , but blue .")) == words("it is , but blue .")
    assert affirmed(words("not red but blue")) == ["but", "blue"]


def test_claims_are_about_the_noun_and_end_with_the_sentence() -> None:
    said = claims(words("big dog . the cat is soft and old . slow ."), "cat")
    assert said == {"soft", "and", "old"}
    assert claims(words("soft is the cat ."), "cat") == set()
    assert claims(words("the cat is not soft , it is old"), "cat") == {",", "it", "is", "old"}


def test_the_first_sentence_with_content_is_the_answer() -> None:
    assert answer_words(words("the . red dog . cat . blue")) == (["red", "dog"], ["cat", "blue"])
    assert answer_words(words("it is not red .")) == ([], [])


def test_offers_need_their_noun_next_to_them() -> None:
    assert offers(words("feed my old cat"), ("feed",), {"cat"})
    assert not offers(words("feed you and the cat"), ("feed",), {"cat"})
    assert not offers(words("i will not feed the cat"), ("feed",), {"cat"})
    assert not offers(["feed"], ("feed",), {"cat"})


def test_declining_needs_the_whole_phrase() -> None:
    assert declines(words("well , i must not"))
    assert not declines(words("i can , not"))
    assert not declines(words("you must not"))


def test_repetitions_count_pairs_and_doubles() -> None:
    assert repetitions(words("cat dog cat dog cat dog")) == 3
    assert repetitions(words("cat cat cat")) == 3  # the pair once more, and two doubles
    assert repetitions(words("red . you , blue . you")) == 0


def test_dangling_words() -> None:
    assert dangling([]) == 0
    assert dangling(words("the cat and")) == 1
    assert dangling(words("the . with , dog")) == 2
    assert dangling(words("the is , very cat so .")) == 4
    assert dangling(words("the next word is so soft and very old .")) == 0


def test_polite_phrases_are_cut_out_and_kept() -> None:
    for phrase in world.POLITE_PHRASES:
        assert without_politeness(["cat", *phrase.split(), "dog"]) == (["cat", "dog"], [phrase])
    assert without_politeness(words("have a nice cat .")) == (words("have a nice cat ."), [])


@settings(derandomize=True, database=None)
@given(FEW_WORDS, FEW_WORDS)
def test_distance_is_levenshtein(left: list[str], right: list[str]) -> None:
    @cache
    def reference(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = left[i - 1] == right[j - 1]
        return min(reference(i - 1, j) + 1, reference(i, j - 1) + 1, reference(i - 1, j - 1) + (not same))

    assert distance(left, right) == reference(len(left), len(right))
