"""``lab overopt`` through the command line: what it writes where, and one line for every mistake."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_align.cli import main as cli
from lightning_align.cli.pipeline import main as run_pipeline
from lightning_align.losses.best_of_n import best_of_n, best_of_n_kl
from lightning_align.run.logging import FileLogger

QUICKSTART = Path(__file__).parents[2] / "configs" / "playground" / "quickstart.yaml"
FILES = ["overopt.html", "overopt.json", "overopt.png"]


def gold(d: float) -> float:
    """Rises to KL 3.1 and falls."""
    return 1.5 + (d * (0.55 - 0.35 * math.log(d)) if d else 0.0)


def write_run(run: Path) -> Path:
    logger = FileLogger(run)
    for index in range(17):
        d = 0.21 * index
        noise = 0.01 * math.sin(29 * index)
        logger.log_metrics(
            {"eval/lab/kl": d * d, "eval/lab/proxy": 0.8 * d, "eval/lab/gold": gold(d) + noise}, step=5 * index
        )
        checkpoint = run / "checkpoints" / f"step={5 * index:05d}-kl={d * d:.3f}.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"weights")
    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, as a path relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_run(Path("runs/ppo"))


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "overopt" in path.name or "report" in path.name)


# ------------------------------------------------------------------ what it does
def test_aspects_of_several_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, slope in (("gate", 0.0), ("alone", -0.1)):
        logger = FileLogger(Path(name))
        for d in range(5):
            aspects = {"helpfulness": 0.5 + 0.1 * d, "safety": 0.9 + slope * d}
            row = {
                "kl": float(d * d),
                "proxy": float(d),
                "gold": float(d),
                **{f"gold_{k}": v for k, v in aspects.items()},
            }
            logger.log_metrics({f"eval/lab/{key}": value for key, value in row.items()}, step=d)
    assert cli.run(["lab", "overopt", "gate", "--against", "alone", "--out", "figures"]) == 0
    assert sorted(path.name for path in Path("figures").iterdir()) == ["aspects.json", "aspects.png", *FILES]
    content = json.loads(Path("figures/aspects.json").read_text())
    assert content["kl"] == 16
    assert content["policies"]["alone"]["safety"]["score"] == pytest.approx(0.5)
    assert "  alone: helpfulness 0.900, safety 0.500\n" in capsys.readouterr().out
    assert cli.run(["lab", "overopt", "gate", "--aspects"]) == 0
    assert cli.run(["lab", "overopt", str(run), "--aspects"]) == 2
    assert not (run / "overopt.png").exists()
    assert "has no eval/lab/gold_helpfulness" in capsys.readouterr().err


def test_three_files_lie_in_the_run_and_the_finding_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["lab", "overopt", str(run)]) == 0
    assert written(run) == FILES
    out = capsys.readouterr().out
    content = json.loads((run / "overopt.json").read_text())
    assert out.startswith(content["headline"] + "\n")
    assert content["verdict"] == "peaks"
    assert content["intervals"]["d_peak"][0] <= math.exp(0.55 / 0.35 - 1) <= content["intervals"]["d_peak"][1]
    assert f"checkpoint: {content['chosen']['checkpoint']}\n" in out
    assert Path(content["chosen"]["checkpoint"]).is_file()
    assert "wrote runs/ppo/overopt.png, runs/ppo/overopt.html, runs/ppo/overopt.json\n" in out


def test_the_same_run_gives_the_same_files(run: Path) -> None:
    for out in ("a", "b"):
        assert cli.run(["lab", "overopt", str(run), "--out", out]) == 0
    assert [(Path("a") / name).read_bytes() for name in FILES] == [(Path("b") / name).read_bytes() for name in FILES]
    assert written(run) == []


def test_out_and_report_choose_the_places(run: Path) -> None:
    assert cli.run(["lab", "overopt", str(run), "--out", "new/figures", "--report", "pages/report.html"]) == 0
    assert written(Path("new/figures")) == ["overopt.json", "overopt.png"]
    assert written(Path("pages")) == ["report.html"]


def test_the_quickstart_leaves_picture_numbers_and_report_beside_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/quickstart/ppo"))
    assert run_pipeline(["--config", str(QUICKSTART), "--only", "overopt"]) == 0
    assert written(Path("runs/quickstart")) == ["overopt.json", "overopt.png", "report.html"]
    assert written(Path("runs/quickstart/ppo")) == []


def test_a_csv_is_read_with_named_columns_and_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "\n".join(f"{n},{n * n / 4},{n},{n / 2 * (1 - 0.2 * n)}" for n in range(1, 12))
    (tmp_path / "best_of_n.csv").write_text(f"n,distance,reward,judge\n{rows}\n")
    arguments = ["--columns", "step=n", "kl=distance", "proxy=reward", "gold=judge", "--form", "bon"]
    assert cli.run(["lab", "overopt", str(tmp_path / "best_of_n.csv"), *arguments, "--intercept", "free"]) == 0
    content = json.loads((tmp_path / "overopt.json").read_text())
    assert (content["form"], content["source"]) == ("bon", "columns")
    assert content["alpha"] == pytest.approx(1.0)
    assert content["beta"] == pytest.approx(0.4)
    assert content["gold"]["start_fitted"]
    assert "d(α − β d)" in capsys.readouterr().out


def test_best_of_n_falls_by_its_own_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 samples of 400 prompts whose flaws the reward likes: unbiased means for each n, KL in closed form."""
    generator = torch.Generator().manual_seed(0)
    quality, flaw = torch.randn(2, 400, 512, generator=generator, dtype=torch.float64)
    proxy, true = quality + flaw, quality - 0.5 * flaw.clamp(min=0) ** 2
    rows = ["step,kl,proxy,gold"]
    for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        means = (best_of_n(proxy, values, n).mean().item() for values in (proxy, true))
        rows.append(",".join(map(str, (n, best_of_n_kl(n), *means))))
    (tmp_path / "best.csv").write_text("\n".join(rows))
    assert cli.run(["lab", "overopt", str(tmp_path / "best.csv"), "--form", "bon"]) == 0
    assert "The true score peaks at KL 1." in capsys.readouterr().out
    content = json.loads((tmp_path / "overopt.json").read_text())
    assert (content["form"], content["verdict"], content["chosen"]["best_iteration"]) == ("bon", "peaks", 8)
    assert not content["gold"]["start_fitted"]  # n = 1 is the policy itself
    assert content["kl_peak"] == pytest.approx(best_of_n_kl(8), abs=0.3)
    assert content["forms"]["bon"]["rmse"] < content["forms"]["rl"]["rmse"]
    half = content["extrapolation"][0]
    assert half["predicted"]["bon"] < min(half["predicted"]["rl"], half["constant"], half["linear"])


