"""Imports the user's files so that each finds its own helper modules, and reports which of their lines failed.

/a/mine.py does `import utils`, and means /a/utils.py:

1. `import_file("/a/mine.py", …)` imports it as `grpo_jax.tools.user_code./a.mine`: a submodule of this module whose
   name holds its folder. `_Finder` finds it, and `_Loader` runs it with builtins of its own, whose `__import__` is
   that of the `_Folder` /a.
2. So `import utils` in it calls `_Folder._import`. `_Folder._owns` finds /a/utils.py and redirects the import to
   `grpo_jax.tools.user_code./a.utils`, which is found and run in the same way. `import numpy` is none of the
   folder's modules, and is imported as anywhere else.
3. mine.py gets that module as `utils`. No `sys.modules["utils"]` comes to be, so /b/mine.py gets /b/utils.py, and a
   process that is started anew (spawn, forkserver) finds each module again, by its full name.

To put /a on `sys.path` is not enough: the first `utils` would be that of every folder, and a user's file that is
named like an installed package would replace it for the whole run.

What the user's code changes of the process is put back by `process_state.users_code`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import traceback
import urllib.parse
from collections.abc import Iterator
from importlib.machinery import FrozenImporter, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.tools.process_state import directory_and_variables, users_code

__path__: list[str] = []  # makes this module the parent of the user's modules

_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def import_file(file: str | os.PathLike, option: str) -> tuple[ModuleType, Path]:
    """Run a Python file as a module that finds modules in its own folder first, as a script does.

    A file that is loaded already and has not changed since, nor its helpers, is not run again.

    Args:
        option: names the file, for messages.

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
    with users_code(), users_errors(f"importing {path}"):
        return _folder(str(path.parent)).import_file(path), path


def import_module(name: str) -> ModuleType:
    """Import the module that tool_functions_module names.

    Raises:
        ValueError: there is no such module, or it fails (with the user's lines).
    """
    try:
        absent = importlib.util.find_spec(name) is None
    except Exception as error:  # of another kind: a parent package of it fails, and the import will say how
        absent = isinstance(error, ModuleNotFoundError)
    if absent:
        raise ValueError(f"tool_functions_module {name!r} is not importable; for a file set tools_script")
    before = list(sys.path)
    added: list[str] = []
    try:
        with users_code(), users_errors(f"importing {name}"):
            try:
                return importlib.import_module(name)
            finally:
                added = [entry for entry in sys.path if entry not in before]
    finally:
        sys.path += added  # it may import from there later, but hides no module of others


# --- the user's modules ----------------------------------------------------------------------------------


