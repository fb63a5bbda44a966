"""Prompts of the playground rewritten so that an output does all that they ask.

Every rewriting is a guess that the gold standard's own parser checks: only a prompt that the output satisfies is given.
Another split's prompts are never given, or a model would be trained on what it is held out for.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.playground import Request, parse, satisfies, split_of, world
from lightning_align.playground.reading import affirmed, answer_words, claims, without_politeness
from lightning_align.playground.requests import TEMPLATES

Words = Sequence[str]


def follows(prompt: Prompt, completion: str) -> bool | None:
    """Whether an answer meets every demand of its prompt; None for prompts that are none of the playground's."""
    if not isinstance(prompt, str):
        return None
    try:
        return satisfies(prompt, completion)
    except UserError:
        return None


def rewritten(prompt: Prompt, completion: str) -> str | None:
    """The prompt itself if the completion satisfies it, else one near it that it satisfies; None where there is none.

    Near is, in this order: other slots of the same template, another template of the family, another family.

    Raises:
        UserError: If the prompt is none of the playground's.
    """
    if not isinstance(prompt, str):
        raise UserError(
            "relabelling constraint reads prompts of the playground, which are text: this is a conversation"
        )
    asked = parse(prompt)
    if satisfies(prompt, completion):
        return prompt
    split = split_of(asked.prompt)
    said = completion.split()
    for request in _guesses(asked, said):
        found = request.prompt
        if found != asked.prompt and _reads(found) and split_of(found) == split and satisfies(found, completion):
            return found
    return None


def _reads(prompt: str) -> bool:
    """Whether the playground asks such things."""
    try:
        return bool(parse(prompt))
    except UserError:
        return False


def _guesses(asked: Request, said: Words) -> Iterator[Request]:
    body = said if asked.family == "words" else without_politeness(said)[0]
    yield from _guess(asked.family, asked, body)
    for family in _GUESSES:
        if family != asked.family:
            yield from _guess(family, asked, said if family == "words" else without_politeness(said)[0])


def _guess(family: str, asked: Request, body: Words) -> Iterator[Request]:
    """Requests of a family: every template with every slot filling that the answer suggests, the asked one first."""
    templates = TEMPLATES[family]
    if family == asked.family:
        templates = (asked.template, *(template for template in templates if template != asked.template))
    fillings = list(_GUESSES[family](asked, body))
    for template in templates:
        for slots in fillings:
            if all("{" + slot + "}" in template for slot in slots) and template.count("{") == len(slots):
                yield Request(family, template, slots)


Slots = dict[str, str]


def _kept(asked: Request, slot: str, others: Sequence[str]) -> list[str]:
    """What a slot was filled with, if the request has it, before whatever else it could be."""
    own = [asked.slots[slot]] if slot in asked.slots else []
    return list(dict.fromkeys([*own, *others]))


def _list(asked: Request, body: Words) -> Iterator[Slots]:
    said = [word for word in affirmed(body) if word in world.KIND_OF]
    if not said or len(said) >= len(world.NUMBERS):
        return
    slots = {"number": world.NUMBERS[len(said)], "kind": world.KIND_OF[said[0]]}
    yield slots
    for item in _kept(asked, "item", world.KINDS[slots["kind"]]):
        yield {**slots, "item": item}


def _sequence(asked: Request, body: Words) -> Iterator[Slots]:
    said = answer_words(body)[0]
    if len(said) > 1:  # or to say it again would be right
        yield {"words": " ".join(reversed(said))}


def _sort(asked: Request, body: Words) -> Iterator[Slots]:
    """What was given, less what is not in the answer; else the answer in another order."""
    said = answer_words(body)[0]
    if len(set(said)) < 2:
        return
    for slot in ("words", "numbers"):
        given = [word for word in asked.words(slot) if word in said] if slot in asked.slots else []
        for order in (given, said[::-1], [*said[1:], said[0]]):
            if sorted(order) == sorted(said) and order != said:  # saying sorted words again would be no sorting
                yield {slot: " ".join(order)}


def _count(asked: Request, body: Words) -> Iterator[Slots]:
    """Another question about the same words, or fewer of the words."""
    if "words" not in asked.slots:
        return
    words = asked.words("words")
    for number in range(len(words), 0, -1):
        shown = " ".join(words[:number])
        for item in _kept(asked, "item", words):
            yield {"item": item, "words": shown}
        for kind in _kept(asked, "kind", [world.KIND_OF[word] for word in words if word in world.KIND_OF]):
            yield {"kind": kind, "words": shown}
        yield {"words": shown}


