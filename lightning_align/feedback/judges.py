"""Judges: which of two answers is better, how good one is, and what a judge has said before.

Legend: P pairs, or completions that are rated.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.journal import Journal, key_of
from lightning_align.feedback.models import LanguageModel
from lightning_align.feedback.wording import JudgeWording
from lightning_align.losses.judge import Rating, both_orders, expected_rating, label_metrics, soft_label
from lightning_align.losses.masked import Metrics
from lightning_align.plugins import said
from lightning_align.rollout.types import SamplingParams

Orders = Literal["both", "given"]
Principles = Literal["draw", "all"]
CHUNK = 64  # questions after whose answers a journal is written


class Pair(NamedTuple):
    """Two answers in the order in which they are shown."""

    prompt: Prompt
    first: str
    second: str


class Comparison(NamedTuple):
    """What a judge says of pairs, each ``[P]`` float32.

    Args:
        first_wins: Probability that the answer shown first is the better one; NaN where the judge gave no answer.
        mass: Probability that the judge chooses one of the two at all; below ½, the question is at fault. NaN where it
            could not be asked.
    """

    first_wins: Tensor
    mass: Tensor


class PairJudge(Protocol):
    """Compares answers; ``name`` is for messages."""

    name: str

    def key(self) -> str:
        """Equal for judges that answer alike."""
        ...

    def compare(self, pairs: Sequence[Pair]) -> Comparison:
        """What it says of each pair in the given order."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What asking took, by name, where there is something to count."""
        ...


class Judge:
    """A language model that is asked by a wording, and answers in log-probs.

    Bai et al. 2022 (2212.08073), Lee et al. 2023 (2309.00267).

    Args:
        model: Who is asked.
        wording: How.
        principles: Where the wording has several, ``draw`` one for each pair, the same in both orders, or average over
            ``all``.
        bounds: Clamp each probability to these before any average, (0.4, 0.6) in the paper after a chain of thought.
        rationale_tokens: Longest chain of thought before a choice, in tokens; 0 asks for none.
        seed: Of the principles that are drawn.

    Raises:
        UserError: The wording cannot ask for a chain of thought, or a value is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        wording: JudgeWording,
        *,
        principles: Principles = "draw",
        bounds: tuple[float, float] | None = None,
        rationale_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        if rationale_tokens < 0:
            raise UserError(f"the chain of thought has {rationale_tokens} tokens: give 0 or more")
        if rationale_tokens:
            wording.reasons("")
        self.name = model.name
        self.model = model
        self.wording = wording
        self._chat = model.chat and not wording.plain
        self.principles = principles
        self.bounds = check_bounds(bounds)
        self.rationale_tokens = rationale_tokens
        self.seed = seed

    def key(self) -> str:
        """See :meth:`PairJudge.key`."""
        options = (self.principles, self.bounds, self.rationale_tokens, self.seed)
        return key_of(self.model.key(), self.wording.key(), *options)

    def compare(self, pairs: Sequence[Pair]) -> Comparison:
        """See :meth:`PairJudge.compare`."""
        asked = [(index, principle) for index, pair in enumerate(pairs) for principle in self._principles(pair)]
        questions = [self.wording.compare(*pairs[index], principle) for index, principle in asked]
        first, second = self._options(questions)
        label = soft_label(first, second, bounds=self.bounds)
        mass = torch.logaddexp(first, second).exp()
        rows = torch.tensor([index for index, _ in asked], dtype=torch.long)
        return Comparison(_mean_by(label, rows, len(pairs)), _mean_by(mass, rows, len(pairs)))

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """Expected rating, reward in [−1, 1] and mass of each completion; NaN where the judge gave no answer."""
        pairs = zip(prompts, completions, strict=True)
        questions = [self._put(self.wording.rate(prompt, completion)) for prompt, completion in pairs]
        return expected_rating(self.model.option_logps(questions, self.wording.ratings))

    def counts(self) -> Mapping[str, int]:
        """See :meth:`LanguageModel.counts`."""
        return self.model.counts()

    def _principles(self, pair: Pair) -> tuple[str | None, ...]:
        if len(self.wording.principles) < 2 or self.principles == "all":
            return self.wording.principles or (None,)
        key = key_of(pair.prompt, sorted((pair.first, pair.second)))
        return (Random(f"principle {self.seed} {key}").choice(self.wording.principles),)

    def _options(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probs of the two options, each the sum over its forms; NaN where there was no answer."""
        put, failed = self._reasoned(questions) if self.rationale_tokens else self._plain(questions)
        forms = [form for option in self.wording.options for form in option]
        logp = self.model.option_logps(put, forms)
        logp[failed] = torch.nan
        count = len(self.wording.options[0])
        return logp[:, :count].logsumexp(1), logp[:, count:].logsumexp(1)

    def _plain(self, questions: Sequence[str]) -> tuple[list[Prompt], list[int]]:
        return [self._put(self.wording.compare_finally(question)) for question in questions], []

    def _reasoned(self, questions: Sequence[str]) -> tuple[list[Prompt], list[int]]:
        """Questions with the model's own reasons behind them, and which of them got none."""
        requests = [self.wording.reasons(question) for question in questions]
        params = SamplingParams(max_new_tokens=self.rationale_tokens, greedy=True)
        replies = self.model.sample([self._put(text) for text in requests], params, seeds=range(len(requests)))
        put: list[Prompt] = []
        for question, request, reply in zip(questions, requests, replies, strict=True):
            if self._chat:
                turns = (request, reply.text.strip(), self.wording.ending)
                roles = ("user", "assistant", "user")
                put.append([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)])
            else:
                put.append(self.wording.compare_finally(question, reply.text))
        return put, [index for index, reply in enumerate(replies) if reply.failed]

    def _put(self, question: str) -> Prompt:
        return [{"role": "user", "content": question}] if self._chat else question


