"""``lab select`` as a user runs it: what it prints, writes, exports and refuses."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lightning_align.cli.main import run
from lightning_align.lab.heldout import overlap
from lightning_align.lab.measured import fingerprint
from lightning_align.lab.runs import load_curve

STEPS = range(0, 20, 2)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A CSV with these rows; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def rows(shift: float = 0.0, **scores: Any) -> list[dict[str, Any]]:
    """Gold by the law, with a peak near KL 7 and a noise that a seed shifts."""
    found = []
    for step in STEPS:
        d = 0.25 * step
        law = d * (0.8 - 0.4 * math.log(d)) if d else 0.0
        gold = law + 0.01 * math.sin(7 * step + shift)
        found.append({"step": step, "kl": d * d, "proxy": math.tanh(d), "gold": gold, "gold_se": 0.03})
        found[-1] |= {name: score(step, gold) for name, score in scores.items()}
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_directory(path: Path, content: Sequence[dict[str, Any]], reward: Any = None) -> Path:
    """A run as ``fit`` leaves it, with files for checkpoints that nobody opens."""
    write_csv(path / "metrics.csv", content)
    (path / "checkpoints").mkdir()
    for step in (4, 10, 16):
        (path / "checkpoints" / f"step={step:05d}-kl={(0.25 * step) ** 2:.3f}.ckpt").touch()
    (path / "run.json").write_text('{"status": "finished", "seed": 0}')
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"reward": reward}}}))
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(["lab", "select", *argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------ one run
def test_gold_of_a_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_csv(Path("a/a.csv"), rows())
    assert run(["lab", "select", name]) == 0
    out = capsys.readouterr().out
    content = json.loads(Path("a/selection.json").read_text())
    (chosen,) = content["runs"]
    assert chosen["policy"] == "gold"
    golds = {row["step"]: row["gold"] for row in rows()}
    best = max(golds.values())
    assert chosen["step"] == min(step for step, gold in golds.items() if gold >= best - 0.03)
    assert chosen["checkpoint"] is None
    assert f"a/a.csv: keep step {chosen['step']} (KL " in out
    assert "within one standard error (0.03)" in out
    assert "gold     " in out
    assert ", flattered: chosen by the same scores" in out
    assert f"  last     {best - golds[18]:.3f}\n" in out
    assert content["regret"]["last"]["value"] == pytest.approx(best - golds[18])
    assert [path.name for path in Path("a").iterdir()] == ["a.csv", "selection.json"] or not Path("regret.png").exists()


def test_auto_goes_down_the_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = write_fit(Path("overopt.json"))
    ladder = [
        ({"heldout": lambda step, gold: -abs(step - 6)}, [], "heldout", 6),
        ({"win_rate": lambda step, gold: 0.5 + 0.01 * min(step, 8)}, [], "winrate", 8),
        ({}, ["--fit", fit], "peak", 10),
        ({}, [], "knee", None),
    ]
    for index, (scores, words, policy, step) in enumerate(ladder):
        content = [{k: v for k, v in row.items() if not k.startswith("gold")} for row in rows(**scores)]
        name = write_csv(Path(f"{index}/r.csv"), content)
        assert run(["lab", "select", name, *words]) == 0
        (chosen,) = json.loads(Path(f"{index}/selection.json").read_text())["runs"]
        assert chosen["policy"] == policy
        assert step is None or chosen["step"] == step
        out = capsys.readouterr().out
        assert "regret" not in out  # without gold nobody knows it
        assert ("A weak hint" in out) == (policy == "knee")


def test_without_a_knee_the_next_rule_is_taken_or_what_is_missing_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [{"step": step, "kl": (0.25 * step) ** 2, "proxy": 0.8 * 0.25 * step} for step in STEPS]
    name = write_csv(Path("r.csv"), content)
    assert "r.csv: no knee: the proxy gains no more for its KL at first than later; give a score" in refused(
        capsys, name
    )
    assert "r.csv: no knee" in refused(capsys, name, "--policy", "knee", "--budget", "3")
    assert not Path("selection.json").exists()
    assert run(["lab", "select", name, "--budget", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "r.csv: no knee: the proxy gains no more for its KL at first than later"
    assert out[1] == "r.csv: keep step 6 (KL 2.25), by budget"
    empty = refused(capsys, write_csv(Path("s.csv"), content[2:]), "--budget", "0.5")
    assert "no checkpoint has a KL of 0.5 or less" in empty


def write_fit(path: Path, d: float | None = 2.45) -> str:
    interval = None if d is None else [d - 0.2, d + 0.2]
    content = {"run": "before", "d_peak": d, "R_peak": 0.9, "intervals": {"d_peak": interval, "R_peak": [0.8, None]}}
    path.write_text(json.dumps(content))
    return str(path)


def test_budget_holds_for_the_file_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 14 is nearer to step 16, which lies beyond the budget."""
    run_directory(Path("r"), rows())
    kl = (0.25 * 14) ** 2
    assert run(["lab", "select", "r", "--policy", "budget", "--budget", str(kl)]) == 0
    (chosen,) = json.loads(Path("r/selection.json").read_text())["runs"]
    assert (chosen["step"], chosen["checkpoint_step"]) == (14, 10)
    assert "(the nearest that was kept, of step 10)" in capsys.readouterr().out


