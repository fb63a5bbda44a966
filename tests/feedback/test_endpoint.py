"""Endpoints: a real server that answers, stalls, fails and talks nonsense."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from lightning_align.errors import UserError
from lightning_align.feedback.endpoint import EndpointModel
from lightning_align.feedback.replies import Token, logps_of_text, logps_of_tokens
from lightning_align.rollout.types import SamplingParams

Answer = Callable[[dict[str, Any], int], tuple[int, str]]


def completion(text: str, likeliest: dict[str, float] | None = None) -> str:
    choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": "stop"}
    if likeliest is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in likeliest.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": math.log(likeliest[text]), "top_logprobs": top}]}
    return json.dumps({"choices": [choice]})


class Server:
    """Answers by a function of the request's body and its number."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body, number: (200, completion("1", {"1": 0.6, " 2": 0.3}))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.more_headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                status, text = outer.answer(body, len(outer.bodies))
                self.send_response(status)
                for name, value in outer.more_headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.source = f"http://127.0.0.1:{self.server.server_port}/v1#judge"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()


def ask(server: Server, **options: Any) -> EndpointModel:
    return EndpointModel(server.source, **{"pause": 0.001, "timeout": 5.0, **options})


def test_options_are_read_from_the_likeliest_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    found = ask(server).option_logps(["a", [{"role": "user", "content": "b"}]], ["1", "2", "3"])
    torch.testing.assert_close(found.exp(), torch.tensor([[0.6, 0.3, 0.0]] * 2))
    assert {body["messages"][0]["content"] for body in server.bodies} == {"a", "b"}
    assert server.bodies[0]["top_logprobs"] == 20
    assert server.headers[0]["Authorization"] == "Bearer very-secret"


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ((500, "oh"), "busy"),
        ((429, ""), "busy"),
        ((200, "<html>"), "malformed"),
        ((200, '{"choices": ['), "malformed"),
        ((200, '{"choices": []}'), "malformed"),
        ((200, '{"choices": [{"message": {"content": 3}}]}'), "malformed"),
        ((200, '{"choices": [{"message": {"content": "1"}, "logprobs": {"content": [{}]}}]}'), "malformed"),
    ],
)
def test_what_may_pass_is_tried_again(server: Server, bad: tuple[int, str], kind: str) -> None:
    good = server.answer
    server.answer = lambda body, number: bad if number < 3 else good(body, number)
    model = ask(server, parallel=1)
    assert model.option_logps(["a"], ["1", "2"]).isfinite().all()
    assert model.counts() == {"requests": 3, "retries": 2, kind: 2}


def test_a_server_that_stalls_costs_its_own_questions_alone(server: Server) -> None:
    good = server.answer

    def stall(body: dict[str, Any], number: int) -> tuple[int, str]:
        if body["messages"][0]["content"] == "slow":
            time.sleep(0.6)
        return good(body, number)

    server.answer = stall
    model = ask(server, timeout=0.2, retries=1)
    found = model.option_logps(["a", "slow", "b"], ["1", "2"])
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert model.counts()["timeout"] == 2
    assert model.counts()["failures"] == 1


def test_failures_in_a_row_stop_with_one_line_and_what_was_answered_is_kept(server: Server) -> None:
    good = server.answer
    server.answer = lambda body, number: good(body, number) if number <= 2 else (503, "down")
    model = ask(server, retries=1, max_failures=3, parallel=1)
    found = model.option_logps(["a"] * 10, ["1", "2"])
    assert found.isnan().all(1).tolist() == [False] * 2 + [True] * 8
    assert len(server.bodies) == 2 + 3 * 2  # nothing more is put
    with pytest.raises(UserError) as caught:
        model.option_logps(["a"], ["1", "2"])
    assert "questions in a row got no answer after up to 2 tries each (6 busy)" in str(caught.value)
    assert len(server.bodies) == 8


def test_nobody_waits_once_enough_have_failed(server: Server) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, str]:
        if body["messages"][0]["content"] == "refused":
            time.sleep(0.2)
            return 401, "no"
        return 503, "down"

    server.answer = answer
    begun = time.monotonic()
    with pytest.raises(UserError, match="refused a question with 401"):
        ask(server, pause=60.0).option_logps(["refused", "a", "b"], ["1", "2"])
    assert time.monotonic() - begun < 15


def test_pauses_double_and_heed_what_the_server_says(server: Server) -> None:
    server.answer = lambda body, number: (503, "down") if number < 4 else (200, completion("1", {"1": 0.6}))
    begun = time.monotonic()
    ask(server, pause=0.2).option_logps(["a"], ["1", "2"])
    assert time.monotonic() - begun > 0.5 * (0.2 + 0.4 + 0.8)
    server.more_headers = {"Retry-After": "0.5"}
    server.bodies.clear()
    begun = time.monotonic()
    ask(server).option_logps(["a"], ["1", "2"])
    assert time.monotonic() - begun > 3 * 0.5


def test_a_server_that_is_not_there(server: Server) -> None:
    server.server.shutdown()
    server.server.server_close()
    model = ask(server, retries=1, max_failures=2)
    assert model.option_logps(["a", "b"], ["1", "2"]).isnan().all()
    with pytest.raises(UserError, match=r"\(\d connection\)"):
        model.option_logps(["a"], ["1", "2"])


def test_a_refusal_is_said_at_once_without_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    server.answer = lambda body, number: (401, "bad key very-secret")
    with pytest.raises(UserError) as caught:
        ask(server).option_logps(["a"], ["1", "2"])
    assert "refused a question with 401 (the key is read from OPENAI_API_KEY): bad key $OPENAI_API_KEY" in str(
        caught.value
    )


def test_without_log_probs_the_reply_counts_as_certain(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = lambda body, number: (200, completion(" 2."))
    found = ask(server).option_logps(["a", "b"], ["1", "2"])
    assert found.exp().tolist() == [[0, 1], [0, 1]]
    assert len(caplog.records) == 1

    def refuse(body: dict[str, Any], number: int) -> tuple[int, str]:
        return (400, "logprobs are not supported") if "logprobs" in body else (200, completion("neither"))

    server.answer = refuse
    assert ask(server, retries=0).option_logps(["a"], ["1", "2"]).exp().tolist() == [[0, 0]]


def test_samples_have_their_seeds(server: Server) -> None:
    server.answer = lambda body, number: (200, completion(str(body["seed"])))
    replies = ask(server).sample(["a", "b"], SamplingParams(max_new_tokens=3, num_samples=2), seeds=[1, 2, 3, 4])
    assert [reply.text for reply in replies] == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="no top_k"):
        ask(server).sample(["a"], SamplingParams(max_new_tokens=3, top_k=2), seeds=[1])


@pytest.mark.parametrize("source", ["http://host/v1", "host#m", "ftp://host#m"])
def test_sources_are_checked(source: str) -> None:
    with pytest.raises(UserError, match="write http://host:port/v1#model-name"):
        EndpointModel(source)


def test_ten_is_one_and_then_zero() -> None:
    tokens = [
        Token("1", math.log(0.5), {"1": math.log(0.5), "2": math.log(0.25)}),
        Token("0", math.log(0.4), {"0": math.log(0.4), "\n": math.log(0.6)}),
    ]
    found = [math.exp(value) for value in logps_of_tokens(tokens, ["1", "2", "10"])]
    assert found == pytest.approx([0.3, 0.25, 0.2])
    assert [math.exp(value) for value in logps_of_text("10 of 10", ["1", "10", "2"])] == [0, 1, 0]
