"""Judgements in a real store to records that the readers accept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_align.data.readers import load_records
from lightning_align.data.writers import write_records
from lightning_align.feedback.human.export import Export, preferences, ranked
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Plan, Verdict

ASPECTS = ("helpfulness", "safety")


class Desk:
    """A store with items, and what annotators say of them."""

    def __init__(self, path: Path, *, aspects: tuple[str, ...] | None = None) -> None:
        self.store = Store(path, Plan() if aspects is None else Plan(aspects=aspects))
        self.aspects = self.store.plan.aspects
        self.count = 0

    def add(self, prompt: Any, *answers: Any) -> int:
        assert self.store.add(prompt, answers, "here")
        return max(self.store.items())

    def say(
        self,
        item: int,
        annotator: str,
        *ranks: int,
        aspect: str | None = None,
        strength: str | None = None,
        unsafe: tuple[int, ...] = (),
        skipped: str | None = None,
    ) -> None:
        self.count += 1
        verdict = Verdict(ranks, strength, unsafe, skipped)
        self.store.judge(f"k{self.count}", self.store.item(item), annotator, aspect or self.aspects[0], verdict)

    def preferences(self, **options: Any) -> Export:
        return preferences(self.store.judgements(), **options)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "judgements.db")
    yield desk
    desk.store.close()


@pytest.fixture
def two_aspects(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "aspects.db", aspects=ASPECTS)
    yield desk
    desk.store.close()


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXT = ("Say hello.", ("Hello!", "Hi.", "No, thanks."))
DIALOGUE = ([{"role": "user", "content": "Say hello."}], tuple(said(answer) for answer in TEXT[1]))


@pytest.mark.parametrize(("prompt", "answers"), [TEXT, DIALOGUE], ids=["text", "dialogue"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_records_read_back(two_aspects: Desk, tmp_path: Path, prompt: Any, answers: Any, ending: str) -> None:
    three, pair = two_aspects.add(prompt, *answers), two_aspects.add(prompt, *answers[:2])
    for aspect, order in zip(ASPECTS, [(2, 1, 2), (1, 2, 3)], strict=True):
        two_aspects.say(three, "ann", *order, aspect=aspect)
        two_aspects.say(pair, "ann", 2, 1, aspect=aspect, strength="slightly")
        two_aspects.say(pair, "bob", 1, 1, aspect=aspect)
    judgements = two_aspects.store.judgements()
    exports = {
        "ranked": [ranked(judgements)],
        "preference": [preferences(judgements), preferences(judgements, combine="soft")],
    }
    for kind, found in exports.items():
        for number, export in enumerate(found):
            out = tmp_path / f"{kind}{number}.{ending}"
            write_records(export.records, out)
            loaded = load_records(str(out), kind)
            assert loaded.records == export.records
            assert not loaded.report.conversions
            assert not loaded.report.unused
    assert exports["ranked"][0].records[0] == {
        **{"prompt": prompt, "completions": list(answers), "ranks": [2, 1, 2], "aspect": "helpfulness"},
    }


def test_each_judgement_gives_its_own_pairs(desk: Desk) -> None:
    item = desk.add("p", "a", "b", "c")
    desk.say(item, "ann", 2, 1, 2)
    pair = desk.add("q", "a", "b")
    desk.say(pair, "ann", 2, 1, strength="significantly")
    desk.say(pair, "bob", 1, 2)
    found = desk.preferences()
    assert found.records == [
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "tie": True},
        {"prompt": "p", "chosen": "b", "rejected": "c"},
        {"prompt": "q", "chosen": "b", "rejected": "a", "strength": "significantly"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    assert (found.judgements, found.ties, found.strengths, found.unsafe) == (3, 1, 0, 0)
    rankings = ranked(desk.store.judgements())
    assert [record["ranks"] for record in rankings.records] == [[2, 1, 2], [2, 1], [1, 2]]
    assert (rankings.ties, rankings.strengths) == (0, 1)


def test_soft_labels_are_shares_with_ties_as_halves(two_aspects: Desk) -> None:
    item = two_aspects.add("p", "a", "b")
    for name, ranks in {"ann": (2, 1), "bob": (2, 1), "cat": (1, 2), "dan": (1, 1)}.items():
        two_aspects.say(item, name, *ranks, strength="better" if ranks != (1, 1) else None)
    two_aspects.say(item, "ann", 1, 2, aspect="safety")
    even = two_aspects.add("q", "a", "b")
    two_aspects.say(even, "ann", 1, 2)
    two_aspects.say(even, "bob", 2, 1)
    two_aspects.say(even, "cat", 1, 1)
    found = two_aspects.preferences(combine="soft")
    assert found.records == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "soft_label": 2.5 / 4, "aspect": "helpfulness"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "soft_label": 1.0, "aspect": "safety"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "soft_label": 0.5, "aspect": "helpfulness"},
    ]
    assert (found.judgements, found.strengths, found.ties) == (8, 3, 1)


def test_skips_are_counted_by_reason_and_undone_judgements_are_gone(desk: Desk) -> None:
    item, other = desk.add("p", "a", "b"), desk.add("q", "a", "b")
    desk.say(item, "ann", 1, 2)
    desk.store.undo("ann")
    desk.say(item, "ann", 2, 1)
    desk.say(other, "ann", skipped="unclear")
    desk.say(other, "bob", skipped="unclear", unsafe=(0,))
    desk.say(item, "bob", skipped="a language I do not read")
    for found in (desk.preferences(), desk.preferences(combine="soft"), ranked(desk.store.judgements())):
        assert found.judgements == len(found.records) == 1
        assert found.skipped == {"unclear": 2, "a language I do not read": 1}
    assert desk.preferences().records == [{"prompt": "p", "chosen": "b", "rejected": "a"}]


def test_a_preferred_answer_that_is_the_only_unsafe_one_is_left_out(two_aspects: Desk) -> None:
    item = two_aspects.add("p", "bad", "good")
    cases = {"ann": (1, 2, (0,)), "bob": (1, 2, (0, 1)), "cat": (1, 2, (1,)), "dan": (1, 1, (0,)), "eve": (2, 1, (0,))}
    for name, (first, second, unsafe) in cases.items():
        for aspect in ASPECTS:
            two_aspects.say(item, name, first, second, aspect=aspect, unsafe=unsafe)
    found = two_aspects.preferences()
    assert found.unsafe == 1  # ann's, of safety
    assert [record["aspect"] for record in found.records].count("helpfulness") == 5
    assert len(found.records) == 9
    kept = two_aspects.preferences(keep_unsafe=True)
    assert (kept.unsafe, len(kept.records)) == (0, 10)
    assert len(ranked(two_aspects.store.judgements()).records) == 10


def test_an_overall_ranking_counts_as_safety_and_half_of_the_flags_are_enough(desk: Desk) -> None:
    item = desk.add("p", "bad", "good")
    desk.say(item, "ann", 1, 2, unsafe=(0,))
    desk.say(item, "bob", 1, 2)
    assert (desk.preferences().unsafe, len(desk.preferences().records)) == (1, 1)
    assert desk.preferences(combine="soft").unsafe == 1
    desk.say(item, "cat", 1, 2)  # one flag of three
    assert desk.preferences(combine="soft").unsafe == 0
    assert len(desk.preferences(combine="soft").records) == 1
