"""Chains of critique and revision under a constitution (Bai et al. 2022, section 3.1)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from lightning_align.data.templates import Prompt
from lightning_align.errors import check_options
from lightning_align.feedback.constitution import Constitution
from lightning_align.feedback.journal import key_of
from lightning_align.feedback.models import LanguageModel, Reply
from lightning_align.rollout.types import SamplingParams

Fault = Literal["empty", "unfinished", "repeats", "unchanged"]
OnBad = Literal["keep_previous", "drop"]
Keep = Literal["all", "last"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
QUOTED = 3  # words of a critique from which a revision that holds it is taken to quote it
SEED_BITS = 48


@dataclass(frozen=True)
class Step:
    """One revision.

    Args:
        principle: Name of the principle that was drawn.
        critique: What the critic said; None where critiques are skipped.
        revision: What it wrote in the place of the completion before.
        fault: What is wrong with that; None if nothing.
        changed: Whether it differs from the completion before.
    """

    principle: str
    critique: str | None
    revision: str
    fault: Fault | None
    changed: bool


@dataclass(frozen=True)
class Chain:
    """A prompt, the first completion, and its revisions.

    Args:
        prompt: What was asked.
        first: The completion that is revised.
        finished: Whether that ended by itself.
        steps: The revisions; none for a prompt whose completion is taken as it is.
        failed: Whether a model gave no reply somewhere: nothing is learnt of the chain.
    """

    prompt: Prompt
    first: str
    finished: bool
    steps: tuple[Step, ...] = ()
    failed: bool = False

    def completions(self) -> list[Reply]:
        """The completion after each step, ``[N + 1]`` with the first one; after a faulty step it is the one before."""
        found = [Reply(self.first, self.finished)]
        for step in self.steps:
            found.append(found[-1] if step.fault else Reply(step.revision, True))
        return found

    def as_row(self) -> dict[str, Any]:
        """Plain values, for a file; without the prompt."""
        return {"first": self.first, "finished": self.finished, "steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_row(cls, prompt: Prompt, row: Mapping[str, Any]) -> "Chain":
        """The chain of :meth:`as_row`."""
        return cls(prompt, row["first"], row["finished"], tuple(Step(**step) for step in row["steps"]))


@dataclass(frozen=True)
class Demonstration:
    """A completion to learn: the ``revision``-th of its chain, under the principles that led there."""

    prompt: Prompt
    completion: str
    revision: int
    principles: tuple[str, ...]


@dataclass(frozen=True)
class Reviser:
    """Who answers, criticises and revises, and how.

    Args:
        model: Answers.
        critic: Criticises and revises; may be the same.
        constitution: Principles, and how questions are put.
        answer: How answers are sampled, one a prompt.
        revision: How revisions are.
        critique: How critiques are.
        revisions: Steps of a chain, N (paper: 4).
        critiques: Whether a critique comes before a revision.

    Raises:
        UserError: ``revisions`` is less than 1.
    """

    model: LanguageModel
    critic: LanguageModel
    constitution: Constitution
    answer: SamplingParams
    revision: SamplingParams
    critique: SamplingParams
    revisions: int = 4
    critiques: bool = True

    def __post_init__(self) -> None:
        check_options("model", ("revisions", self.revisions, self.revisions >= 1, "at least 1"))

    def chains(self, prompts: Sequence[Prompt], keys: Sequence[str], revised: Sequence[bool]) -> list[Chain]:
        """One chain a prompt, all of them a step at a time.

        A chain is a function of its prompt and key: all that is random in it is seeded by the key and the step.

        Args:
            prompts: Texts or conversations.
            keys: One a prompt; equal prompts with equal keys get equal chains.
            revised: Whether the first completion is to be revised.
        """
        answers = self._sample(self.model, prompts, self.answer, keys, "answer", 0)
        chains = [
            Chain(prompt, reply.text, reply.finished, failed=reply.failed)
            for prompt, reply in zip(prompts, answers, strict=True)
        ]
        rows = [index for index, wanted in enumerate(revised) if wanted]
        for step in range(1, self.revisions + 1):
            steps = self._step([chains[row] for row in rows], [keys[row] for row in rows], step)
            for row, chain in zip(rows, steps, strict=True):
                chains[row] = chain
        return chains

    def _step(self, chains: Sequence[Chain], keys: Sequence[str], step: int) -> list[Chain]:
        """The chains with one more step."""
        constitution, templates = self.constitution, self.constitution.templates
        before = [chain.completions()[-1].text for chain in chains]
        rules = [constitution.draw(key, step) for key in keys]
        critiques: list[str | None] = [None] * len(chains)
        failed = [chain.failed for chain in chains]
        if self.critiques:
            questions = [
                constitution.ask_critique(chain.prompt, text, rule)
                for chain, text, rule in zip(chains, before, rules, strict=True)
            ]
            params = replace(self.critique, stop_strings=templates.critique_stop)
            replies = self._sample(self.critic, questions, params, keys, "critique", step)
            critiques = [reply.text.strip() for reply in replies]
            failed = [gone or reply.failed for gone, reply in zip(failed, replies, strict=True)]
        questions = [
            constitution.ask_revision(chain.prompt, text, rule, critique)
            for chain, text, rule, critique in zip(chains, before, rules, critiques, strict=True)
        ]
        params = replace(self.revision, stop_strings=(*self.revision.stop_strings, *templates.revision_stop))
        replies = self._sample(self.critic, questions, params, keys, "revision", step)
        made = []
        rows = zip(chains, rules, critiques, before, replies, failed, strict=True)
        for chain, rule, critique, text, reply, gone in rows:
            fault = find_fault(reply, text, constitution.requests, critique)
            revision = (margin(chain.first) if isinstance(chain.prompt, str) else "") + reply.text.strip()
            step_made = Step(rule.name, critique, revision, fault, words(revision) != words(text))
            made.append(replace(chain, steps=(*chain.steps, step_made), failed=gone or reply.failed))
        return made

    def _sample(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        keys: Sequence[str],
        what: str,
        step: int,
    ) -> list[Reply]:
        if not prompts:
            return []
        seeds = [int(key_of(key, what, step), 16) >> (128 - SEED_BITS) for key in keys]
        return model.sample(prompts, params, seeds=seeds)


def find_fault(reply: Reply, before: str, requests: Sequence[str], critique: str | None) -> Fault | None:
    """Why a revision is none.

    Args:
        reply: The revision: at fault if it is ``empty``, ``unfinished`` (cut off, and learnt it would be cut off
            again), if it ``repeats`` a request of the constitution or the critique, or is ``unchanged``.
        before: The completion that it revises.
        requests: The constitution's.
        critique: Of this step; one of a few words is no quotation.
    """
    if not reply.text.strip():
        return "empty"
    if not reply.finished:
        return "unfinished"
    if repeats(reply.text, requests, critique):
        return "repeats"
    return "unchanged" if words(reply.text) == words(before) else None


def repeats(text: str, requests: Sequence[str], critique: str | None = None) -> bool:
    """Whether a text holds one of the requests or the critique, whatever their case and spacing."""
    inside = f" {words(text)} "
    quoted = [words(request) for request in requests]
    if critique is not None and len(critique.split()) >= QUOTED:
        quoted.append(words(critique))
    return any(f" {quotation} " in inside for quotation in quoted)


def margin(text: str) -> str:
    """The white space that a text begins with: a revision goes on from the prompt as the first completion does."""
    return text[: len(text) - len(text.lstrip())]


def words(text: str) -> str:
    """The text in lower case with single spaces."""
    return " ".join(text.casefold().split())


# ------------------------------------------------------------------------------------------------- what is learnt of it
def demonstrations(chain: Chain, constitution: Constitution, *, keep: Keep, on_bad: OnBad) -> list[Demonstration]:
    """What a chain teaches; never a completion that is empty, cut off or repeats a request.

    Args:
        chain: Without steps it teaches its first completion, as revision 0.
        constitution: Whose requests must not be learnt.
        keep: Every revision (paper), or the ``last`` one.
        on_bad: Where a step is at fault, ``keep_previous`` teaches the completion before it once more; ``drop`` leaves
            the step out.
    """
    if chain.failed:
        return []
    texts, used = chain.completions(), [step.principle for step in chain.steps]
    wanted = list(range(1, len(texts))) or [0]
    if on_bad == "drop":
        wanted = [n for n in wanted if n == 0 or chain.steps[n - 1].fault is None]
    if keep == "last":
        wanted = wanted[-1:]
    critiques = [step.critique for step in chain.steps]
    good = [n for n in wanted if is_learnable(texts[n], constitution.requests, critiques[:n])]
    return [Demonstration(chain.prompt, texts[n].text, n, tuple(used[:n])) for n in good]


def is_learnable(reply: Reply, requests: Sequence[str], critiques: Sequence[str | None]) -> bool:
    """Whether a completion says something, came to its end, and holds neither a request nor a critique."""
    if not reply.text.strip() or not reply.finished:
        return False
    return not any(repeats(reply.text, requests, critique) for critique in (None, *critiques))


def tally(chains: Sequence[Chain]) -> dict[str, int]:
    """What happened, as counts that add up over chains: critiques, revisions, changed ones, and those at each fault."""
    steps = [step for chain in chains if not chain.failed for step in chain.steps]
    faults = Counter(step.fault for step in steps)
    return {
        "critiques": sum(step.critique is not None for step in steps),
        "revisions": len(steps),
        "changed": sum(step.changed for step in steps),
        **{fault: faults[fault] for fault in FAULTS},
    }
