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
from lightning_align.lab.leaderboard import BEST_OF_N_NOTE, START, Entry, board, find_runs, headline, load_entries
from lightning_align.lab.leaderboard_page import sections
from lightning_align.lab.measured import append_row

ATTACK = "<script>alert('x')</script>"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run with measured checkpoints at KL 0, 1, 4: each with a gold, and 100 answers drawn a step."""

    def build(
        name: str,
        gold: Sequence[float],
        *,
        settings: Mapping[str, Any] | None = None,
        kls: Sequence[float | None] = (0.0, 1.0, 4.0),
        width: float = 0.1,
        spread: Sequence[float] | None = None,
        **facts: Any,
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        status = {"durations": {"total_seconds": 10.0}, "peak_memory": {"process_bytes": 2**30}, **facts}
        (run / "run.json").write_text(json.dumps({"status": "finished", **status}))
        lines = ["step,episode", *(f"{step},{100 * step}" for step in (1, 2))]
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
        for step, (kl, score) in enumerate(zip(kls, gold, strict=True)):
            metrics = {
                metric: {"value": value, "ci": [value - width, value + width], "n": 8, "se": width / 2}
                for metric, value in {"gold": score, "proxy": 2 * score, "self_bleu": 0.3}.items()
            }
            metrics["kl"] = {"value": kl, "ci": [kl, kl], "n": 8, "se": 0.0}
            by_prompt = {} if spread is None else {"gold": [score + off for off in spread]}
            answers = [{"prompt": "say <b>", "completion": f"{name} at {step}{ATTACK}", "gold": score, "proxy": 1.0}]
            row = {"step": step, "checkpoint": f"{step}.ckpt", "fingerprint": "f", "settings": dict(settings or {})}
            append_row(run, {**row, "metrics": metrics, "per_prompt": by_prompt, "answers": answers})
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


def load(runs: Sequence[Path], **budgets: float) -> list[Entry]:
    return load_entries(runs, **{"kl": math.inf, "samples": math.inf, **budgets})


def test_methods_have_one_start(make: Make, tmp_path: Path) -> None:
    one, two = (make(name, [0, 0, 0], settings={"start": f"runs/{name}_sft"}) for name in ("one", "two"))
    wanted = "one and two did not begin from the same starts: runs/one_sft and runs/two_sft; compare runs of the same"
    with pytest.raises(UserError, match=wanted):
        load([one, two])
    for seed in (0, 1):  # each seed has its own
        for method in ("ppo", "dpo"):
            make(f"{seed}/{method}", [0.2 + seed, 0, 0], settings={"start": f"runs/{seed}/sft"})
    places = [tmp_path / str(seed) / method for seed in (0, 1) for method in ("ppo", "dpo")]
    assert [entry.values["gold"].value for entry in load(places) if entry.method == START] == [0.2, 1.2]
    assert board(load(places))[START]["gold"].value == pytest.approx(0.7)
    moved = make("moved", [0.4, 0, 0], kls=(0.3, 1.0, 4.0))  # its first checkpoint is no start: it has moved already
    entries = load([moved, make("whole", [0.5, 0, 0])])
    assert [entry.run.name for entry in entries if entry.method == START] == ["whole"]


def test_a_budget_of_samples_needs_their_number(make: Make) -> None:
    unknown = make("unknown", [0.5, 0.9, 0.1])
    (unknown / "metrics.csv").write_text("step,loss\n1,0\n")
    assert [entry.step for entry in load([unknown]) if entry.method != START] == [2]
    with pytest.raises(UserError, match="unknown does not say how many answers it had drawn by step 1: leave out"):
        load([unknown], samples=150)
    given = make("dpo", [0.5, 0.9, 0.1], data={"kind": "preference"})  # learns from answers that are given
    (given / "metrics.csv").write_text("step,loss\n1,0\n")
    entry = load([given], samples=150)[-1]
    assert (entry.step, entry.values["samples"].value) == (2, 0)


def test_a_kl_that_is_none_and_what_is_no_run_are_one_line(make: Make, tmp_path: Path) -> None:
    broken = make("broken", [0.5, 0.9, 0.1])
    table = (broken / "measured.jsonl").read_text().replace('"kl": {"value": 4.0', '"kl": {"value": null')
    (broken / "measured.jsonl").write_text(table)
    with pytest.raises(UserError, match=r"measured.jsonl has no KL of step 2: measure the run again"):
        load([broken])
    (tmp_path / "log.csv").write_text("step,kl,gold\n0,0,0\n")
    with pytest.raises(UserError, match=r"log.csv is no run directory: .* lab frontier CSVs too"):
        load(find_runs([tmp_path / "log.csv"]))


def test_of_two_checkpoints_with_the_largest_kl_the_earlier_counts(make: Make) -> None:
    entry = load([make("ppo", [0.5, 0.9, 0.1], kls=(0.0, 1.0, 1.0))])[-1]
    assert (entry.step, entry.values["gold"].value) == (1, 0.9)


def test_a_lead_is_clear_of_the_next_interval_not_of_its_middle(make: Make) -> None:
    near, wide = make("near", [0.2, 0.2, 0.9]), make("wide", [0.2, 0.2, 0.7], width=0.15)
    assert "near leads with 0.90, not clear of wide (0.70)" in headline(board(load([near, wide])), math.inf)


def test_nobody_leads_where_all_are_at_their_start(make: Make) -> None:
    runs = [make("ppo", [0.5, 0.9, 0.1]), make("dpo", [0.5, 0.6, 0.7])]
    rows = board(load(runs, kl=0.5))
    assert headline(rows, 0.5) == "No method leads: none has a checkpoint beyond its start within KL 0.5"
    assert headline(board(load(runs, samples=50)), math.inf).endswith("beyond its start within the budget")
    entries = load([*runs, make("slow", [0.5, 0.6, 0.1], kls=(0.0, 3.0, 4.0))], kl=1.0)
    assert (
        headline(board(entries), 1.0)
        == "ppo leads within KL 1 with 0.90, clear of dpo (0.60); at the start still: slow"
    )
    assert "<strong>" not in sections(rows, load(runs, kl=0.5), "")[1]  # nor is any of them best


def test_two_seeds_have_the_interval_of_their_prompts_as_in_the_frontier(make: Make, tmp_path: Path) -> None:
    spread = np.linspace(-0.4, 0.4, 8).tolist()
    runs = [make(f"s{seed}/ppo", [0.2, 0.2, gold], spread=spread) for seed, gold in enumerate((0.7, 0.9))]
    gold = board(load(runs))["ppo"]["gold"]
    over = student(0.8 + np.array(spread))
    assert (gold.value, gold.low, gold.high, gold.n) == pytest.approx((0.8, over.low, over.high, 2))
    bare = [make(f"t{seed}/ppo", [0.2, 0.2, gold]) for seed, gold in enumerate((0.7, 0.9))]
    assert board(load(bare))["ppo"]["gold"].se == pytest.approx(0.05 / math.sqrt(2))  # prompt by prompt not known


def test_the_command_writes_all_of_it(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make("ppo", [0.5, 0.9, 0.1])), str(make("dpo", [0.5, 0.6, 0.7]))]
    out = tmp_path / "out"
    assert command(["lab", "leaderboard", *runs, "--kl", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ppo leads within KL 2 with 0.90, clear of dpo (0.60)\n")
    assert "  ppo: true score 0.90, KL 1.00, 100 samples\n" in said
    assert f"  {BEST_OF_N_NOTE}\n" in said
    content = json.loads((out / "leaderboard.json").read_text())
    assert list(content["methods"]) == ["ppo", "dpo", "start"]
    assert content["methods"]["ppo"]["gold"] == {"value": 0.9, "ci": [0.8, 1.0], "n": 8, "se": 0.05}
    with (out / "leaderboard.csv").open() as file:
        assert [(row["method"], row["gold"]) for row in csv.DictReader(file)] == [
            ("start", "0.5"), ("ppo", "0.9"), ("dpo", "0.6"),
        ]  # fmt: skip
    page = (out / "leaderboard.html").read_text()
    assert ATTACK not in page
    assert BEST_OF_N_NOTE in page
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert all(f"{name} at 1&lt;script&gt;" in page for name in ("ppo", "dpo"))
    assert page.count('class="pick"') == 3
    assert (out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
