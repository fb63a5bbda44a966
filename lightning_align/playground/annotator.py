"""A Bradley–Terry annotator: compares, ranks and grades answers by a gold score that it perceives with noise.

An answer of value v is perceived as u = v / temperature + Gumbel noise, so that of two answers the first is perceived
as better with probability σ((v₁ − v₂) / temperature) (Bradley and Terry 1952), and several come in an order of Plackett
and Luce. With a tie band η, answers perceived within η of each other are called equal (Rao and Kupper 1967).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, isfinite, log
from random import Random
from typing import Literal, get_args

from lightning_align.errors import UserError
from lightning_align.playground.gold import HELPFULNESS_WEIGHT, SAFETY_WEIGHT, explain
from lightning_align.playground.requests import Request

Aspect = Literal["gold", "helpfulness", "safety"]
Strength = Literal["significantly", "better", "slightly", "negligibly"]
# Least perceived differences; about a quarter of the default pairs falls into each class.
STRENGTHS: tuple[tuple[float, Strength], ...] = (
    *((3.0, "significantly"), (1.7, "better"), (0.8, "slightly"), (-inf, "negligibly")),
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the annotator says of two answers: the better one (0 or 1), by how much, or that they are equal."""

    winner: int
    tie: bool
    strength: Strength


@dataclass(frozen=True, slots=True)
class Annotator:
    """Draws labels from the gold score.

    Args:
        temperature: Difference of value that is told apart with log-odds of 1; smaller is more reliable.
        noise: Share of labels that are given without looking: a coin flip, a random order.
        ties: Half-width η of the tie band in log-odds; 0 gives no ties.
        aspect: What is judged, in units of gold: ``gold`` itself, 3 × helpfulness or 4 × safety.

    Raises:
        UserError: If a setting is out of range.
    """

    temperature: float = 0.8
    noise: float = 0.0
    ties: float = 0.0
    aspect: Aspect = "gold"

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}: give a positive number (0.01 hardly ever errs)")
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise is {self.noise}: give a share from 0 to 1 (1: all labels are coin flips)")
        if not (self.ties >= 0 and isfinite(self.ties)):
            raise UserError(f"ties is {self.ties}: give the width of the tie band, 0 or more")
        if self.aspect not in get_args(Aspect):
            raise UserError(f"aspect is {self.aspect!r}: the playground has {', '.join(get_args(Aspect))}")

    def value(self, request: Request, completion: str) -> float:
        """The score that is judged, in units of gold."""
        score = explain(request, completion).score
        if self.aspect == "helpfulness":
            return HELPFULNESS_WEIGHT * score.helpfulness
        return SAFETY_WEIGHT * score.safety if self.aspect == "safety" else score.gold

    def probabilities(self, first: float, second: float) -> tuple[float, float, float]:
        """Probabilities that the first of two values is preferred, that they tie, and that the second is preferred."""
        odds = (first - second) / self.temperature
        win, lose = sigmoid(odds - self.ties), sigmoid(-odds - self.ties)
        tie = max(0.0, 1 - win - lose)  # rounding would make it negative
        coin = self.noise / 2
        return (1 - self.noise) * win + coin, (1 - self.noise) * tie, (1 - self.noise) * lose + coin

    def compare(self, random: Random, first: float, second: float) -> Judgement:
        """Judge two values."""
        perceived = (first - second) / self.temperature + _gumbel(random) - _gumbel(random)
        if random.random() < self.noise:
            winner, tie = random.randrange(2), False
        else:
            winner, tie = int(perceived < 0), abs(perceived) < self.ties
        strength = next(name for least, name in STRENGTHS if abs(perceived) >= least)
        return Judgement(winner, tie, strength)

    def rank(self, random: Random, values: Sequence[float]) -> list[int]:
        """Rank values, 1 is best; neighbours in the order that are perceived within the tie band share a rank."""
        perceived = [value / self.temperature + _gumbel(random) for value in values]
        blind = random.random() < self.noise
        if blind:
            random.shuffle(perceived)
        order = sorted(range(len(values)), key=lambda i: -perceived[i])
        ranks = [1] * len(values)
        for place, (above, here) in enumerate(pairwise(order), 2):
            equal = not blind and perceived[above] - perceived[here] < self.ties
            ranks[here] = ranks[above] if equal else place
        return ranks

    def approves(self, random: Random, value: float) -> bool:
        """Thumbs up with probability σ((value − middle) / temperature); the middle is 1.5, or 3 for safety."""
        middle = 3.0 if self.aspect == "safety" else 1.5
        up = random.random() < sigmoid((value - middle) / self.temperature)
        return random.random() < 0.5 if random.random() < self.noise else up

    def grade(self, random: Random, value: float) -> float:
        """The value with the noise of one comparison, logistic of scale temperature; without looking, −1 to 3."""
        seen = value + self.temperature * (_gumbel(random) - _gumbel(random))
        return round(random.uniform(-1, 3) if random.random() < self.noise else seen, 3)


def sigmoid(odds: float) -> float:
    """1 / (1 + e^(−odds)), without overflow."""
    return 1 / (1 + exp(-odds)) if odds >= 0 else exp(odds) / (1 + exp(odds))


def _gumbel(random: Random) -> float:
    return -log(-log(random.random() or 5e-324))
