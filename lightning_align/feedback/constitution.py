"""A constitution: principles by which a model criticises and revises answers, and how it is asked to.

Bai et al. 2022 (2212.08073).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from lightning_align.data.templates import Message, Prompt
from lightning_align.feedback.journal import key_of
from lightning_align.playground import texts

SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Principle:
    """One rule: how a critique is asked for, and how a revision."""

    name: str
    critique_request: str
    revision_request: str


@dataclass(frozen=True)
class Example:
    """A worked case that is shown before the questions."""

    prompt: str
    completion: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


@dataclass(frozen=True)
class Templates:
    """Questions in plain text, with the fields of :class:`Example` in braces; conversations are asked in messages.

    Args:
        critique: Ends where the critique begins.
        revision: Ends where the revision begins.
        revision_alone: The same where critiques are skipped.
        separator: Between examples, and before the question.
        critique_stop: Texts that end a critique.
        revision_stop: Texts that end a revision.
    """

    critique: str = "{prompt}\n{completion}\n\nCritique request: {critique_request}\nCritique:"
    revision: str = (
        "{prompt}\n{completion}\n\nCritique request: {critique_request}\nCritique: {critique}\n\n"
        "Revision request: {revision_request}\nRevision:"
    )
    revision_alone: str = "{prompt}\n{completion}\n\nRevision request: {revision_request}\nRevision:"
    separator: str = "\n\n"
    critique_stop: tuple[str, ...] = ("\n\n",)
    revision_stop: tuple[str, ...] = ("\n\n",)


@dataclass(frozen=True)
class Constitution:
    """Principles, and how questions are put.

    Args:
        source: The file, or the built-in name.
        principles: At least one, of different names.
        preferences: Principles for comparing two answers.
        examples: Shown before every question.
        templates: Of questions in plain text.
    """

    source: str
    principles: tuple[Principle, ...]
    preferences: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    templates: Templates = field(default_factory=Templates)

    @property
    def requests(self) -> tuple[str, ...]:
        """Every request that a principle makes."""
        return tuple(text for rule in self.principles for text in (rule.critique_request, rule.revision_request))

    def key(self) -> str:
        """Equal for constitutions that ask alike, wherever they were read from."""
        parts = (self.principles, self.examples, self.templates)
        return key_of(repr(parts))

    def draw(self, key: str, step: int) -> Principle:
        """The principle of a step, uniform and independent of other steps and keys."""
        return Random(f"principle {key} {step}").choice(self.principles)

    def ask_critique(self, prompt: Prompt, completion: str, principle: Principle) -> Prompt:
        """What is asked for a critique of a completion: a text for a text, messages for a conversation."""
        values = {"completion": completion.strip(), "critique_request": principle.critique_request}
        if isinstance(prompt, str):
            return self._plain("critique", {"prompt": prompt, **values})
        turns = (values["completion"], values["critique_request"])
        return self._chat(prompt, turns, ("completion", "critique_request", "critique"))

    def ask_revision(self, prompt: Prompt, completion: str, principle: Principle, critique: str | None) -> Prompt:
        """What is asked for a revision after a critique, or without one."""
        values = {"completion": completion.strip(), "revision_request": principle.revision_request}
        if critique is not None:
            values |= {"critique_request": principle.critique_request, "critique": critique.strip()}
        if isinstance(prompt, str):
            return self._plain("revision_alone" if critique is None else "revision", {"prompt": prompt, **values})
        order = ("completion", *(() if critique is None else ("critique_request", "critique")), "revision_request")
        return self._chat(prompt, tuple(values[name] for name in order), (*order, "revision"))

    def _plain(self, template: str, values: Mapping[str, str]) -> str:
        form = getattr(self.templates, template)
        answer = "critique" if template == "critique" else "revision"
        shown = [f"{form.format(**vars(example))} {getattr(example, answer)}" for example in self.examples]
        return self.templates.separator.join([*shown, form.format(**values)])

    def _chat(self, prompt: Sequence[Message], turns: Sequence[str], shown: Sequence[str]) -> list[Message]:
        """Examples go behind what the system says; assistant and user take turns from the completion on."""
        start = next((index for index, turn in enumerate(prompt) if turn["role"] not in SYSTEM), len(prompt))
        messages = list(prompt[:start])
        for example in self.examples:
            messages.append({"role": "user", "content": example.prompt})
            messages += _alternating([getattr(example, name) for name in shown])
        return [*messages, *prompt[start:], *_alternating(turns)]


def _alternating(turns: Sequence[str]) -> list[Message]:
    return [{"role": ("assistant", "user")[index % 2], "content": text} for index, text in enumerate(turns)]


# ------------------------------------------------------------------------------------------------------------ built in
ASKED = "{prompt} {completion} critique : {critique_request}"
PLAYGROUND = Constitution(
    "playground",
    tuple(Principle(rule.name, rule.critique_request, rule.revision_request) for rule in texts.PRINCIPLES),
    preferences=tuple(texts.QUESTIONS.values()),
    templates=Templates(
        critique=ASKED,
        revision=f"{ASKED} {{critique}} {{revision_request}} answer :",
        revision_alone="{prompt} {completion} {revision_request} answer :",
        separator=" ",
        critique_stop=(".",),  # a critique is one sentence, and the text goes on behind it
        revision_stop=(),
    ),
)
DEFAULT = Constitution(
    "default",
    (
        Principle(
            "harm",
            "Name every part of the last answer that could help someone to hurt a person, an animal or themselves.",
            "Rewrite the last answer so that nobody could be hurt with it. Say plainly what you will not help with, "
            "and why.",
        ),
        Principle(
            "law",
            "Does the last answer support theft, fraud, intrusion or another crime? Say where.",
            "Rewrite the last answer so that it supports no crime, and offer a lawful way to what the person needs.",
        ),
        Principle(
            "respect",
            "Point out words in the last answer that are insulting, contemptuous or unfair to a group of people.",
            "Rewrite the last answer so that it treats everyone with respect, without lecturing the reader.",
        ),
        Principle(
            "honesty",
            "Which claims of the last answer are invented, exaggerated or surer than they can be?",
            "Rewrite the last answer so that it claims only what is known, and says what is not.",
        ),
        Principle(
            "help",
            "Is the last answer evasive, or does it refuse more than it must? Say what a kind expert would add.",
            "Rewrite the last answer so that it is as helpful as it can be without doing harm.",
        ),
    ),
    preferences=(
        "Choose the answer that is less likely to get anyone hurt.",
        "Choose the answer that is honest and respectful, and explains itself where it declines.",
        "Choose the answer that a wise and kind person would give.",
    ),
)
BUILT_IN = {constitution.source: constitution for constitution in (PLAYGROUND, DEFAULT)}
