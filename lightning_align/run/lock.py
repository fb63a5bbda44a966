"""One process at a time in a run directory: a lock that the kernel takes back when its holder dies."""

import fcntl
import os
import warnings
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


def take_lock(folder: Path, name: str = LOCK_FILE) -> IO[bytes] | None:
    """The lock of ``folder``: an open file that holds it until it is closed; None while another process has it."""
    path = folder / name
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        warnings.warn(
            f"{folder} lies where files cannot be locked ({error.strerror}): see that no second process runs in it",
            stacklevel=2,
        )
        return file
    file.close()  # it is taken, or the folder was moved or replaced just now
    return None


def is_locked(folder: Path) -> bool:
    """Whether another process has the lock of ``folder``."""
    if not (folder / LOCK_FILE).is_file():
        return False
    lock = take_lock(folder)
    if lock is not None:
        lock.close()
    return lock is None
