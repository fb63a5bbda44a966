"""Which fields of a labelled record are the prompt and the answers, and which answer an option names."""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_align.errors import UserError, nearest
from lightning_align.feedback.human.tasks import dense

PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversation", "messages", "chat")
ANSWERS = (
    "answer",
    "response",
    "completion",
    "reply",
    "output",
    "candidate",
    "generation",
    "summary",
    "option",
    "text",
)
TIES = frozenset(("tie", "draw", "equal", "same", "both", "neither", "bothgood", "bothbad", "nopreference"))


@dataclass(frozen=True)
class Wish:
    """What the user says of a file.

    Args:
        name: Of the file, for messages.
        prompt, answers, question: Fields and questions by name; None and nothing where they are to be found.
        buckets: Of a ranker, from best to worst.
    """

    name: str
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    question: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()


def plain(name: str) -> str:
    """What names are compared by: letters and digits, in lower case."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find_prompt(fields: Sequence[str], answers: Sequence[str], wish: Wish) -> str:
    """The field of the prompt: the one that the user names, or the only one of a usual name."""
    if wish.prompt is not None:
        return _known(wish.prompt, fields, "--prompt", wish)
    left = [name for name in fields if name not in answers]
    usual = [name for name in left if plain(name) in PROMPTS] or [name for name in left if plain(name) == "text"]
    if len(usual) != 1:
        raise _unclear("prompt", fields, usual, wish)
    return usual[0]


def find_answers(fields: Sequence[str], options: Iterable[str], wish: Wish) -> tuple[str, ...]:
    """The fields of the answers: those that the user names, those that options are called after, or a usual family."""
    if wish.answers:
        return tuple(_known(name, fields, "--answers", wish) for name in wish.answers)
    called = {plain(option) for option in options}
    named = tuple(name for name in fields if plain(name) in called)
    if len(named) > 1:
        return named
    families: dict[str, list[str]] = {}
    for name in fields:
        stem, tail = _parts(name)
        if tail and plain(stem) in ANSWERS:
            families.setdefault(plain(stem), []).append(name)
    families = {stem: names for stem, names in families.items() if len(names) > 1}
    if len(families) != 1:
        raise _unclear("answers", fields, [name for names in families.values() for name in names], wish)
    return tuple(sorted(next(iter(families.values())), key=lambda name: _order(_parts(name)[1])))


def _parts(name: str) -> tuple[str, str]:
    """A name without the number or the single letter at its end, and that: ``response-2``, ``answer_b``."""
    match = re.fullmatch(r"(.*?)[\s_\-.]*(\d+)|(.*?)[\s_\-.]+([a-zA-Z])", name)
    if match is None:
        return name, ""
    stem, number, other, letter = match.groups()
    return (stem, str(int(number))) if number else (other, letter.lower())


def _order(tail: str) -> tuple[int, str]:
    return (len(tail), tail)


def _known(name: str, fields: Sequence[str], option: str, wish: Wish) -> str:
    if name not in fields:
        there = ", ".join(fields)
        raise UserError(f"{option}: {wish.name} has no field {name!r}{nearest(name, fields)} (there are: {there})")
    return name


def _unclear(what: str, fields: Sequence[str], several: Sequence[str], wish: Wish) -> UserError:
    reason = f"{', '.join(several)} could be" if several else f"none of the fields is called as {what} usually are"
    there = ", ".join(fields) or "none"
    return UserError(
        f"{wish.name}: cannot tell the {what}: {reason}; its fields are {there}: "
        "give --prompt FIELD and --answers FIELD FIELD …"
    )


class Names:
    """How options of a question name answers.

    An option names the answer whose field has its name, or whose field's number or letter it ends with
    (``Response 2``, ``2``). Letters, numbers, and left and right of two, else count the answers from the first.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self.names = {plain(name): number for number, name in enumerate(answers)}
        self.stems = {*ANSWERS, "model", "assistant", *(plain(_parts(name)[0]) for name in answers)}
        tails = [_parts(name)[1] for name in answers]
        if len(set(tails)) == len(tails) and all(tails):
            self.tails = {tail: number for number, tail in enumerate(tails)}
        else:
            self.tails = {}
        positions = [string.ascii_lowercase, [str(number) for number in range(1, len(answers) + 1)]]
        if len(answers) == 2:
            positions.append(["left", "right"])
        for own in positions:
            if not set(own) & set(self.tails):
                self.tails |= {name: number for number, name in enumerate(own[: len(answers)])}

    def number(self, option: Any) -> int | None:
        """The number of the answer that an option names; None if it names none."""
        name = plain(str(option))
        if name in self.names or name in self.tails:
            return self.names.get(name, self.tails.get(name))
        stem, tail = _parts(str(option))
        return self.tails.get(tail) if plain(stem) in self.stems else None

    def about(self, question: str) -> int | None:
        """The number of the answer whose name is in that of a question, or whose number the question ends with."""
        found = [number for name, number in self.names.items() if name in plain(question)]
        return found[0] if len(found) == 1 else self.tails.get(_parts(question)[1]) if not found else None

    def choice(self, option: Any) -> tuple[int, ...] | None:
        """Ranks ``[2]`` if one of two answers, or a tie, was chosen; None if the option says neither."""
        if plain(str(option)) in TIES:
            return (1, 1)
        number = self.number(option)
        return None if number is None or len(self.answers) != 2 else ((1, 2), (2, 1))[number]

    def order(self, groups: Iterable[Iterable[Any]]) -> tuple[int, ...] | None:
        """Ranks ``[K]`` of groups of options from best to worst, tied in a group; None unless each answer is in one."""
        ranked = [(self.number(option), rank) for rank, group in enumerate(groups) for option in group]
        ranks = {number: rank for number, rank in ranked if number is not None}
        if len(ranked) != len(ranks) or len(ranks) != len(self.answers):
            return None
        return dense([ranks[number] for number in range(len(ranks))])


def by_rating(ratings: Sequence[float]) -> tuple[int, ...]:
    """Ranks ``[K]`` of ratings, where more is better."""
    return dense([-rating for rating in ratings])
