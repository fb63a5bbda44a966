"""``generate``: one prompt, a file of prompts, a conversation; reproducible, and never half a file."""

import io
import json
from typing import Any

import pytest

PROMPT = "list two animals . answer :"
MODEL = ["generate", "runs/sft", "--max_new_tokens=4"]


def test_a_prompt_and_its_seed(desk: Any) -> None:
    first, again = (desk.done(*MODEL, "--prompt", PROMPT, "--seed=1") for _ in range(2))
    assert first.out == again.out
    assert first.err == ""
    three = desk.done(*MODEL, "--prompt", PROMPT, "--seed=1", "--num_samples=3").out.splitlines()
    assert len(three) == 3
    assert three[0] == first.out.strip("\n")
    assert len(first.out.split()) <= 4
    greedy = {desk.done(*MODEL, "--prompt", PROMPT, "--greedy").out for _ in range(2)}
    assert len(greedy) == 1
    few = desk.done(*MODEL, "--prompt", PROMPT, "--seed=1", "--num_samples=3", "--rollout_batch_size=2").out
    assert few.splitlines() == three


@pytest.mark.parametrize("engine", ["static", "generate"])
def test_engines(desk: Any, engine: str) -> None:
    answer = desk.done(*MODEL, "--prompt", PROMPT, "--greedy", f"--engine={engine}")
    assert answer.out == desk.done(*MODEL, "--prompt", PROMPT, "--greedy").out


def test_files_of_prompts(scratch: Any) -> None:
    scratch.write("prompts.txt", f"{PROMPT}\n\nsort these words : a b\n")
    answer = scratch.done(*MODEL, "--file=prompts.txt")
    asked = [line for line in answer.out.splitlines() if not line.startswith("  → ")]
    assert asked == [PROMPT, "sort these words : a b"]
    answer = scratch.done(*MODEL, "--file=prompt.jsonl", "--out=out/answers.jsonl", "--num_samples=2", "--seed=3")
    assert answer.out == "wrote 32 completions to out/answers.jsonl\n"
    rows = [json.loads(line) for line in (scratch.root / "out" / "answers.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "completion", "finish_reason"} for row in rows)
    asked = [json.loads(line)["prompt"] for line in (scratch.root / "prompt.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows[::2]] == asked


def test_a_conversation(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nlist two animals .\n\n"))
    answer = desk.done(*MODEL, "--seed=1")
    assert answer.out.startswith("an empty line or Ctrl-D ends the conversation\n> ")
    assert answer.out.count("> ") == 3


def test_a_chat_template_is_applied_on_request(desk: Any) -> None:
    plain, chat = (desk.done(*MODEL, "--prompt", PROMPT, "--greedy", *more).out for more in ([], ["--chat"]))
    assert plain != chat


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs/none", "--prompt=x"], "runs/none: there is no such local folder, and the model hub"),
        (["runs/reward", "--prompt=x"], "runs/reward is a reward model (it has a score head), but a language model is"),
        (["tiny.yaml", "--prompt=x"], "tiny.yaml: its tokenizer is trained on data: there is none before a run"),
        (["runs/sft", "--prompt="], "prompt 0 has no tokens: give a text or a beginning-of-sequence token"),
        (
            ["runs/sft", "--prompt=x", "--max_new_tokens=200"],
            "prompt 0 has 1 tokens; with max_new_tokens 200 that is 201, but the model has 96 positions: shorten the",
        ),
        (["runs/sft", "--prompt=x", "--temperature=0"], "--temperature is 0: give one above 0, or --greedy for the"),
        (["runs/sft", "--prompt=x", "--temperature=-1"], "sampling: temperature is -1.0: must be above 0"),
        (["runs/sft", "--prompt=x", "--rollout_batch_size=0"], "--rollout_batch_size is 0: give at least 1"),
        (["runs/sft", "--prompt=x", "--top_p=2"], "sampling: top_p is 2.0: must be above 0 and at most 1"),
        (["runs/sft", "--prompt=x", "--num_samples=0"], "sampling: num_samples is 0: must be at least 1"),
        (["runs/sft", "--prompt=x", "--temprature=1"], "unknown option --temprature=1; did you mean '--temperature'?"),
        (["runs/sft", "--prompt=x", "--dtype=int8"], "dtype is int8: give one of float32, bfloat16, float16, auto"),
        (["runs/sft", "--prompt=x", "--engine=vlm"], "argument --engine: invalid choice: 'vlm'"),
        (["runs/sft", "--file=none.txt"], "file none.txt does not exist (--file)"),
        (["runs/sft", "--file=prompt.jsonl", "--out=tiny.txt"], "tiny.txt: records are written as .jsonl, .json"),
        (["runs/sft", "--file=prompt.jsonl", "--out=sft.jsonl"], "sft.jsonl exists: give another name, or --overwrite"),
        (["runs/sft", "--file=prompt.jsonl", "--out=tiny.yaml/a.jsonl"], "cannot write tiny.yaml/a.jsonl: "),
        (["runs/sft", "--out=a.jsonl"], "--out needs --prompt or --file: a conversation is not written"),
    ],
)
def test_bad_input(desk: Any, words: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert desk.refused("generate", *words).startswith(line)


def test_a_chat_without_a_template(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    make_model(scratch.root / "plain", tokenizer=make_tokenizer(template=None))
    assert scratch.refused("generate", "plain", "--prompt=hi", "--chat").endswith(
        "the tokenizer has no chat template: use a tokenizer that has one, or records of plain text"
    )
