"""Rewards that are Python functions, TRL's signature: ``f(prompts, completions, **columns) -> list[float | None]``."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_align.errors import UserError
from lightning_align.plugins import said
from lightning_align.rewards.base import Prompt

RewardFunction = Callable[..., Sequence[float | None]]

SEVERAL = 4  # completions that must all fail before a function is taken to be broken

_LOGGER = logging.getLogger(__name__)


class FunctionReward:
    """Calls a function once a batch; where it raises, once a sequence, and leaves out those that raise again.

    The function is called by keyword and gets what it asks for: ``prompts``, ``completions``, ``finished`` and any
    column of the records; all of them if it takes ``**kwargs``. As in TRL, the completion of a conversational prompt is
    a list of one assistant message. ``None`` or NaN means "does not apply".

    Args:
        function: The function.
        name: What messages call it.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        if inspect.iscoroutinefunction(function):
            raise UserError(f"reward {name} is a coroutine function: give a plain one")
        self.function = function
        self.name = name
        self.num_failed = 0  # sequences left without a score because the function failed on them
        self.num_scored = 0
        self._parameters = list(inspect.signature(function).parameters.values())

    def to(self, device: torch.device) -> None:
        """A function has no device."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """One score per completion ``[B]``; raises :class:`UserError` if it fails on every one of several."""
        columns = self._arguments(prompts, completions, finished, records)
        total = len(completions)
        try:
            values = self._call(columns, total)
        except UserError:
            raise  # the function keeps no contract at all: calling it again cannot help
        except Exception as error:  # a user's function may raise anything, and must not cost the other sequences
            values = self._one_by_one(columns, total, error)
        self.num_scored += sum(not math.isnan(value) for value in values)
        return torch.tensor(values, dtype=torch.float32)

    def _one_by_one(self, columns: Mapping[str, Sequence[Any]], total: int, cause: Exception) -> list[float]:
        values, failed = [], 0
        for index in range(total):
            try:
                values += self._call({name: column[index : index + 1] for name, column in columns.items()}, 1)
            except UserError:
                raise
            except Exception as error:
                values.append(math.nan)
                failed, cause = failed + 1, error
        if failed == total >= SEVERAL:  # a few bad sequences say little
            raise UserError(
                f"reward {self.name} failed on all {total} completions of a batch: {said(cause)}"
            ) from cause
        if failed:
            self._note_failures(failed, said(cause))
        return values

    def _note_failures(self, failed: int, reason: str) -> None:
        if self.num_failed == 0:
            _LOGGER.warning(
                "reward %s failed on %d completions (%s): they get no score from it; later cases are only counted",
                self.name,
                failed,
                reason,
            )
        self.num_failed += failed

    def _call(self, columns: Mapping[str, Sequence[Any]], total: int) -> list[float]:
        """Call the function and check what it returned."""
        try:
            result = self.function(**{name: list(column) for name, column in columns.items()})
        except SystemExit as error:  # it would end the run as if it were done
            raise UserError(f"reward {self.name} tried to end the program: {said(error)}") from error
        if isinstance(result, Tensor | np.ndarray):
            result = result.tolist()
        if not isinstance(result, Sequence) or isinstance(result, str):
            raise UserError(f"reward {self.name} returned {type(result).__name__}: it must return a list of numbers")
        if len(result) != total:
            raise UserError(
                f"reward {self.name} returned {len(result)} scores for {total} completions: one each is needed"
            )
        values = []
        for value in result:
            if value is not None and not isinstance(value, Real):
                raise UserError(f"reward {self.name} returned {value!r} as a score: it must be a number or None")
            values.append(math.nan if value is None else float(value))
        infinite = [index for index, value in enumerate(values) if math.isinf(value)]
        if infinite:
            self._note_failures(len(infinite), "it returned an infinite score")
        return [math.nan if math.isinf(value) else value for value in values]

    def _arguments(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool],
        records: Sequence[Mapping[str, Any]],
    ) -> dict[str, Sequence[Any]]:
        names = dict.fromkeys(name for record in records for name in record)
        available: dict[str, Sequence[Any]] = {name: [record.get(name) for record in records] for name in names}
        available |= {"finished": finished, "prompts": prompts}  # whatever columns of these names say
        available["completions"] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._parameters)
        if takes_all:
            available.pop("prompt", None)  # it is passed as `prompts`, as TRL does
        for parameter in self._parameters:
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if needed and parameter.name not in available:
                columns = ", ".join(sorted(available))
                raise UserError(
                    f"reward {self.name} asks for {parameter.name!r}, which the records lack; there is: {columns}"
                )
        if takes_all:
            return available
        wanted = {parameter.name for parameter in self._parameters}
        return {name: values for name, values in available.items() if name in wanted}
