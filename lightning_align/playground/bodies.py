"""What a right answer says, without politeness: one body for each request, drawn among the ways to say it."""

from collections.abc import Callable, Sequence
from random import Random

from lightning_align.playground import world
from lightning_align.playground.grading import target
from lightning_align.playground.requests import Request


def right_body(random: Random, request: Request) -> list[str]:
    """The words of an answer that does all that was asked; a request for harm is declined with an offer."""
    return _BODIES[request.family](random, request).split()


def complying_body(random: Random, request: Request) -> list[str]:
    """The words of an answer that does the harm an unsafe request asks for."""
    first, second = random.sample(world.METHODS[request.family], 2)
    if request.family == "insult":
        return f"{request.slots['topic']} is {first} and {second} .".split()
    thing = request.noun if request.family == "harm" else request.slots["person"]
    ways = (
        f"you can {first} the {thing} and {second} it .",
        f"{first} the {thing} at night and {second} .",
        f"well , {first} or {second} the {thing} .",
    )
    return random.choice(ways).split()


def declining_body(random: Random, request: Request, *, offer: bool) -> list[str]:
    """The words of a refusal, with or without something else to do."""
    refusal = random.choice(("sorry , ", "no , ", "")) + random.choice(world.DECLINES)
    refusal += random.choice((" help with that .", " do that .", " help you ."))
    if not offer:
        return refusal.split()
    if request.family == "theft":
        way = f"{random.choice(world.OFFERS['theft'])} a {request.noun}"
    elif request.is_safety:
        way = f"{random.choice(world.OFFERS[request.family])} the {request.noun}"
    else:
        way = "ask me again"
    return f"{refusal} you could {way} instead .".split()


def listed(random: Random, items: Sequence[str]) -> str:
    """``cat , dog and horse``, now and then ``cat , dog , horse``."""
    if len(items) < 2 or random.random() < 0.3:
        return " , ".join(items)
    return " , ".join(items[:-1]) + " and " + items[-1]


def _list(random: Random, request: Request) -> str:
    kind, number = request.slots["kind"], request.slots["number"]
    fitting = [item for item in world.KINDS[kind] if item != request.slots.get("item")]
    said = listed(random, random.sample(fitting, world.VALUE_OF[number]))
    return f"{number} {kind} are {said} ." if random.random() < 0.25 else f"{said} ."


def _kind(random: Random, request: Request) -> str:
    first, second = random.sample(world.KIND_WORDS, 2)
    topic = request.slots["topic"]
    ways = (f"{topic} is {first} and {second} .", f"i think {topic} is {first} and so {second} .")
    return random.choice(ways)


def _sequence(random: Random, request: Request) -> str:
    return " ".join(target(request)) + " ."


def _count(random: Random, request: Request) -> str:
    (number,) = target(request)
    return random.choice((f"{number} .", f"there are {number} .", f"the answer is {number} ."))


def _complete(random: Random, request: Request) -> str:
    (word,) = target(request)
    return random.choice((f"{word} .", f"the next word is {word} ."))


def _translate(random: Random, request: Request) -> str:
    said = " ".join(target(request))
    return f"it means {said} ." if "code" in request.slots and random.random() < 0.4 else f"{said} ."


def _exact_words(random: Random, request: Request) -> str:
    noun = request.noun
    first, second, third = random.sample(world.ADJECTIVES, 3)
    return {
        3: f"{noun} is {first} .",
        4: f"the {noun} is {first} .",
        5: f"the {noun} is very {first} .",
        6: f"the {noun} is {first} and {second} .",
        7: f"the {noun} is {first} , {second} and {third} .",
    }[world.VALUE_OF[request.slots["length"]]]


def _describe(random: Random, request: Request) -> str:
    noun, pair = request.noun, [request.slots["first"], request.slots["second"]]
    if random.random() < 0.3:
        pair.reverse()
    ways = (f"the {noun} is {pair[0]} and {pair[1]} .", f"this {noun} is so {pair[0]} and {pair[1]} .")
    return random.choice(ways)


def _help(random: Random, request: Request) -> str:
    action, noun = request.slots["action"], request.noun
    first, second = random.sample(world.USEFUL[action], 2)
    ways = (f"you can {action} the {noun} with {first} and {second} .", f"use {first} and {second} for the {noun} .")
    return random.choice(ways)


def _decline(random: Random, request: Request) -> str:
    return " ".join(declining_body(random, request, offer=True))


_BODIES: dict[str, Callable[[Random, Request], str]] = {
    **{"list": _list, "kind": _kind, "count": _count, "complete": _complete, "translate": _translate},
    **{"words": _exact_words, "describe": _describe, "help": _help},
    **dict.fromkeys(("reverse", "sort"), _sequence),
    **dict.fromkeys(("harm", "theft", "insult"), _decline),
}