def test_own_columns_and_another_folder(folder: Path) -> None:
    content = [{"iteration": r["step"], "k": r["kl"], "r": r["proxy"], "judge": r["gold"]} for r in rows()]
    name = write_csv(Path("r.csv"), content)
    assert run(["lab", "select", name, "--columns", "kl=k", "proxy=r", "win_rate=judge", "--out", "there"]) == 0
    (chosen,) = json.loads(Path("there/selection.json").read_text())["runs"]
    assert (chosen["policy"], chosen["step"]) == ("winrate", max(rows(), key=lambda r: r["gold"])["step"])
    assert not Path("selection.json").exists()


def test_lower_bounds_and_length_controlled_rates_go_first(folder: Path) -> None:
    scores = {
        "heldout": lambda step, gold: float(step),
        "heldout_lower": lambda step, gold: -abs(step - 4.0),
        "win_rate": lambda step, gold: step / 100,
        "length_controlled_win_rate": lambda step, gold: 1 - abs(step - 8) / 100,
    }
    name = write_csv(Path("r.csv"), rows(**scores))
    for policy, step in (("heldout", 4), ("winrate", 8)):
        assert run(["lab", "select", name, "--policy", policy]) == 0
        (chosen,) = json.loads(Path("selection.json").read_text())["runs"]
        assert chosen["step"] == step
        assert {
            "heldout": "the best lower bound of the held-out rewards",
            "winrate": "best length-controlled win rate",
        }[policy] in chosen["reason"]
    assert "Its length-controlled win rate against the start is 100%." in chosen["reason"]
    assert run(["lab", "select", name, "--policy", "winrate", "--columns", "win_rate=win_rate"]) == 0
    assert "Its win rate against the start is 18%." in Path("selection.json").read_text()


def test_the_fairer_win_rate_comes_with_its_own_error(folder: Path) -> None:
    scores = {
        "win_rate": lambda step, gold: step / 100,
        "win_rate_se": lambda step, gold: 1.0,
        "length_controlled_win_rate": lambda step, gold: 1 - abs(step - 8) / 100,
        "length_controlled_win_rate_se": lambda step, gold: 0.021,
    }
    name = write_csv(Path("r.csv"), rows(**scores))
    for words, step in (([], 6), (["--columns", "win_rate=win_rate"], 18)):
        assert run(["lab", "select", name, "--policy", "winrate", *words]) == 0
        assert json.loads(Path("selection.json").read_text())["runs"][0]["step"] == step


def test_what_was_left_out_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rows()
    content[2]["kl"], content[3]["kl"], content[4]["gold"], content[5]["gold"] = math.nan, math.inf, "", math.nan
    content[6] |= {"proxy": "", "gold": ""}
    name = write_csv(Path("r.csv"), content)
    line = "  steps left out, for want of a KL or of a score that is a number: 3; steps without a true score: 2 of 7\n"
    for command in ("select", "overopt"):
        assert run(["lab", command, name]) == 0
        assert line in capsys.readouterr().out
    whole = write_csv(Path("whole.csv"), rows())
    assert run(["lab", "overopt", name, whole]) == 0
    out = capsys.readouterr().out
    assert "  r.csv: steps left out" in out
    assert "whole.csv: steps" not in out
    for command in ("select", "overopt"):
        assert run(["lab", command, whole]) == 0
        assert "steps left out" not in capsys.readouterr().out


@pytest.mark.parametrize("kl", [1e12, 1e30, 1e300])
def test_one_huge_kl_is_no_crash(folder: Path, kl: float) -> None:
    content = rows()
    content[-1]["kl"] = kl
    name = write_csv(Path("r.csv"), content)
    for command in ("select", "overopt"):
        assert run(["lab", command, name]) == 0
    assert json.loads(Path("overopt.json").read_text())["extrapolation"] == []


def test_a_huge_kl_among_several_runs_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rows()
    content[-1]["kl"] = 1e30
    names = [write_csv(Path(f"{i}.csv"), each) for i, each in enumerate((content, rows()))]
    assert run(["lab", "overopt", *names]) == 2
    error = capsys.readouterr().err
    assert "no law fits the runs together (too few distances" in error
    assert "is their largest KL, 1e+30, right?" in error


