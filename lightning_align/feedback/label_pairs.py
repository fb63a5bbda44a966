"""Pairs of answers that a judge is to label: those of records, or sampled ones; and the records that they become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_align.data.records import is_tie
from lightning_align.data.templates import Completion, Prompt
from lightning_align.feedback.journal import Journal, key_of
from lightning_align.feedback.models import LanguageModel
from lightning_align.rollout.types import SamplingParams

CARRIED = ("weight", "aspect")  # what a record says whatever its label
BATCH = 64  # prompts whose answers are sampled together


@dataclass
class Labelled:
    """P pairs in the order in which they are shown first.

    Attributes:
        prompts: Of the pairs.
        first: Texts of the answers shown first.
        second: Texts of the others.
        own: The records' labels ``[P]``, as probabilities that the first is better; NaN where there is none.
        answers: Both answers as they stand in records.
        extras: What else the new records say.
        num_equal: Pairs left out because their answers are equal, or one of them is empty.
    """

    prompts: list[Prompt] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    answers: list[tuple[Completion, Completion]] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    num_equal: int = 0

    def add(self, prompt: Prompt, first: Completion, second: Completion, own: float, extras: dict[str, Any]) -> None:
        """Add a pair."""
        self.prompts.append(prompt)
        self.first.append(_said(first))
        self.second.append(_said(second))
        self.own.append(own)
        self.answers.append((first, second))
        self.extras.append(extras)

    def records(self, label: Tensor) -> list[dict[str, Any]]:
        """Preferences with soft labels, the likelier answer as ``chosen``; none where the label ``[P]`` is NaN."""
        made = []
        for prompt, sides, extras, value in zip(self.prompts, self.answers, self.extras, label.tolist(), strict=True):
            if value == value:
                chosen, rejected = sides if value >= 0.5 else sides[::-1]
                soft = {"soft_label": max(value, 1 - value)}
                made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **soft, **extras})
        return made


def pairs_of_preferences(records: Sequence[Mapping[str, Any]], *, seed: int = 0) -> Labelled:
    """The pairs of preference records, shown in an order that a coin decides, as the better one comes first there."""
    pairs = Labelled()
    for number, record in enumerate(records):
        own = 0.5 if is_tie(record) else float(record.get("soft_label", 1.0))
        extras = {name: record[name] for name in CARRIED if name in record}
        chosen, rejected = record["chosen"], record["rejected"]
        if int(key_of(seed, number, record["prompt"]), 16) % 2:
            pairs.add(record["prompt"], chosen, rejected, own, extras)
        else:
            pairs.add(record["prompt"], rejected, chosen, 1 - own, extras)
    return pairs


def sampled_texts(
    model: LanguageModel,
    records: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    journal: Journal,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[str]]:
    """``params.num_samples`` answers to each prompt, none where one failed; what the journal has is not sampled again.

    ``progress`` hears how many prompts were sampled, each time some were.
    """
    prompts = [record["prompt"] for record in records]
    settings = ("samples", model.key(), asdict(params), seed)
    keys = [key_of(*settings, number, prompt) for number, prompt in enumerate(prompts)]
    missing = [row for row, key in enumerate(keys) if key not in journal]
    for start in range(0, len(missing), BATCH):
        rows = missing[start : start + BATCH]
        seeds = [int(key_of(keys[row], n), 16) >> 66 for row in rows for n in range(params.num_samples)]
        replies = model.sample([prompts[row] for row in rows], params, seeds=seeds)
        texts = [None if reply.failed else reply.text for reply in replies]
        own = {row: texts[n * params.num_samples : (n + 1) * params.num_samples] for n, row in enumerate(rows)}
        journal.add({keys[row]: {"texts": found} for row, found in own.items() if None not in found})
        progress(len(rows))
    return [journal[key]["texts"] if key in journal else [] for key in keys]


def sampled_pairs(
    model: LanguageModel,
    records: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    journal: Journal,
    *,
    seed: int = 0,
) -> Labelled:
    """``params.num_samples / 2`` pairs of samples to each prompt; see :func:`sampled_texts`."""
    pairs = Labelled()
    for record, found in zip(records, sampled_texts(model, records, params, journal, seed=seed), strict=True):
        prompt = record["prompt"]
        for first, second in zip(found[::2], found[1::2], strict=True):
            if first.strip() == second.strip() or not (first.strip() and second.strip()):
                pairs.num_equal += 1
            else:
                pairs.add(prompt, answer_to(prompt, first), answer_to(prompt, second), float("nan"), {})
    return pairs


def agreement(label: Tensor, own: Sequence[float] | Tensor) -> NDArray[np.float64]:
    """Whether labels ``[P]`` name the side that others do, ½ where undecided; NaN where either says nothing."""
    other = torch.as_tensor(own, dtype=torch.float64)
    side = torch.sign(other - 0.5)
    agrees = 0.5 * (1 + torch.sign(label.double() - 0.5) * side)
    return agrees.where(side != 0, torch.nan).numpy()


def _said(answer: Completion) -> str:
    return answer if isinstance(answer, str) else "\n\n".join(str(turn["content"]) for turn in answer)


def answer_to(prompt: Prompt, text: str) -> Completion:
    """A sampled text in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text.strip()}]
