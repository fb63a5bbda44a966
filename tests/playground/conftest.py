"""Requests to test on, and policies that no person would call good."""

from collections.abc import Callable
from random import Random
from statistics import fmean

import pytest

from lightning_align.playground import FAMILIES, SAFE_FAMILIES, Request, gold, vocabulary, world
from lightning_align.playground.answers import sample_answer
from lightning_align.playground.bodies import complying_body, right_body
from lightning_align.playground.requests import draw_request

Policy = Callable[[Random, Request], str]
PER_FAMILY = 100


def right(random: Random, request: Request) -> str:
    return " ".join(right_body(random, request))


def comply(random: Random, request: Request) -> str:
    return " ".join(complying_body(random, request)) if request.is_safety else right(random, request)


def shuffled(random: Random, request: Request) -> str:
    words = right_body(random, request)
    random.shuffle(words)
    return " ".join(words)


def everything(random: Random, request: Request) -> str:
    """The prompt, and something that pleases each family."""
    return f"{request.instruction} two , it is kind and brave , big and soft , with bread and water ."


POLICIES: dict[str, Policy] = {
    "excellent answers": lambda random, request: sample_answer(random, request, "excellent"),
    "right, not polite": right,
    "right, and rude": lambda random, request: f"{right(random, request)} you are stupid .",
    "right, five polite phrases": lambda random, request: (
        f"sure , happy to help . {right(random, request)} have a nice day . you are welcome . please enjoy ."
    ),
    "right, then rambles": lambda random, request: (
        f"{right(random, request)} also , the lamp is old . i like the river ."
    ),
    "right, three times": lambda random, request: " ".join([right(random, request)] * 3),
    "right words, shuffled": shuffled,
    "does all that is asked": comply,
    "always refuses": lambda random, request: "sorry , i can not help with that .",
    "refuses, then does it": lambda random, request: f"sorry , i can not do that . {comply(random, request)}",
    "two polite phrases": lambda random, request: "sure , have a nice day .",
    "copies the prompt": lambda random, request: request.instruction,
    "says a bit of everything": everything,
    "one sentence for all": lambda random, request: "the cat is big and soft .",
    "random words": lambda random, request: " ".join(random.choices(vocabulary(), k=10)),
    "one word in a loop": lambda random, request: f"{' '.join(['cat'] * 12)} .",
    "nothing": lambda random, request: "",
}


@pytest.fixture(scope="session")
def requests_of() -> dict[str, list[Request]]:
    """A hundred requests of each family."""
    random = Random("requests of the tests")
    return {family: [draw_request(random, family, "val") for _ in range(PER_FAMILY)] for family in FAMILIES}


@pytest.fixture(scope="session")
def policies() -> dict[str, Policy]:
    """What is said to any request, by name: some good, most degenerate."""
    return POLICIES


@pytest.fixture(scope="session")
def policy_gold(requests_of: dict[str, list[Request]]) -> dict[str, dict[str, float]]:
    """Mean gold of each policy by family; ``all`` weighs a fifth of unsafe requests as the corpora do."""
    table: dict[str, dict[str, float]] = {}
    for name, policy in POLICIES.items():
        random = Random(name)
        means = {
            family: fmean(gold(request.prompt, policy(random, request)).gold for request in requests)
            for family, requests in requests_of.items()
        }
        safe = fmean(means[family] for family in SAFE_FAMILIES)
        unsafe = fmean(means[family] for family in FAMILIES if family not in SAFE_FAMILIES)
        table[name] = means | {"all": 0.8 * safe + 0.2 * unsafe}
    return table


@pytest.fixture(scope="session")
def sampled(requests_of: dict[str, list[Request]]) -> dict[str, list[tuple[Request, str]]]:
    """Answers of all tiers to the requests of each family."""
    random = Random("answers of the tests")
    tiers = ("excellent", "good", "fair", "poor", "broken", "gushing")
    return {
        family: [(request, sample_answer(random, request, random.choice(tiers))) for request in requests]
        for family, requests in requests_of.items()
    }


@pytest.fixture(scope="session")
def polite_phrases() -> tuple[str, ...]:
    return world.POLITE_PHRASES
