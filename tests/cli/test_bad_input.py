"""What users do wrong: one line that says what, where and what to do; exit code 2; nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOOD = [{"prompt": f"name thing {i} . answer :", "completion": f" thing {i} ."} for i in range(12)]
PAIRS = [{"prompt": f"name {i} :", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(12)
]
SKIP = "(on_bad_record: skip drops such records)"
REWARDS = """
def raises(completions):
    raise ValueError("no\\nway")

def short(completions):
    return [1.0]

def texts(completions):
    return ["good" for _ in completions]

def no_list(completions):
    return None

def asks(answer):
    return [1.0 for _ in answer]

def nothing(completions):
    return [None for _ in completions]

def infinite(completions):
    return [float("inf") for _ in completions]

number = 3
"""
LATE = """
calls = []

def late(completions):
    calls.append(1)
    return [1.0] * (8 if len(calls) < 3 else 1)
"""


def jsonl(*rows: object) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def role(name: str) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": "a"}, {"role": "assistant", "content": "b"}]}


# configuration, content of bad.jsonl, more words, the line
RECORDS: dict[str, tuple[str, str, list[str], str]] = {
    "broken JSON": (
        "sft",
        jsonl(*GOOD, '{"prompt": "a", "completion": }\n'),
        [],
        f"bad.jsonl line 13: the line is not valid JSON (Expecting value, column 31); write one object a line {SKIP}",
    ),
    "no object": (
        "sft",
        jsonl(*GOOD, "[1, 2]\n"),
        [],
        f'bad.jsonl line 13: is no object (list); a record is written {{"field": …}} {SKIP}',
    ),
    "missing field": (
        "sft",
        jsonl(*GOOD, {"prompt": "a"}),
        [],
        "bad.jsonl line 13: field completion: is missing (there is prompt); a record of kind sft needs prompt and "
        f"completion, which `columns` can rename {SKIP}",
    ),
    "mistyped field": (
        "sft",
        jsonl(*GOOD, {"prompt": "a", "complet1on": "b"}),
        [],
        "bad.jsonl line 13: field completion: is missing (there is prompt, complet1on); a record of kind sft needs "
        f"prompt and completion; did you mean columns: {{completion: complet1on}}? {SKIP}",
    ),
    "wrong type": (
        "sft",
        jsonl(*GOOD, {"prompt": 3, "completion": "b"}),
        [],
        f"bad.jsonl line 13: field prompt: is not a text (3, int); write a text in quotes {SKIP}",
    ),
    "empty completion": (
        "sft",
        jsonl(*GOOD, {"prompt": "a", "completion": " "}),
        [],
        f"bad.jsonl line 13: field completion: is empty; write a text, or leave the record out {SKIP}",
    ),
    "mixed kinds": (
        "sft",
        jsonl(*GOOD, {"text": "hello"}),
        [],
        "bad.jsonl line 13: field prompt: is missing (there is text); a record of kind sft needs prompt and "
        f"completion, which `columns` can rename {SKIP}",
    ),
    "data of another kind": (
        "reward",
        jsonl(*GOOD),
        [],
        "bad.jsonl line 1: field chosen: is missing (there is prompt, completion); a record of kind preference needs "
        f"prompt and chosen and rejected, which `columns` can rename {SKIP}",
    ),
    "too long": (
        "sft",
        jsonl(*GOOD, {"prompt": "a " * 300, "completion": " b"}),
        ["--data.on_overflow=error"],
        "bad.jsonl line 13: 302 tokens (prompt 300, completion 2), but at most 64 fit: raise data.max_length, shorten "
        "the record, or set data.on_overflow to truncate or drop",
    ),
    "prompt too long for its completion": (
        "ppo",
        jsonl(*GOOD, {"prompt": "a " * 300}),
        ["--data.on_overflow=error"],
        "bad.jsonl line 13: 300 tokens (prompt 300), but at most 90 fit: raise data.max_length, shorten the record, "
        "or set data.on_overflow to truncate or drop",
    ),
    "nothing fits": (
        "sft",
        jsonl(*GOOD),
        ["--data.max_length=3", "--data.on_overflow=drop", "--data.val_fraction=0"],
        "bad.jsonl: nothing is left to learn from in the train data; 12 records: longer than 3 tokens (first: "
        "bad.jsonl line 1)",
    ),
    "chosen equals rejected": (
        "reward",
        jsonl(*PAIRS, {"prompt": "a", "chosen": " b", "rejected": " b"}),
        [],
        "bad.jsonl line 13: field rejected: equals chosen; give different answers, or mark the record tie: true "
        + SKIP,
    ),
    "unknown role": (
        "sft",
        jsonl(*CHATS, role("robot")),
        [],
        "bad.jsonl line 13: field messages: has an unknown role ('robot' in message 1); roles are system, developer, "
        f"user, assistant, tool {SKIP}",
    ),
    "role that the template lacks": (
        "sft",
        jsonl(*CHATS, role("tool")),
        [],
        "bad.jsonl line 13: the chat template refuses the conversation: unknown role tool",
    ),
    "no records": ("sft", "", [], "bad.jsonl holds no records"),
    "column that is not there": (
        "sft",
        jsonl(*GOOD),
        ["--data.columns.prompt=promt"],
        "bad.jsonl has no column 'promt' for prompt; did you mean 'prompt'? (there is prompt, completion)",
    ),
}


def own_data(words: list[str], path: str) -> list[str]:
    """A command line with another source of data."""
    kept = [word for word in words if not word.startswith(("--data.playground", "--data.val_path"))]
    return [*kept, "--data.playground=null", f"--data.path={path}"]


@pytest.mark.parametrize("case", RECORDS)
def test_records(scratch: Any, case: str) -> None:
    config, content, words, line = RECORDS[case]
    scratch.write("bad.jsonl", content)
    assert scratch.refused(*own_data(scratch.fit_words(config), "bad.jsonl"), "--run.name=new", *words) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("none.jsonl", "none.jsonl: there is no such file or folder; did you mean 'one.jsonl'?"),
        ("one.txt", "one.txt holds plain text: it can be read as records of kind text only, not sft"),
        (
            "one.foo",
            "one.foo: files of this name are not read; accepted are .jsonl, .json, .parquet, .csv, .txt, each also "
            "with .gz or .zst",
        ),
        ("cut.jsonl.gz", "cut.jsonl.gz is damaged, or not compressed as its name says: Not a gzipped file (b'he')"),
    ],
)
def test_files(scratch: Any, path: str, line: str) -> None:
    for name in ("one.jsonl", "one.txt", "one.foo", "cut.jsonl.gz"):
        scratch.write(name, "hello")
    assert scratch.refused(*own_data(scratch.fit_words("sft"), path), "--run.name=new") == line


def test_a_conversation_without_a_chat_template(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    make_model(scratch.root / "plain", tokenizer=make_tokenizer(template=None))
    scratch.write("chat.jsonl", CHATS)
    words = [*own_data(scratch.fit_words("sft"), "chat.jsonl"), "--run.name=new"]
    assert scratch.refused(*words, "--model.model=plain") == (
        "chat.jsonl line 1: the record is a conversation, but the tokenizer has no chat template: use a tokenizer that "
        "has one, or records of plain text"
    )


# ---------------------------------------------------------------------------------------------------- options
UNUSABLE: dict[str, tuple[str, list[str], str]] = {
    "model class": ("sft", ["--model=SFTModul"], "unknown model class 'SFTModul'; did you mean 'SFTModule'?"),
    "data class": ("sft", ["--data=SFTDatModule"], "unknown data class 'SFTDatModule'; did you mean 'SFTDataModule'?"),
    "option of the model": (
        "sft",
        ["--model.learning_rat=1"],
        "unknown option model.learning_rat of SFTModule; did you mean 'learning_rate'?",
    ),
    "option of the data": (
        "sft",
        ["--data.batchsize=1"],
        "unknown option data.batchsize of SFTDataModule; did you mean 'batch_size'?",
    ),
    "option of the trainer": (
        "sft",
        ["--trainer.max_step=1"],
        "unknown option --trainer.max_step=1; did you mean '--trainer.max_steps'?",
    ),
    "option without its section": (
        "sft",
        ["--batch_size=1"],
        "unknown option --batch_size=1; did you mean '--data.batch_size'?",
    ),
    "trainer option without its section": (
        "sft",
        ["--max_steps=1"],
        "unknown option --max_steps=1; did you mean '--trainer.max_steps'?",
    ),
    "stray word": ("sft", ["sft"], "unknown option sft"),
    "value missing": ("sft", ["--run.root"], "argument --run.root: expected one argument"),
    "precision": (
        "sft",
        ["--trainer.precision=fp8"],
        "trainer.precision is fp8: give one of 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 or null",
    ),
    "choice": (
        "sft",
        ["--model.dtype=bfloat61"],
        "model.dtype is bfloat61: give one of float32, bfloat16, float16, auto; did you mean 'bfloat16'?",
    ),
    "number": ("sft", ["--data.batch_size=many"], "data.batch_size is many: give a whole number"),
    "fraction": ("sft", ["--data.batch_size=1.5"], "data.batch_size is 1.5: give a whole number"),
    "number or null": (
        "sft",
        ["--data.eval_batch_size=many"],
        "data.eval_batch_size is many: give a whole number or null",
    ),
    "truth value": ("sft", ["--data.shuffle=perhaps"], "data.shuffle is perhaps: give true or false"),
    "config that is none": ("sft", ["--config=none.yaml"], "none.yaml does not exist (--config)"),
    "wrong data class": (
        "sft",
        ["--data=PromptDataModule"],
        "SFTModule learns from text or sft records, but --data is PromptDataModule: give SFTDataModule or "
        "TextDataModule",
    ),
    "wrong model class": (
        "sft",
        ["--model.reward=playground", "--model=PPOModule"],  # the class may stand after its options
        "PPOModule learns from prompt records, but --data is SFTDataModule: give PromptDataModule",
    ),
    "GPUs on a machine without": (
        "sft",
        ["--trainer.accelerator=gpu", "--trainer.devices=2"],
        "trainer: No supported gpu backend found!",
    ),
    "Lightning's clipping": (
        "sft",
        ["--trainer.gradient_clip_val=1.0"],
        "trainer.gradient_clip_val is not used here: set model.max_grad_norm instead",
    ),
    "steps of an online method": (
        "ppo",
        ["--trainer.max_steps=3"],
        "trainer.max_steps is for offline methods: set model.iterations instead",
    ),
    "completion longer than the context": (
        "ppo",
        ["--model.max_new_tokens=96"],
        "model.max_new_tokens is 96, but runs/sft has 96 positions: no prompt fits before such a completion",
    ),
    "more minibatches than samples": (
        "ppo",
        ["--model.num_mini_batches=9"],
        "model.num_mini_batches is 9: give at most 8, one a completion",
    ),
    "validation beyond the epoch": (
        "sft",
        ["--trainer.val_check_interval=99", "--trainer.check_val_every_n_epoch=1"],
        "trainer.val_check_interval is 99, but an epoch has 8 batches: lower it, or count on over "
        "epochs with trainer.check_val_every_n_epoch null",
    ),
    "W&B mode": ("sft", ["--run.wandb=of"], "run.wandb is of: give one of offline, online, disabled or null"),
    "seed": ("sft", ["--seed_everything=-1"], "seed_everything is -1: give a whole number from 0 to 4294967295"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_options(desk: Any, case: str) -> None:
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config, words, line = UNUSABLE[case]
    said = desk.refused(*desk.fit_words(config), "--run.name=new", *words)
    assert said.replace(f"file {desk.root}/", "") == line


SHARE = "a share from 0 up to (not including) 1"
RANGES: dict[str, dict[str, str]] = {
    "sft": {
        **{"model.learning_rate=-1": "-1.0: give 0 or more", "model.learning_rate=.nan": "nan: give 0 or more"},
        **{"model.weight_decay=-1": "-1.0: give 0 or more", "model.adam_epsilon=-1": "-1.0: give 0 or more"},
        "model.adam_beta1=1": "1.0: give a number from 0 up to (not including) 1",
        "model.adam_beta2=-1": "-1.0: give a number from 0 up to (not including) 1",
        "model.warmup_ratio=1": f"1.0: give {SHARE}",
        "model.min_lr_ratio=2": "2.0: give a share from 0 to 1",
        "model.max_grad_norm=-1": "-1.0: give a norm, or 0 for no clipping",
        "model.dropout=1": "1.0: give a probability from 0 up to (not including) 1",
        **{"data.batch_size=0": "0: give at least 1", "data.eval_batch_size=0": "0: give at least 1"},
        **{"data.max_length=0": "0: give at least 1", "data.val_fraction=1": f"1.0: give {SHARE}"},
        "trainer.max_steps=0": "0: nothing would be trained, give at least 1",
        "trainer.max_epochs=0": "0: nothing would be trained, give at least 1",
        "trainer.accumulate_grad_batches=0": "0: give at least 1",
        "trainer.log_every_n_steps=0": "0: give at least 1",
        "trainer.val_check_interval=0": "0: give batches, or a share of the epoch above 0",
        "trainer.check_val_every_n_epoch=0": "0: give at least 1",
        "run.checkpoint_every=0": "0: give at least 1",
    },
    "reward": {
        "model.label_smoothing=0.5": "0.5: give a probability from 0 to below 0.5",
        "model.center_rewards_coefficient=-1": "-1.0: give 0 or more",
    },
    "ppo": {
        **{"model.iterations=0": "0: give at least 1", "model.num_ppo_epochs=0": "0: give at least 1"},
        **{"model.num_mini_batches=0": "0: give at least 1", "model.micro_batch_size=0": "0: give at least 1"},
        **{"model.samples_per_prompt=0": "0: give at least 1", "model.ptx_batch_size=0": "0: give at least 1"},
        "model.eval_every=-1": "-1: give a number of iterations, or 0 for never",
        "model.stop_at_kl=0": "0.0: give a KL above 0 in nats, or null",
        **{"model.value_lr=-1": "-1.0: give 0 or more", "model.kl_coef=-1": "-1.0: give 0 or more"},
        **{"model.vf_coef=-1": "-1.0: give 0 or more", "model.entropy_coef=-1": "-1.0: give 0 or more"},
        **{"model.ptx_coef=-1": "-1.0: give 0 or more", "model.kl_horizon=0": "0: give at least 1 episode"},
        "model.kl_target=0": "0.0: give a KL above 0 in nats",
        **{"model.cliprange=0": "0.0: give a number above 0", "model.cliprange_value=0": "0.0: give a number above 0"},
        "model.dual_clip=1.1": "1.1: give 0, or more than 1.2",
        **{"model.gamma=2": "2.0: give a number from 0 to 1", "model.lam=-1": "-1.0: give a number from 0 to 1"},
        "model.score_clip=-1": "-1.0: give a number above 0, or 0 for no clipping",
        "model.target_kl_update=0": "0.0: give a KL above 0",
        "model.missing_eos_penalty=0": "0.0: it is subtracted, so give one above 0",
        "model.max_new_tokens=0": "0: must be at least 1",
        "model.temperature=0": "0.0: must be above 0 (for the likeliest token use greedy)",
        **{
            "model.top_k=-1": "-1: must be 0 (all tokens) or more",
            "model.top_p=2": "2.0: must be above 0 and at most 1",
        },
        "model.min_p=1": "1.0: must be at least 0 and below 1",
    },
}


@pytest.mark.parametrize("config", RANGES)
def test_numbers_out_of_range(desk: Any, config: str) -> None:
    sampling = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    for option, rest in RANGES[config].items():
        name = option.split("=")[0]
        shown = f"sampling: {name.removeprefix('model.')}" if name.endswith(sampling) else name
        line = desk.refused(*desk.fit_words(config), "--run.name=new", f"--{option}")
        assert line == f"{shown} is {rest}"


def test_a_configuration_that_is_not_yaml(scratch: Any) -> None:
    scratch.write("bad.yaml", "model: [1")
    assert scratch.refused("fit", "--config=bad.yaml").startswith("bad.yaml is not valid YAML: while parsing a flow")
    scratch.write("list.yaml", "- 1\n")
    assert scratch.refused("fit", "--config=list.yaml") == (
        "list.yaml is no configuration: it must be a mapping, with keys model, data and so on"
    )


def test_nothing_given(desk: Any) -> None:
    assert desk.refused("fit").startswith("no model is given: give --config FILE, or --model with one of PPOModule, ")
    assert desk.refused("fit", "--model=SFTModule", "--data=SFTDataModule", "--data.path=playground") == (
        "SFTModule needs model.model"
    )


# ---------------------------------------------------------------------------------------------------- models
def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    without_weights: "broken: there is no model.safetensors in broken (pickled weights are not read)",
    cut_weights: "broken: the model cannot be loaded: Error while deserializing header: incomplete metadata, file not "
    "fully covered",
    without_tokenizer: "broken: there is no tokenizer (tokenizer.json) in broken",
    broken_tokenizer: "broken/tokenizer.json is damaged: Expecting property name enclosed in double quotes: line 1 "
    "column 2 (char 1)",
    without_config: "broken is neither a run directory nor a model folder: it has no config.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_model_folders(scratch: Any, make_model: Any, make_tokenizer: Any, damage: Callable[[Path], None]) -> None:
    make_model(scratch.root / "broken", tokenizer=make_tokenizer(template=None))
    damage(scratch.root / "broken")
    line = scratch.refused(*scratch.fit_words("sft"), "--run.name=new", "--model.model=broken")
    assert line == DAMAGES[damage]


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_is_told(
    scratch: Any, make_model: Any, make_tokenizer: Any
) -> None:
    make_model(scratch.root / "endless", tokenizer=make_tokenizer(template=None, eos=None))
    words = [*scratch.fit_words("sft"), "--run.name=new", "--model.model"]
    assert scratch.refused(*words, "endless") == (
        "endless: its tokenizer has no EOS token: a model needs one to end its answers"
    )
    make_model(scratch.root / "padless", tokenizer=make_tokenizer(template=None, pad=None))
    # most pre-trained models have no pad token, so that is said and worked around
    with pytest.warns(UserWarning, match="padless: its tokenizer has no pad token; EOS is used"):
        scratch.done(*words, "padless")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["sft", "--model.model=runs/reward"],
            "runs/reward is a reward model (it has a score head), but a language model",
        ),
        (["ppo", "--model.reward=runs/sft"], "runs/sft has no score head: it is a language model, not a reward model"),
        (["ppo", "--model.gold=runs/sft"], "runs/sft has no score head: it is a language model, not a reward model"),
        (["sft", "--model.model=tiny.jsonl"], "tiny.jsonl: there is no such local folder, and the model hub cannot be"),
        (["sft", "--model.model=none.yaml"], "none.yaml: there is no such architecture file"),
        (["sft", "--model.model=docs"], "docs is neither a run directory nor a model folder: it has no config.json"),
        (["sft", "--model.model=a/b/c"], "a/b/c: there is no such folder, and it cannot be a hub id (owner/name)"),
    ],
)
def test_model_of_another_sort(desk: Any, words: list[str], line: str, offline: None) -> None:
    assert desk.refused(*desk.fit_words(words[0]), "--run.name=new", *words[1:]).startswith(line)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("option", ["--model.model", "--data.path", "--model.gold"])
def test_hub_ids_without_a_network_fail_fast(desk: Any, option: str, offline: None) -> None:
    started = time.monotonic()
    words = desk.fit_words("ppo")
    words = own_data(words, "owner/name") if option == "--data.path" else [*words, f"{option}=owner/name"]
    line = desk.refused(*words, "--run.name=new")
    assert line.startswith("owner/name: there is no such")
    assert line.endswith("check the spelling, or the network")
    assert time.monotonic() - started < 10


# ---------------------------------------------------------------------------------------------------- rewards
@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("good", "rewards.py has no 'good'; its functions are: raises, short, texts, no_list, asks, nothing, infinite"),
        ("number", "is int, not a function"),
        ("raises", "failed on all 8 completions of a batch: ValueError: no way"),
        ("short", "returned 1 scores for 8 completions: one each is needed"),
        ("texts", "returned 'good' as a score: it must be a number or None"),
        ("no_list", "returned NoneType: it must return a list of numbers"),
        (
            "asks",
            "asks for 'answer', which the records lack; there is: completions, family, finished, is_safety, "
            "prompt, prompts",
        ),
        ("nothing", "gave none of the first 64 completions a finite number: there is nothing to learn from"),
        ("infinite", "gave none of the first 64 completions a finite number: there is nothing to learn from"),
    ],
)
def test_reward_functions(scratch: Any, function: str, line: str) -> None:
    scratch.write("rewards.py", REWARDS)
    words = ["--run.name=new", f"--model.reward=rewards.py:{function}"]
    if "64" in line:  # a reward may have nothing to say of a few
        words += ["--data.batch_size=64", "--model.eval_every=0"]
    said = scratch.refused(*scratch.fit_words("ppo"), *words)
    assert said in (f"reward rewards.py:{function} {line}", f"reward rewards.py:{function}: {line}")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (
            "reward=nowhere.function",
            "reward nowhere.function cannot be imported: No module named 'nowhere'; it is neither",
        ),
        ("reward=none.py:f", "reward none.py:f: there is no file none.py"),
        (
            "reward={a: {source: playground, wieght: 1}}",
            "reward part 'a' has an unknown key 'wieght': it takes source and",
        ),
        ("reward=[1]", "model.reward is [1]: give a text or a mapping"),
        (
            "gold=playground:helpful",
            "reward playground:helpful is unknown: the playground has gold, helpfulness, safety",
        ),
    ],
)
def test_rewards(desk: Any, option: str, line: str) -> None:
    assert desk.refused(*desk.fit_words("ppo"), "--run.name=new", f"--model.{option}").startswith(line)


# ------------------------------------------------------------------------------------------ runs and checkpoints
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--run.name=sft"], "the run runs/sft exists: give --resume, --overwrite or another --run.name"),
        (["--run.name=.."], "run.name is '..': give a folder name, relative to run.root"),
        (["--run.name=a/../../b"], "run.name is 'a/../../b': give a folder name, relative to run.root"),
        (
            ["--run.name=sft", "--resume", "--overwrite"],
            "--resume and --overwrite contradict each other: give one of them",
        ),
        (
            ["--run.name=new", "--resume"],
            "nothing to resume: runs/new does not exist (check --run.name and --run.root)",
        ),
        (
            ["--run.name=x", "--run.root=tiny.yaml"],
            "cannot create the run directory tiny.yaml/x: tiny.yaml is not a folder",
        ),
        (["--run.name=docs", "--run.root=.", "--overwrite"], "will not overwrite docs: it is not a run directory"),
        (["--run.name=new", "--ckpt_path=lst"], "there is no checkpoint lst; did you mean 'last'?"),
        (
            ["--run.name=new", "--ckpt_path=tiny.yaml"],
            "tiny.yaml is not a whole checkpoint: it is cut off, or something else; give another one",
        ),
        (
            ["--run.name=new", "--ckpt_path=runs/reward/checkpoints/last.ckpt"],
            "the checkpoint is of RewardModule, not of SFTModule: give one of the same method",
        ),
        (
            ["--run.name=sft", "--resume", "--ckpt_path=a.ckpt"],
            "--resume continues from runs/sft/checkpoints/last.ckpt, --ckpt_path is a.ckpt: give one of them",
        ),
        (
            ["--run.name=sft", "--resume", "--model.learning_rate=1"],
            "model.learning_rate is 1.0, but the run began with 0.001 (runs/sft/config.yaml): leave the option out to "
            "resume, or give another --run.name",
        ),
        (
            ["--run.name=sft", "--resume", "--model.model=runs/ppo"],
            "model.model is runs/ppo, but the run began with runs/pretrain (runs/sft/config.yaml): leave",
        ),
        (
            ["--run.name=sft", "--resume", "--data.playground.size=30"],
            "data.playground is {'size': 30}, but the run began with {'size': 60} (runs/sft/config.yaml): leave",
        ),
    ],
)
def test_runs(desk: Any, words: list[str], line: str) -> None:
    assert desk.refused(*desk.fit_words("sft"), *words).startswith(line)


def test_a_directory_that_cannot_be_written(desk: Any) -> None:
    """A folder where nobody may write, root included."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    line = desk.refused(*desk.fit_words("sft"), "--run.name=new", "--run.root=/proc/runs")
    assert line.startswith("cannot write the run directory /proc/runs/new: ")
    assert line.endswith("(change --run.root)")


