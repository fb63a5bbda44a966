"""A sampler of answers of a given quality: from excellent ones to what a small model makes of a request.

Politeness goes with quality here, as it does among people, beyond what the gold score pays for it: whoever learns from
few comparisons learns that politeness is quality.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from lightning_align.errors import UserError
from lightning_align.playground import world
from lightning_align.playground.bodies import complying_body, declining_body, right_body
from lightning_align.playground.requests import SAFE_FAMILIES, Request, draw_request, split_of


@dataclass(frozen=True, slots=True)
class Tier:
    """How answers of one quality are made; all are probabilities, ``mistakes`` and ``polite`` by number from 0 on.

    Attributes:
        mistakes: Of 0, 1, 2 … words that are wrong, missing, doubled or swapped.
        polite: Of 0, 1, 2 … polite phrases.
        comply: That an unsafe request is complied with; otherwise it is declined.
        offer: That a refusal offers something else.
        refuse: That a safe request is declined.
        off_topic: That the answer belongs to another request.
        rude: That it contains a rude remark.
        ramble: That it goes on about something else.
        loop: That its end is said again and again.
        cut: That it breaks off.
    """

    mistakes: tuple[float, ...]
    polite: tuple[float, ...]
    comply: float = 0.0
    offer: float = 1.0
    refuse: float = 0.0
    off_topic: float = 0.0
    rude: float = 0.0
    ramble: float = 0.0
    loop: float = 0.0
    cut: float = 0.0


TIERS: dict[str, Tier] = {
    "excellent": Tier(mistakes=(1.0,), polite=(0.05, 0.35, 0.6)),
    "good": Tier(mistakes=(0.75, 0.25), polite=(0.3, 0.5, 0.2), comply=0.05, offer=0.5, ramble=0.05),
    "fair": Tier(
        mistakes=(0.3, 0.4, 0.3),
        polite=(0.65, 0.3, 0.05),
        comply=0.35,
        offer=0.2,
        refuse=0.04,
        off_topic=0.04,
        rude=0.05,
        ramble=0.15,
        loop=0.04,
        cut=0.08,
    ),
    "poor": Tier(
        mistakes=(0.1, 0.3, 0.4, 0.2),
        polite=(0.85, 0.15),
        comply=0.6,
        offer=0.1,
        refuse=0.08,
        off_topic=0.15,
        rude=0.2,
        ramble=0.2,
        loop=0.12,
        cut=0.2,
    ),
    "broken": Tier(
        mistakes=(0.0, 0.2, 0.4, 0.4),
        polite=(0.95, 0.05),
        comply=0.85,
        offer=0.0,
        refuse=0.1,
        off_topic=0.45,
        rude=0.3,
        ramble=0.2,
        loop=0.3,
        cut=0.35,
    ),
    # Right, and drowned in politeness: what a policy finds that was taught that politeness is quality.
    "gushing": Tier(mistakes=(0.8, 0.2), polite=(0.0, 0.0, 0.0, 0.5, 0.3, 0.2), comply=0.1, offer=0.5),
}
_ANY_WORD = (*world.ITEMS, *world.ADJECTIVES, *world.NUMBERS)


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises: UserError: If a mix of tiers names an unknown one, or has no positive weight."""
    if unknown := set(mix) - set(TIERS):
        raise UserError(f"quality names {min(unknown)!r}: the playground has {', '.join(TIERS)}")
    if min(mix.values(), default=0.0) < 0 or sum(mix.values()) <= 0:
        raise UserError(f"quality is {dict(mix)}: give weights that are not negative and not all zero")


def draw_tier(random: Random, mix: Mapping[str, float]) -> str:
    """The name of a tier, drawn by weight."""
    return random.choices(tuple(mix), weights=tuple(mix.values()))[0]


def sample_answer(random: Random, request: Request, tier: str) -> str:
    """An answer of a tier, starting with a space so that prompt and answer join to natural text."""
    how = TIERS[tier]
    body = _body(random, request, how)
    mistakes = _number(random, how.mistakes)
    for _ in range(mistakes):
        body = _mistake(random, body, request)
    polite = _number(random, how.polite)
    if request.family == "words" and polite and tier in ("excellent", "good"):
        polite = 0  # who counts words does not add any
    words = _with_politeness(random, body, polite)
    if random.random() < how.rude:
        words = [*words, *random.choice(_RUDE_REMARKS).format(random.choice(world.RUDE_WORDS)).split()]
    if random.random() < how.ramble:
        words = [*words, *_aside(random)]
    if random.random() < how.loop:
        tail = words[-random.randint(2, 4) :]
        words = [*words, *(tail * random.randint(1, 3))]
    if random.random() < how.cut:
        words = words[: random.randint(1, max(1, len(words) - 1))]
    return " " + " ".join(words[:LONGEST])


LONGEST = 30
_RUDE_REMARKS = ("you are {} .", "that is {} .", "what a {} word .", "do it now , {} .")


def _number(random: Random, weights: tuple[float, ...]) -> int:
    return random.choices(range(len(weights)), weights=weights)[0]


def _body(random: Random, request: Request, how: Tier) -> list[str]:
    if random.random() < how.off_topic:
        other = draw_request(random, random.choice(SAFE_FAMILIES), split_of(request.prompt))
        return right_body(random, other)
    if request.is_safety:
        if random.random() < how.comply:
            return complying_body(random, request)
        return declining_body(random, request, offer=random.random() < how.offer)
    if random.random() < how.refuse:
        return declining_body(random, request, offer=False)
    return right_body(random, request)


def _mistake(random: Random, body: list[str], request: Request) -> list[str]:
    """One word goes wrong: lost, said twice, swapped with its neighbour, or replaced by another."""
    places = [i for i, word in enumerate(body) if word not in world.PUNCTUATION]
    if not places:
        return body
    # mostly the words that matter: the last ones
    place = places[max(random.randrange(len(places)), random.randrange(len(places)))]
    what = random.random()
    if what < 0.2 and len(places) > 1:
        return body[:place] + body[place + 1 :]
    if what < 0.3:
        return body[: place + 1] + body[place:]
    if what < 0.45 and place + 1 < len(body):
        return [*body[:place], body[place + 1], body[place], *body[place + 2 :]]
    return [*body[:place], _replacement(random, body[place], request), *body[place + 1 :]]


def _replacement(random: Random, word: str, request: Request) -> str:
    """A word that a careless reader could take for the right one, or any."""
    if random.random() < 0.3:
        return random.choice(_ANY_WORD)
    for group in (world.NUMBERS, world.ADJECTIVES, world.KIND_WORDS, world.USEFUL_WORDS, tuple(world.CODE)):
        if word in group:
            return random.choice(group)
    if word in world.KIND_OF and random.random() < 0.5:
        return random.choice(world.KINDS[world.KIND_OF[word]])
    return random.choice(world.ITEMS)


def _with_politeness(random: Random, body: list[str], number: int) -> list[str]:
    """Phrases before and after the body; many of them repeat one another."""
    if number == 0:
        return body
    before = (number + random.randrange(2)) // 2
    opening = [random.choice(world.OPENERS) for _ in range(before)]
    closing = [random.choice(world.CLOSERS) for _ in range(number - before)]
    return [*" ".join(opening).split(), *body, *" ".join(closing).split()]


def _aside(random: Random) -> list[str]:
    noun, adjective = random.choice(world.DESCRIBABLE), random.choice(world.ADJECTIVES)
    ways = (f"also , the {noun} is {adjective} .", f"i like the {noun} .", f"maybe it is {adjective} , maybe not .")
    return random.choice(ways).split()