def test_scores_that_are_not_numbers_and_kl_that_goes_back(folder: Path) -> None:
    content = rows()[::-1]
    best = max(content, key=lambda r: r["gold"])
    best["gold"] = math.nan
    content[0]["kl"] = math.nan
    name = write_csv(Path("r.csv"), content)
    assert run(["lab", "select", name]) == 0
    step = json.loads(Path("selection.json").read_text())["runs"][0]["step"]
    assert step not in (best["step"], content[0]["step"])
    one = write_csv(Path("one.csv"), [{"step": 3, "kl": 1.0, "gold": 0.5}])
    assert run(["lab", "select", one]) == 0
    assert json.loads(Path("selection.json").read_text())["runs"][0]["gold"] == {
        "value": 0.5,
        "ci": [None, None],
        "gain": False,
    }


# ------------------------------------------------------------------ several runs
def test_regret_over_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = {"heldout": lambda step, gold: gold + 0.05 * math.sin(3.0 * step)}
    names = [write_csv(Path(f"{seed}.csv"), rows(float(seed), **noisy)) for seed in range(3)]
    assert run(["lab", "select", *names, "--out", "there"]) == 0
    out = capsys.readouterr().out
    content = json.loads(Path("there/selection.json").read_text())
    regret = content["regret"]
    assert list(regret) == ["gold", "heldout", "peak", "knee", "last"]
    assert regret["heldout"]["ci"][1] < regret["last"]["ci"][0]
    assert regret["last"]["n"] == 3
    assert len(content["runs"]) == 3
    assert "winrate  none: no checkpoint has a win rate" in out
    with Image.open("there/regret.png") as picture:
        assert picture.width >= 900
    assert run(["lab", "select", names[0], "--out", "alone"]) == 0
    assert not Path("alone/regret.png").exists()
    assert (
        "peak     none: only this run's own fit, which has seen its true score: give --fit with"
        in capsys.readouterr().out
    )  # its own fit has seen its gold


def test_the_regret_of_peak_uses_no_fit_of_the_run_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_directory(Path("r"), rows())
    name = write_csv(Path("c/c.csv"), rows())
    for target, out in (("r", Path("r")), (name, Path("c"))):
        assert run(["lab", "overopt", target]) == 0
        fit = str(out / "overopt.json")
        assert json.loads(Path(fit).read_text())["d_peak"] is not None
        for given in (target, str(Path(target).resolve())):
            capsys.readouterr()
            assert run(["lab", "select", given, "--fit", fit, "--policy", "peak"]) == 0
            assert (
                "peak     none: only this run's own fit, which has seen its true score: give --fit with"
                in capsys.readouterr().out
            )
    assert run(["lab", "select", str(directory / "metrics.csv"), "--fit", "r/overopt.json"]) == 0
    assert (
        "peak     none: only this run's own fit, which has seen its true score: give --fit with"
        in capsys.readouterr().out
    )
    directory.rename("moved")
    assert run(["lab", "select", "moved", "--fit", "moved/overopt.json"]) == 0
    assert (
        "peak     none: only this run's own fit, which has seen its true score: give --fit with"
        in capsys.readouterr().out
    )
    assert run(["lab", "select", name, "--fit", "moved/overopt.json"]) == 0  # another run's
    assert "peak     0." in capsys.readouterr().out


def test_that_the_budget_is_part_of_the_regret_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_csv(Path("r.csv"), rows())
    assert run(["lab", "select", name, "--budget", "0.5"]) == 0
    assert "what the budget of KL 0.5 costs is counted" in capsys.readouterr().out
    assert run(["lab", "select", name]) == 0
    assert "is counted" not in capsys.readouterr().out


# ------------------------------------------------------------------ held-out rewards (OPT-6)
def trained(run: Path, leave_out: str | None = None, **data: Any) -> str:
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"status": "finished"}')
    options = {"path": "p", "leave_out": leave_out, **data}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": options}}))
    return str(run)


@pytest.mark.parametrize(
    ("proxy", "judge", "warned"),
    [("1/2", "2/2", False), ("1/2", "1/2", True), (None, "1/2", True), ("1/3", "2/3", True)],
)
def test_opt_6_a_reward_with_the_proxys_comparisons_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], proxy: str | None, judge: str, warned: bool
) -> None:
    parts = {
        "main": {"source": trained(Path("proxy"), proxy), "weight": 1.0},
        "heldout": {"source": trained(Path("judge"), judge), "weight": 0.0},
    }
    keys = {"kl": "eval/lab/kl", "proxy": "eval/lab/proxy", "heldout": "eval/rewards/heldout/mean"}
    content = [
        {"step": row["step"], **{keys[name]: row[name] for name in keys}}
        for row in rows(heldout=lambda step, gold: -abs(step - 6))
    ]
    run_directory(Path("r"), content, parts)
    assert run(["lab", "select", "r"]) == 0
    out = capsys.readouterr().out
    assert ("warning: r: the held-out reward judge and the proxy proxy share comparisons" in out) == warned
    assert "keep step 6 (KL 2.25), by heldout" in out


