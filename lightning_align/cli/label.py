"""``label``: makes records. One file per command beside this one."""

import importlib
from types import ModuleType

from lightning_align.errors import UserError, nearest

COMMANDS = {
    "ai": "a judge compares answers: preferences with soft labels",
    "export": "what people judged: rankings or preferences, and how far they agree",
    "human": "people rank answers on a local page",
    "import": "what people labelled in Argilla or Label Studio: into the same store",
    "revise": "a model criticises and revises its answers under a constitution: demonstrations",
}


def main(argv: list[str]) -> int:
    """Run the label command that ``argv`` names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8}{summary}" for name, summary in COMMANDS.items())
        print(f"usage: lightning-align label COMMAND [options]\n\ncommands:\n{lines}")
        return 0
    return _module(argv[0]).main(argv[1:])


def check_label(argv: list[str]) -> None:
    """Raise :class:`UserError` for words that the command they name would refuse; nothing is loaded or written."""
    _module(argv[0]).read_options(argv[1:])


def _module(name: str) -> ModuleType:
    if name not in COMMANDS:
        names = list(COMMANDS)
        raise UserError(f"unknown label command '{name}'{nearest(name, names)} (there are: {', '.join(names)})")
    return importlib.import_module(f"lightning_align.cli.label_{name}")
