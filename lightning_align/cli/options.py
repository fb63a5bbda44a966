"""What the small commands share: an argparse parser whose errors are one line."""

import argparse
import re
from typing import NoReturn

from lightning_align.errors import UserError, nearest


class OptionParser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of printing the usage; options must be written out."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"lightning-align {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.S)
        if unknown is not None:
            word = unknown.group(1)
            message = f"unknown option {word}{nearest(word.split('=')[0], list(self._option_string_actions))}"
        raise UserError(f"{message} (see {self.prog} --help)")
