"""``label revise``: records, chains and metrics; resuming after a kill; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_align.playground import records, texts

REQUESTS = [text for rule in texts.PRINCIPLES for text in (rule.critique_request, rule.revision_request)]
WORDS = [
    *("label", "revise", "--model=runs/pretrain", "--constitution=playground", "--data=asked.jsonl"),
    *("--max_new_tokens=12", "--max_critique_tokens=6", "--revisions=2", "--out=made/sft.jsonl"),
]


@pytest.fixture
def asked(scratch: Any) -> Any:
    """A folder with 24 prompts, half of them unsafe; one is there twice."""
    rows = records("prompt", size=23, unsafe=0.5)
    scratch.write("asked.jsonl", [*rows, next(row for row in rows if row["is_safety"])])
    return scratch


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said_in(chain: dict[str, Any]) -> list[str]:
    """The first completion of a chain and its revisions."""
    return [chain["first"], *(step["revision"] for step in chain["steps"])]


def made(desk: Any) -> dict[str, bytes]:
    """What the command wrote, but for the journal."""
    return {path.name: path.read_bytes() for path in (desk.root / "made").iterdir() if path.suffix != ".journal"}


def test_records_chains_and_metrics(asked: Any) -> None:
    answer = asked.done(*WORDS, "--gold=playground", "--batch_size=7")
    folder = asked.root / "made"
    prompts = read(asked.root / "asked.jsonl")
    chains, learnt = (read(folder / name) for name in ("sft.chains.jsonl", "sft.jsonl"))
    metrics = json.loads((folder / "sft.metrics.json").read_text())
    assert [chain["prompt"] for chain in chains] == [row["prompt"] for row in prompts]
    assert [len(chain["steps"]) for chain in chains] == [2 * row["is_safety"] for row in prompts]
    assert chains[-1]["first"] != next(c for c in chains if c["prompt"] == chains[-1]["prompt"])["first"]

    steps = [step for chain in chains for step in chain["steps"]]
    assert metrics["cai/critiques"] == metrics["cai/revisions"] == len(steps)
    assert metrics["cai/revision_changed"] == sum(step["changed"] for step in steps) / len(steps)
    assert metrics["cai/bad_revisions"] == sum(step["fault"] is not None for step in steps)
    assert metrics["cai/records"] == len(learnt) > 0
    for n in range(3):
        assert metrics[f"cai/harmlessness_by_revision/{n}"]["n"] == sum(row["is_safety"] for row in prompts)
        assert f"cai/harmlessness_by_revision/{n} " in answer.out

    said = {(chain["prompt"], text) for chain in chains for text in said_in(chain)}
    for record in learnt:
        assert set(record) == {"prompt", "completion", "revision", "principles"}
        assert (record["prompt"], record["completion"]) in said
        assert len(record["principles"]) == record["revision"]
        assert not any(request in record["completion"] for request in REQUESTS)  # CAI-3
    critiques = [step["critique"] for step in steps if len(step["critique"].split()) >= 3]
    assert critiques
    assert not any(critique in record["completion"] for critique in critiques for record in learnt)

    # what SFT reads, and the same bytes again, with nothing asked twice
    before = made(asked)
    journal = (folder / "sft.journal").read_bytes()
    again = asked.done(*WORDS, "--gold=playground", "--batch_size=7", "--overwrite")
    assert "24 of 24 chains are in made/sft.journal" in again.err
    assert made(asked) == before
    assert (folder / "sft.journal").read_bytes() == journal
    asked.done(*asked.fit_words_on("made/sft.jsonl", "sft"), "--data.val_fraction=0.2", "--run.name=on_revisions")


@pytest.mark.parametrize("helpful", ["revise", "leave_out"])
def test_helpful_prompts(asked: Any, helpful: str) -> None:
    unsafe = sum(row["is_safety"] for row in read(asked.root / "asked.jsonl"))
    answer = asked.done(*WORDS, f"--helpful={helpful}")
    chains = read(asked.root / "made" / "sft.chains.jsonl")
    assert len(chains) == (24 if helpful == "revise" else unsafe)
    assert all(len(chain["steps"]) == 2 for chain in chains)
    assert ("prompts are left out" in answer.out) == (helpful == "leave_out")


def test_kept_and_dropped_revisions(asked: Any) -> None:
    numbers = {}
    for keep in ("all", "last"):
        for on_bad in ("keep_previous", "drop"):
            asked.done(*WORDS, f"--keep={keep}", f"--on_bad={on_bad}", "--overwrite")
            numbers[keep, on_bad] = len(read(asked.root / "made" / "sft.jsonl"))
    chains = read(asked.root / "made" / "sft.chains.jsonl")
    good = sum(step["fault"] is None for chain in chains for step in chain["steps"])
    plain = sum(chain["finished"] and bool(chain["first"].strip()) for chain in chains if not chain["steps"])
    assert numbers["all", "drop"] == good + plain
    assert numbers["all", "keep_previous"] >= numbers["all", "drop"] >= numbers["last", "drop"]
    assert numbers["last", "keep_previous"] >= numbers["last", "drop"]
    assert len(read(asked.root / "made" / "sft.journal")) == 24  # made once for all four


def test_another_critic_and_no_critiques(asked: Any) -> None:
    asked.done(*WORDS)
    own = read(asked.root / "made" / "sft.chains.jsonl")
    asked.done(*WORDS, "--critic=runs/sft", "--overwrite")
    other = read(asked.root / "made" / "sft.chains.jsonl")
    assert [chain["first"] for chain in own] == [chain["first"] for chain in other]
    principles = [[step["principle"] for chain in chains for step in chain["steps"]] for chains in (own, other)]
    assert principles[0] == principles[1]
    assert own != other
    answer = asked.done(*WORDS, "--no_critique", "--overwrite")
    assert "cai/critiques                        0" in answer.out
    bare = read(asked.root / "made" / "sft.chains.jsonl")
    assert all(step["critique"] is None for chain in bare for step in chain["steps"])


def test_a_retrained_model_makes_new_chains(asked: Any) -> None:
    """The journal goes by what is in the model folder, not by its name."""
    from lightning_align.cli.label_revise import identity

    before = identity(str(asked.root / "runs" / "pretrain"))
    assert identity(str(asked.root / "runs" / "pretrain" / "model")) == before
    assert identity(str(asked.root / "runs" / "sft")) != before
    assert identity("owner/name") == "owner/name"


def test_kill_9_and_resume_leave_the_same_bytes(asked: Any) -> None:
    words = [*WORDS, "--batch_size=4", "--gold=playground"]
    asked.done(*words)
    whole, keys = made(asked), [row["key"] for row in read(asked.root / "made" / "sft.journal")]
    command = [sys.executable, "-m", "lightning_align", *words]
    command[command.index("--out=made/sft.jsonl")] = "--out=killed/sft.jsonl"
    journal = asked.root / "killed" / "sft.journal"
    with subprocess.Popen(command, cwd=asked.root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.stat().st_size == 0:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    written = journal.read_bytes()
    there = written.count(b"\n")
    assert 0 < there < 24
    assert not (asked.root / "killed" / "sft.jsonl").exists()
    with journal.open("ab") as file:
        file.write(b'{"key": "half a li')  # what a kill in the middle of a line leaves
    answer = asked.done(*[word.replace("made/", "killed/") for word in words])
    assert f"{there} of 24 chains are in killed/sft.journal" in answer.err
    assert [row["key"] for row in read(journal)] == keys  # none twice, none lost
    assert journal.read_bytes().startswith(written)
    assert {path.name: path.read_bytes() for path in journal.parent.iterdir() if path != journal} == whole


def write_parrot(source: Path, folder: Path, word: str) -> None:
    """A model that says one word and ends, whatever it is asked: it knows nothing but the token before."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = False
    said, end = tokenizer.convert_tokens_to_ids(word), tokenizer.eos_token_id
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embeddings = torch.zeros_like(model.get_input_embeddings().weight)
        embeddings[:, 0], embeddings[said, 0], embeddings[said, 1] = 1.0, 0.0, 1.0
        head = torch.zeros_like(embeddings)
        head[said, 0] = head[end, 1] = 1000.0
    model.get_input_embeddings().weight = torch.nn.Parameter(embeddings)
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_cai_4_a_model_that_always_says_the_same_is_one_line(asked: Any) -> None:
    write_parrot(asked.root / "runs" / "sft" / "model", asked.root / "parrot", "cat")
    answer = asked.run(*WORDS, "--model=parrot")
    assert answer.code == 2
    unsafe = sum(row["is_safety"] for row in read(asked.root / "asked.jsonl"))
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"error: none of {2 * unsafe} revisions differs from the text that it revises (look at ")
    folder = asked.root / "made"
    assert not (folder / "sft.jsonl").exists()
    assert json.loads((folder / "sft.metrics.json").read_text())["cai/revision_changed"] == 0
    assert {chain["first"].strip() for chain in read(folder / "sft.chains.jsonl")} == {"cat"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--constitution=none.yaml"], "constitution none.yaml: there is no such file (built in: playground, default)"),
        (["--constitution=bad.yaml"], "bad.yaml: field principles[0].revision_request is missing"),
        (["--revisions=0"], "--revisions is 0: give at least 1"),
        (["--limit=0"], "--limit is 0: give at least 1"),
        (["--temperature=0"], "sampling: temperature is 0.0: must be above 0"),
        (["--out=prompt.jsonl"], "prompt.jsonl exists: give another name, or --overwrite"),
        (["--out=made.txt"], "made.txt: records are written as .jsonl"),
        (["--data=none.jsonl"], "none.jsonl"),
        (["--model=runs/none"], "runs/none: there is no such local folder"),
        (["--max_new_tokens=90"], "model runs/pretrain has 96 positions, but a question to it takes"),
        (["--data=safe.jsonl", "--helpful=leave_out"], "safe.jsonl: no prompt is left, as is_safety is false in all"),
        (["--keep=some"], "argument --keep: invalid choice: 'some'"),
        (["--revision=2"], "unknown option --revision=2; did you mean '--revisions'?"),
    ],
)
def test_bad_input(asked: Any, words: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked.write("bad.yaml", "principles: [{critique_request: a}]")
    asked.write("safe.jsonl", [{"prompt": "list two animals . answer :", "is_safety": False}])
    assert asked.refused(*WORDS, *words).startswith(line)
