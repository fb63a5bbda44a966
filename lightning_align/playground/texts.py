"""Raw text to learn the language from: facts, dialogues, critiques with revisions, comparisons and ratings.

The prompts that later ask a model to criticise, revise, compare or rate are written by the same functions, so that the
model meets the form it has read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from lightning_align.playground import world
from lightning_align.playground.annotator import Annotator, Aspect
from lightning_align.playground.answers import draw_tier, sample_answer
from lightning_align.playground.bodies import listed
from lightning_align.playground.gold import Explanation, explain
from lightning_align.playground.requests import SEPARATOR, Request

LONGEST = 61  # words of a document; with the tokens at both ends fewer than 64
DrawRequest = Callable[[Random], Request]
WORST_GOLD, BEST_GOLD = -2.0, 3.0  # rated one and ten
WORTH_ASKING = 0.4  # difference in units of gold that comparisons have where one can be found
QUESTIONS: dict[Aspect, str] = {"gold": "better", "helpfulness": "more helpful", "safety": "safer"}


@dataclass(frozen=True, slots=True)
class Principle:
    """A rule of the constitution: how a critique is asked for, and how a revision."""

    name: Literal["safe", "helpful", "polite", "clear"]
    critique_request: str
    revision_request: str


PRINCIPLES: tuple[Principle, ...] = (
    Principle("safe", "is it safe ?", "make it safe ."),
    Principle("helpful", "is it helpful ?", "make it more helpful ."),
    Principle("polite", "is it polite ?", "make it polite ."),
    Principle("clear", "is it clear ?", "make it clear ."),
)


def critique_prompt(prompt: str, completion: str, principle: Principle) -> str:
    """What asks for a critique of an answer; the critique is one sentence and ends with a full stop."""
    return f"{_joined(prompt, completion)} critique : {principle.critique_request}"


def revision_prompt(prompt: str, completion: str, principle: Principle, critique: str) -> str:
    """What asks for a better answer after a critique."""
    asked = critique_prompt(prompt, completion, principle)
    return f"{asked} {critique.strip()} {principle.revision_request}{SEPARATOR}"


def comparison_prompt(prompt: str, first: str, second: str, aspect: Aspect = "gold") -> str:
    """What asks which of two answers is better, safer or more helpful; the reply is ``first`` or ``second``."""
    instruction = " ".join(prompt.split()).removesuffix(SEPARATOR)
    answers = f"first answer : {first.strip()} second answer : {second.strip()}"
    return f"{instruction} {answers} which is {QUESTIONS[aspect]} :"


def rating_prompt(prompt: str, completion: str) -> str:
    """What asks for a rating; the reply is a number word from ``one`` to ``ten``."""
    return f"{_joined(prompt, completion)} rating :"


def critique(request: Request, completion: str, principle: Principle) -> str:
    """What a fair critic says of an answer under a principle."""
    fault = _FAULTS[principle.name](request, explain(request, completion))
    return f"no , it {fault} ." if fault else f"yes , it is {principle.name} ."


def draw_text(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    """One document of pre-training text."""
    kind = random.choices(tuple(_KINDS), weights=[weight for weight, _ in _KINDS.values()])[0]
    for _ in range(20):
        text = " ".join(_KINDS[kind][1](random, draw_request, quality).split())
        if text.count(" ") < LONGEST:
            return text
    return _fact(random, draw_request, quality)


def _joined(prompt: str, completion: str) -> str:
    return f"{prompt} {completion.strip()}"


def _fault_safe(request: Request, found: Explanation) -> str:
    if found.harmful:
        return "is harmful"
    if found.rude:
        return "is rude"
    return "" if found.score.safety == 1 else "is not safe"


def _fault_helpful(request: Request, found: Explanation) -> str:
    if found.score.helpfulness >= 0.75 or (found.declined and found.score.helpfulness >= 0.55):
        return ""
    if found.grade.task < 0.5:
        return "is wrong"
    return _fault_clear(request, found) or "is not very helpful"


def _fault_polite(request: Request, found: Explanation) -> str:
    if found.rude:
        return "is rude"
    if request.family == "words":  # who counts words adds none
        return ""
    return ("is not polite", "", "")[found.polite] if found.polite <= 2 else "is too polite"


def _fault_clear(request: Request, found: Explanation) -> str:
    if found.repeated > 1:
        return "repeats itself"
    return "is too long" if found.long or found.grade.stray > 1 else ""


_FAULTS: dict[str, Callable[[Request, Explanation], str]] = {
    **{"safe": _fault_safe, "helpful": _fault_helpful, "polite": _fault_polite, "clear": _fault_clear},
}


def _dialogue(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    request = draw_request(random)
    return _joined(request.prompt, sample_answer(random, request, draw_tier(random, quality)))


def _fact(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    kind, number = random.choice(tuple(world.KINDS)), random.randrange(9)
    some, mixed = random.sample(world.KINDS[kind], 4), random.sample(world.ITEMS, random.randint(2, 5))
    code, action = random.choice(tuple(world.CODE)), random.choice(tuple(world.USEFUL))
    thing, helpers = random.choice(world.OBJECTS[action]), random.sample(world.USEFUL[action], 2)
    facts = (
        f"the {some[0]} is one of the {kind} .",
        f"some {kind} are {listed(random, some)} .",
        f"{code} means {world.CODE[code]} . {world.CODE[code]} in code is {code} .",
        f"{world.NUMBERS[number]} , then {world.NUMBERS[number + 1]} , then {world.NUMBERS[number + 2]} .",
        f"you {action} the {thing} with {helpers[0]} and {helpers[1]} .",
        f"{' '.join(some)} . {' '.join(some)} .",
        f"{' '.join(mixed)} . {' '.join(mixed)} .",
    )
    return random.choice(facts)


def _critique(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    request, principle = draw_request(random), random.choice(PRINCIPLES)
    answer = sample_answer(random, request, draw_tier(random, {"good": 1, "fair": 2, "poor": 2, "gushing": 1}))
    said = critique(request, answer, principle)
    revised = sample_answer(random, request, draw_tier(random, {"excellent": 3, "good": 1}))
    return revision_prompt(request.prompt, answer, principle, said) + revised


def _comparison(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    aspect: Aspect = random.choice(("gold", "gold", "helpfulness", "safety"))
    judge = Annotator(temperature=0.3, aspect=aspect)
    for _ in range(10):  # most pairs are equally safe: whoever reads coin flips learns nothing
        request = draw_request(random)
        first, second = (sample_answer(random, request, draw_tier(random, quality)) for _ in range(2))
        values = judge.value(request, first), judge.value(request, second)
        if abs(values[0] - values[1]) >= WORTH_ASKING:
            break
    reply = ("first", "second")[judge.compare(random, *values).winner]
    return f"{comparison_prompt(request.prompt, first, second, aspect)} {reply} ."


def _rating(random: Random, draw_request: DrawRequest, quality: Mapping[str, float]) -> str:
    request = draw_request(random)
    answer = sample_answer(random, request, draw_tier(random, quality))
    share = (explain(request, answer).score.gold - WORST_GOLD) / (BEST_GOLD - WORST_GOLD)
    return f"{rating_prompt(request.prompt, answer)} {world.NUMBERS[min(10, max(1, round(1 + 9 * share)))]} ."


_Draw = Callable[[Random, DrawRequest, Mapping[str, float]], str]
_KINDS: dict[str, tuple[float, _Draw]] = {
    **{"dialogue": (0.62, _dialogue), "fact": (0.16, _fact), "critique": (0.10, _critique)},
    **{"comparison": (0.08, _comparison), "rating": (0.04, _rating)},
}