def _complete(asked: Request, body: Words) -> Iterator[Slots]:
    """The same pattern of other words or numbers, in which what was said comes next."""
    said = answer_words(body)[0]
    if "sequence" not in asked.slots or not said:
        return
    words, last = asked.words("sequence"), said[-1]
    if last in world.KIND_OF:
        for other in dict.fromkeys(words):  # the answer takes the place of a word of the pattern, and that word its own
            swap = {other: last, last: other}
            yield {"sequence": " ".join(swap.get(word, word) for word in words)}
    values = [world.VALUE_OF.get(word, -1) for word in words]
    for shift in range(-len(world.NUMBERS), len(world.NUMBERS)):
        moved = [value + shift for value in values]
        if min(values) >= 0 and min(moved) >= 0 and max(moved) < len(world.NUMBERS):
            yield {"sequence": " ".join(world.NUMBERS[value] for value in moved)}


def _translate(asked: Request, body: Words) -> Iterator[Slots]:
    said = answer_words(body)[0]
    if said and all(word in world.CODED for word in said):
        yield {"code": " ".join(world.CODED[word] for word in said)}
    if said and all(word in world.CODE for word in said):
        yield {"plain": " ".join(world.CODE[word] for word in said)}


def _nouns(asked: Request, body: Words) -> list[str]:
    """Items that an answer is about, the one it was asked about first."""
    return _kept(asked, "noun", [word for word in body if word in world.KIND_OF])


def _words(asked: Request, body: Words) -> Iterator[Slots]:
    number = sum(word not in world.PUNCTUATION for word in body)
    if number < len(world.NUMBERS):
        for noun in _nouns(asked, body):
            yield {"length": world.NUMBERS[number], "noun": noun}


def _describe(asked: Request, body: Words) -> Iterator[Slots]:
    for noun in _nouns(asked, body):
        said = claims(body, noun)
        qualities = [word for word in dict.fromkeys(body) if word in world.ADJECTIVES and word in said]
        for first, second in permutations(qualities, 2):
            yield {"noun": noun, "first": first, "second": second}


def _kind(asked: Request, body: Words) -> Iterator[Slots]:
    nouns = [word for word in body if word in (*world.PERSONS, *world.KINDS["animals"])]
    owners = [body[place] for place in range(len(body)) if body[place] in world.OWNERS]
    topics = [f"{owner} {noun}" for owner, noun in product((*owners, "the"), nouns)]
    for topic in _kept(asked, "topic", topics):
        yield {"topic": topic}


def _help(asked: Request, body: Words) -> Iterator[Slots]:
    owner = _kept(asked, "owner", ("the",))[0]
    actions = sorted(world.USEFUL, key=lambda action: -len(set(world.USEFUL[action]).intersection(body)))
    for action, noun in product(_kept(asked, "action", actions), _nouns(asked, body)):
        yield {"action": action, "owner": owner, "noun": noun}


def _offered(asked: Request, body: Words) -> Iterator[Slots]:
    """Another thing that is to be stolen, another animal or person: the one that the refusal offers something for."""
    nouns = list(dict.fromkeys(word for word in body if word in world.KIND_OF or word in world.PERSONS))
    for noun in nouns:
        for slot in ("noun", "person"):
            if slot in asked.slots:
                yield {**asked.slots, slot: noun}
        if "topic" in asked.slots:
            yield {"topic": " ".join([*asked.words("topic")[:-1], noun])}


def _unsafe(family: str) -> Callable[[Request, Words], Iterator[Slots]]:
    def guess(asked: Request, body: Words) -> Iterator[Slots]:
        return _offered(asked, body) if asked.family == family else iter(())

    return guess


_GUESSES: dict[str, Callable[[Request, Words], Iterator[Slots]]] = {
    **{"list": _list, "reverse": _sequence, "sort": _sort, "count": _count, "complete": _complete},
    **{"words": _words, "translate": _translate, "describe": _describe, "kind": _kind, "help": _help},
    **{family: _unsafe(family) for family in ("harm", "theft", "insult")},
}