class FunctionJudge:
    """A function ``f(prompts, first, second) -> list[float]``: probabilities that the first answer is the better one.

    ``None`` or NaN means no answer.

    Args:
        function: The function.
        name: What messages call it; also what caches know it by.
        bounds: Clamp probabilities to these.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        name: str,
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.bounds = check_bounds(bounds)

    def key(self) -> str:
        """See :meth:`PairJudge.key`."""
        return key_of("function", self.name, self.bounds)

    def compare(self, pairs: Sequence[Pair]) -> Comparison:
        """See :meth:`PairJudge.compare`; raises :class:`UserError` if the function fails or returns something else."""
        prompts, first, second = ([pair[side] for pair in pairs] for side in range(3))
        try:
            values: Any = self.function(prompts, first, second)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise UserError(f"judge {self.name} failed: {said(error)}") from error
        values = values.tolist() if isinstance(values, Tensor) else list(values)
        if len(values) != len(pairs):
            raise UserError(
                f"judge {self.name} returned {len(values)} labels for {len(pairs)} pairs: one each is needed"
            )
        for value in values:
            if value is not None and not (isinstance(value, int | float) and (0 <= value <= 1 or value != value)):
                raise UserError(
                    f"judge {self.name} returned {value!r}: it must return probabilities from 0 to 1, or None"
                )
        label = torch.tensor([torch.nan if value is None else float(value) for value in values])
        label = label if self.bounds is None else label.clamp(*self.bounds)
        return Comparison(label, torch.where(label.isnan(), torch.nan, 1.0))

    def counts(self) -> Mapping[str, int]:
        """Nothing."""
        return {}


class CachedJudge:
    """A judge that is never asked the same twice.

    Args:
        judge: Who is asked.
        journal: Keeps answers on the disk; None keeps them in memory alone.
        chunk: Questions that are asked at once, after which the journal is written.
        progress: Is called with the number of answers that came in.

    Attributes:
        num_asked: Questions that the judge was asked.
        num_cached: Questions that were answered before.
        num_failed: Questions that could not be put; they are not kept, so that they are put again.
    """

    def __init__(
        self,
        judge: PairJudge,
        journal: Journal | None = None,
        *,
        chunk: int = CHUNK,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.judge = judge
        self.name = judge.name
        self.journal = journal
        self.chunk = chunk
        self.progress = progress
        self.num_asked = self.num_cached = self.num_failed = 0
        self._key = judge.key()
        self._known: dict[str, tuple[float, float]] = {}

    def key(self) -> str:
        """See :meth:`PairJudge.key`."""
        return self._key

    def compare(self, pairs: Sequence[Pair]) -> Comparison:
        """See :meth:`PairJudge.compare`."""
        keys = [key_of("compare", self._key, *pair) for pair in pairs]
        wanted = {key: pair for key, pair in zip(keys, pairs, strict=True) if not self._recall(key)}
        self.num_cached += len(pairs) - len(wanted)
        self.progress(len(pairs) - len(wanted))
        missing = list(wanted)
        for start in range(0, len(missing), self.chunk):
            self._ask({key: wanted[key] for key in missing[start : start + self.chunk]})
        rows = [self._known.get(key, (torch.nan, torch.nan)) for key in keys]
        return Comparison(*torch.tensor(rows, dtype=torch.float32).view(-1, 2).unbind(1))

    def counts(self) -> Mapping[str, int]:
        """The judge's own."""
        return self.judge.counts()

    def _recall(self, key: str) -> bool:
        if key not in self._known and self.journal is not None and key in self.journal:
            row = self.journal[key]
            self._known[key] = torch.nan if row["first_wins"] is None else row["first_wins"], row["mass"]
        return key in self._known

    def _ask(self, wanted: dict[str, Pair]) -> None:
        said_now = self.judge.compare(list(wanted.values()))
        rows = zip(wanted, said_now.first_wins.tolist(), said_now.mass.tolist(), strict=True)
        answers = {key: (label, mass) for key, label, mass in rows if mass == mass}
        if self.journal is not None and answers:
            kept = {key: (label if label == label else None, mass) for key, (label, mass) in answers.items()}
            self.journal.add({key: {"first_wins": label, "mass": mass} for key, (label, mass) in kept.items()})
        self._known |= answers
        self.num_asked += len(wanted)
        self.num_failed += len(wanted) - len(answers)
        self.progress(len(wanted))


