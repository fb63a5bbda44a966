"""How likely options are by what a server says of its reply: likeliest tokens, or the text alone."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple


class Token(NamedTuple):
    """A token of a reply, its log-prob, and those of the likeliest tokens in its place, by text."""

    text: str
    logp: float
    likeliest: Mapping[str, float]


def logps_of_tokens(tokens: Sequence[Token], options: Sequence[str]) -> list[float]:
    """Log-prob of each option as the beginning of a reply, by the likeliest tokens along the reply that was drawn.

    White space around options and before the reply does not count; of options that differ in it alone, the first one
    has all. An option that others begin with (1 and 10) counts where the reply does not go on to be one of them, which
    is known only along the drawn reply; beside it, the beginning of one option alone counts as that. −inf for what is
    nowhere among the likeliest.
    """
    names = [option.strip() for option in options]
    mass = dict.fromkeys(names, 0.0)
    drawn, logp = "", 0.0
    for token in tokens:
        before = mass.copy()
        for text, value in {**token.likeliest, token.text: token.logp}.items():
            name = _named((drawn + text).strip(), mass, whole=text == token.text)
            if name is not None and text.strip():
                mass[name] += math.exp(logp + value)
        if drawn.strip() in mass:  # what is a longer option now was counted as the shorter one before
            mass[drawn.strip()] -= sum(mass[name] - before[name] for name in mass if name != drawn.strip())
        drawn, logp = drawn + token.text, logp + token.logp
        if not any(name.startswith(drawn.strip()) and name != drawn.strip() for name in mass):
            break
    return [math.log(mass[name]) if mass[name] > 0 else -math.inf for name in _once(names, mass)]


def logps_of_text(text: str, options: Sequence[str]) -> list[float]:
    """0 for the longest option that a text begins with as whole words, −inf for all others."""
    reply = text.strip()
    names = [option.strip() for option in options]
    begun = [name for name in names if reply.startswith(name) and not reply[len(name) : len(name) + 1].isalnum()]
    mass = {max(begun, key=len, default=None): 1.0}
    return [0.0 if mass.pop(name, 0.0) else -math.inf for name in names]


def _named(reply: str, names: Collection[str], *, whole: bool) -> str | None:
    """The option that a reply is, or that it alone can still become where its end is not known."""
    if reply in names:
        return reply
    begun = [name for name in names if reply and name.startswith(reply)]
    return begun[0] if len(begun) == 1 and not whole else None


def _once(names: Sequence[str], mass: dict[str, float]) -> Iterator[str]:
    """Names in their order; one that was there before has nothing left."""
    for name in names:
        yield name
        mass[name] = 0.0