def test_a_pipeline_draws_several_runs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(Path(f"runs/ppo{seed}"))) for seed in range(3)]
    stages = {"together": {"lab": "overopt", "run": runs, "out": "figures"}}
    Path("seeds.yaml").write_text(json.dumps({"name": "seeds", "stages": stages}))
    assert run_pipeline(["--config", "seeds.yaml"]) == 0
    content = json.loads(Path("figures/overopt.json").read_text())
    assert (content["runs"], content["over_runs"], content["n"]) == (runs, True, 51)
    assert Path("figures/overopt.png").is_file()


def test_source_chooses_between_evaluations_and_training(run: Path) -> None:
    logger = FileLogger(Path("both"))
    for step in range(8):
        logger.log_metrics({"lab/kl": 0.3 * step, "lab/proxy": 1.0 * step}, step=step)
        logger.log_metrics({"eval/lab/kl": 0.3 * step, "eval/lab/proxy": 9.0}, step=step)
    for source, expected in (("auto", "eval"), ("train", "train")):
        assert cli.run(["lab", "overopt", "both", "--source", source]) == 0
        assert json.loads(Path("both/overopt.json").read_text())["source"] == expected


def test_source_takes_what_was_measured_afterwards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["lab", "overopt", "runs/ppo", "--source", "measured"]) == 2
    assert "runs/ppo has no measured.csv: lab frontier runs/ppo --recompute makes it" in capsys.readouterr().err
    Path("runs/ppo/measured.csv").write_text("step,kl,proxy,gold\n" + "".join(f"{i},{i},{i},{i}\n" for i in range(9)))
    read = {
        "measured": "  points read: 9 (checkpoints measured on held-out prompts, measured.csv)\n",
        "eval": "  points read: 17 (evaluations on held-out prompts, metrics.csv)\n",
    }
    for source, expected in (("measured", "measured"), ("auto", "measured"), ("eval", "eval")):
        assert cli.run(["lab", "overopt", "runs/ppo", "--source", source]) == 0
        assert read[expected] in capsys.readouterr().out
        assert json.loads(Path("runs/ppo/overopt.json").read_text())["source"] == expected


