"""``label``: makes records. One file per command beside this one."""

import importlib

from lightning_align.errors import UserError, nearest

COMMANDS = {
    "ai": "a judge compares answers: preferences with soft labels",
    "revise": "a model criticises and revises its answers under a constitution: demonstrations",
}


def main(argv: list[str]) -> int:
    """Run the label command that ``argv`` names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8}{summary}" for name, summary in COMMANDS.items())
        print(f"usage: lightning-align label COMMAND [options]\n\ncommands:\n{lines}")
        return 0
    if argv[0] not in COMMANDS:
        names = list(COMMANDS)
        raise UserError(f"unknown label command '{argv[0]}'{nearest(argv[0], names)} (there are: {', '.join(names)})")
    return importlib.import_module(f"lightning_align.cli.label_{argv[0]}").main(argv[1:])
