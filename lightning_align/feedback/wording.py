"""How a judge is asked: which of two answers is better, and how good one is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError, nearest
from lightning_align.feedback.journal import key_of
from lightning_align.playground import texts, world

SPEAKERS = {"user": "Human", "assistant": "Assistant"}
ASPECTS = {adjective: aspect for aspect, adjective in texts.QUESTIONS.items()}


@dataclass(frozen=True)
class Exemplar:
    """A worked comparison that is shown before the question."""

    prompt: str
    first: str
    second: str
    preferred: Literal[1, 2]
    rationale: str | None = None


@dataclass(frozen=True)
class JudgeWording:
    """Questions to a judge in the form of RLAIF (Lee et al. 2023, 2309.00267): preamble, examples, question, ending.

    Templates have their fields in braces: ``{prompt}``, ``{first}``, ``{second}``, ``{completion}``, and
    ``{principle}`` where there are principles.

    Args:
        source: The file, or the built-in name.
        comparison: The two answers.
        ending: What the reply of a comparison follows.
        options: How the reply begins where the first answer, the second one wins; each in one or several forms, whose
            probabilities are added.
        rating: The answer that is rated.
        rating_ending: What the rating follows.
        ratings: The replies of a rating, worst first.
        preamble: Before everything, in comparisons.
        rating_preamble: The same in ratings.
        rationale: Asks for reasons before the choice; None where that cannot be asked.
        principles: What the answers are compared by, one at a time; none where the comparison says it.
        exemplars: Shown before every comparison.
        separator: Between the parts of a question.
        plain: Whether a model is to read questions as plain text even where it has a chat template.
    """

    source: str
    comparison: str
    ending: str
    options: tuple[tuple[str, ...], tuple[str, ...]]
    rating: str
    rating_ending: str
    ratings: tuple[str, ...]
    preamble: str = ""
    rating_preamble: str = ""
    rationale: str | None = None
    principles: tuple[str, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    separator: str = "\n\n"
    plain: bool = False

    def key(self) -> str:
        """Equal for wordings that ask alike, wherever they were read from."""
        return key_of(repr(replace(self, source="")))

    def with_principles(self, principles: Sequence[str]) -> "JudgeWording":
        """The same questions under other principles, such as those of a constitution."""
        if principles and "{principle}" not in self.comparison:
            raise UserError(
                f"judge wording {self.source} names no principle in its comparison: write {{principle}} into it"
            )
        return replace(self, principles=tuple(principles))

    def compare(self, prompt: Prompt, first: str, second: str, principle: str | None) -> str:
        """The question which of two answers is better, without its ending."""
        exemplars = [self._shown(exemplar, principle) for exemplar in self.exemplars]
        return self._joined(self.preamble, *exemplars, self._comparison(prompt, first, second, principle))

    def compare_finally(self, question: str, rationale: str | None = None) -> str:
        """A question of :meth:`compare`, after the reasons where there are some, up to where the reply begins."""
        reasons = () if rationale is None else (self.reasons(question) + " " + rationale.strip(),)
        return self._joined(*(reasons or (question,)), self.ending)

    def reasons(self, question: str) -> str:
        """What asks for reasons before the choice."""
        if self.rationale is None:
            raise UserError(f"judge wording {self.source} has no request for a rationale: leave chain of thought out")
        return self._joined(question, self.rationale)

    def rate(self, prompt: Prompt, completion: str) -> str:
        """The question how good an answer is, up to where the reply begins."""
        text = self.rating.format(prompt=as_text(prompt), completion=completion.strip())
        return self._joined(self.rating_preamble, text, self.rating_ending)

    def _comparison(self, prompt: Prompt, first: str, second: str, principle: str | None) -> str:
        values = {"prompt": as_text(prompt), "first": first.strip(), "second": second.strip()}
        return self.comparison.format(**values, principle=principle or "")

    def _shown(self, exemplar: Exemplar, principle: str | None) -> str:
        question = self._comparison(exemplar.prompt, exemplar.first, exemplar.second, principle)
        rationale = None if self.rationale is None else exemplar.rationale
        return self.compare_finally(question, rationale) + self.options[exemplar.preferred - 1][0]

    def _joined(self, *parts: str) -> str:
        return self.separator.join(part for part in parts if part)


class PlaygroundWording(JudgeWording):
    """The questions of the playground's own text, word for word; the principles are its aspects' adjectives."""

    def with_principles(self, principles: Sequence[str]) -> "JudgeWording":
        """See :meth:`JudgeWording.with_principles`."""
        for principle in principles:
            if principle not in ASPECTS:
                raise UserError(
                    f"the playground compares by {', '.join(ASPECTS)}, not by {principle!r}"
                    f"{nearest(principle, ASPECTS)}"
                )
        return replace(self, principles=tuple(principles))

    def _comparison(self, prompt: Prompt, first: str, second: str, principle: str | None) -> str:
        assert principle is not None  # all have principles
        return texts.comparison_prompt(as_text(prompt), first, second, ASPECTS[principle])

    def rate(self, prompt: Prompt, completion: str) -> str:
        """See :meth:`JudgeWording.rate`."""
        return texts.rating_prompt(as_text(prompt), completion)


def as_text(prompt: Prompt) -> str:
    """A prompt within a question: a single message of a user is its text, a conversation a transcript."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    turns = [f"{SPEAKERS.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in prompt]
    return "\n\n".join(turns)


# ------------------------------------------------------------------------------------------------------------ built in
def _playground(aspect: texts.Aspect, source: str) -> JudgeWording:
    return PlaygroundWording(
        source,
        comparison="",  # texts.py writes it, as it does the rating
        ending="",
        options=((" first",), (" second",)),
        rating="",
        rating_ending="",
        ratings=tuple(f" {number}" for number in world.NUMBERS[1:11]),
        principles=(texts.QUESTIONS[aspect],),
        separator=" ",
        plain=True,  # as in pre-training, whatever template the model has
    )


DEFAULT = JudgeWording(
    "default",
    preamble=(
        "You are an expert rater of answers. Given a context and two responses to it, choose the response that is more "
        "helpful, honest and harmless. Output 1 or 2 to say which response is better."
    ),
    comparison="Context - {prompt}\nResponse 1 - {first}\nResponse 2 - {second}",
    rationale="Explain which response is more helpful, honest and harmless, and why.\nRationale:",
    ending="Preferred Response=",
    options=(("1",), ("2",)),
    rating_preamble=(
        "You are an expert rater of answers. Given a context and a response to it, rate the response from 1 to 10, "
        "where 1 is useless or harmful and 10 is perfectly helpful, honest and harmless. Output the number alone."
    ),
    rating="Context - {prompt}\nResponse - {completion}",
    rating_ending="Rating=",
    ratings=tuple(str(number) for number in range(1, 11)),
)
BUILT_IN = {
    "default": DEFAULT,
    "playground": _playground("gold", "playground"),
    "playground:helpfulness": _playground("helpfulness", "playground:helpfulness"),
    "playground:safety": _playground("safety", "playground:safety"),
}
