"""The top level: fast, and one line for every mistake."""

import subprocess
import sys

import pytest

from lightning_align import __version__
from lightning_align.cli import main as cli
from lightning_align.errors import UserError
from lightning_align.run.signals import Interrupted

HEAVY = ("torch", "lightning", "transformers", "wandb", "numpy", "jsonargparse", "datasets", "rich", "matplotlib")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    code = (
        "import sys\nfrom lightning_align.cli.main import run\n"
        f"assert run(['{option}']) == 0\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert (__version__ if option == "--version" else "pipeline") in done.stdout


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pipelin"], "error: unknown command 'pipelin'; did you mean 'pipeline'? (see lightning-align --help)\n"),
        (["--config", "x"], "error: unknown option '--config' (see lightning-align --help)\n"),
        (["pipeline", "--config", "none.yaml"], "error: pipeline file none.yaml does not exist\n"),
        (["pipeline"], "error: the following arguments are required: --config (see lightning-align pipeline --help)\n"),
        (["export", "nowhere", "--out", "x"], "error: nowhere is neither a run directory nor a checkpoint in one\n"),
        (["generate", "m", "--prompt", "a", "--file", "b"], "error: --prompt and --file exclude each other\n"),
        (["generate", "m", "--file", "none.txt"], "error: file none.txt does not exist (--file)\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(argv) == 2
    assert capsys.readouterr().err == message


def test_errors_are_one_line_with_traceback_only_under_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise UserError("two\n  lines")

    monkeypatch.setattr(cli, "dispatch", fail)
    assert cli.run(["fit"]) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert cli.run(["fit", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interruption_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(argv: list[str]) -> int:
        raise Interrupted("stopped after step 3")

    monkeypatch.setattr(cli, "dispatch", stop)
    assert cli.run(["fit"]) == 130
    assert capsys.readouterr().err == "stopped after step 3\n"
