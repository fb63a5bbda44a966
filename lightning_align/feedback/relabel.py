"""Hindsight relabelling: from a prompt and what was said to it, the instruction that the output does follow.

A relabelling is any function ``(prompt, completion, feedback) -> Relabelled``. Some of the built-in ones also say how a
prompt is put to the model in use: the "generate a correct answer" of Zhang et al. 2023 (2302.05206). One in which a
language model writes the instruction would be a further entry of :data:`BUILT_IN`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from lightning_align.data.encode import encode_prompts
from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError, nearest
from lightning_align.feedback.relabel_playground import follows, rewritten
from lightning_align.plugins import load_function, said

CORRECTNESS = ("Generate a correct answer. ", "Generate a wrong answer. ")
QUALITY = ("Quality: high. ", "Quality: above average. ", "Quality: below average. ", "Quality: low. ")


@dataclass(frozen=True)
class Feedback:
    """What is known of a completion beside its text.

    Attributes:
        score: What the reward gave it, NaN for nothing.
        quantile: Share of its round's completions that score less, ties by half, 0 to 1; None without a score, and
            outside a round.
        finished: Whether it ended by itself.
        record: The record of its prompt, with whatever columns that has.
    """

    score: float
    quantile: float | None
    finished: bool
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Relabelled:
    """An output in hindsight.

    Attributes:
        instruction: What the output follows; None where nothing that can be said, and it is left out. It is a whole
            prompt, or what stands before ``query``.
        negative: An instruction that the output does not follow, the harder the better; None for none.
        satisfied: Whether it does what it was asked for; None where that is not known.
        weight: Of its tokens in the loss.
        query: What the instruction is about. Other outputs' instructions are then tried before the same query, and in
            the place of a whole prompt where there is none.
    """

    instruction: Prompt | None
    negative: Prompt | None = None
    satisfied: bool | None = None
    weight: float = 1.0
    query: Prompt | None = None


Relabel = Callable[[Prompt, str, Feedback], Relabelled]
Verifier = Callable[[Prompt, str, Feedback], bool | None]


@runtime_checkable
class Conditioned(Protocol):
    """A relabelling that puts an instruction before every prompt, in training and in use."""

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        """As every :data:`Relabel`."""
        ...

    def asked(self, prompt: Prompt) -> Prompt:
        """The prompt as it is put to the model whenever it is sampled."""
        ...


def under(instruction: Prompt, query: Prompt | None) -> Prompt:
    """The prompt that an instruction makes with what it is about: it stands before the text, or the last user turn."""
    if query is None:
        return instruction
    if not isinstance(instruction, str):
        raise UserError("a relabelling gave a query and a conversation as its instruction: give text before a query")
    if isinstance(query, str):
        return instruction + query
    last = max((place for place, turn in enumerate(query) if turn["role"] == "user"), default=None)
    if last is None:
        raise UserError("a conversation without a turn of the user has no place for an instruction")
    turn = query[last]
    return [*query[:last], {**turn, "content": instruction + turn["content"]}, *query[last + 1 :]]


# ---------------------------------------------------------------------- verifiers
def above(threshold: float) -> Verifier:
    """Satisfied is what scores more than this; not known without a score."""

    def verify(prompt: Prompt, completion: str, feedback: Feedback) -> bool | None:
        return None if feedback.score != feedback.score else feedback.score > threshold

    return verify


def by_the_playground(prompt: Prompt, completion: str, feedback: Feedback) -> bool | None:
    """Satisfied is what meets every demand of a prompt of the playground; of other prompts it is not known."""
    return follows(prompt, completion)


# ---------------------------------------------------------------------- built in
@dataclass(frozen=True)
class Identity:
    """The prompt as it was: with successes alone, plain filtering."""

    verify: Verifier

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        """See :data:`Relabel`."""
        return Relabelled(prompt, satisfied=self.verify(prompt, completion, feedback))


@dataclass(frozen=True)
class Binary:
    """A right output follows the first of two instructions, a wrong one the second (Zhang et al. 2023)."""

    verify: Verifier
    instructions: Sequence[str] = CORRECTNESS

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        """See :data:`Relabel`."""
        satisfied = self.verify(prompt, completion, feedback)
        if satisfied is None:
            return Relabelled(None)
        right, wrong = self.instructions
        own, other = (right, wrong) if satisfied else (wrong, right)
        return Relabelled(own, other, satisfied, query=prompt)

    def asked(self, prompt: Prompt) -> Prompt:
        """For a right answer."""
        return under(self.instructions[0], prompt)


@dataclass(frozen=True)
class ScoreBucket:
    """An output follows the instruction of its score's quantile; the first is that of the best.

    As return-conditioned policies do (Chen et al. 2021, 2106.01345).
    """

    verify: Verifier
    instructions: Sequence[str] = QUALITY

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        """See :data:`Relabel`."""
        satisfied = self.verify(prompt, completion, feedback)
        if feedback.quantile is None:
            return Relabelled(None, satisfied=satisfied)
        number = len(self.instructions)
        bucket = min(number - 1, int((1 - feedback.quantile) * number))
        far = self.instructions[-1 if bucket < number / 2 else 0]
        return Relabelled(self.instructions[bucket], far, satisfied, query=prompt)

    def asked(self, prompt: Prompt) -> Prompt:
        """For an answer of the best bucket."""
        return under(self.instructions[0], prompt)


@dataclass(frozen=True)
class Constraint:
    """A prompt of the playground, rewritten so that the output does all of it; the negative is the one it failed."""

    verify: Verifier

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        """See :data:`Relabel`; raises :class:`UserError` for a prompt that is none of the playground's."""
        satisfied = self.verify(prompt, completion, feedback)
        found = rewritten(prompt, completion)
        if found is None:
            return Relabelled(None, satisfied=satisfied)
        return Relabelled(found, None if found == prompt else prompt, satisfied)


