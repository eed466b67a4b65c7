"""Imports the user's Python files and modules, and says which of the user's lines failed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def import_file(file: str | os.PathLike, option: str) -> tuple[ModuleType, Path]:
    """Run a Python file as a module; its folder becomes importable.

    Args:
        file: its path.
        option: that names it, for messages.

    Returns:
        The module, and the file's absolute path.

    Raises:
        ValueError: there is no such file, it is not a Python file, or it fails (with the user's lines).
    """
    path = Path(file).expanduser().resolve()
    if not path.exists():
        raise ValueError(f"{option} must be a Python file, and {path} does not exist")
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{option} must be a Python file (.py), got {path}")
    # A name of its own: two scripts called tools.py, or one called math.py, must not meet in sys.modules.
    name = f"{option}_{zlib.crc32(os.fsencode(path)):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    _make_importable(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and TypedDicts look their hints up
    with users_errors(f"importing {path}"):
        spec.loader.exec_module(module)
    return module, path


def _make_importable(folder: str) -> None:
    """Add a folder to the path before installed packages, but behind the standard library.

    A json.py or calendar.py beside the user's file must not take the place of Python's own, which this
    process and the tool workers import.
    """
    if folder not in sys.path:
        standard = os.path.dirname(os.__file__)
        own = [i for i, entry in enumerate(sys.path) if entry in (standard, f"{standard}/lib-dynload")]
        sys.path.insert(max(own, default=-1) + 1, folder)


def import_module(name: str) -> ModuleType:
    """Import the module that tool_functions_module names.

    Raises:
        ValueError: there is no such module, or it fails (with the user's lines).
    """
    if _is_absent(name):
        raise ValueError(f"tool_functions_module {name!r} is not importable; for a file set tools_script")
    with users_errors(f"importing {name}"):
        return importlib.import_module(name)


@contextlib.contextmanager
def users_errors(doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises in the block into a ValueError that shows the user's own lines.

    Args:
        doing: what failed then, as "importing tools.py".
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit is no Exception
        raise ValueError(f"{doing} failed: {_users_lines(error)}") from error


def message_of(error: BaseException) -> str:
    """What an exception says; nothing where its own `__str__`, which is the user's, fails."""
    try:
        return str(error)
    except BaseException:
        return ""


def error_text(error: BaseException) -> str:
    """`KeyError: 'rate'`, or the type alone where the exception says nothing."""
    message = message_of(error)
    return type(error).__name__ + (f": {message}" if message else "")


def _users_lines(error: BaseException) -> str:
    """The error with the lines that led to it, leaving out this package and the import machinery."""
    text = error_text(error)
    if isinstance(error, SyntaxError):
        return f"{text}\n  {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OURS, importlib.__file__, "<frozen importlib"))
    ]
    return text + "".join(f"\n  {frame.filename}:{frame.lineno}: {frame.line}" for frame in frames)


def _is_absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True
    except Exception:  # a parent package of it fails: the import will say how
        return False
