"""Files of a run: whole or not there, also after a power cut, and one clear line where the disk is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lightning_align.errors import UserError

RESUME = "make room or mend this, then go on with --resume"


@contextmanager
def writing(path: Path, remedy: str = RESUME) -> Iterator[None]:
    """What the system refuses while ``path`` is written becomes a :class:`UserError` that names it and the remedy."""
    try:
        yield
    except Exception as error:
        refusal = _system_error(error)  # torch hides it behind one of its own
        if refusal is None:
            raise
        raise UserError(f"cannot write {path}: {refusal.strerror or refusal}; {remedy}") from error


@contextmanager
def replacing(path: Path, remedy: str = RESUME) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of ``path`` once it is on disk; it lies beside it until then."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path, remedy):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):  # what was wrong before is what counts
            temporary.unlink()
        raise


def write_atomically(path: Path, text: str, remedy: str = RESUME) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new one."""
    with replacing(path, remedy) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
