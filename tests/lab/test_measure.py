"""Rows of measured checkpoints: what survives a crash, the table, which runs are compared, what curves read."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_align.errors import UserError
from lightning_align.lab.frontier import best, gain, load_tracks, roots, samples
from lightning_align.lab.measured import (
    append_row,
    check_alike,
    drop_damaged,
    fingerprint,
    prompts_hash,
    read_measured,
    remove,
    table,
    write_table,
)
from lightning_align.lab.runs import load_curve, read_episodes


def row(step: int, kl: float, gold: float, **more: Any) -> dict[str, Any]:
    """As the command writes it, of two prompts."""
    metrics = {
        name: {"value": value, "ci": [value - 0.1, value + 0.1], "n": 2, "se": 0.05}
        for name, value in {"length": 4.0, "gold": gold, "kl": kl}.items()
    }
    head = {
        "step": step,
        "checkpoint": f"checkpoints/step={step:05d}.ckpt",
        "fingerprint": "f",
        "settings": {"seed": 0},
    }
    return {**head, "metrics": metrics, "per_prompt": {"gold": [gold - 1, gold + 1]}, "answers": [], **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a log of eight answers a step, and three measured checkpoints."""
    folder = tmp_path / "ppo"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,episode,lab/kl,lab/proxy\n1,8,0.5,1\n2,16,0.7,2\n3,24,0.9,3\n")
    for step, kl, gold in ((0, 0.0, 0.5), (1, 1.0, 0.9), (3, 4.0, 0.7)):
        append_row(folder, row(step, kl, gold))
    return folder


def test_a_last_row_that_was_cut_off_is_not_one_and_goes(run: Path) -> None:
    path = run / "measured.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (last[:-1], last[:20], b"\x00" * 30, b'{"step": 4}\n', b"\xff\xfe\n"):
        path.write_bytes(whole + cut)
        assert [found["step"] for found in read_measured(run)] == [0, 1, 3]
        drop_damaged(run)
        assert path.read_bytes() == whole
    drop_damaged(run)
    assert path.read_bytes() == whole


def test_of_a_step_that_was_measured_twice_the_last_row_counts(run: Path) -> None:
    append_row(run, row(1, 1.0, 0.4))
    append_row(run, row(0, 0.0, 0.6))
    assert [(found["step"], found["metrics"]["gold"]["value"]) for found in read_measured(run)] == [
        (0, 0.6),
        (1, 0.4),
        (3, 0.7),
    ]


def test_a_damaged_row_in_the_middle_is_named(run: Path) -> None:
    path = run / "measured.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{]\n" + lines[2])
    with pytest.raises(UserError, match=r"measured\.jsonl line 2 is damaged"):
        read_measured(run)


def test_rows_are_strict_json_with_null_for_what_is_no_number(run: Path) -> None:
    append_row(run, row(5, 1.0, math.nan))
    text = (run / "measured.jsonl").read_text().splitlines()[-1]
    assert "NaN" not in text
    assert json.loads(text)["metrics"]["gold"]["value"] is None
    assert [point.step for point in load_tracks([_written(run)])[0].points] == [0, 1, 3]


def _written(run: Path) -> Path:
    write_table(run, read_measured(run), read_episodes(run))
    return run


def test_the_table_is_by_step_with_errors_and_samples(run: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(table(read_measured(run)[::-1], read_episodes(run)))))
    assert list(rows[0])[:6] == ["step", "episode", "kl", "kl_se", "gold", "gold_se"]
    assert [(line["step"], line["episode"], line["kl"], line["gold"]) for line in rows] == [
        ("0", "0.0", "0.0", "0.5"),
        ("1", "8.0", "1.0", "0.9"),
        ("3", "24.0", "4.0", "0.7"),
    ]
    assert table(read_measured(run), {}).splitlines()[1].startswith("0,,0.0,0.05,0.5,")


def test_curves_read_what_was_measured_unless_told_otherwise(run: Path) -> None:
    assert load_curve(run).source == "train"
    with pytest.raises(UserError, match=r"has no measured\.csv: lab frontier .* --recompute makes it"):
        load_curve(run, source="measured")
    _written(run)
    curve = load_curve(run)
    assert (curve.source, [point.gold for point in curve.points]) == ("measured", [0.5, 0.9, 0.7])
    assert load_curve(run, source="train").points[0].kl == 0.5
    (track,) = load_tracks([run])
    assert list(track.samples) == [0, 8, 24]
    assert track.at(samples, 16) == pytest.approx(0.8)
    remove(run)
    assert load_curve(run).source == "train"


def test_a_gain_is_over_pairs_of_a_prompt_where_they_are_known(run: Path) -> None:
    """Every prompt gains the same here: the gain is certain, however different the prompts are."""
    (track,) = load_tracks([_written(run)])
    estimate = gain([track], roots, 1.5)
    assert estimate.value == pytest.approx(0.8 - 0.5)
    assert estimate.se == pytest.approx(0, abs=1e-12)
    remove(run)
    for step, kl, values in ((0, 0.0, [0.0, 1.0]), (1, 1.0, [1.0, 1.5]), (2, 4.0, [3.0, None])):
        known = [value for value in values if value is not None]
        append_row(run, row(step, kl, sum(known) / len(known), per_prompt={"gold": values}))
    (track,) = load_tracks([_written(run)])
    estimate = gain([track], roots, 1.0)
    assert estimate.value == pytest.approx(0.75)
    assert estimate.se == pytest.approx(0.25)  # gains 1 and 0.5: deviation 0.354, of two
    assert best([track])["gain"]["se"] != best([track])["gain"]["se"]  # one pair at the best: no error is known


def test_runs_that_were_not_measured_alike_are_refused() -> None:
    settings = {"prompts_hash": "a", "prompts": 4, "data": "playground", "split": "val", "seed": 0, "num_samples": 2}
    check_alike({"one": settings, "two": {**settings, "start": "elsewhere", "proxy": "another"}})
    check_alike({})
    for name, value, told in (
        ("prompts_hash", "b", r"one and two were measured with different prompts \(4 of playground, val; 4 of"),
        ("num_samples", 4, "different --num_samples: 2 and 4"),
        ("heldout", ["x"], r'different --heldout: none and \["x"\]'),
    ):
        with pytest.raises(UserError, match=told):
            check_alike({"one": settings, "two": {**settings, name: value}})
    with pytest.raises(UserError, match="would be measured with different --seed: 0 and 1; say which"):
        check_alike({"one": settings, "two": {**settings, "seed": 1}}, planned=True)


def test_measured_runs_and_others_are_not_mixed(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "rest"
    other.mkdir()
    (other / "metrics.csv").write_text("step,kl,proxy,gold\n0,0,0,1\n1,1,1,2\n")
    _written(run)
    with pytest.raises(UserError, match=r"ppo was measured afterwards and .*rest was not: give --recompute"):
        load_tracks([run, other])


def test_hashes_follow_the_content() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert prompts_hash([{"prompt": "x"}, {"prompt": "y"}]) != prompts_hash([{"prompt": "y"}, {"prompt": "x"}])
