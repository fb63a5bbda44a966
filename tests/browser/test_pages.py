"""The lab's pages in a real browser: offline, on a phone; they sort, show and hide, and run nobody else's script."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_align.cli.main import run as command
from lightning_align.lab.charts import sections
from lightning_align.lab.measured import append_row
from lightning_align.lab.page import page

ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def fits(tab: Any) -> bool:
    """Whether nothing sticks out to the right of the window."""
    return bool(tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.fixture
def leaderboard(tmp_path: Path) -> Path:
    runs = []
    for name, gold in (("ppo", 0.9), ("dpo", 1.1), ("rest", 1.0)):
        run = tmp_path / name
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"status": "finished", "durations": {"total_seconds": 60 * gold}}))
        (run / "metrics.csv").write_text("step,episode\n1,100\n")
        for step in range(2):
            values = {"kl": float(step), "gold": gold * step, "proxy": 2.0, "length": 20 - 5 * gold * step}
            metrics = {key: {"value": v, "ci": [v - 0.1, v + 0.1], "n": 8, "se": 0.05} for key, v in values.items()}
            answers = [
                {"prompt": f"prompt {i}{ATTACK}", "completion": f"{name} {i}{ATTACK}", "gold": 1.0} for i in range(2)
            ]
            row = {"step": step, "checkpoint": "c", "fingerprint": "f", "settings": {}, "per_prompt": {}}
            append_row(run, {**row, "metrics": metrics, "answers": answers})
        runs.append(str(run))
    assert command(["lab", "leaderboard", *runs, "--out", str(tmp_path)]) == 0
    return tmp_path / "leaderboard.html"


def methods(tab: Any) -> Sequence[str]:
    found: Sequence[str] = tab.locator("#leaderboard tbody tr td:first-child").all_inner_texts()
    return found


def test_the_leaderboard_sorts_and_shows_what_is_ticked(tab: Any, leaderboard: Path) -> None:
    tab.goto(leaderboard.as_uri())
    assert methods(tab) == ["dpo", "rest", "ppo", "start"]
    assert fits(tab)
    head = tab.get_by_role("button", name="tokens")
    head.click()
    assert methods(tab) == ["start", "ppo", "rest", "dpo"]
    head.click()
    assert methods(tab) == ["dpo", "rest", "ppo", "start"]
    head.click()
    tab.get_by_role("button", name="seconds").click()
    assert methods(tab) == ["dpo", "rest", "ppo", "start"]  # the start cost nothing that is known: last
    assert tab.locator(".card:visible").count() == 8  # four methods, two prompts
    tab.get_by_label("rest").uncheck()
    assert tab.locator(".card:visible").count() == 6
    assert tab.get_by_text("rest 0<img").first.is_hidden()
    assert tab.locator("img").count() == 0  # answers are text


def test_charts_of_a_run(tab: Any, tmp_path: Path, make_metrics: Callable[[Path], None]) -> None:
    make_metrics(tmp_path)
    (tmp_path / "run.html").write_text(page("run", sections(tmp_path)))
    tab.goto((tmp_path / "run.html").as_uri())
    assert tab.locator("figure.chart").count() == 2
    assert fits(tab)
    box = tab.locator("figure.chart polyline").first.bounding_box()
    assert box["width"] > 100
    tab.get_by_role("heading", name="loss").click()
    assert tab.locator("figure.chart:visible").count() == 1


@pytest.fixture
def make_metrics() -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / "metrics.csv").write_text("step,loss/a,eval/b\n0,1,2\n1,2,1\n2,3,0.5\n")

    return make


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Of a pipeline with two methods, whose samples try to be markup."""
    states = {}
    for stage, lift in (("ppo", 0.0), ("dpo", 0.2)):
        run = tmp_path / stage / "seed=0"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"status": "finished"}))
        lines, samples = ["step,eval/lab/kl,eval/lab/proxy,eval/lab/gold"], []
        for step in range(12):
            d = step / 3
            gold = 1 + d * (0.6 + lift - 0.35 * math.log(d)) if d else 1.0
            lines.append(f"{step},{d * d},{d},{gold + 0.02 * (-1) ** step}")
            samples.append(json.dumps({"step": step, "prompt": ATTACK, "completion": f"{stage} {step}{ATTACK}"}))
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
        (run / "samples.jsonl").write_text("\n".join(samples) + "\n")
        states[f"{stage}/seed=0"] = {"stage": stage, "axes": {"seed": "0"}, "finished": True, "seconds": 60.0}
    (tmp_path / "pipeline.json").write_text(json.dumps(states))
    (tmp_path / "claims.yaml").write_text(
        "claims: [{name: c, hypothesis: DPO beats PPO, source: s, measure: best_gold, a: dpo, b: ppo}]"
    )
    assert command(["lab", "report", str(tmp_path), "--claims", str(tmp_path / "claims.yaml")]) == 0
    return tmp_path / "report.html"


def test_the_report_of_a_pipeline(tab: Any, report: Path) -> None:
    tab.goto(report.as_uri())
    assert fits(tab)
    assert tab.locator("ul.found li").count() == 7
    tab.get_by_role("link", name="Claims").click()
    assert tab.get_by_text("DPO beats PPO").is_visible()
    assert tab.get_by_role("cell", name="undecided").is_visible()
    pictures = tab.locator("svg.wide:visible, svg.narrow:visible")
    assert pictures.count() >= 2
    assert all(pictures.nth(i).bounding_box()["height"] > 100 for i in range(pictures.count()))
    assert tab.locator("img").count() == 0  # answers are text
    captions = tab.locator("caption:visible")
    boxes = [captions.nth(i).bounding_box() for i in range(captions.count())]
    assert len(boxes) >= 4
    assert all(box["x"] + box["width"] <= tab.viewport_size["width"] for box in boxes)  # of tables that scroll, too
    # a label that the browser's letters push over the edge of a picture is seen all the same
    assert tab.locator("figure svg").first.evaluate("svg => getComputedStyle(svg).overflow") == "visible"
    opened = tab.locator("details[open] .card:visible").count()
    assert opened >= 3
    tab.locator("summary", has_text="dpo:").click()
    assert tab.locator("details[open] .card:visible").count() > opened
