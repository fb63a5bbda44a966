"""The records of the playground: their form, their words, and that a seed fixes them everywhere."""

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from lightning_align.errors import UserError
from lightning_align.playground import FAMILIES, gold, parse, records, split_of, vocabulary
from lightning_align.playground.corpora import SIZES

KINDS = tuple(SIZES)
FIELDS: dict[str, set[str]] = {
    "text": {"text"},
    "sft": {"prompt", "completion"},
    "prompt": {"prompt", "is_safety", "family"},
    "preference": {"prompt", "chosen", "rejected", "strength"},
    "ranked": {"prompt", "completions", "ranks"},
    "unpaired": {"prompt", "completion", "label"},
    "scored": {"prompt", "completion", "score"},
}
TOKENS = 64


def texts(record: dict[str, Any]) -> list[str]:
    """Everything a model would read of a record: its text, or its prompt with each of its completions."""
    if "text" in record:
        return [record["text"]]
    completions = record.get("completions") or [record[k] for k in ("completion", "chosen", "rejected") if k in record]
    return [record["prompt"] + completion for completion in completions or [""]]


@pytest.mark.parametrize("kind", KINDS)
def test_fields_words_and_lengths(kind: str) -> None:
    known = set(vocabulary())
    for record in records(kind, size=1500):
        assert set(record) == FIELDS[kind]
        for text in texts(record):
            words = text.split()
            assert text == " ".join(words)  # nothing that whole-word tokenizers would lose
            assert known.issuperset(words), set(words) - known
            assert len(words) + 2 < TOKENS  # one token at each end


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_records_do_not_depend_on_how_many_are_asked_for(kind: str) -> None:
    assert records(kind, size=40)[:15] == records(kind, size=15)
    assert records(kind, size=15) != records(kind, size=15, seed=1)
    assert records(kind, size=15) != records(kind, size=15, split="val")
    assert records(kind, size=0) == []


def test_default_sizes() -> None:
    assert len(records("ranked")) == SIZES["ranked"][0]
    assert len(records("preference", split="test")) == SIZES["preference"][1]