def preferences(
    judge: PairJudge, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], *, orders: Orders = "both"
) -> tuple[Tensor, Metrics]:
    """Probabilities that the first of two answers is the better one.

    Args:
        judge: Who is asked.
        prompts: P of them.
        first: An answer to each.
        second: Another answer to each.
        orders: ``both`` shows each pair twice and averages, which takes a judge's preference for a place out; ``given``
            shows it once.

    Returns:
        Probabilities ``[P]`` float32, NaN where the judge gave no answer in an order; and metrics of those that it
        answered: ``ai/mass``, of :func:`~lightning_align.losses.judge.label_metrics`, of
        :func:`~lightning_align.losses.judge.both_orders`, and of all of them ``ai/unanswered``.
    """
    pairs = [Pair(*pair) for pair in zip(prompts, first, second, strict=True)]
    swapped = [Pair(pair.prompt, pair.second, pair.first) for pair in pairs] if orders == "both" else []
    said_now = judge.compare([*pairs, *swapped])
    shown, mass = said_now.first_wins.view(1 + (orders == "both"), len(pairs)), said_now.mass
    answered = ~shown.isnan().any(0)
    label = shown.new_full((len(pairs),), torch.nan)
    if orders == "both":
        label[answered], metrics = both_orders(shown[0, answered], shown[1, answered])
    else:
        label[answered] = shown[0, answered]
        metrics = label_metrics(label[answered])
    known = mass[~mass.isnan()]
    metrics["ai/mass"] = known.sum(), known.new_tensor(len(known))
    metrics["ai/unanswered"] = (~answered).float().sum(), label.new_tensor(len(pairs))
    return label, metrics


def check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """The same bounds; raises :class:`UserError` if they are no two ascending probabilities."""
    if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= 1:
        raise UserError(f"labels are clamped to {bounds[0]:g} and {bounds[1]:g}: give two ascending probabilities")
    return bounds


def _mean_by(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """Mean of the values of each row ``[size]``."""
    total = torch.zeros(size).index_add(0, rows, values.float())
    return total / torch.zeros(size).index_add(0, rows, torch.ones(len(rows)))