class _Folder:
    """A folder with user files: imports in them are looked up there first."""

    def __init__(self, folder: str):
        # The separators of a path may stay in a module's name; its dots may not.
        self.name = f"{__name__}.{urllib.parse.quote(folder, safe='/ ').replace('.', '%2E')}"
        self.folder = folder
        self.path = [folder]  # and what the user's files add to sys.path while they are imported
        # Directory and variables after a file's import, where it changed them; see `users_code`.
        self.left: tuple[str | None, dict[str, str]] | None = None
        self._usual_path = list(sys.path)
        self._owned: dict[str, bool] = {}  # what `_owns` said
        # The user's modules have these builtins and this importlib; no other module's imports change.
        self.builtins = vars(builtins) | {"__import__": self._import}
        self._importlib: Any = ModuleType("importlib", importlib.__doc__)
        self._importlib.__getattr__ = lambda name: getattr(importlib, name)
        self._importlib.import_module = self._import_module

    def import_file(self, path: Path) -> ModuleType:
        """Import one of the folder's files by its path; its name may be any."""
        # All modules of the folder are forgotten where the file of one has changed.
        names = [name for name in sys.modules if name == self.name or name.startswith(self.name + ".")]
        loaders = [getattr(sys.modules[name], "__loader__", None) for name in names]
        if any(isinstance(one, _Loader) and one.stamp != _stamp(one.path) for one in loaders):
            for name in names:
                del sys.modules[name]
            self._owned.clear()
            self.left = None
        # A stem with a dot in it, or one that is also a package here, does not find the file: its whole name,
        # quoted, does.
        spec = PathFinder.find_spec(path.stem, [self.folder])
        plain = spec is not None and spec.origin == str(path)
        name = path.stem if plain else path.name.replace("%", "%25").replace(".", "%2E")
        before = directory_and_variables()
        try:
            return importlib.import_module(f"{self.name}.{name}")
        finally:
            self.path += [e for e in sys.path if e not in self._usual_path and e not in self.path]
            if (after := directory_and_variables()) != before:
                self.left = after

    def find_spec(self, name: str, path: list[str]) -> ModuleSpec | None:
        """Where the module of a full name is."""
        tail = name.rpartition(".")[2]
        if tail.endswith("%2Epy"):
            file = os.path.join(self.folder, urllib.parse.unquote(tail))
            spec = importlib.util.spec_from_file_location(name, file)
        else:
            spec = PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
            spec.loader.folder = self
        return spec

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        """`__import__` of the user's modules: what is the folder's own is imported by its full name."""
        top = name.partition(".")[0]
        if level == 0 and top == "importlib":
            module = builtins.__import__(name, globals, locals, fromlist)
            return self._importlib if module is importlib else module
        if level or not self._owns(top, (globals or {}).get("__file__")):
            return builtins.__import__(name, globals, locals, fromlist, level)
        full = f"{self.name}.{name}"
        if fromlist:
            return builtins.__import__(full, globals, locals, fromlist)
        importlib.import_module(full)
        return sys.modules[f"{self.name}.{top}"]

    def _import_module(self, name: str, package: str | None = None) -> ModuleType:
        """`importlib.import_module` of the user's modules."""
        own = not name.startswith(".") and self._owns(name.partition(".")[0], None)
        return importlib.import_module(f"{self.name}.{name}" if own else name, package)

    def _owns(self, top: str, importer: str | None) -> bool:
        """Whether a file here means a module of this folder by this name, as it would if run as a script.

        1. Python's built-in and frozen modules come first.
        2. A file that imports its own name means the other module of that name (json.py that imports json).
        3. A module that is the same file for all importers, as where the folder is on sys.path, is imported
        once.
        4. A folder without `__init__.py` is a package only where there is no other.
        """
        if top in self._owned:
            return self._owned[top]
        if top in sys.builtin_module_names or FrozenImporter.find_spec(top) is not None:
            return False
        added = [entry for entry in sys.path if entry not in self._usual_path and entry not in self.path]
        own = PathFinder.find_spec(top, self.path + added)
        if own is None:
            return False
        if top in sys.modules:  # what any other `import` of the name finds
            usual = getattr(sys.modules[top], "__spec__", None)
        else:
            path = [entry for entry in sys.path if entry not in added]
            specs = (one.find_spec(top, path if one is PathFinder else None) for one in sys.meta_path)
            usual = next((spec for spec in specs if spec is not None), None)
        if usual is not None and own.origin is not None and own.origin == importer:
            return False  # to this file alone: not remembered
        files = [one and one.origin and os.path.realpath(one.origin) for one in (own, usual)]
        owns = usual is None or (own.loader is not None and (files[0] is None or files[0] != files[1]))
        self._owned[top] = owns
        self.path += added if owns else []
        return owns


_folder = functools.cache(_Folder)  # one object for each folder


class _Loader(SourceFileLoader):
    folder: _Folder

    def exec_module(self, module: ModuleType) -> None:
        self.stamp = _stamp(self.path)
        vars(module)["__builtins__"] = self.folder.builtins
        super().exec_module(module)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


class _Finder:
    """Finds the submodules of this module: folders, and the user's modules in them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(__name__ + "."):
            return None
        quoted, _, rest = name.removeprefix(__name__ + ".").partition(".")
        folder = _folder(urllib.parse.unquote(quoted))
        if rest:
            return folder.find_spec(name, path)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folder.path
        return spec


sys.meta_path.insert(0, _Finder)


# --- the user's errors -----------------------------------------------------------------------------------


@contextlib.contextmanager
def users_errors(doing: str) -> Iterator[None]:
    """Turn any exception of the user's code in the block into a ValueError that shows the user's own lines.

    Args:
        doing: what failed then, as "importing tools.py".
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit is no Exception
        lines = error_text(error)
        if isinstance(error, SyntaxError):
            lines += f"\n  {error.filename}:{error.lineno}: {(error.text or '').strip()}"
        else:
            for frame in traceback.extract_tb(error.__traceback__):
                if not frame.filename.startswith((_OURS, importlib.__file__, "<frozen importlib")):
                    lines += f"\n  {frame.filename}:{frame.lineno}: {frame.line}"
        raise ValueError(f"{doing} failed: {lines}") from error


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