def test_another_process_and_hash_seed_give_the_same_records() -> None:
    code = (
        "import hashlib, json; from lightning_align.playground import records, annotator_agreement; "
        f"made = [records(kind, size=60, split='val', seed=4) for kind in {KINDS!r}]; "
        "made.append(annotator_agreement(size=60)); print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(digests) == 1


def test_splits_share_no_prompt() -> None:
    prompts = {
        split: {record["prompt"] for kind in ("sft", "prompt", "preference") for record in records(kind, split=split)}
        for split in ("train", "val", "test")
    }
    for split, found in prompts.items():
        assert {split_of(prompt) for prompt in found} == {split}


def test_raw_text_holds_no_held_out_prompt() -> None:
    for record in records("text", size=3000):
        if " answer :" in record["text"] and " first answer :" not in record["text"]:
            prompt = record["text"].partition(" answer :")[0] + " answer :"
            assert split_of(prompt) == "train"


def test_prompts_differ_and_carry_their_family() -> None:
    made = records("prompt")
    assert len({record["prompt"] for record in made}) == len(made)
    for record in made:
        request = parse(record["prompt"])
        assert (request.family, request.is_safety) == (record["family"], record["is_safety"])
    assert {record["family"] for record in made} == set(FAMILIES)
    share = sum(record["is_safety"] for record in made) / len(made)
    assert abs(share - 0.2) < 4 * (0.16 / len(made)) ** 0.5


def test_few_families_run_out_of_new_prompts_without_hanging() -> None:
    assert len(records("prompt", size=400, families=["translate"])) == 400


def test_answers_do_not_depend_on_the_annotator() -> None:
    def pairs(**options: Any) -> list[set[str]]:
        return [{r["prompt"], r["chosen"], r["rejected"]} for r in records("preference", size=100, **options)]

    assert pairs() == pairs(temperature=0.01) == pairs(noise=0.5, ties=1.0) == pairs(strength=False)


def test_a_reliable_annotator_hardly_errs_and_a_coin_flips() -> None:
    def accuracy(**options: Any) -> float:
        differences = [
            gold(r["prompt"], r["chosen"]).gold - gold(r["prompt"], r["rejected"]).gold
            for r in records("preference", size=1500, **options)
        ]
        decided = [difference > 0 for difference in differences if abs(difference) > 0.2]
        return sum(decided) / len(decided)

    assert accuracy(temperature=0.01) == 1.0
    assert abs(accuracy(noise=1.0) - 0.5) < 4 * (0.25 / 1300) ** 0.5
    assert accuracy(temperature=0.3) > accuracy() > accuracy(temperature=3.0)


def test_ties_take_the_place_of_strength() -> None:
    made = records("preference", size=500, ties=1.0)
    assert {frozenset(record) - {"prompt", "chosen", "rejected"} for record in made} == {
        frozenset({"tie"}),
        frozenset({"strength"}),
    }
    assert all("strength" not in record for record in records("preference", size=50, strength=False))


def test_aspect_is_said_and_asks_for_more_unsafe_prompts() -> None:
    made = records("preference", size=600, aspect="safety")
    assert {record["aspect"] for record in made} == {"safety"}
    share = sum(parse(record["prompt"]).is_safety for record in made) / 600
    assert abs(share - 0.6) < 4 * (0.24 / 600) ** 0.5


@pytest.mark.parametrize("k", [2, 4, 9])
def test_rankings_have_k_answers_and_dense_order(k: int) -> None:
    for record in records("ranked", size=60, k=k):
        assert len(record["completions"]) == len(record["ranks"]) == k
        assert sorted(record["ranks"]) == list(range(1, k + 1))
    for record in records("ranked", size=60, k=k, ties=0.5):
        ordered = sorted(record["ranks"])
        assert ordered[0] == 1
        # a tie shares the rank of its first, and the next rank counts the tied: 1 2 2 4
        assert all(after in (before, place) for place, (before, after) in enumerate(pairwise(ordered), 2))


def test_better_answers_rank_higher_on_average() -> None:
    by_rank: dict[int, list[float]] = {}
    for record in records("ranked", size=400):
        for completion, rank in zip(record["completions"], record["ranks"], strict=True):
            by_rank.setdefault(rank, []).append(gold(record["prompt"], completion).gold)
    means = [sum(by_rank[rank]) / len(by_rank[rank]) for rank in sorted(by_rank)]
    assert means == sorted(means, reverse=True)


def test_families_and_unsafe_choose_the_prompts() -> None:
    assert {record["family"] for record in records("prompt", size=80, families=["sort", "harm"])} == {"sort", "harm"}
    assert all(record["is_safety"] for record in records("prompt", size=50, unsafe=1.0))
    assert {record["family"] for record in records("prompt", size=30, families=["theft"])} == {"theft"}


def test_quality_chooses_the_tiers() -> None:
    def mean(**quality: float) -> float:
        made = records("sft", size=300, quality=quality)
        return sum(gold(record["prompt"], record["completion"]).gold for record in made) / 300

    assert mean(excellent=1.0) > 2.5
    assert mean(broken=1.0) < 0.2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "movie"}, "the playground has no records of kind 'movie'"),
    "split": ({"split": "dev"}, "split is 'dev'"),
    "size": ({"size": -1}, "size is -1"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0"),
    "noise": ({"noise": 2.0}, "noise is 2.0"),
    "unsafe": ({"unsafe": -0.1}, "unsafe is -0.1"),
    "aspect": ({"aspect": "charm"}, "aspect is 'charm'"),
    "families": ({"families": ["sort", "sing"]}, "families names 'sing'"),
    "no families": ({"families": []}, "families is empty"),
    "quality": ({"quality": {"superb": 1.0}}, "quality names 'superb'"),
    "k": ({"kind": "ranked", "k": 1}, "k is 1"),
    "meaningless": ({"kind": "sft", "ties": 1.0}, "playground option ties has no meaning for records of kind sft"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(UserError) as caught:
        records(**({"kind": "preference", "size": 5} | options))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
