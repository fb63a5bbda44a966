"""The leaderboard: which checkpoint counts, what is averaged, what is refused, and that the page holds it all."""

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_align.cli.main import run as command
from lightning_align.errors import UserError
from lightning_align.lab.evaluation.intervals import student
from lightning_align.lab.leaderboard import START, board, find_runs, load_entries
from lightning_align.lab.measured import append_row

ATTACK = "<script>alert('x')</script>"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run with measured checkpoints at KL 0, 1, 4: each with a gold, and 100 answers drawn a step."""

    def build(
        name: str, gold: Sequence[float], *, settings: Mapping[str, Any] | None = None, seconds: float = 10
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        status = {"durations": {"total_seconds": 10.0}, "peak_memory": {"process_bytes": 2**30}}
        (run / "run.json").write_text(json.dumps({"status": "finished", **status}))
        lines = ["step,episode", *(f"{step},{100 * step}" for step in (1, 2))]
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
        for step, (kl, score) in enumerate(zip((0.0, 1.0, 4.0), gold, strict=True)):
            metrics = {
                metric: {"value": value, "ci": [value - 0.1, value + 0.1], "n": 8, "se": 0.05}
                for metric, value in {"kl": kl, "gold": score, "proxy": 2 * score, "self_bleu": 0.3}.items()
            }
            answers = [{"prompt": "say <b>", "completion": f"{name} at {step}{ATTACK}", "gold": score, "proxy": 1.0}]
            row = {"step": step, "checkpoint": f"{step}.ckpt", "fingerprint": "f", "settings": dict(settings or {})}
            append_row(run, {**row, "metrics": metrics, "per_prompt": {}, "answers": answers})
        return run

    return build


def test_the_farthest_checkpoint_within_both_budgets_counts(make: Make) -> None:
    runs = [make("ppo", [0.5, 0.9, 0.1]), make("dpo", [0.5, 0.6, 0.7])]
    for kl, samples, step in ((math.inf, math.inf, 2), (3.9, math.inf, 1), (4.0, 150, 1), (0.5, math.inf, 0)):
        entries = [entry for entry in load_entries(runs, kl=kl, samples=samples) if entry.method != START]
        assert [entry.step for entry in entries] == [step, step]
    entry = next(e for e in load_entries(runs, kl=3, samples=math.inf) if e.method == "ppo")
    assert (entry.values["gold"].value, entry.values["samples"].value) == (0.9, 100)
    assert (entry.values["seconds"].value, entry.values["memory"].value) == (10, 1024)
    with pytest.raises(UserError, match=re.escape("no checkpoint within KL -1 and inf samples")):
        load_entries(runs, kl=-1, samples=math.inf)


def test_methods_are_means_over_their_seeds_and_stand_by_true_score(make: Make, tmp_path: Path) -> None:
    states = {}
    for seed, gold in enumerate((0.5, 0.7, 0.9)):
        for stage, extra in (("ppo", 0.0), ("dpo", 0.3)):
            name = f"{stage}/seed={seed}"
            make(name, [0.2, 0.2, gold + extra])
            states[name] = {"stage": stage, "axes": {"seed": str(seed)}, "finished": True, "seconds": 1}
    make("sft", [0, 0, 0])
    (tmp_path / "sft" / "measured.jsonl").unlink()  # a stage that nobody measured takes no part
    states["sft"] = {"finished": True}
    (tmp_path / "pipeline.json").write_text(json.dumps(states))
    entries = load_entries(find_runs([tmp_path]), kl=math.inf, samples=math.inf)
    rows = board(entries)
    assert list(rows) == ["dpo", "ppo", START]
    wanted = student(np.array([0.5, 0.7, 0.9]))
    assert rows["ppo"]["gold"].value == pytest.approx(0.7)
    assert (rows["ppo"]["gold"].low, rows["ppo"]["gold"].n) == (pytest.approx(wanted.low), 3)
    assert rows[START]["gold"].value == 0.2
    assert (rows[START]["gold"].low, rows[START]["gold"].high) == pytest.approx((0.1, 0.3))  # over prompts
    assert "samples" not in rows[START]


def test_what_cannot_be_compared_is_refused(make: Make, tmp_path: Path) -> None:
    one = make("one", [0, 0, 0], settings={"prompts_hash": "a", "prompts": 8, "data": "x", "split": "val"})
    two = make("two", [0, 0, 0], settings={"prompts_hash": "b", "prompts": 9, "data": "x", "split": "val"})
    with pytest.raises(UserError, match="were measured with different prompts"):
        load_entries([one, two], kl=math.inf, samples=math.inf)
    (two / "measured.jsonl").unlink()
    with pytest.raises(UserError, match="two has no measured checkpoints: run lab frontier --recompute"):
        load_entries([one, two], kl=math.inf, samples=math.inf)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pipeline.json").write_text("{}")
    with pytest.raises(UserError, match="no stage has finished"):
        find_runs([tmp_path / "p"])


def test_the_command_writes_all_of_it(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make("ppo", [0.5, 0.9, 0.1])), str(make("dpo", [0.5, 0.6, 0.7]))]
    out = tmp_path / "out"
    assert command(["lab", "leaderboard", *runs, "--kl", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("ppo leads within KL 2 with 0.90, clear of dpo (0.60)\n")
    content = json.loads((out / "leaderboard.json").read_text())
    assert list(content["methods"]) == ["ppo", "dpo", "start"]
    assert content["methods"]["ppo"]["gold"] == {"value": 0.9, "ci": [0.8, 1.0], "n": 8, "se": 0.05}
    with (out / "leaderboard.csv").open() as file:
        assert [(row["method"], row["gold"]) for row in csv.DictReader(file)] == [
            ("start", "0.5"), ("ppo", "0.9"), ("dpo", "0.6"),
        ]  # fmt: skip
    page = (out / "leaderboard.html").read_text()
    assert ATTACK not in page
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert all(f"{name} at 1&lt;script&gt;" in page for name in ("ppo", "dpo"))
    assert page.count('class="pick"') == 3
    assert (out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
