"""``label human`` as a process: what it prints and refuses, kills, and what a stranger can do to it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from lightning_align.cli.main import run
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import Plan

Command = Callable[..., "Server"]


class Server:
    """The command as a process of its own."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        line = [sys.executable, "-m", "lightning_align", "label", "human", "--no_browser", "--port=0", *words]
        errors = (folder / "stderr").open("w")
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        assert self.process.stdout is not None
        self.lines, self.links = [], {}
        for text in self.process.stdout:
            self.lines.append(text.rstrip())
            if found := re.match(r"  (\S+)\s+(http://\S+)/#token=(\S+)", text):
                self.links[found[1]] = (found[2], found[3])
            if text.startswith("Ctrl-C"):
                break

    def client(self, name: str) -> httpx.Client:
        """What a page of this annotator does."""
        address, token = self.links[name]
        return httpx.Client(base_url=address, headers={"authorization": f"Bearer {token}"}, timeout=30)

    def stop(self, kind: int = signal.SIGINT) -> str:
        """End the process; the rest of what it printed."""
        self.process.send_signal(kind)
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.wait(timeout=30)
        return rest


@pytest.fixture
def serve(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (repository, repository / "kernels"))))
    rows = [{"prompt": f"prompt {n}", "completions": [f"a{n}", f"b{n}", f"c{n}"]} for n in range(8)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    servers: list[Server] = []

    def start(*words: str) -> Server:
        servers.append(Server(tmp_path, words))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


def judge(client: httpx.Client, count: int, start: int = 0) -> int:
    """Judge up to so many tasks; how many there were."""
    answer = client.get("/api/task").json()
    for number in range(start, start + count):
        task: Any = answer["task"]
        if task is None:
            return number - start
        said = {
            "key": f"{answer['annotator']} {number:>8}",
            "item": task["item"],
            "aspect": task["aspect"],
            "ranks": [1, 2, 3],
        }
        answer = client.post("/api/judge", json=said).raise_for_status().json()
    return count


def test_from_answers_to_records_through_a_kill(serve: Command, tmp_path: Path) -> None:
    server = serve("--responses=responses.jsonl", "--annotators", "ann", "bob", "--overlap=0.5")
    assert server.lines[0] == "8 prompts are new"
    with server.client("ann") as client:
        assert judge(client, 5) == 5
    links = server.links
    server.stop(signal.SIGKILL)
    server = serve()  # what the store holds, under its own plan, for those who have links
    assert {name: token for name, (_, token) in server.links.items()} == {
        name: token for name, (_, token) in links.items()
    }
    with server.client("ann") as client:
        done = 5 + judge(client, 10, 5)
    with server.client("bob") as client:
        done += judge(client, 10)
    assert done == 8 + 4
    rest = server.stop()
    assert "12 judgements by 2 annotators in labels.sqlite" in rest
    assert server.process.returncode == 0
    assert (tmp_path / "stderr").read_text() == ""
    out = tmp_path / "ranked.jsonl"
    assert run(["label", "export", str(tmp_path / "labels.sqlite"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 12


def test_answers_are_sampled_once(
    serve: Command, tmp_path: Path, make_model: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    make_model(tmp_path / "tiny", tokenizer=make_tokenizer(template=None))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "list three animals"}\n{"prompt": "answer"}\n')
    words = ["--prompts=prompts.jsonl", "--model=tiny", "--num_answers=3", "--max_new_tokens=8"]
    server = serve(*words, "--annotators=ann")
    with server.client("ann") as client:
        task = client.get("/api/task").json()["task"]
    assert 2 <= len(task["answers"]) <= 3
    server.stop()
    before = (tmp_path / "labels.journal").read_bytes()
    server = serve(*words, "--annotators=ann")
    assert server.lines[0] == "2 prompts were there before"
    assert (tmp_path / "labels.journal").read_bytes() == before
    assert len(Store(tmp_path / "labels.sqlite").items()) == 2


def test_strangers_are_turned_away_by_the_real_server(serve: Command, tmp_path: Path) -> None:
    server = serve("--responses=responses.jsonl", "--annotators=ann")
    address, token = server.links["ann"]
    with httpx.Client(base_url=address) as stranger:
        assert stranger.get("/api/task").status_code == 401
        assert stranger.get("/", headers={"host": "evil.example"}).status_code == 400
        cross = {"authorization": f"Bearer {token}", "origin": "http://evil.example"}
        assert stranger.post("/api/undo", headers=cross, json={}).status_code == 403
        for path in (
            "/page/../../../cli/main.py",
            "/page/%2e%2e/%2e%2e/store.py",
            "/labels.sqlite",
            "/labels.tokens.json",
        ):
            assert stranger.get(path).status_code == 404
    raw = httpx.get(f"{address}/page/page.js")
    assert "javascript" in raw.headers["content-type"]
    import socket

    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(b"GET /page/../store.py HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 404")
    for name in ("labels.tokens.json",):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_a_megabyte_is_shown_as_text(serve: Command, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["<b>" * 333_334, "short"]}]
    (tmp_path / "big.jsonl").write_text(json.dumps(rows[0]) + "\n")
    server = serve("--responses=big.jsonl", "--annotators=ann")
    with server.client("ann") as client:
        answers = client.get("/api/task").json()["task"]["answers"]
    html = max((answer[0]["html"] for answer in answers), key=len)
    assert html == f"<pre>{'&lt;b&gt;' * 333_334}</pre>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts=p.jsonl"], "--prompts and --model go together"),
        (["--model=m"], "--prompts and --model go together"),
        (["--prompts=p", "--model=m", "--responses=r"], "exclude each other"),
        (["--responses=r.jsonl", "--num_answers=10"], "--num_answers is 10: give 2 to 9"),
        (["--responses=r.jsonl", "--temperature=0"], "--temperature is 0"),
        (["--responses=r.jsonl", "--port=70000"], "--port is 70000"),
        (["--responses=r.jsonl", "--limit=0"], "--limit is 0: give at least 1"),
        (["--responses=r.jsonl", "--aspects", "savety"], "did you mean 'safety'"),
        (["--responses=nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["--responses=one.jsonl"], "holds nothing to rank"),
        ([], "there is no store of judgements at labels.sqlite"),
        (["--store=empty.sqlite"], "holds nothing to rank"),
        (["--store=empty.sqlite", "--responses=one.jsonl", "--overlap=0.9"], "made with overlap 0.2, not 0.9"),
        (["--store=empty.sqlite", "--guidelines=none.md"], "cannot read none.md (--guidelines)"),
        (["--store=empty.sqlite", "--host=203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--store=empty.sqlite", "--annotators", "ann", "a/b"], "'a/b' is no name"),
    ],
)
def test_what_it_refuses_and_leaves_no_store_behind(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Store(tmp_path / "empty.sqlite", Plan()).close()
    (tmp_path / "one.jsonl").write_text('{"prompt": "p", "completions": ["same", "same"]}\n')
    assert run(["label", "human", "--no_browser", *words]) == 2
    assert message in capsys.readouterr().err
    if "--responses=one.jsonl" not in words:
        assert not (tmp_path / "labels.sqlite").exists()
