"""Functions that a user names in a configuration."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_align.errors import UserError

LONGEST = 4096  # characters of a path
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def said(error: BaseException) -> str:
    """An error of somebody else's code, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_function(source: str) -> bool:
    """Whether a source names a function: ``file.py:function``, or a dotted name that is no path."""
    return ".py:" in source or (not Path(source).exists() and DOTTED.fullmatch(source) is not None)


def function_file(source: str) -> Path | None:
    """The file of a function named as ``file.py:function``; None for any other string, or where there is none."""
    if ".py:" not in source or len(source) > LONGEST or "\n" in source:
        return None
    path = Path(source.rpartition(":")[0])
    return path if path.is_file() else None


def load_function(spec: str, what: str = "reward") -> Callable[..., Any]:
    """The function at ``package.module.function`` or ``path/to/file.py:function``.

    Args:
        spec: Where it is.
        what: What messages call it.

    Raises:
        UserError: Nothing there can be imported, or it is not callable.
    """
    if ".py:" in spec:
        location, _, name = spec.rpartition(":")
        module = _module_from_file(Path(location), f"{what} {spec}")
    else:
        location, _, name = spec.rpartition(".")
        module = _module_by_name(location, f"{what} {spec}")
    if name not in vars(module):
        near = ", ".join(
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        )
        raise UserError(f"{what} {spec}: {location} has no {name!r}; its functions are: {near or 'none'}")
    function = vars(module)[name]
    if not callable(function):
        raise UserError(f"{what} {spec} is {type(function).__name__}, not a function")
    return function


def _module_by_name(name: str, wanted: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:
        # console scripts do not look where the user stands; at the end, so that nothing installed is hidden
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{wanted} cannot be imported: {error}; it is neither an importable function nor a path that exists"
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UserError(f"{wanted}: importing {name} failed: {said(error)}") from error


def _module_from_file(path: Path, wanted: str) -> Any:
    if not path.is_file():
        raise UserError(f"{wanted}: there is no file {path}")
    found = importlib.util.spec_from_file_location(f"lightning_align_function_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything while it runs
        raise UserError(f"{wanted}: running {path} failed: {said(error)}") from error
    return module
