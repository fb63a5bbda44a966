"""What the page's server lets in and what it says; a real client on the real application."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lightning_align.errors import UserError
from lightning_align.feedback.human.access import LARGEST_BODY, tokens_of
from lightning_align.feedback.human.server import build_app, listen
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Plan

TOKENS = {"ann": "token-of-ann", "bob": "token-of-bob"}
HOST = "127.0.0.1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "labels.sqlite", Plan(overlap=1.0))
    for number in range(3):
        store.add(f"prompt {number}", ["first", "second", "third"], "here")
    store.add("a pair", ["first", "second"], "here")
    return store


class Asked:
    """What ann asks."""

    def __init__(self, store: Store) -> None:
        self.client = TestClient(build_app(store, TOKENS, [HOST], "**Be fair.**"), base_url=f"http://{HOST}:8642")
        self.headers = {"authorization": f"Bearer {TOKENS['ann']}"}
        self.number = 0

    def task(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/api/task", headers=self.headers).json()
        return found

    def judge(self, task: dict[str, Any], **said: Any) -> Any:
        self.number += 1
        body = {"key": f"judgement {self.number}", "item": task["item"], "aspect": task["aspect"], "seconds": 1.5}
        return self.client.post("/api/judge", headers=self.headers, json={**body, **said})

    def undo(self) -> Any:
        return self.client.post("/api/undo", headers=self.headers, json={"last": self.task()["progress"]["last"]})

    def until(self, size: int) -> dict[str, Any]:
        """The next task of so many answers; others are ranked as shown."""
        while True:
            task: dict[str, Any] = self.task()["task"]
            if len(task["answers"]) == size:
                return task
            self.judge(task, ranks=list(range(1, len(task["answers"]) + 1)), strength="better" if size != 2 else None)


@pytest.fixture
def asked(store: Store) -> Asked:
    return Asked(store)


def test_what_is_ranked_as_shown_is_saved_as_meant(asked: Asked, store: Store) -> None:
    task = asked.until(3)
    texts = [answer[0]["text"] for answer in task["answers"]]
    before = len(store.judgements())
    answer = asked.judge(task, ranks=[3, 1, 2], unsafe=[0])
    assert answer.status_code == 200
    saved = store.judgements()[before]
    own = saved.item.answers
    by_rank = sorted(range(3), key=lambda number: saved.verdict.ranks[number])
    assert [own[number] for number in by_rank] == [texts[1], texts[2], texts[0]]
    assert [own[number] for number in saved.verdict.unsafe] == [texts[0]]
    assert [own[number] for number in saved.shown] == texts
    assert saved.seconds == 1.5
    assert answer.json()["task"]["item"] != task["item"]


def test_the_page_is_not_told_who_wrote_what_or_in_which_order(asked: Asked) -> None:
    task = asked.task()["task"]
    assert set(task) == {"item", "aspect", "aspects", "prompt", "answers", "strengths"}
    assert all(set(message) == {"role", "html", "text"} for answer in task["answers"] for message in answer)


def test_undo_shows_what_was_said_in_the_same_order(asked: Asked) -> None:
    task = asked.until(3)
    asked.judge(task, ranks=[2, 1, 2], unsafe=[1, 2])
    undone = asked.undo().json()
    assert undone["task"] == task
    assert undone["before"] == {"ranks": [2, 1, 2], "unsafe": [1, 2], "strength": None}
    asked.judge(task, skipped="no idea")
    undone = asked.undo().json()
    assert undone["before"] == {"ranks": [], "unsafe": [], "strength": None}


def test_nothing_to_undo(asked: Asked) -> None:
    answer = asked.undo()
    assert (answer.status_code, answer.json()) == (422, {"error": "there is nothing to undo"})


def test_of_two_answers_the_strength_is_told(asked: Asked, store: Store) -> None:
    task = asked.until(2)
    assert task["strengths"] == ["significantly", "better", "slightly", "negligibly"]
    assert asked.judge(task, ranks=[2, 1]).json() == {"error": "say how much better the better answer is"}
    assert asked.judge(task, ranks=[2, 1], strength="much").status_code == 422
    assert asked.judge(task, ranks=[2, 1], strength="slightly").status_code == 200
    assert store.judgements()[-1].verdict.strength == "slightly"


@pytest.mark.parametrize(
    "said",
    [
        {"ranks": [1, 2]},
        {"ranks": [1, 2, 4]},
        {"ranks": [1, 2, 10**18]},
        {"ranks": [1, 2, 2.5]},
        {"ranks": [True, 1, 2]},
        {"ranks": "123"},
        {"ranks": {"0": 1}},
        {"ranks": None},
        {"ranks": [1, 2, 3], "unsafe": [5]},
        {"ranks": [1, 2, 3], "unsafe": ["0"]},
        {"ranks": [1, 2, 3], "strength": "better"},
        {"ranks": [1, 2, 3], "strength": 5},
        {"ranks": [1, 2, 3], "skipped": "why"},
        {"skipped": ""},
        {"skipped": "x" * 501},
        {"ranks": [1, 2, 3], "aspect": "beauty"},
        {"ranks": [1, 2, 3], "aspect": None},
        {"ranks": [1, 2, 3], "key": "short"},
        {"ranks": [1, 2, 3], "key": "x" * 65},
        {"ranks": [1, 2, 3], "key": 12345678},
        {"ranks": [1, 2, 3], "item": "1"},
        {"ranks": [1, 2, 3], "item": 10**30},
        {"ranks": [1, 2, 3], "item": -1},
        {"ranks": [1, 2, 3], "item": 999},
        {"ranks": [1, 2, 3], "item": None},
    ],
)
def test_what_cannot_be_said_is_refused_with_a_line_and_not_saved(said: dict, asked: Asked, store: Store) -> None:
    task = asked.until(3)
    before = store.judgements()
    answer = asked.judge(task, **said)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]
    assert store.judgements() == before


def test_only_what_was_handed_out_can_be_judged(asked: Asked, store: Store) -> None:
    task = asked.task()["task"]
    other = next(number for number in store.items() if number != task["item"])
    answer = asked.judge({**task, "item": other}, ranks=[1, 2, 3])
    assert "not given to you" in answer.json()["error"]


def test_a_second_tab_is_told(asked: Asked) -> None:
    task = asked.until(3)
    assert asked.judge(task, ranks=[1, 2, 3]).status_code == 200
    assert asked.judge(task, ranks=[1, 2, 3]).status_code == 409


@pytest.mark.parametrize("seconds", ["fast", None, -1, True, "NaN"])
def test_odd_times_are_unknown(seconds: Any, asked: Asked, store: Store) -> None:
    asked.judge(asked.until(3), ranks=[1, 2, 3], seconds=seconds)
    assert store.judgements()[-1].seconds != store.judgements()[-1].seconds


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"null", b"1" * 5000, b"\xff\xfe", b"[" * 60000])
def test_bodies_that_are_none(content: bytes, asked: Asked) -> None:
    headers = {**asked.headers, "content-type": "application/json"}
    answer = asked.client.post("/api/judge", headers=headers, content=content)
    assert answer.status_code in (400, 422), answer.text


def test_large_bodies_are_not_read(asked: Asked) -> None:
    headers = {**asked.headers, "content-type": "application/json"}
    assert asked.client.post("/api/judge", headers=headers, content=b" " * (LARGEST_BODY + 1)).status_code == 413
    endless = iter([b"{}"])
    assert asked.client.post("/api/judge", headers=headers, content=endless).status_code == 413


# ------------------------------------------------------------------------------------------------------------- access
ASKED = [("GET", "/api/task"), ("POST", "/api/judge"), ("POST", "/api/undo")]


@pytest.mark.parametrize(("method", "path"), ASKED)
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer ", "Bearer wrong", "token-of-ann ", "Bearer token-of-anna"]
)
def test_without_a_token_nothing_is_told_or_done(
    method: str, path: str, authorization: str | None, asked: Asked
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = asked.client.request(method, path, headers=headers, json={} if method == "POST" else None)
    assert answer.status_code == 401
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("path", ["/", "/api/task", "/page/page.js"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "[::1", "", "127.0.0.1@evil"]
)
def test_under_another_name_nothing_is_answered(path: str, host: str, asked: Asked) -> None:
    answer = asked.client.get(path, headers={**asked.headers, "host": host})
    assert answer.status_code == 400
    assert "prompt" not in answer.text


@pytest.mark.parametrize(("method", "path"), ASKED)
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_sites_may_not_ask(method: str, path: str, headers: dict, asked: Asked, store: Store) -> None:
    answer = asked.client.request(
        method, path, headers={**asked.headers, **headers}, json={} if method == "POST" else None
    )
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_a_form_cannot_judge(asked: Asked) -> None:
    answer = asked.client.post("/api/judge", headers=asked.headers, data={"key": "x" * 8})
    assert answer.status_code == 415


def test_the_page_itself_may(asked: Asked) -> None:
    headers = {**asked.headers, "origin": f"http://{HOST}:8642", "sec-fetch-site": "same-origin"}
    assert asked.client.get("/api/task", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/../store.py",
        "/page/%2e%2e/store.py",
        "/page/..%2fstore.py",
        "/page//etc/passwd",
        "/page/....//store.py",
        "/labels.sqlite",
        "/page/",
        "/page/%00",
        "/api/",
        "/api/nothing",
    ],
)
def test_paths_lead_nowhere_else(path: str, asked: Asked) -> None:
    answer = asked.client.get(path, headers=asked.headers)
    assert answer.status_code in (404, 405), (answer.status_code, answer.text[:100])
    assert "sqlite" not in answer.text


def test_every_answer_carries_the_policy(asked: Asked) -> None:
    for path in ("/", "/page/page.js", "/code.css", "/api/task", "/nothing"):
        headers = asked.client.get(path, headers=asked.headers).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_each_token_is_one_annotator(asked: Asked, store: Store) -> None:
    asked.judge(asked.until(3), ranks=[1, 2, 3])
    asked.headers = {"authorization": f"Bearer {TOKENS['bob']}"}
    assert asked.task()["annotator"] == "bob"
    assert asked.task()["guidelines"] == "<p><strong>Be fair.</strong></p>\n"
    asked.judge(asked.until(3), ranks=[1, 2, 3])
    assert {judgement.annotator for judgement in store.judgements()} == {"ann", "bob"}


def test_tokens_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    first = tokens_of(path, ["ann", "bob"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert tokens_of(path, ["bob"]) == {"bob": first["bob"]}
    later = tokens_of(path, ["cyd"])
    assert tokens_of(path, ["ann", "cyd"]) == {"ann": first["ann"], **later}
    assert len({*first.values(), *later.values()}) == 3
    assert all(len(token) >= 32 for token in first.values())


@pytest.mark.parametrize("names", [["a b"], [""], ["x" * 65], ["a/b"], ["<b>"], ["ann", "ann"]])
def test_names_that_are_none(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--annotators"):
        tokens_of(tmp_path / "tokens.json", names)


@pytest.mark.parametrize("content", ["[]", "{", '{"ann": 5}'])
def test_a_damaged_file_of_tokens(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no tokens"):
        tokens_of(path, ["ann"])
    assert json.dumps(content)


def test_a_port_that_is_taken() -> None:
    taken = r"cannot listen on 127\.0\.0\.1 port \d+: .*another --port"
    with listen(HOST, 0) as where, pytest.raises(UserError, match=taken):
        listen(HOST, where.getsockname()[1])


def test_an_undo_that_is_sent_twice_takes_one_back(asked: Asked, store: Store) -> None:
    for _ in range(2):
        asked.judge(asked.until(3), ranks=[1, 2, 3])
    body = {"last": asked.task()["progress"]["last"]}
    before = len(store.judgements())
    answers = [asked.client.post("/api/undo", headers=asked.headers, json=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 409]
    assert len(store.judgements()) == before - 1
