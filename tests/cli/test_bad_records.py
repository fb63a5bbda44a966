"""Records that users get wrong: one line with file, line, field, reason and what to do; nothing left behind."""

import json
from typing import Any

import pytest

GOOD = [{"prompt": f"name thing {i} . answer :", "completion": f" thing {i} ."} for i in range(12)]
PAIRS = [{"prompt": f"name {i} :", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(12)
]
SKIP = "(on_bad_record: skip drops such records)"


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
        f"bad.jsonl line 13: the chat template refuses the conversation: unknown role tool {SKIP}",
    ),
    "no records": ("sft", "", [], "bad.jsonl holds no records"),
    "column that is not there": (
        "sft",
        jsonl(*GOOD),
        ["--data.columns.prompt=promt"],
        "bad.jsonl has no column 'promt' for prompt; did you mean 'prompt'? (there is prompt, completion)",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(scratch: Any, case: str) -> None:
    config, content, words, line = RECORDS[case]
    scratch.write("bad.jsonl", content)
    assert scratch.refused(*scratch.fit_words_on("bad.jsonl", config), "--run.name=new", *words) == line


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
    assert scratch.refused(*scratch.fit_words_on(path, "sft"), "--run.name=new") == line


def test_a_conversation_without_a_chat_template(scratch: Any, make_model: Any, make_tokenizer: Any) -> None:
    make_model(scratch.root / "plain", tokenizer=make_tokenizer(template=None))
    scratch.write("chat.jsonl", CHATS)
    words = [*scratch.fit_words_on("chat.jsonl", "sft"), "--run.name=new"]
    assert scratch.refused(*words, "--model.model=plain") == (
        "chat.jsonl line 1: the record is a conversation, but the tokenizer has no chat template: use a tokenizer that "
        "has one, or records of plain text"
    )
