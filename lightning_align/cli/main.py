"""The top level of the command line: answers ``--help`` and ``--version`` itself, imports a command only to run it."""

import atexit
import gc
import importlib
import sys
import traceback
from dataclasses import dataclass
from types import ModuleType

from lightning_align import __version__
from lightning_align.errors import UserError, nearest
from lightning_align.run.signals import Interrupted

PROGRAM = "lightning-align"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """Where a command lives and what the help says of it."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "fit": Command("fit", "main", "train one stage (--dry-run: sizes and memory only)"),
    "validate": Command("fit", "validate", "evaluate on the validation split"),
    "test": Command("fit", "test", "evaluate on the test split"),
    "pipeline": Command("pipeline", "main", "run several stages in order, skipping those that are done"),
    "generate": Command("generate", "main", "sample from a run, a path or a hub id"),
    "evaluate": Command("evaluate", "main", "score, KL, win rate, calibration, with intervals"),
    "label": Command("label", "main", "make records: an AI judge, a constitution"),
    "data": Command("data", "main", "inspect, convert or export records"),
    "lab": Command("lab", "main", "over-optimisation of a run; several runs side by side"),
    "export": Command("export", "main", "write a checkpoint in Hugging Face format"),
    "doctor": Command("doctor", "main", "versions, devices, extras and a self-test"),
}


def help_text() -> str:
    """The text of ``--help``."""
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [options]      (also: python -m lightning_align COMMAND)\n\n"
        "Align decoder-only language models, and see when to stop.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help     this text; after a command, the options of that command\n"
        "  --version      print the version\n"
        "  --debug        show the traceback of an error\n\n"
        "first steps:\n"
        f"  {PROGRAM} pipeline --config configs/playground/quickstart.yaml\n"
        f"  {PROGRAM} fit --config configs/playground/sft.yaml --dry-run"
    )


def dispatch(argv: list[str]) -> int:
    """Run the command that ``argv`` (without ``--debug``) names; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"{PROGRAM} {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} '{name}'{nearest(name, list(COMMANDS))} (see {PROGRAM} --help)")
    command = COMMANDS[name]
    return getattr(_import(f"lightning_align.cli.{command.module}"), command.function)(rest)


def _import(name: str) -> ModuleType:
    """Import a module; what was imported stays until the process ends, so the garbage collector leaves it alone.

    Collecting while PyTorch and Lightning are imported finds nothing and takes a fifth of the time.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's bindings report leaks
        gc.enable()


def run(argv: list[str]) -> int:
    """Run a command line; a :class:`UserError` becomes one line on stderr and exit code 2."""
    debug = "--debug" in argv
    try:
        return dispatch([word for word in argv if word != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("lightning_align"):
            raise
        print(
            f"error: {error}: this Python ({sys.executable}) lacks what {PROGRAM} needs; use the one that it was "
            "installed for (after make env: .venv/bin/python)",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt) as stop:
        if debug:
            traceback.print_exc()
        print(str(stop) or "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return 1


def entry() -> None:
    """Console script."""
    sys.exit(run(sys.argv[1:]))
