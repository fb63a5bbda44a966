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


LETTERS = """
def letters(prompts, completions, bonus, **_):
    return [None if len(text) % 3 == 0 else len(text) + extra for text, extra in zip(completions, bonus)]


def nothing(completions, **_):
    return [None] * len(completions)


def first_prompt(prompts, completions, **_):
    return [len(text) if "a b" in prompt else None for prompt, text in zip(prompts, completions)]
"""


def test_the_best_of_several_is_the_one_that_the_reward_likes_best(scratch: Any) -> None:
    scratch.write("rewards.py", LETTERS)
    scratch.write("asked.jsonl", [{"prompt": PROMPT, "bonus": 1}, {"prompt": "sort these words : a b", "bonus": 100}])
    words = [*MODEL, "--file=asked.jsonl", "--seed=3"]
    scratch.done(*words, "--num_samples=6", "--out=all.jsonl")
    answer = scratch.done(*words, "--best-of=6", "--reward=rewards.py:letters", "--out=best.jsonl")
    assert answer.out == "wrote 2 completions to best.jsonl\n"
    drawn, best = (
        [json.loads(line) for line in (scratch.root / f"{name}.jsonl").read_text().splitlines()]
        for name in ("all", "best")
    )
    means = []
    for index, row in enumerate(best):
        texts = [other["completion"] for other in drawn[6 * index : 6 * index + 6]]
        scored = [text for text in texts if len(text) % 3]
        scores = [len(text) + (1, 100)[index] for text in scored]
        means.append(sum(scores) / len(scores))
        assert row["completion"] == max(scored, key=len)
        assert row["score"] == max(scores)
        assert row["mean_score"] == pytest.approx(means[-1])
        assert row["n"] == len(scores)
        assert set(row) == {"prompt", "completion", "finish_reason", "score", "mean_score", "n"}
    assert min(row["n"] for row in best) < 6  # some have no score
    mean = sum(row["score"] for row in best) / 2
    assert (
        f"best of 6 by rewards.py:letters: mean score {mean:.4g}, of all completions {sum(means) / 2:.4g}" in answer.err
    )
    assert "at most 0.958 nats from the distribution that is sampled" in answer.err  # log 6 − 5/6
    printed = scratch.done(*words, "--best-of=6", "--reward=rewards.py:letters").out.splitlines()
    assert printed[1] == f"  → {best[0]['completion']}"
    assert printed[2] == f"  score {best[0]['score']:.4g}, mean of {best[0]['n']} {best[0]['mean_score']:.4g}"


@pytest.mark.parametrize("reward", ["runs/reward", "playground", "both.yaml"])
def test_any_reward_chooses(scratch: Any, reward: str) -> None:
    scratch.write("both.yaml", "gold: {source: playground, weight: 0.5}\nlearned: runs/reward\n")
    prompts = [json.loads(line) for line in (scratch.root / "prompt.jsonl").read_text().splitlines()]
    scratch.write("few.jsonl", prompts[:3])
    scratch.done(
        *(*MODEL, "--file=few.jsonl", "--best-of=16", f"--reward={reward}", "--out=best.jsonl"),
        *("--rollout_batch_size=3", "--seed=1"),
    )
    rows = [json.loads(line) for line in (scratch.root / "best.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in prompts[:3]]
    assert all(row["score"] >= row["mean_score"] for row in rows)
    assert any(row["score"] > row["mean_score"] for row in rows)


def test_prompts_without_a_score_are_left_out_and_counted(scratch: Any) -> None:
    scratch.write("rewards.py", LETTERS)
    scratch.write("prompts.txt", f"{PROMPT}\nsort these words : a b\n")
    words = [*MODEL, "--file=prompts.txt", "--best-of=2"]
    answer = scratch.done(*words, "--reward=rewards.py:first_prompt", "--out=best.jsonl")
    assert "1 prompts left out: the reward gave none of their completions a score" in answer.err
    (row,) = [json.loads(line) for line in (scratch.root / "best.jsonl").read_text().splitlines()]
    assert row["prompt"] == "sort these words : a b"
    line = scratch.refused(*words, "--reward=rewards.py:nothing", "--out=none.jsonl")
    assert line.startswith("reward rewards.py:nothing gave none of 4 completions a score: there is no best one")


def test_a_conversation(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nlist two animals .\n\n"))
    answer = desk.done(*MODEL, "--seed=1")
    assert answer.out.startswith("an empty line or Ctrl-D ends the conversation\n> ")
    assert answer.out.count("> ") == 3


def test_a_stage_of_that_name_in_a_pipeline_is_pointed_to(scratch: Any) -> None:
    scratch.write("runs/chain/stage/run.json", "{}")
    assert "no such local folder (there is runs/chain/stage), and" in scratch.refused(
        "generate", "runs/stage", "--prompt=x"
    )


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
        (["runs/sft", "--prompt=x", "--best-of=4"], "--best-of needs --reward, what scores: a run, path, hub id"),
        (["runs/sft", "--prompt=x", "--best-of=1", "--reward=playground"], "--best-of is 1: give at least 2"),
        (["runs/sft", "--prompt=x", "--reward=playground"], "--reward chooses among completions: give --best-of too"),
        (
            ["runs/sft", "--prompt=x", "--best-of=4", "--reward=playground", "--num_samples=2"],
            "--best-of gives one completion of each prompt: leave --num_samples out",
        ),
        (
            ["runs/sft", "--prompt=x", "--best-of=4", "--reward=playground", "--greedy"],
            "--greedy makes all completions",
        ),
        (["runs/sft", "--prompt=x", "--best-of=4", "--reward=runs/sft"], "runs/sft has no score head"),
        (["runs/sft", "--prompt=x", "--best-of=4", "--reward=none.py:f"], "reward none.py:f: "),
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
