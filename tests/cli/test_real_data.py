"""Real records through the whole line: public files that lie beside the repository, where they are there."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")
# Byte-level BPE, since real text has any character.
ARCHITECTURE = """
architecture: llama
hidden_size: 32
intermediate_size: 48
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 160
tie_word_embeddings: true
tokenizer: {train: {vocab_size: 600, algorithm: bpe}}
"""
# as docs/rewards.md describes one: the last number of the answer is what counts
REWARD = r"""
import re

def number(text):
    found = re.findall(r"-?\d[\d,]*", text)
    return found[-1].replace(",", "") if found else None

def gsm8k(completions, answer):
    pairs = zip(completions, answer, strict=True)
    return [1.0 if number(text) == number(right) else 0.1 * (number(text) is not None) for text, right in pairs]
"""
QUICK = ["--run.wandb=disabled", "--data.cache_dir=null", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
FEW = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=4", "--data.max_length=160"]


def fit(desk: Any, config: str, name: str, *words: str) -> str:
    """A few steps of one of the playground's configurations on other data; returns what was said of the data."""
    argv = ["fit", "--config", f"configs/playground/{config}.yaml", *QUICK, *words, f"--run.name={name}"]
    answer = desk.done(*argv)
    assert f"finished: runs/{name} (model in runs/{name}/model)\n" in answer.err
    return answer.out


@pytest.fixture(scope="module")
def shakespeare(desk: Any) -> str:
    """A model that has read a little of the plays."""
    desk.write("bpe.yaml", ARCHITECTURE)
    path = f"--data.path={DATA / 'tinyshakespeare.txt.gz'}"
    said = fit(desk, "pretrain", "shakespeare", "--model.model=bpe.yaml", path, *FEW, "--trainer.limit_val_batches=2")
    assert "18 records read from 1 file, 18 of kind text kept" in said
    (_, last) = (float(row["loss"]) for row in desk.metrics("shakespeare") if row["loss"])
    assert 5 < last < 7  # ln 600 is 6.4
    return "runs/shakespeare"


def test_pretraining_on_tiny_shakespeare(desk: Any, shakespeare: str) -> None:
    (row,) = (row for row in desk.metrics("shakespeare") if row["eval/loss"])
    assert float(row["eval/bits_per_byte"]) < 8
    AutoModelForCausalLM.from_pretrained(desk.root / shakespeare / "model")


@pytest.fixture(scope="module")
def instructed(desk: Any, shakespeare: str) -> str:
    """That model after a few instructions."""
    path = f"--data.path={DATA / 'self_instruct_seed.jsonl.gz'}"
    said = fit(desk, "sft", "instructed", f"--model.model={shakespeare}", path, *FEW)
    assert "175 records read from 1 file, 175 of kind sft kept" in said
    assert "converted: 175 instruction and instances → messages" in said
    assert "columns not used: id (175), name (175), is_classification (175)" in said
    return "runs/instructed"


def test_sft_on_self_instruct(desk: Any, instructed: str) -> None:
    assert any(row["eval/loss"] for row in desk.metrics("instructed"))
    answer = desk.done("generate", instructed, "--prompt=What is a cat?", "--chat", "--max_new_tokens=5")
    assert answer.err == ""


def test_reward_model_on_hh_harmless(scratch: Any, instructed: str) -> None:
    words = [f"--model.model={instructed}", f"--data.path={DATA / 'hh_harmless.jsonl.gz'}", *FEW]
    line = scratch.refused(*("fit", "--config=configs/playground/reward.yaml", *QUICK, *words, "--run.name=harmless"))
    assert line.startswith("hh_harmless.jsonl.gz line 87: field chosen: is empty; ")
    words += ["--data.on_bad_record=skip", "--data.val_fraction=0.1", "--trainer.limit_val_batches=4"]
    said = fit(scratch, "reward", "harmless", *words, "--trainer.val_check_interval=2")
    assert "2,312 records read from 1 file, 2,308 of kind preference kept" in said
    assert "converted: 2,308 hh transcripts → prompt and answers" in said
    assert "dropped: 4 field chosen: is empty (first: hh_harmless.jsonl.gz line 87)" in said
    assert any(row["eval/accuracy"] for row in scratch.metrics("harmless"))
    model = AutoModelForSequenceClassification.from_pretrained(scratch.root / "runs" / "harmless" / "model")
    assert model.config.num_labels == 1