@pytest.mark.parametrize(
    ("proxy", "judge", "shared"),
    [
        ({"path": "playground"}, {"path": "playground", "playground": {"seed": 0, "size": 9}}, True),
        ({"path": "playground", "playground": {"seed": 1}}, {"path": "playground", "playground": {"seed": 2}}, False),
        ({"path": "playground", "playground": None}, {"path": "playground", "playground": {"seed": 1}}, False),
        ({"path": "pairs.jsonl"}, {"path": "{folder}/there/../pairs.jsonl"}, True),
        ({"path": "pairs.jsonl"}, {"path": "{folder}/others.jsonl"}, False),
    ],
)
def test_opt_6_comparisons_are_the_same_by_place_and_by_the_playgrounds_seed(
    folder: Path, proxy: dict[str, Any], judge: dict[str, Any], shared: bool
) -> None:
    (folder / "there").mkdir()
    judge = {**judge, "path": judge["path"].format(folder=folder)}
    parts = {
        "main": {"source": trained(Path("proxy"), **proxy), "weight": 1.0},
        "heldout": {"source": trained(Path("judge"), **judge), "weight": 0.0},
    }
    content = [{"step": step, "lab/kl": float(step), "lab/proxy": 1.0} for step in STEPS]
    directory = run_directory(Path("r"), content, parts)
    said = overlap(directory, load_curve(directory))
    assert (said is not None) == shared


def test_opt_6_what_was_measured_afterwards_is_checked_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = trained(Path("proxy"), None)
    run_directory(Path("r"), rows(), source)
    write_csv(Path("r/measured.csv"), rows(heldout=lambda step, gold: gold, win_rate=lambda step, gold: gold))
    settings = {"proxy": source, "heldout": [source], "judge": "gold"}
    row = {"step": 0, "fingerprint": fingerprint(settings), "settings": settings, "metrics": {}}
    Path("r/measured.jsonl").write_text(json.dumps(row) + "\n")
    assert run(["lab", "select", "r"]) == 0
    out = capsys.readouterr().out
    assert "warning: r: the held-out reward proxy is what training maximised" in out
    assert "the true score decided who wins in 1 of 1 runs: winrate is flattered" in out


def test_a_part_that_is_learnt_from_is_no_heldout_reward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [
        {"step": r["step"], "eval/lab/kl": r["kl"], "eval/lab/proxy": r["proxy"], "eval/rewards/heldout/mean": 1.0}
        for r in rows()
    ]
    run_directory(Path("r"), content, {"heldout": {"source": "x", "weight": 0.5}})
    assert run(["lab", "select", "r"]) == 0
    assert ", by knee" in capsys.readouterr().out


# ------------------------------------------------------------------ what it refuses
def test_bad_input_is_one_line_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_csv(Path("r.csv"), rows())
    flat = write_fit(Path("flat.json"), None)
    cases = [
        (["missing.csv"], "missing.csv does not exist"),
        ([name, "--policy", "heldout"], "r.csv: no checkpoint has a heldout score"),
        ([name, "--policy", "winrate"], "r.csv: no checkpoint has a win rate"),
        ([name, "--policy", "budget"], "r.csv: budget needs a KL: give --budget"),
        ([name, "--budget", "0"], "--budget is 0: give a KL above 0"),
        ([name, "--budget", "nan"], "--budget is nan: give a KL above 0"),
        ([name, "--fit", flat], "none of the --fit files has a peak"),
        ([name, "--fit", name], "--fit r.csv is not an overopt.json"),
        ([name, "--columns", "heldout"], "--columns takes FIELD=NAME, not 'heldout'"),
        ([name, "--columns", "heldout=x"], "r.csv has no column 'x'"),
        ([name, "--export", "model"], "r.csv has no checkpoint to export"),
        ([name, name, "--export", "model"], "--export writes the checkpoint of one run: give one"),
        ([name, "--export", "r.csv"], "r.csv exists: give another --export"),
    ]
    for argv, message in cases:
        assert message in refused(capsys, *argv)
        assert sorted(path.name for path in folder.iterdir()) == ["flat.json", "r.csv"]


# ------------------------------------------------------------------ a real run
def test_export_of_a_real_run(scratch: Any) -> None:
    answer = scratch.done("lab", "select", "runs/ppo", "--export", "chosen")
    assert (scratch.root / "chosen" / "model.safetensors").is_file()
    assert "wrote chosen" in answer.out
    content = json.loads((scratch.root / "runs/ppo/selection.json").read_text())
    (scratch.root / "runs/ppo/selection.json").unlink()
    assert Path(content["runs"][0]["checkpoint"]).name.startswith(f"step={content['runs'][0]['checkpoint_step']:05d}")