def test_help_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\nfrom lightning_align.cli.main import run\nrun(['lab'])\n"
        "try:\n    run(['lab', 'overopt', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = [name for name in ('torch', 'matplotlib', 'scipy', 'numpy') if name in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "  overopt " in done.stdout
    assert "--report REPORT" in done.stdout


def test_the_curve_does_not_need_torch(run: Path) -> None:
    code = (
        f"import sys\nfrom lightning_align.cli.main import run\nassert run(['lab', 'overopt', {str(run)!r}]) == 0\n"
        "sys.exit('torch' in sys.modules and 'slow to start' or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["overop"], "unknown lab command 'overop'; did you mean 'overopt'? (there are: overopt, frontier,"),
        (["overopt"], "the following arguments are required: RUN (see lightning-align lab overopt --help)"),
        (["overopt", "runs/pp0"], "runs/pp0 does not exist: give a run directory, or a CSV"),
        (["overopt", "runs"], "runs has no metrics.csv; it holds the runs ppo: give one of them"),
        (["overopt", "runs/ppo", "--form", "dpo"], "argument --form: invalid choice: 'dpo'"),
        (["overopt", "runs/ppo", "--columns", "kl"], "--columns takes FIELD=NAME, not 'kl'"),
        (["overopt", "--columns", "kl=x", "log.csv"], "not 'log.csv' (a RUN goes before --columns)"),
        (["select", "--columns", "kl=x", "log.csv"], "not 'log.csv' (a RUN goes before --columns)"),
        (["select", "--columns", "kl=x", "runs/seed=0"], "not 'runs/seed=0' (a RUN goes before --columns)"),
        (["overopt", "runs/ppo", "--columns", "kl=x"], "runs/ppo/metrics.csv has no column 'x' (it has step, eval/"),
        (["overopt", "runs/ppo", "--source", "trl"], "metrics.csv has nothing for --source trl (found: eval)"),
        (
            ["overopt", "runs/ppo", "--source", "eval", "--columns", "kl=eval/lab/kl"],
            "--source and --columns contradict each other: give one of them",
        ),
        (["overopt", "runs/ppo", "--out", "file"], "cannot write file/overopt.png: "),
        (["overopt", "runs/ppo", "--report", "runs"], "cannot write runs: it is a folder (name another place)"),
        (["overopt", "runs/ppo", "--report", "file/x.html"], "cannot write file/x.html: "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    run: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("not a folder")
    Path("runs/seed=0").mkdir()
    before = sorted(Path().rglob("*"))
    assert cli.run(["lab", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before


def test_a_failure_in_the_middle_leaves_the_old_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["lab", "overopt", str(run)]) == 0
    before = {name: (run / name).read_bytes() for name in FILES}
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("\n5,", "\n6,"))
    (run / "overopt.json").unlink()
    (run / "overopt.json").mkdir()  # the last file cannot be written
    assert cli.run(["lab", "overopt", str(run)]) == 2
    assert "cannot write runs/ppo/overopt.json: it is a folder" in capsys.readouterr().err
    assert written(run) == FILES
    assert all((run / name).read_bytes() == before[name] for name in ("overopt.html", "overopt.png"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.chmod(0o500)
    try:
        assert cli.run(["lab", "overopt", str(run)]) == 2
    finally:
        run.chmod(0o700)
    assert "Permission denied (name another place)" in capsys.readouterr().err