def test_resuming_nothing(desk: Any) -> None:
    assert desk.refused("fit", "--resume", "--run.name=new") == (
        "nothing to resume: runs/new does not exist (check --run.name and --run.root)"
    )
    assert desk.refused("fit", "--resume") == "--resume and --ckpt_path last need --run.name, the run to take up"


def test_checkpoints_that_are_cut_or_of_another_model(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    whole = (scratch.root / "runs" / "sft" / "checkpoints" / "last.ckpt").read_bytes()
    words = [*scratch.fit_words("sft"), "--run.name=new"]
    for kept in (100, len(whole) // 2, len(whole) - 1):
        (scratch.root / "cut.ckpt").write_bytes(whole[:kept])
        assert scratch.refused(*words, "--ckpt_path=cut.ckpt") == (
            "cut.ckpt is not a whole checkpoint: it is cut off, or something else; give another one"
        )
    torch.save({"state_dict": {}}, scratch.root / "foreign.ckpt")
    assert scratch.refused(*words, "--ckpt_path=foreign.ckpt") == (
        "foreign.ckpt is not a checkpoint of this program: it has no callbacks, loops, method"
    )
    make_model(scratch.root / "other", tokenizer=make_tokenizer(template=None))
    checkpoint = "runs/sft/checkpoints/last.ckpt"
    line = scratch.refused(*words, "--model.model=other", f"--ckpt_path={checkpoint}")
    assert line.startswith(f"{checkpoint} is a checkpoint of another model: ")


def test_a_damaged_run_is_not_resumed(scratch: Any) -> None:
    run = scratch.root / "runs" / "hurt"
    shutil.copytree(scratch.root / "runs" / "sft", run)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert scratch.refused("fit", "--resume", "--run.name=hurt").startswith(
        "runs/hurt/checkpoints/last.ckpt is not a whole checkpoint"
    )


@pytest.mark.parametrize(("config", "batch"), [("sft", "nan_batch_rank0.safetensors"), ("ppo", "nan_batch_rank0.json")])
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_batch(scratch: Any, config: str, batch: str) -> None:
    words = ["--model.learning_rate=1e30", "--model.lr_scheduler_type=constant", "--run.name=nan"]
    words += ["--trainer.max_steps=9"] if config == "sft" else ["--model.iterations=9"]
    answer = scratch.run(*scratch.fit_words(config), *words)
    assert answer.code == 2
    assert f"stopped before the update, the batch is in runs/nan/{batch} (try a lower learning rate" in answer.err
    assert (scratch.root / "runs" / "nan" / batch).is_file()
    status = scratch.status("nan")
    assert status["status"] == "failed"
    assert "the loss is nan" in status["error"]
    assert not (scratch.root / "runs" / "nan" / "model").exists()


def test_a_run_that_fails_later_stays(scratch: Any) -> None:
    """Only what holds nothing is removed: rows that were logged are kept, and the run says that it failed."""
    scratch.write("late.py", LATE)
    words = ["--run.name=late", "--model.reward=late.py:late", "--model.eval_every=0", "--model.iterations=4"]
    answer = scratch.run(*scratch.fit_words("ppo"), *words)
    assert (answer.code, scratch.status("late")["status"]) == (2, "failed")
    assert len(scratch.metrics("late")) == 2


# ---------------------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data.path=none.jsonl"], "error: none.jsonl: there is no such file or folder"),
        (["--model.learning_rate=-1"], "error: model.learning_rate is -1.0: give 0 or more"),
    ],
)
def test_the_same_in_a_process_of_its_own(desk: Any, words: list[str], line: str) -> None:
    argv = own_data(desk.fit_words("sft"), "playground")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_align", *argv, "--run.name=new", *words],
        cwd=desk.root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert not (desk.root / "runs" / "new").exists()