BUILT_IN: dict[str, Callable[..., Relabel]] = {
    **{"binary": Binary, "constraint": Constraint, "score_bucket": ScoreBucket, "identity": Identity},
}


def build_relabel(
    name: str, *, satisfied_above: float | None = None, instructions: Sequence[str] | None = None
) -> Relabel:
    """The relabelling of a name, or a user's own.

    Args:
        name: ``binary``, ``constraint``, ``score_bucket``, ``identity``; or ``package.module.function`` or
            ``file.py:function``.
        satisfied_above: Score above which an output counts as satisfying; by default the playground's demands decide.
        instructions: Of ``binary`` and ``score_bucket``, from the best on.

    Raises:
        UserError: There is no such relabelling, or it does not take these settings.
    """
    verify = by_the_playground if satisfied_above is None else above(satisfied_above)
    if name in ("binary", "score_bucket"):
        options = {} if instructions is None else {"instructions": tuple(instructions)}
        _check_instructions(name, options.get("instructions", ("one", "two")))
        return BUILT_IN[name](verify, **options)
    if instructions is not None:
        raise UserError("model.instructions are those of model.relabel binary and score_bucket: leave them out")
    if name in BUILT_IN:
        return BUILT_IN[name](verify)
    if ".py:" not in name and ("." not in name or Path(name).exists()):
        raise UserError(
            f"model.relabel is {name}: give {', '.join(BUILT_IN)}, package.module.function or file.py:function"
            f"{nearest(name, BUILT_IN)}"
        )
    if satisfied_above is not None:
        raise UserError("model.satisfied_above is for built-in relabellings: your own says what is satisfied")
    return _Guarded(load_function(name, "relabelling"), name)


def _check_instructions(name: str, instructions: Sequence[str]) -> None:
    if len(instructions) < 2 or (name == "binary" and len(instructions) > 2):
        wanted = "two, of right and of wrong answers" if name == "binary" else "two or more, from the best on"
        raise UserError(f"model.instructions has {len(instructions)}: model.relabel {name} takes {wanted}")
    if len(set(instructions)) < len(instructions):
        raise UserError("model.instructions has one twice: the model could not tell them apart")


def check_told_apart(relabel: Relabel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`UserError` where two instructions before a prompt are the same tokens, of words not known."""
    if not isinstance(relabel, Binary | ScoreBucket):
        return
    names = list(relabel.instructions)
    ids = encode_prompts(tokenizer, names)
    for place, name in enumerate(names):
        if ids[place] in ids[:place]:
            other = names[ids.index(ids[place])]
            raise UserError(
                f"model.instructions {other!r} and {name!r} are the same to the model, whose tokenizer does not know "
                "their words: give others"
            )


@dataclass(frozen=True)
class _Guarded:
    """A user's function, whose mistakes are said in one line."""

    function: Callable[..., Any]
    name: str

    def __call__(self, prompt: Prompt, completion: str, feedback: Feedback) -> Relabelled:
        try:
            result = self.function(prompt, completion, feedback)
        except UserError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"relabelling {self.name} failed on {completion[:80]!r}: {said(error)}") from error
        if not isinstance(result, Relabelled):
            raise UserError(
                f"relabelling {self.name} returned {type(result).__name__}: it must return "
                "lightning_align.feedback.relabel.Relabelled, with instruction None for what is left out"
            )
        if not 0 <= result.weight < float("inf"):
            raise UserError(f"relabelling {self.name} gave weight {result.weight}: give 0 or more")
        return result
