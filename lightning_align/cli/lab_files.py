"""What the lab commands share: files written all or none, and words of ``--columns``."""

import os
from collections.abc import Mapping
from contextlib import suppress
from errno import EISDIR
from pathlib import Path

from lightning_align.errors import UserError


def write_all(outputs: Mapping[Path, bytes]) -> None:
    """All of them under other names first, so that a full disk or a missing permission leaves the old files."""
    written: dict[Path, Path] = {}
    for path, content in outputs.items():
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            if path.is_dir():
                raise IsADirectoryError(EISDIR, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
        except OSError as error:
            for leftover in (*written.values(), temporary):
                with suppress(OSError):
                    leftover.unlink()
            raise UserError(f"cannot write {path}: {error.strerror} (name another place)") from error
        written[path] = temporary
    for path, temporary in written.items():
        os.replace(temporary, path)


def pair(word: str) -> tuple[str, str]:
    """A word of ``--columns``."""
    key, equals, column = word.partition("=")
    if not equals or not column or Path(word).exists():
        raise UserError(f"--columns takes FIELD=NAME, not '{word}' (a RUN goes before --columns)")
    return key, column
