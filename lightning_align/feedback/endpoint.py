"""Language models behind an OpenAI-compatible server: asked in parallel, and again where the network or it fails."""

import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, NamedTuple, TypeVar

import httpx
import torch
from torch import Tensor

from lightning_align.data.templates import Prompt
from lightning_align.errors import UserError
from lightning_align.feedback.journal import key_of
from lightning_align.feedback.models import Reply
from lightning_align.feedback.replies import Token, logps_of_text, logps_of_tokens
from lightning_align.rollout.types import SamplingParams

SOURCE = re.compile(r"(https?://[^\s#]+)#(\S+)")
KEY_VARIABLE = "OPENAI_API_KEY"
TOP = 20  # log-probs a token, the most that servers give
LONGEST_WAIT = 30.0  # seconds between two tries
BUSY = (408, 409, 425, 429)  # and 5xx: worth another try

Result = TypeVar("Result")
_LOGGER = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A server's reply: its text, why it ended, and its tokens where it gave log-probs."""

    text: str
    finish_reason: str
    tokens: list[Token] | None


class EndpointModel:
    """A model of a chat-completions server. The key is read from ``OPENAI_API_KEY`` and written nowhere.

    What fails for a reason that may pass (no answer in time, no connection, 429 and 5xx, something that is no chat
    completion) is tried again with pauses that double, up to a random share. A question that fails for good gets no
    answer, and others go on, until too many in a row have failed: the rest of them is not put, those that were answered
    are returned, and the next call raises :class:`UserError`.

    Args:
        source: ``http(s)://host:port/v1#model-name``.
        parallel: Questions under way at a time.
        timeout: Seconds to wait for an answer.
        retries: Tries after the first.
        max_failures: Questions in a row without an answer that stop everything.
        pause: Seconds before the second try.

    Attributes:
        num: ``requests``, ``retries``, ``failures`` (questions without an answer), and what the retries and failures
            were for: ``timeout``, ``connection``, ``busy``, ``malformed``.

    Raises:
        UserError: The source is not of that form, or an option is out of range.
    """

    chat = True

    def __init__(
        self,
        source: str,
        *,
        parallel: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        max_failures: int = 10,
        pause: float = 0.5,
    ) -> None:
        match = SOURCE.fullmatch(source)
        if match is None:
            raise UserError(f"endpoint {source}: write http://host:port/v1#model-name")
        for name, value, least in (
            ("parallel", parallel, 1),
            ("retries", retries, 0),
            ("max_failures", max_failures, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}: give at least {least}")
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout is {timeout}: give seconds above 0")
        self.name = source
        self.url, self.model = match[1].rstrip("/"), match[2]
        self.parallel = parallel
        self.retries = retries
        self.max_failures = max_failures
        self.pause = pause
        self.num: Counter[str] = Counter()
        self._secret = os.environ.get(KEY_VARIABLE, "")
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        limits = httpx.Limits(max_connections=parallel)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)
        self._lock = Lock()
        self._in_a_row = 0
        self._gives_logps = True
        self._enough = Event()  # of failures, or of this call: nothing more is put

    def key(self) -> str:
        """See :meth:`LanguageModel.key`: the server's address and the model's name."""
        return key_of("endpoint", self.url, self.model)

    def counts(self) -> Mapping[str, int]:
        """See :meth:`LanguageModel.counts`."""
        return dict(self.num)

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams, *, seeds: Sequence[int]) -> list[Reply]:
        """See :meth:`LanguageModel.sample`; raises :class:`UserError` for top_k and min_p, which servers lack."""
        if params.top_k or params.min_p:
            raise UserError(f"endpoint {self.name} has no top_k and no min_p: leave them out")
        options = {
            "max_tokens": params.max_new_tokens,
            "temperature": 0.0 if params.greedy else params.temperature,
            "top_p": params.top_p,
            **({"stop": list(params.stop_strings)} if params.stop_strings else {}),
        }
        asked = [prompt for prompt in prompts for _ in range(params.num_samples)]
        rows = list(zip(asked, seeds, strict=True))
        choices = self._in_parallel(lambda row: self._ask(row[0], {**options, "seed": row[1] % 2**31}), rows)
        return [
            Reply("", False, failed=True) if choice is None else Reply(choice.text, choice.finish_reason == "stop")
            for choice in choices
        ]

    def option_logps(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Tensor:
        """See :meth:`LanguageModel.option_logps`; of what the server's most likely tokens begin.

        An option that is not among them is −inf. From a server without log-probs the likeliest reply counts with
        probability 1, which is said once.
        """

        def ask(prompt: Prompt) -> list[float]:
            longest = max(map(len, options))  # in characters; no token has less than one
            choice = self._ask(prompt, {"max_tokens": min(16, longest + 1), "temperature": 0.0}, logps=True)
            if choice is None:
                return [math.nan] * len(options)
            if choice.tokens is None:
                self._note_no_logps()
                return logps_of_text(choice.text, options)
            return logps_of_tokens(choice.tokens, options)

        return torch.tensor(self._in_parallel(ask, prompts), dtype=torch.float32).view(-1, len(options))

    def _in_parallel(self, ask: Callable[[Any], Result], rows: Sequence[Any]) -> list[Result]:
        if self._in_a_row >= self.max_failures:
            raise UserError(self._what_failed())
        self._enough.clear()
        pool = ThreadPoolExecutor(self.parallel)
        try:
            return list(pool.map(ask, rows))
        finally:  # after an error or an interruption, those under way do not go on to wait and try again
            self._enough.set()
            pool.shutdown(cancel_futures=True)

    def _note_no_logps(self) -> None:
        with self._lock:
            if not self.num["without_logprobs"]:
                _LOGGER.warning(
                    "endpoint %s gives no log-probs: its likeliest reply counts as certain, labels are 0 or 1",
                    self.name,
                )
            self.num["without_logprobs"] += 1

    # ------------------------------------------------------------------ one question
    def _ask(self, prompt: Prompt, options: Mapping[str, Any], *, logps: bool = False) -> Choice | None:
        """What the server says; None where it says nothing after all tries."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        body = {"model": self.model, "messages": messages, **options}
        for number in range(self.retries + 1):
            if self._enough.is_set():
                break
            extra = {"logprobs": True, "top_logprobs": TOP} if logps and self._gives_logps else {}
            fault, wait = "malformed", 0.0
            try:
                self._count("requests")
                response = self._client.post(f"{self.url}/chat/completions", json={**body, **extra})
                if response.status_code == 200:
                    choice = _choice(response.json())
                    with self._lock:
                        self._in_a_row = 0
                    return choice
                if extra and response.status_code in (400, 422) and "logprob" in response.text:
                    self._gives_logps = False
                    return self._ask(prompt, options)
                if response.status_code not in BUSY and response.status_code < 500:
                    raise UserError(self._refusal(response))
                fault, wait = "busy", _seconds(response.headers.get("Retry-After", ""))
            except httpx.TimeoutException:
                fault = "timeout"
            except (httpx.TransportError, httpx.InvalidURL):
                fault = "connection"
            except (httpx.DecodingError, ValueError, KeyError, TypeError, IndexError, AttributeError):
                pass  # not JSON, or no chat completion
            self._count(fault)
            if number < self.retries and not self._enough.is_set():
                self._count("retries")
                doubled = min(LONGEST_WAIT, self.pause * 2**number)
                self._enough.wait(max(min(wait, LONGEST_WAIT), doubled * random.uniform(0.5, 1)))
        self._fail()
        return None

    def _count(self, what: str) -> None:
        with self._lock:
            self.num[what] += 1

    def _fail(self) -> None:
        with self._lock:
            self.num["failures"] += 1
            self._in_a_row += 1
            if self._in_a_row >= self.max_failures:
                self._enough.set()

    def _what_failed(self) -> str:
        kinds = ("timeout", "connection", "busy", "malformed")
        seen = ", ".join(f"{self.num[kind]} {kind}" for kind in kinds if self.num[kind])
        return (
            f"endpoint {self.name}: {self._in_a_row} questions in a row got no answer after up to {self.retries + 1} "
            f"tries each ({seen}): see whether it is up and what it can take at a time"
        )

    def _refusal(self, response: httpx.Response) -> str:
        said = " ".join(response.text.split())
        if self._secret:
            said = said.replace(self._secret, f"${KEY_VARIABLE}")
        hint = f" (the key is read from {KEY_VARIABLE})" if response.status_code in (401, 403) else ""
        return f"endpoint {self.name} refused a question with {response.status_code}{hint}: {said[:200]}"


def _choice(answer: Any) -> Choice:
    """A chat completion; raises whatever something else lacks."""
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"content is {type(text).__name__}")
    logps = (choice.get("logprobs") or {}).get("content")
    tokens = None
    if logps:
        tokens = [
            Token(
                str(entry["token"]),
                float(entry["logprob"]),
                {str(other["token"]): float(other["logprob"]) for other in entry.get("top_logprobs") or ()},
            )
            for entry in logps
        ]
    return Choice(text, str(choice.get("finish_reason")), tokens)


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