@pytest.mark.parametrize("config", ["reward", "dpo"])
def test_adapters_on_hh_harmless(scratch: Any, instructed: str, config: str) -> None:
    name = f"{config}_lora"
    words = [f"--model.model={instructed}", f"--data.path={DATA / 'hh_harmless.jsonl.gz'}", *FEW, "--model.lora_r=4"]
    words += ["--data.on_bad_record=skip", "--data.val_fraction=0.1", "--trainer.limit_val_batches=2"]
    words += ["--trainer.max_epochs=2"]
    said = fit(scratch, config, name, *words)
    assert " 0.00 M, base 0.03 M" in said  # adapters, and what they are added to
    scratch.done("fit", "--resume", f"--run.name={name}", "--trainer.max_steps=3")
    losses = [float(row["loss"]) for row in scratch.metrics(name) if row["loss"]]
    assert len(losses) == 3
    auto_class = AutoModelForCausalLM if config == "dpo" else AutoModelForSequenceClassification
    auto_class.from_pretrained(scratch.root / "runs" / name / "model")


def test_a_corrupted_copy_of_hh_harmless_ends_in_one_report(scratch: Any, instructed: str) -> None:
    with gzip.open(DATA / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(80), strict=False)]
    lines = [json.dumps(row).encode() for row in rows]
    first, second = rows[10], rows[20]
    lines[10] = json.dumps({"chosen": first["chosen"]}).encode()
    lines[20] = json.dumps({"chosen": second["chosen"], "rejected": second["chosen"]}).encode()
    lines[30] = b'{"prompt": "x", "chosen": [{"role": "robot", "content": "a"}], "rejected": "b"}'
    lines[40] = json.dumps({**rows[40], "chosen": rows[40]["chosen"] + " on" * 70_000}).encode()
    lines[50] = rb'{"chosen": "\n\nHuman: caf' + b"\xff" + rb'", "rejected": ""}'
    lines[60] = lines[60][:50]
    (scratch.root / "corrupted.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    words = [f"--model.model={instructed}", "--data.path=corrupted.jsonl", *FEW, "--data.val_fraction=0"]
    words += ["--trainer.limit_val_batches=0"]
    line = scratch.refused("fit", "--config=configs/playground/dpo.yaml", *QUICK, *words, "--run.name=refused")
    assert line.startswith("corrupted.jsonl line 11: field rejected: is missing (there is chosen); ")
    said = fit(scratch, "dpo", "corrupted", *words, "--data.on_bad_record=skip")
    assert "80 records read from 1 file, 75 of kind preference kept" in said
    for line, reason in (
        (11, "field rejected: is missing"),
        (21, "field rejected: equals chosen"),
        (31, "field chosen: has an unknown role"),
        (51, "the line is not UTF-8 text"),
        (61, "the line is not valid JSON"),
    ):
        assert f"dropped: 1 {reason} (first: corrupted.jsonl line {line}" in said
    assert re.search(r"tokens cut: \d{2,3},\d{3}", said)  # the answer of 200 kB among them


def test_ppo_on_gsm8k_with_a_python_function(scratch: Any, instructed: str) -> None:
    scratch.write("rewards.py", REWARD)
    words = [f"--model.model={instructed}", "--model.reward=rewards.py:gsm8k", "--model.gold=null"]
    words += [f"--data.path={DATA / 'gsm8k_train.jsonl.gz'}", "--data.columns.prompt=question", "--data.max_length=128"]
    words += ["--model.iterations=2", "--data.batch_size=16", "--model.max_new_tokens=16", "--data.val_fraction=0.003"]
    said = fit(scratch, "ppo", "gsm8k", *words)
    assert "7,473 records read from 1 file, 7,473 of kind prompt kept" in said
    proxies = [float(row["lab/proxy"]) for row in scratch.metrics("gsm8k") if row["lab/proxy"]]
    assert len(proxies) == 2
    assert all(0 <= proxy <= 1 for proxy in proxies)
    assert any(proxy > 0 for proxy in proxies)  # a random model writes numbers now and then
    samples = (scratch.root / "runs" / "gsm8k" / "samples.jsonl").read_text().splitlines()
    assert all({"prompt", "completion", "proxy", "kl"} <= set(json.loads(line)) for line in samples)
    AutoModelForCausalLM.from_pretrained(scratch.root / "runs" / "gsm8k" / "model")
