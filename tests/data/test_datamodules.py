"""From a path to batches: the playground, small files, real data; with Lightning's Trainer where that matters."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_align.data.datamodules import (
    BaseDataModule,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    TextDataModule,
)
from lightning_align.data.splits import hold_out
from lightning_align.errors import UserError

Make = Callable[..., PreTrainedTokenizerBase]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not here")
FIT = ("train", "val")


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prepared(datamodule: BaseDataModule, module: Any, splits: Any = FIT) -> BaseDataModule:
    datamodule.prepare(module, splits)
    return datamodule


def real_ids(batch: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


# ---------------------------------------------------------------------- the playground
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TextDataModule, {}),
        (TextDataModule, {"packing": "wrap"}),
        (SFTDataModule, {}),
        (SFTDataModule, {"packing": "bfd"}),
        (PreferenceDataModule, {}),
        (PromptDataModule, {}),
    ],
)
def test_playground(module: Any, kind: type[BaseDataModule], options: dict[str, Any]) -> None:
    own = module(max_tokens=96)
    datamodule = prepared(
        kind(path="playground", batch_size=16, playground={"size": 200}, **options), own, ("train", "val", "test")
    )
    assert datamodule.max_tokens_seen <= 96
    assert datamodule.mean_tokens > 0
    assert any("200 records read" in line for line in datamodule.report.lines())
    train = list(datamodule.train_dataloader())
    assert len(train) == len(datamodule.train_dataloader())
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        assert len(list(loader)) == len(loader) > 0
    if kind is PromptDataModule:
        assert train[0]["records"][0]["family"]
        assert own.tokenizer.decode(train[0]["prompt_ids"][0]) == train[0]["records"][0]["prompt"]
    elif kind is PreferenceDataModule:
        assert datamodule.sequences_per_batch == 32
        margins = torch.cat([batch["pair_margin"] for batch in train])
        assert margins.unique() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert "data.margin: auto" in str(datamodule.report.notes["margin by strength"])
        reference = next(iter(datamodule.reference_dataloader()))
        assert reference["input_ids"].shape[0] == 32
    else:
        weight = sum(float(batch["loss_weights"].sum()) for batch in train)
        assert weight == datamodule.report.notes["tokens with loss"] or options == {"packing": "wrap"}
        assert datamodule.packs == (options != {} or kind is TextDataModule)


@pytest.mark.parametrize("packing", ["bfd", "wrap", "none"])
def test_pre_2_the_corpus_can_be_put_together_again(module: Any, packing: Any) -> None:
    own = module()
    datamodule = prepared(
        TextDataModule(path="playground", max_length=20, batch_size=7, packing=packing, playground={"size": 300}), own
    )
    documents = [
        [*own.tokenizer(record["text"])["input_ids"], own.tokenizer.eos_token_id]
        for record in datamodule.splits.read("train").records
    ]
    pieces: list[list[int]] = []
    for batch in datamodule.train_dataloader():
        for ids, document in zip(batch["input_ids"], batch["document_ids"], strict=True):
            pieces += [ids[document == number].tolist() for number in range(int(document.max()) + 1)]
    assert sum(map(len, pieces)) == sum(map(len, documents)) == datamodule.report.notes["tokens"]
    if packing == "wrap":
        return
    expected = [ids[start : start + 20] for ids in documents for start in range(0, len(ids), 20)]
    assert sorted(pieces) == sorted(expected)


# ---------------------------------------------------------------------- splits
def test_no_prompt_is_on_both_sides(module: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"p {i % 40}", "completion": f" c {i}"} for i in range(120)]
    datamodule = prepared(SFTDataModule(path=write(tmp_path / "a.jsonl", records), val_fraction=0.2), module())
    train, val = (datamodule.splits.read(split).records for split in FIT)
    assert len(train) + len(val) == 120
    assert len(val) >= 3
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in val}
    assert f"{len(val)} records held out (20.0% of the prompts, by data.val_fraction)" in datamodule.report.notes["val"]


def test_each_record_is_left_out_of_one_fold(module: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"question {i // 2}", "completion": f" {i}"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", records)
    whole = prepared(SFTDataModule(path=path, val_fraction=0.2), module())
    seen: Counter[str] = Counter()
    for fold in (1, 2, 3):
        datamodule = prepared(SFTDataModule(path=path, val_fraction=0.2, leave_out=f"{fold}/3"), module())
        assert datamodule.splits.read("val") == whole.splits.read("val")
        kept = datamodule.splits.read("train").records
        prompts = {record["prompt"] for record in kept}
        assert len(kept) == 2 * len(prompts)  # records of a prompt stay together
        assert 80 < len(kept) < 130  # about two thirds of 160
        missing = len(whole.splits.read("train").records) - len(kept)
        assert f"{missing} records, part {fold} of 3 by the prompts" in datamodule.report.notes["left out"]
        seen.update(record["completion"] for record in kept)
    assert set(seen.values()) == {2}
    assert set(seen) == {record["completion"] for record in whole.splits.read("train").records}


def test_no_question_of_a_conversation_is_on_both_sides() -> None:
    greeting = [{"role": "system", "content": "kind"}, {"role": "assistant", "content": "Hello!"}]
    for opening in ([], greeting[:1], greeting):
        records = [
            {
                "messages": [
                    *opening,
                    {"role": "user", "content": f"q {i % 40}"},
                    {"role": "assistant", "content": f"{i}"},
                ]
            }
            for i in range(400)
        ]
        held = hold_out(records, 0.2)
        sides = [
            {r["messages"][-2]["content"] for r, h in zip(records, held, strict=True) if h is s} for s in (True, False)
        ]
        assert len(sides[0] | sides[1]) == 40
        assert not sides[0] & sides[1]
        assert 2 <= len(sides[0]) <= 18


def test_reference_answers_are_drawn_from_the_whole_file(module: Any, tmp_path: Path) -> None:
    records = [{"prompt": "p", "chosen": f" c {i}", "rejected": f" r {i}"} for i in range(200)]
    options = {"path": write(tmp_path / "a.jsonl", records), "val_fraction": 0, "eval_batch_size": 10}
    orders = []
    for _ in range(2):
        datamodule = prepared(PreferenceDataModule(**options), module())
        assert isinstance(datamodule, PreferenceDataModule)
        orders.append([element for batch in datamodule.reference_dataloader().batches for element in batch.tolist()])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(200))
    assert min(orders[0][:30]) < 60
    assert max(orders[0][:30]) > 140


@pytest.mark.parametrize("kind", [SFTDataModule, PreferenceDataModule, PromptDataModule])
def test_conversations_that_the_template_refuses_can_be_skipped(
    module: Any, make_tokenizer: Make, tmp_path: Path, kind: type[BaseDataModule]
) -> None:
    good, bad = [{"role": "user", "content": "q"}], [{"role": "system", "content": "kind"}]
    answers = {"completion": "a", "chosen": "b", "rejected": "c"}
    names = {SFTDataModule: ("completion",), PreferenceDataModule: ("chosen", "rejected")}.get(kind, ())
    records = [
        {"prompt": bad + good if i in (2, 3, 7) else good, **{n: f"{answers[n]} {i}" for n in names}} for i in range(9)
    ]
    options = {"path": write(tmp_path / "a.jsonl", records), "val_fraction": 0}
    own = module(make_tokenizer("bytes", "mistral"))
    with pytest.raises(UserError, match=r"line 3: the chat template refuses .*\(on_bad_record: skip drops such"):
        prepared(kind(**options), own)
    datamodule = prepared(kind(**options, on_bad_record="skip"), own)
    assert len(datamodule.datasets["train"]) == 6
    reason = "the chat template refuses the conversation: roles must alternate"
    assert datamodule.report.dropped == {reason: 3}
    assert datamodule.report.examples[reason].endswith("line 3")


def test_turns_without_loss_are_reported(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", [{"messages": turn * 2}, {"messages": turn}, {"messages": turn * 3}])
    for template, expected in (("qwen3", 3), ("chatml", None)):
        datamodule = prepared(SFTDataModule(path=path, val_fraction=0), module(make_tokenizer("bytes", template)))
        said = "assistant turns without loss: template writes them differently inside a conversation"
        assert datamodule.report.notes.get(said) == expected


def test_held_out_records_stay_held_out_when_others_come() -> None:
    records = [{"text": f"t {i}"} for i in range(500)]
    held = {r["text"] for r, is_held in zip(records, hold_out(records, 0.1), strict=True) if is_held}
    assert 25 < len(held) < 80
    more = [*({"text": f"u {i}"} for i in range(300)), *records[::-1]]
    still = {r["text"] for r, is_held in zip(more, hold_out(more, 0.1), strict=True) if is_held}
    assert held <= still
    assert held == still & {r["text"] for r in records}


@pytest.mark.parametrize(
    ("prompts", "fraction", "expected"),
    [(["a", "b"], 0.01, 1), (["a", "b"], 0.99, 1), (["a", "a"], 0.5, 0), (["a"], 0.5, 0), (["a", "b", "c"], 0.0, 0)],
)
def test_both_sides_have_records_where_that_is_possible(prompts: list[str], fraction: float, expected: int) -> None:
    assert sum(hold_out([{"prompt": prompt} for prompt in prompts], fraction)) == expected


def test_val_path_and_no_validation(module: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": f"cat {i}"} for i in range(9)])
    val = write(tmp_path / "b.jsonl", [{"text": "dog"}] * 3)
    datamodule = prepared(TextDataModule(path=train, val_path=val, packing="none"), module())
    assert len(datamodule.datasets["train"]) == 9
    assert len(datamodule.datasets["val"]) == 3
    assert datamodule.has_validation
    assert datamodule.report.notes["val"] == f"3 records of {val}"
    datamodule = prepared(TextDataModule(path=train, val_fraction=0.0), module())
    assert datamodule.val_dataloader() == []
    assert not datamodule.has_validation
    assert datamodule.report.notes["val"] == "no records are held out"


def test_splits_of_a_folder_are_used(module: Any, tmp_path: Path) -> None:
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(count)])
    datamodule = prepared(TextDataModule(path=str(tmp_path), packing="none"), module(), ("train", "val", "test"))
    assert {split: len(data) for split, data in datamodule.datasets.items()} == {"train": 5, "val": 2, "test": 3}


# ---------------------------------------------------------------------- overflow
LONG = [
    {"prompt": "list three animals . answer :", "completion": " cat , dog , bird ."},
    {"prompt": "cat", "completion": " dog"},
    {"prompt": "list three animals . answer :", "completion": " cat"},
]


def test_truncation_is_counted(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("words+bos")
    datamodule = SFTDataModule(path=write(tmp_path / "a.jsonl", LONG), max_length=8, val_fraction=0, shuffle=False)
    prepared(datamodule, module(tokenizer))
    assert datamodule.report.notes == {
        "val": "no records are held out",
        "tokens": 8 + 4 + 8,
        "tokens with loss": 4 + 2 + 2,
        "samples that end in a learnt EOS": "66.7%",
        "records truncated": 2,
        "tokens cut": 6 + 1,
        "EOS lost by truncation": 1,
    }
    (batch,) = datamodule.train_dataloader()
    assert sorted(tokenizer.decode(ids) for ids in real_ids(batch)) == [
        "<bos> . answer : cat , dog ,",  # the prompt keeps half of the room, BOS included
        "<bos> cat dog <eos>",
        "<bos> three animals . answer : cat <eos>",
    ]


def test_overflow_drop_and_error(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    tokenizer = make_tokenizer("words")
    datamodule = prepared(SFTDataModule(path=path, max_length=6, on_overflow="drop", val_fraction=0), module(tokenizer))
    assert datamodule.report.dropped == {"longer than 6 tokens": 2}
    assert len(datamodule.datasets["train"]) == 1
    with pytest.raises(UserError, match=r"^a.jsonl line 1: 13 tokens \(prompt 6, completion 7\), but at most 6 fit: "):
        prepared(SFTDataModule(path=path, max_length=6, on_overflow="error", val_fraction=0), module(tokenizer))


def test_nothing_left_is_an_error(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LONG)
    with pytest.raises(UserError, match=r"nothing is left to learn from in the train data; 3 records: no token left"):
        prepared(SFTDataModule(path=path, max_length=1, val_fraction=0), module(make_tokenizer("words")))
    short = SFTDataModule(path=path, max_length=2, on_overflow="drop", val_fraction=0)
    with pytest.raises(UserError, match=r"3 records: longer than 2 tokens \(first: a.jsonl line 1\)"):
        prepared(short, module(make_tokenizer("words")))


def test_the_model_limits_the_length_too(module: Any) -> None:
    options = {"path": "playground", "playground": {"size": 50}}
    datamodule = prepared(PromptDataModule(max_length=64, **options), module(max_tokens=6))
    assert datamodule.max_tokens_seen == 6
    assert datamodule.report.notes["longest sequence"].startswith("6 tokens, as the model takes no more")
    assert datamodule.report.notes["records truncated"] > 0
    with pytest.raises(UserError, match=r"model.max_new_tokens leaves no room"):
        prepared(PromptDataModule(**options), module(max_tokens=-3))


def test_prompts_lose_their_beginning(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("words+bos")
    path = write(tmp_path / "a.jsonl", [{"prompt": "list three animals . answer :", "extra": 5}])
    datamodule = prepared(PromptDataModule(path=path, max_length=4, batch_size=2), module(tokenizer))
    batch = next(iter(datamodule.train_dataloader()))
    assert [tokenizer.decode(ids) for ids in batch["prompt_ids"]] == ["<bos> . answer :"] * 2
    assert batch["records"][0] == {"prompt": "list three animals . answer :", "extra": 5}


@pytest.mark.parametrize(("on_overflow", "tokens"), [("split", 13), ("truncate", 8), ("drop", 3)])
def test_long_documents(module: Any, make_tokenizer: Make, tmp_path: Path, on_overflow: Any, tokens: int) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "cat " * 9}, {"text": "dog bird"}])
    datamodule = TextDataModule(path=path, max_length=5, on_overflow=on_overflow, val_fraction=0, packing="none")
    prepared(datamodule, module(make_tokenizer("words")))
    assert datamodule.report.notes["tokens"] == tokens
    assert sum(len(ids) for batch in datamodule.train_dataloader() for ids in real_ids(batch)) == tokens


# ---------------------------------------------------------------------- kinds
def test_rankings_stay_together(module: Any, tmp_path: Path) -> None:
    ranked = [{"prompt": f"p {i}", "completions": [" a", " b", " c"], "ranks": [2, 1, 2]} for i in range(4)]
    datamodule = prepared(PreferenceDataModule(path=write(tmp_path / "a.jsonl", ranked), val_fraction=0), module())
    (batch,) = datamodule.train_dataloader()
    assert batch["input_ids"].shape[0] == 12
    assert batch["pair_weight"].tolist() == [0.5] * 8
    assert batch["window_weight"] == 4


def test_aspect_selects(module: Any, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"p {i}", "chosen": " a", "rejected": " b", "aspect": "safety" if i % 2 else "helpfulness"}
        for i in range(6)
    ]
    path = write(tmp_path / "a.jsonl", pairs)
    datamodule = prepared(PreferenceDataModule(path=path, aspect="safety", val_fraction=0), module())
    assert len(datamodule.datasets["train"]) == 3
    assert datamodule.report.dropped == {"not of aspect safety": 3}
    only = write(tmp_path / "b.jsonl", [{**pair, "aspect": "helpfulness"} for pair in pairs])
    with pytest.raises(UserError, match="neither this record nor one of the other 5 is of aspect safety"):
        prepared(PreferenceDataModule(path=only, aspect="safety", val_fraction=0), module())
    playground = PreferenceDataModule(path="playground", aspect="safety", playground={"size": 20})
    prepared(playground, module())
    assert {record["aspect"] for record in playground.splits.read("train").records} == {"safety"}


@pytest.mark.parametrize(
    ("margin", "expected", "said"),
    [
        ("auto", 1.0, "significantly 1, better 0.667, slightly 0.333, negligibly 0 (data.margin: auto)"),
        ("none", 0.0, "none"),
        ("large", 3.0, "significantly 3, better 2, slightly 1, negligibly 0"),
        ({"significantly": 0.5}, 0.5, "significantly 0.5, better 0, slightly 0, negligibly 0"),
    ],
)
def test_margins(module: Any, tmp_path: Path, margin: Any, expected: float, said: str) -> None:
    pairs = [
        {"prompt": "p", "chosen": " a", "rejected": " b", "strength": "significantly"},
        {"prompt": "q", "chosen": " a", "rejected": " b", "margin": 0.75},
    ]
    path = write(tmp_path / "a.jsonl", pairs)
    datamodule = prepared(PreferenceDataModule(path=path, margin=margin, val_fraction=0, shuffle=False), module())
    (batch,) = datamodule.train_dataloader()
    assert batch["pair_margin"].tolist() == [expected, 0.75]
    assert datamodule.report.notes["margin by strength"] == said
    assert datamodule.report.notes["pairs with a margin of their own"] == 1


@pytest.mark.parametrize(("loss_on", "turns"), [("completion", 1), ("assistant", 2), ("all", None)])
def test_loss_on_of_prompt_and_completion(
    module: Any, make_tokenizer: Make, tmp_path: Path, loss_on: Any, turns: int | None
) -> None:
    chat = [{"role": role, "content": "cat"} for role in ("user", "assistant", "user")]
    record = {"prompt": chat, "completion": [{"role": "assistant", "content": "dog"}]}
    tokenizer = make_tokenizer("words")
    path = write(tmp_path / "a.jsonl", [record])
    (batch,) = prepared(SFTDataModule(path=path, loss_on=loss_on), module(tokenizer)).train_dataloader()
    learnt = int((batch["loss_weights"] > 0).sum())
    assert learnt == (2 * turns if turns is not None else batch["input_ids"].numel() - 1)
    whole = write(tmp_path / "b.jsonl", [{"messages": chat + record["completion"]}])
    (batch,) = prepared(SFTDataModule(path=whole, loss_on=loss_on), module(tokenizer)).train_dataloader()
    assert int((batch["loss_weights"] > 0).sum()) == (4 if turns is not None else learnt)


def test_says_how_a_turn_ends_where_that_is_not_eos(module: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    for name, records in (("a", [{"messages": chat}]), ("b", [{"prompt": "cat", "completion": " dog"}])):
        path = write(tmp_path / f"{name}.jsonl", records)
        for template, end in (("chatml", "<|im_end|>"), ("mistral", None)):
            datamodule = prepared(SFTDataModule(path=path), module(make_tokenizer("bytes", template)))
            said = datamodule.report.notes.get("a turn ends with")
            expected = f"{end}, which is not the tokenizer's </s>" if name == "a" and end else None
            assert said == expected


def test_weights_of_records(module: Any, tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": " b", "weight": weight} for weight in (0.5, 2.0, 0.0)]
    path = write(tmp_path / "a.jsonl", records)
    datamodule = prepared(SFTDataModule(path=path, val_fraction=0, batch_size=2), module())
    (batch,) = datamodule.train_dataloader()
    assert sorted(batch["loss_weights"].sum(1).tolist()) == [1.0, 4.0]
    assert batch["window_weight"] == 5
    assert datamodule.report.dropped == {"its weight is 0": 1}


def test_cache_gives_the_same_batches(
    module: Any, make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_align.data.cache.SMALLEST", 0)
    for kind in (TextDataModule, SFTDataModule, PreferenceDataModule, PromptDataModule):
        options = {"path": "playground", "playground": {"size": 60}, "max_length": 14}
        runs = []
        for cache_dir in (None, str(tmp_path), str(tmp_path)):
            datamodule = prepared(kind(cache_dir=cache_dir, **options), module())
            runs.append((datamodule.report.lines(), [repr(batch) for batch in datamodule.train_dataloader()]))
        assert runs[0] == runs[1] == runs[2]
    assert len(list(tmp_path.iterdir())) == 8  # training and validation data of each kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"max_length": 0}, "data.max_length is 0"),
        ({"val_fraction": 1.0}, "data.val_fraction is 1.0"),
        ({"leave_out": "6/5"}, "data.leave_out is .6/5.: give a part"),
        ({"leave_out": "half"}, "data.leave_out is .half."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTDataModule(path="file.jsonl", **options)


def test_options_of_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseDataModule, "data")
    for kind, options in (
        ("TextDataModule", ["--data.packing=wrap", "--data.on_overflow=split", "--data.playground={size: 3}"]),
        ("SFTDataModule", ["--data.loss_on=assistant", "--data.columns.prompt=question", "--data.cache_dir=null"]),
        ("PreferenceDataModule", ["--data.margin=large", "--data.ties=soft"]),
        ("PreferenceDataModule", ["--data.margin={better: 1.5}", "--data.aspect=safety"]),
        ("PromptDataModule", ["--data.batch_size=4", "--data.max_length=7"]),
    ):
        config = parser.parse_args([f"--data={kind}", "--data.path=playground", *options])
        assert type(parser.instantiate(config).data).__name__ == kind


# ---------------------------------------------------------------------- with Lightning
class Recorder(L.LightningModule):
    """Remembers what it was given; asks for the number of steps before a checkpoint is restored, as schedules do."""

    record_kind = None
    tie_models = ()
    uses_margins = True

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[Any, float]] = []

    def check_data(self, datamodule: Any) -> None:
        """All data will do."""

    def get_tokenizer(self, texts: Callable[[], Iterator[str]]) -> PreTrainedTokenizerBase:
        return self.own.get_tokenizer(texts)

    def max_tokens(self) -> int | None:
        return self.own.max_tokens()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        ids = batch["prompt_ids"] if "prompt_ids" in batch else batch["input_ids"].tolist()
        self.seen.append((ids, float(batch.get("window_weight", 0.0))))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    kind: type[BaseDataModule], own: Any, folder: Path, *, steps: int, resume: Path | None = None, **options: Any
) -> tuple[list[Any], Path]:
    datamodule = kind(path="playground", playground={"size": 45}, max_length=40, batch_size=5, **options)
    recorder = Recorder(own)
    accumulate = 1 if kind is PromptDataModule else 2
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(recorder, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    return recorder.seen, folder


@pytest.mark.parametrize("kind", [TextDataModule, SFTDataModule, PreferenceDataModule, PromptDataModule])
@pytest.mark.filterwarnings("ignore")
def test_pre_5_a_resumed_run_has_the_same_batches(module: Any, tmp_path: Path, kind: type[BaseDataModule]) -> None:
    own = module()
    whole, checkpoints = fit(kind, own, tmp_path / "whole", steps=12)
    for stop in (3, 5, 7):
        first, _ = fit(kind, own, tmp_path / f"to-{stop}", steps=stop)
        resumed, _ = fit(kind, own, tmp_path / f"from-{stop}", steps=12, resume=checkpoints / f"step={stop}.ckpt")
        assert first + resumed == whole


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_other_batches_is_refused(module: Any, tmp_path: Path) -> None:
    own = module()
    fit(SFTDataModule, own, tmp_path, steps=2)
    with pytest.raises(UserError, match="the checkpoint was made with shuffle 1, this run has 0"):
        fit(SFTDataModule, own, tmp_path, steps=4, resume=tmp_path / "step=2.ckpt", shuffle=False)


@pytest.mark.filterwarnings("ignore")
def test_validation_needs_held_out_records(module: Any, tmp_path: Path) -> None:
    datamodule = TextDataModule(path=write(tmp_path / "a.jsonl", [{"text": "cat"}, {"text": "dog"}]), val_fraction=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(UserError, match=r"a\.jsonl: no records are held out: set"):
        trainer.validate(Recorder(module()), datamodule=datamodule, verbose=False)


# ---------------------------------------------------------------------- real data
@real
@pytest.mark.parametrize(
    ("kind", "file", "options"),
    [
        (TextDataModule, "tinyshakespeare.txt.gz", {}),
        (SFTDataModule, "self_instruct_seed.jsonl.gz", {}),
        (SFTDataModule, "gsm8k_test.jsonl.gz", {"columns": {"prompt": "question", "completion": "answer"}}),
        (PreferenceDataModule, "hh_harmless.jsonl.gz", {"on_bad_record": "skip"}),
        (PromptDataModule, "gsm8k_test.jsonl.gz", {"columns": {"prompt": "question"}}),
    ],
)
def test_real_data(
    module: Any, make_tokenizer: Make, kind: type[BaseDataModule], file: str, options: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    datamodule = prepared(
        kind(path=str(SHARED / file), max_length=256, val_fraction=0.02, batch_size=64, cache_dir=None, **options),
        module(tokenizer),
    )
    batch = next(iter(datamodule.train_dataloader()))
    assert len(datamodule.val_dataloader()) > 0
    assert datamodule.max_tokens_seen <= 256
    if kind is PromptDataModule:
        assert len(batch["prompt_ids"]) == 64
        return
    assert datamodule.report.notes["tokens with loss"] > 1000
    masks = batch["completion_mask"] if "completion_mask" in batch else batch["loss_weights"] > 0
    assert masks.any(1).all()
    if kind is PreferenceDataModule:
        texts = tokenizer.batch_decode(real_ids(batch))
        assert all("<|im_start|>assistant\n" in text for text in texts if "user\n" in text)
        assert not any("Human:" in text and "<|im_start|>" not in text for text in texts)
