"""``label export`` from the command line: files that read back and train a reward model, measures, and mistakes."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli.main import run
from lightning_align.data.readers import load_records
from lightning_align.feedback.human.store import Store
from lightning_align.feedback.human.tasks import OVERALL, Plan, Verdict, dense

NAMES = ("ann", "bob", "cat")
WORDS = ("yes .", "the cat sleeps .", "the dog and the bird eat .", "no .")


def fill(
    path: Path, *, items: int = 24, answers: int = 2, aspects: tuple[str, ...] = (OVERALL,), overlap: float = 0.5
) -> Path:
    """A store that three people have worked through: cat takes what is shown first, bob skips now and then."""
    store = Store(path, Plan(aspects=aspects, overlap=overlap, annotators_per_prompt=3))
    for number in range(items):
        texts = [f" {WORDS[place]} {number}" for place in range(answers)]
        store.add(f"list {number} animals . answer :", texts, f"line {number}")
    draw = random.Random(1)
    said = 0
    while tasks := [(name, task) for name in NAMES if (task := store.next_task(name)) is not None]:
        for name, (item, aspect) in tasks:
            shown = store.plan.shown(item.key, name, answers)
            scores = [shown.index(n) if name == "cat" else -n + draw.random() for n in range(answers)]
            ranks = dense(scores)
            strength = "better" if answers == 2 else None
            unsafe = (ranks.index(1),) if said % 9 == 4 else ()
            is_skip = name == "bob" and said % 7 == 3
            verdict = Verdict(skipped="unclear") if is_skip else Verdict(ranks, strength, unsafe)
            store.judge(f"k{said}", item, name, aspect, verdict, seconds=1.0 + said % 5)
            said += 1
    store.close()
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pairs_are_exported_with_what_was_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(here / "pairs.db")
    judged = [j for j in Store(here / "pairs.db").judgements() if j.verdict.skipped is None]
    flagged = sum(bool(j.verdict.unsafe) for j in judged)
    assert flagged
    assert run(["label", "export", "pairs.db", "--out", "pairs.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "kind preference, because every item has two answers" in said
    assert f"(--keep_unsafe keeps them): {flagged}\n" in said
    assert "skipped: unclear: " in said
    assert "note: what is shown first wins more often than chance for cat\n" in said
    loaded = load_records("pairs.jsonl", "preference")
    assert len(loaded.records) == len(judged) - flagged
    assert all(record["strength"] == "better" for record in loaded.records)
    measures = json.loads((here / "pairs.agreement.json").read_text())
    assert measures["export"]["records"] == len(loaded.records)
    assert measures["export"]["unsafe"] == flagged
    assert measures["annotators"]["cat"]["first_wins"]["value"] == 1
    assert measures["items"] == 12
    low, high = measures["nominal"]["ci"]
    assert low < measures["nominal"]["value"] < high
    assert run(["label", "export", "pairs.db", "--out", "pairs.jsonl"]) == 2
    more = ["--overwrite", "--keep_unsafe", "--annotators", "ann", "bob"]
    assert run(["label", "export", "pairs.db", "--out", "pairs.jsonl", *more]) == 0
    kept = load_records("pairs.jsonl", "preference").records
    assert len(kept) == sum(j.annotator != "cat" for j in judged)
    assert "cat" not in json.loads((here / "pairs.agreement.json").read_text())["annotators"]


def test_rankings_by_aspect_and_soft_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(here / "ranks.db", answers=3, aspects=("helpfulness", "safety"))
    assert run(["label", "export", "ranks.db", "--out", "ranks.parquet"]) == 0
    said = capsys.readouterr().out
    assert "kind ranked, because items have up to 3 answers" in said
    assert "│ safety " in said
    loaded = load_records("ranks.parquet", "ranked")
    assert {record["aspect"] for record in loaded.records} == {"helpfulness", "safety"}
    assert set(json.loads((here / "ranks.agreement.json").read_text())["aspects"]) == {"helpfulness", "safety"}
    assert run(["label", "export", "ranks.db", "--combine", "soft", "--out", "soft.jsonl"]) == 0
    soft = load_records("soft.jsonl", "preference").records
    assert {round(record["soft_label"], 3) for record in soft} >= {1.0, 0.667}
    pairs = {json.dumps([r["prompt"], r["aspect"], sorted([r["chosen"], r["rejected"]])]) for r in soft}
    assert len(pairs) == len(soft)


def test_without_overlap_it_says_that_agreement_is_unknown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(here / "alone.db", items=6, overlap=0.0)
    assert run(["label", "export", "alone.db", "--out", "alone.csv"]) == 0
    assert "note: no pair of answers was judged by two annotators" in capsys.readouterr().out
    measures = json.loads((here / "alone.agreement.json").read_text())
    assert measures["nominal"]["value"] is None
    assert measures["items"] == 0


@pytest.mark.parametrize("combine", ["each", "soft"])
def test_a_reward_model_learns_from_the_export(
    here: Path, make_model: Callable[..., str], make_tokenizer: Callable[..., Any], combine: str
) -> None:
    fill(here / "pairs.db")
    make_model(here / "tiny", tokenizer=make_tokenizer(template=None))
    assert run(["label", "export", "pairs.db", "--combine", combine, "--out", "pairs.jsonl"]) == 0
    words = [
        *("fit", "--model=RewardModule", "--model.model=tiny", "--data=PreferenceDataModule"),
        *("--data.path=pairs.jsonl", "--data.batch_size=4", "--data.val_fraction=0.2", "--data.cache_dir=null"),
        *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_progress_bar=false", "--run.wandb=disabled", "--run.name=reward"),
    ]
    assert run(words) == 0
    rows = (here / "runs/reward/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["other.db"], "there is no store of judgements at other.db"),
        (["empty.db"], "empty.db holds no judgement yet: `label human` shows the page"),
        (
            ["pairs.db", "--annotators", "an"],
            "--annotators: 'an' has judged nothing; did you mean 'ann'? (ann, bob, cat",
        ),
        (["pairs.db", "--kind", "ranked", "--combine", "soft"], "--combine soft is of pairs: give --kind preference"),
        (["pairs.db", "--kind", "ranked", "--keep_unsafe"], "--keep_unsafe is of pairs: rankings are never left out"),
        (["pairs.db", "--out", "labels.xyz"], "labels.xyz: records are written as"),
        (["pairs.db", "--out", "there.jsonl"], "there.jsonl exists: give another name, or --overwrite"),
        (["notes.txt"], "cannot use notes.txt as a store of judgements"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    fill(here / "pairs.db", items=4)
    Store(here / "empty.db", Plan()).close()
    (here / "there.jsonl").write_text("mine")
    (here / "notes.txt").write_text("no database at all, but a text\n" * 100)
    before = sorted(path.name for path in here.iterdir())
    out = [] if "--out" in words else ["--out", "out.jsonl"]
    assert run(["label", "export", *words, *out]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert sorted(path.name for path in here.iterdir() if not path.name.endswith(("-wal", "-shm"))) == before
    assert (here / "there.jsonl").read_text() == "mine"


def test_skips_alone_give_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(here / "skips.db", Plan())
    store.add("p", [" a", " b"], "here")
    store.judge("k", store.item(1), "ann", OVERALL, Verdict(skipped="unclear"))
    store.close()
    assert run(["label", "export", "skips.db", "--out", "out.jsonl"]) == 2
    said = capsys.readouterr()
    assert "skipped: unclear: 1" in said.out
    assert "no judgement gives a record of kind preference" in said.err
    assert not (here / "out.jsonl").exists()
