"""One page for the runs of a pipeline: each part is there or says what is missing, and nothing in it can run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_align.cli.main import run as command
from lightning_align.lab.measured import append_row, write_table
from lightning_align.lab.study import load_study, parts

ATTACK = "<script>alert('x')</script>"
ATTACK_SHOWN = "&lt;script&gt;alert"
CLAIMS = """
claims:
  - {name: c, hypothesis: "a <b>", source: s, measure: best_gold, a: ppo, b: dpo}
  - {name: d, hypothesis: not here, source: s, measure: best_gold, a: grpo, b: dpo}
"""
SCALING = {
    "claims": [
        {"claim": "S1", "statement": "larger is <b>better</b>", "estimate": 0.3, "ci": [0.1, 0.5], "n": 3}
        | {"verdict": "supported", "reason": "the interval lies above 0"},
        {"claim": "S2", "statement": "size does not help", "estimate": None, "ci": [None, None], "n": 0}
        | {"verdict": "undecided", "reason": "no such runs"},
    ]
}


@pytest.fixture
def study(make_run: Callable[..., Path], peaked: dict[str, list[float]], tmp_path: Path) -> Path:
    """A pipeline with two methods over two seeds, and a stage without a curve."""
    folder, states = tmp_path / "study", {}
    for stage, lift in (("ppo", 0.0), ("dpo", 0.3)):
        for seed in range(2):
            gold = [value + lift * (index > 0) for index, value in enumerate(peaked["gold"])]
            made = make_run(f"{stage}{seed}", **{**peaked, "gold": gold}, prompts=[ATTACK], completions=[ATTACK])
            name = f"{stage}/seed={seed}"
            (folder / stage).mkdir(parents=True, exist_ok=True)
            shutil.move(made, folder / name)
            states[name] = {"stage": stage, "axes": {"seed": str(seed)}, "finished": True, "seconds": 90.0}
    sft = folder / "sft"
    sft.mkdir()
    (sft / "run.json").write_text(json.dumps({"status": "finished", "durations": {"total_seconds": 110.0}}))
    (sft / "metrics.csv").write_text("step,loss\n0,2\n1,1\n")
    states["sft"] = {"finished": True, "seconds": 60.0}
    (folder / "pipeline.json").write_text(json.dumps(states))
    return folder


def test_runs_with_a_true_score_take_part(study: Path) -> None:
    loaded = load_study([study])
    assert {method: len(own) for method, own in loaded.curves.items()} == {"ppo": 2, "dpo": 2}
    assert len(loaded.cells) == 5


def test_every_part_is_there_or_says_what_is_missing(study: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CLAIMS)
    found = {part.name: part for part in parts(load_study([study]), kl=2.0, claims=tmp_path / "c.yaml")}
    assert list(found) == [
        "Frontier", "Over-optimisation", "When to stop", "Scaling", "Leaderboard", "Claims", "Runs",
    ]  # fmt: skip
    assert "run lab scaling" in found["Scaling"].headline
    assert "lab frontier --recompute" in found["Leaderboard"].headline
    assert "dpo gains most" in found["Frontier"].headline
    assert "peaks at KL" in found["Over-optimisation"].headline
    told = "0 supported, 0 contradicted, 1 undecided; 1 of 2 claims not measured by these runs"
    assert found["Claims"].headline == told
    assert found["Runs"].headline == "5 runs, 2 minutes of training"  # of the runs themselves, as in the leaderboard
    regrets, _, kept, _ = found["When to stop"].html
    assert regrets.count("<tr>") >= 3
    assert "without its own true score" in found["When to stop"].headline
    assert "Checkpoints to keep" in kept
    assert kept.count("<tr>") == 1 + 4  # the head, and the runs with a true score
    assert all(f">{method} seed={seed}<" in kept for method in ("ppo", "dpo") for seed in range(2))
    without = {part.name: part for part in parts(load_study([study]), kl=2.0, claims=None)}
    assert "no claims were given" in without["Claims"].headline


def test_scaling_laws_say_what_they_claim(study: Path) -> None:
    (study / "scaling.json").write_text(json.dumps(SCALING))
    scaling = next(part for part in parts(load_study([study]), kl=2.0, claims=None) if part.name == "Scaling")
    assert scaling.headline == "S1 supported: larger is <b>better</b>; S2 undecided: size does not help"
    assert "S1: larger is &lt;b&gt;better&lt;/b&gt;" in scaling.html[0]
    assert "S2: size does not help" in scaling.html[0]


def test_the_heading_is_the_title_that_was_given(study: Path) -> None:
    for place in (study, study / "sft"):
        assert command(["lab", "report", str(place), "--title", "A & B"]) == 0
        text = (place / "report.html").read_text()
        assert "<h1>A &amp; B</h1>" in text
        assert "<title>A &amp; B</title>" in text


def test_the_page_is_whole_offline_and_harmless(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["lab", "report", str(study)]) == 0
    text = (study / "report.html").read_text()
    assert "Over-optimisation: " in capsys.readouterr().out
    assert ATTACK not in text
    assert ATTACK_SHOWN in text
    assert "drawn during training" in text
    assert "<script" not in text  # no leaderboard, no script
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', text)
    assert set(targets) <= set(ids)
    assert command(["lab", "report", str(study)]) == 0
    assert (study / "report.html").read_text() == text


def test_the_page_of_one_run(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study / "ppo" / "seed=0"
    assert command(["lab", "report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert text.count("<polyline") == 4
    assert "peaks at KL" in text
    assert ATTACK not in text
    assert command(["lab", "report", str(study / "sft")]) == 0
    assert "<polyline" in (study / "sft" / "report.html").read_text()


def test_what_cannot_be_reported_is_refused(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty")], "has no pipeline.json: give the folder of a pipeline"),
        ([str(study), str(study / "sft")], "sft is a run: a report is of one run alone, or of folders of pipelines"),
        ([str(study), str(study)], "study is given twice"),
        ([str(study / "nope")], "there is no folder"),
        ([str(study), "--claims", "nope.yaml"], "nope.yaml"),
        ([str(study), "--kl", "0"], "--kl is 0: give a number above 0"),
    ):
        assert command(["lab", "report", *words]) == 2
        assert message in capsys.readouterr().err


def test_what_was_measured_afterwards_takes_part(study: Path) -> None:
    """Best-of-n stands beside the methods, and a win rate that gold judged is no way to do without it."""
    for name in ("ppo/seed=0", "ppo/seed=1", "dpo/seed=0", "dpo/seed=1"):
        rows = []
        for step, (kl, gold) in enumerate(((0.0, 1.0), (1.0, 1.5), (4.0, 1.2))):
            values = {"kl": kl, "proxy": float(step), "gold": gold, "win_rate": gold / 3}
            settings = {"judge": "gold", "num_samples": 2}
            metrics = {key: {"value": v, "ci": [v, v], "n": 8, "se": 0.1} for key, v in values.items()}
            row = {"step": step, "checkpoint": "c", "fingerprint": "f", "settings": settings}
            answers = [{"prompt": "p", "completion": f"measured {step}", "proxy": 0.5, "gold": 9.0}]
            rows.append({**row, "metrics": metrics, "per_prompt": {}, "answers": answers})
            append_row(study / name, rows[-1])
        write_table(study / name, rows, {})
    (study / "best_of.csv").write_text("step,kl,proxy,gold\n1,0,0,1\n2,0.19,1,1.6\n4,0.64,2,1.9\n")
    found = {part.name: part for part in parts(load_study([study]), kl=2.0, claims=None)}
    assert "best-of-n gains most" in found["Frontier"].headline
    stop = found["When to stop"]
    assert "winrate" not in stop.headline
    assert "winrate" in stop.html[0]
    assert "winrate is flattered, too" in stop.html[1]
    assert "leads within KL 2 with 1.50, not clear of" in found["Leaderboard"].headline
    assert "best-of-n is no policy" in found["Leaderboard"].html[0]
    assert (
        "the mean over 4 answers to each prompt, and the start of the other methods the mean over 2"
        in (found["Frontier"].html[0])
    )
    over = "".join(found["Over-optimisation"].html)
    assert ATTACK_SHOWN not in over  # what training drew: the answers are those that the means are of
    assert "drawn when the checkpoints were measured" in over
    assert "step 1, KL 1.0<br>mean reward 1.00, true score 1.50" in over
