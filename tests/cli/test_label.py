"""``label ai`` from the command line: killed, resumed, done without a question, and with a judge that goes down."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli.main import run

JUDGE = """
import time
from pathlib import Path

def longer(prompts, first, second):
    time.sleep(0.3)
    with (Path(__file__).parent / "calls").open("a") as file:
        file.writelines(f"{p}|{a}|{b}\\n" for p, a, b in zip(prompts, first, second))
    return [0.8 if len(a) > len(b) else 0.3 for a, b in zip(first, second)]

def place(prompts, first, second):
    return [0.9] * len(prompts)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    rows = [
        {"prompt": f"p{n}", "chosen": " long answer" + "." * n, "rejected": " no" * (n % 5 + 1)} for n in range(300)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(files: Path, function: str, *more: str) -> list[str]:
    judge = ["--judge", f"{files}/judge.py:{function}", "--data", f"{files}/pairs.jsonl"]
    return ["label", "ai", *judge, "--out", f"{files}/out.jsonl", *more]


def test_aif_5_a_killed_run_goes_on_without_asking_again(files: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "lightning_align", *words(files, "longer")])
    journal = files / "out.journal"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 64):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = journal.read_text().count("\n")
    assert 64 <= kept < 600
    assert not (files / "out.jsonl").exists()
    assert run(words(files, "longer")) == 0
    calls = (files / "calls").read_text().splitlines()
    assert 600 <= len(calls) <= 600 + 64  # what was asked when the end came is asked once more
    assert len(set(calls)) == 600
    metrics = json.loads((files / "out.metrics.json").read_text())
    assert metrics["ai/from_cache"] == kept
    assert run(words(files, "longer", "--overwrite")) == 0
    assert len((files / "calls").read_text().splitlines()) == len(calls)
    undisturbed = [*words(files, "longer"), "--out", f"{files}/other.jsonl"]  # a later option wins
    assert run(undisturbed) == 0
    assert (files / "other.jsonl").read_bytes() == (files / "out.jsonl").read_bytes()
    assert (files / "other.journal").read_bytes() == journal.read_bytes()
    records = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert len(records) == 300
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in records)
    assert {round(row["soft_label"], 4) for row in records} <= {0.75, 0.5}


def test_aif_1_a_bias_for_a_place_is_said_and_gives_halves(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(files, "place", "--limit", "20")) == 0
    assert "warning: 100% of pairs change their winner with the order" in capsys.readouterr().err
    metrics = json.loads((files / "out.metrics.json").read_text())
    assert metrics["ai/position_bias"] == 1
    assert metrics["ai/undecided"] == 1
    assert metrics["ai/alignment"]["value"] == 0.5
    records = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert {row["soft_label"] for row in records} == {0.5}


class Down:
    """A chat-completions server that prefers longer answers, until it is down after so many questions."""

    def __init__(self, until: int) -> None:
        self.until = until
        self.token: str | None = None  # what it says in the place of an answer
        self.questions: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                up = len(outer.questions) < outer.until
                text = body["messages"][0]["content"]
                if up:
                    outer.questions.append(text)
                self.send_response(200 if up else 503)
                self.end_headers()
                self.wfile.write(json.dumps(outer.reply(text)).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.source = f"http://127.0.0.1:{self.server.server_port}/v1#judge"

    def reply(self, text: str) -> dict[str, Any]:
        first, second = text.split("Response 1 - ")[1].split("\n\n")[0].split("\nResponse 2 - ")
        token = self.token or ("1" if len(first) > len(second) else "2")
        top = [{"token": name, "logprob": math.log(0.75 if name == token else 0.25)} for name in "12"]
        entry = {"token": token, "logprob": math.log(0.75), "top_logprobs": top}
        if self.token is not None:
            entry = {"token": token, "logprob": 0.0, "top_logprobs": [{"token": token, "logprob": 0.0}]}
        return {"choices": [{"message": {"content": token}, "finish_reason": "stop", "logprobs": {"content": [entry]}}]}


def test_a_server_that_goes_down_stops_the_run_and_its_labels_are_kept(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Down(until=10)
    asked = ["--judge", server.source, "--limit", "20", "--parallel", "4", "--retries", "0", "--max_failures", "3"]
    try:
        assert run(words(files, "unused", *asked)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: endpoint {server.source}: ")
        assert "10 of 40 answers are kept in" in line
        assert not (files / "out.jsonl").exists()
        server.until = 10_000
        assert run(words(files, "unused", *asked)) == 0
    finally:
        server.server.shutdown()
    assert len(server.questions) == len(set(server.questions)) == 40
    metrics = json.loads((files / "out.metrics.json").read_text())
    assert (metrics["ai/from_cache"], metrics["ai/questions"], metrics["ai/endpoint/requests"]) == (10, 30, 30)
    assert metrics["ai/mean_confidence"] == pytest.approx(0.75)
    records = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert {round(row["soft_label"], 6) for row in records} == {0.75}
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in records)


def test_replies_that_choose_nothing_are_kept_and_the_error_says_where(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a server that was mended since would get the same line for ever, and no question."""
    server = Down(until=10_000)
    server.token = "banana"
    asked = ["--judge", server.source, "--limit", "4", "--retries", "0"]
    try:
        for _ in range(2):
            assert run(words(files, "unused", *asked)) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.endswith(
                f"choose neither answer; ask otherwise, or remove {files}/out.journal, which keeps them"
            )
            assert len(server.questions) == 8
        server.token = None
        (files / "out.journal").unlink()
        assert run(words(files, "unused", *asked)) == 0
    finally:
        server.server.shutdown()
    assert len(server.questions) == 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cot"], "is a function, which gives no chain of thought"),
        (["--clamp", "0.6", "0.4"], "labels are clamped to 0.6 and 0.4"),
        (["--limit", "0"], "--limit is 0: give at least 1"),
        (["--judge", "http://host/v1"], "write http://host:port/v1#model-name"),
        (["--judge", "http://host/v1#m", "--timeout", "0"], "timeout is 0.0: give seconds above 0"),
        (["--judge", "http://host/v1#m", "--wording", "playgruond"], "did you mean 'playground'?"),
        (["--max_failure", "3"], "unknown option --max_failure; did you mean '--max_failures'?"),
        (["--out", "labels.xyz"], "labels.xyz: records are written as"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    before = sorted(files.iterdir())
    assert run(words(files, "place", *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path for path in sorted(files.iterdir()) if path.name != "__pycache__"] == before
