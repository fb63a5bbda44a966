"""The one exception that means "the user can mend this", and what its messages are made of."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where (file, line, field) and what to do.

    The command line prints it as ``error: …`` and exits with code 2; the traceback is shown only under ``--debug``.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def check_options(section: str, *rules: tuple[str, Any, bool, str]) -> None:
    """Raise :class:`UserError` at the first option out of its range.

    Args:
        section: ``model`` or ``data``.
        rules: Name, value, whether it is in range, and what to give instead.
    """
    for name, value, holds, wanted in rules:
        if not holds:
            raise UserError(f"{section}.{name} is {value}: give {wanted}")
