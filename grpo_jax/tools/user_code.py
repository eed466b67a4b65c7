"""Imports the user's files, isolates the run from what they do, and reports which of their lines failed.

A user file is imported as a submodule of this module, whose name holds its folder:
`grpo_jax.tools.user_code./home/me/tools.my_tools`. Helper modules next to it become its siblings. So files
of equal name in two folders, or one named like an installed package, never meet in `sys.modules`, nothing is
added to `sys.path`, and a process that is started anew (spawn, forkserver) finds every such module by its name.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import threading
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import FrozenImporter, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

__path__: list[str] = []  # makes this module the parent of the user's modules

_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
# What jax and the libraries under it read from the environment, some of it only when a device is first used.
_RUNS_VARIABLES = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NCCL_")
# Not SIGALRM, SIGVTALRM and SIGPROF: the user's time limits, which the run does not set.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD", "SIGPIPE", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


def import_file(file: str | os.PathLike, option: str) -> tuple[ModuleType, Path]:
    """Run a Python file as a module that finds modules in its own folder first, as a script does.

    A file that is loaded already and has not changed since, nor its helpers, is not run again.

    Args:
        option: that names the file, for messages.

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
        return _home(str(path.parent)).run(path), path


def import_module(name: str) -> ModuleType:
    """Import the module that tool_functions_module names.

    Raises:
        ValueError: there is no such module, or it fails (with the user's lines).
    """
    if _is_absent(name):
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


def _is_absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True
    except Exception:  # a parent package of it fails: the import will say how
        return False


# --- the user's modules ----------------------------------------------------------------------------------


class _Home:
    """A folder with user files: imports in them are looked up there first.

    Their modules have separate builtins, with this object's `__import__`; no other module's imports change.
    """

    def __init__(self, folder: str):
        self.name = f"{__name__}.{urllib.parse.quote(folder, safe='/ ').replace('.', '%2E')}"
        self.folder = folder
        self.path = [folder]  # and what the user's files add to sys.path while they are imported
        self.left: tuple[str | None, dict[str, str]] | None = None  # directory and variables, where changed
        self._usual_path = list(sys.path)
        self._known: dict[str, bool] = {}
        self.builtins = vars(builtins) | {"__import__": self._import}
        self._importlib: Any = ModuleType("importlib", importlib.__doc__)
        self._importlib.__getattr__ = lambda name: getattr(importlib, name)
        self._importlib.import_module = self._import_module

    def run(self, path: Path) -> ModuleType:
        """Import one of the folder's files by its path; its name may be any."""
        self._forget_changed()
        spec = PathFinder.find_spec(path.stem, [self.folder])
        plain = spec is not None and spec.origin == str(
            path
        )  # no dot in it, no package of that name next to it
        name = path.stem if plain else path.name.replace("%", "%25").replace(".", "%2E")
        before = (_working_directory(), _runs_variables(_environment()))
        try:
            return importlib.import_module(f"{self.name}.{name}")
        finally:
            self.path += [e for e in sys.path if e not in self._usual_path and e not in self.path]
            if (after := (_working_directory(), _runs_variables(_environment()))) != before:
                self.left = after

    def find(self, name: str, path: list[str]) -> ModuleSpec | None:
        """Where the module of a full name is."""
        tail = name.rpartition(".")[2]
        if tail.endswith("%2Epy"):
            file = os.path.join(self.folder, urllib.parse.unquote(tail))
            spec = importlib.util.spec_from_file_location(name, file)
        else:
            spec = PathFinder.find_spec(name, path)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
            spec.loader.home = self
        return spec

    def _forget_changed(self) -> None:
        names = [name for name in sys.modules if name == self.name or name.startswith(self.name + ".")]
        loaders = [getattr(sys.modules[name], "__loader__", None) for name in names]
        if any(isinstance(one, _Loader) and one.state != _state(one.path) for one in loaders):
            for name in names:
                del sys.modules[name]
            self._known.clear()
            self.left = None

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
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
        if top in self._known:
            return self._known[top]
        if top in sys.builtin_module_names or FrozenImporter.find_spec(top) is not None:
            return False
        added = [entry for entry in sys.path if entry not in self._usual_path and entry not in self.path]
        own = PathFinder.find_spec(top, self.path + added)
        if own is None:
            return False
        usual = _usual_spec(top, [entry for entry in sys.path if entry not in added])
        if usual is not None and own.origin is not None and own.origin == importer:
            return False
        owns = usual is None or (own.loader is not None and not _same_file(own.origin, usual.origin))
        self._known[top] = owns
        self.path += added if owns else []
        return owns


class _Loader(SourceFileLoader):
    home: _Home

    def exec_module(self, module: ModuleType) -> None:
        self.state = _state(self.path)
        vars(module)["__builtins__"] = self.home.builtins
        super().exec_module(module)


class _Finder:
    """Finds the submodules of this module: homes, and the user's modules in them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(__name__ + "."):
            return None
        quoted, _, rest = name.removeprefix(__name__ + ".").partition(".")
        home = _home(urllib.parse.unquote(quoted))
        if rest:
            return home.find(name, path)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = home.path
        return spec


_homes: dict[str, _Home] = {}
sys.meta_path.insert(0, _Finder)


def _home(folder: str) -> _Home:
    if folder not in _homes:
        _homes[folder] = _Home(folder)
    return _homes[folder]


def _usual_spec(top: str, path: list[str]) -> ModuleSpec | None:
    """What any other `import` of a top-level name finds, given sys.path."""
    if top in sys.modules:
        return getattr(sys.modules[top], "__spec__", None)
    specs = (one.find_spec(top, path if one is PathFinder else None) for one in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def _state(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _same_file(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


# --- process state that the run relies on ----------------------------------------------------------------

has_own_process = (
    False  # set by a tool worker, in which the user's code alone runs: nothing is restored there
)
_lock = threading.Lock()
_inside = 0  # blocks of `users_code` that have not ended, of all threads
_shared: tuple = ()


@contextlib.contextmanager
def users_code(function: Callable | None = None) -> Iterator[None]:
    """Run the user's code in the block, in this process; restore the process state that the run relies on.

    Restored: the working directory, `sys.path`, and the environment variables that jax and XLA read; in the
    main thread also `sys.stdout`, `sys.stderr`, signal handlers (except those of the timers, which stay the
    user's), a timer left on, warning filters, numpy's handling of floating-point errors, and the event loop
    policy. Not restored, since the run never reads them: the global random generators of `random` and numpy,
    which are the user's to seed. Where blocks of several threads overlap, the last
    one restores what the first found.

    Args:
        function: that runs in the block; it finds the working directory and the variables that its file set
            while it was imported.
    """
    global _inside, _shared
    if has_own_process:
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    with _lock:
        if not _inside:
            _shared = (_working_directory(), list(sys.path), _environment())
        _inside += 1
        shared = _shared
    own = _mains_footing() if in_main else None
    home = _home_of(function)
    try:
        if home is not None and home.left is not None:
            _set_directory(home.left[0])
            _set_variables(home.left[1])
        yield
    finally:
        if own is not None:
            _restore_main(own)
        with _lock:
            _inside -= 1
            if not _inside:
                folder, path, environment = shared
                _set_directory(folder)
                if sys.path != path:
                    sys.path[:] = path
                if _environment() != environment:
                    _set_variables(_runs_variables(environment))


def _home_of(function: Callable | None) -> _Home | None:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(getattr(module, "__loader__", None), "home", None)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_directory(folder: str | None) -> None:
    if folder is not None and _working_directory() != folder:
        with contextlib.suppress(OSError):
            os.chdir(folder)


def _environment() -> dict:
    """All variables, as the system holds them: to decode every name takes 0.04 ms, a copy 0.001 ms."""
    return dict(getattr(os.environ, "_data", os.environ))


def _runs_variables(environment: dict) -> dict[str, str]:
    decoded = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    return {name: value for name, value in decoded.items() if name.startswith(_RUNS_VARIABLES)}


def _set_variables(variables: dict[str, str]) -> None:
    for name in _runs_variables(_environment()).keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _mains_footing() -> tuple:
    numpy: Any = sys.modules.get("numpy")
    return (
        (sys.stdout, sys.stderr),
        {number: signal.getsignal(number) for number in _SIGNALS},
        signal.getitimer(signal.ITIMER_REAL)[0],
        list(warnings.filters),
        numpy.geterr() if hasattr(numpy, "geterr") else None,
        _loop_policy(),
    )


def _restore_main(footing: tuple) -> None:
    (sys.stdout, sys.stderr), handlers, timer, filters, floats, policy = footing
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    if not timer and signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if warnings.filters != filters:
        warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]
        warnings._filters_mutated()  # pyright: ignore[reportAttributeAccessIssue]
    if floats is not None and sys.modules["numpy"].geterr() != floats:
        sys.modules["numpy"].seterr(**floats)
    if _loop_policy() is not policy:
        sys.modules["asyncio"].set_event_loop_policy(policy)


def _loop_policy() -> object | None:
    """The event loop policy that was set; None for the default."""
    asyncio: Any = sys.modules.get("asyncio")
    if not hasattr(asyncio, "events") or not hasattr(asyncio, "DefaultEventLoopPolicy"):
        return None
    policy = asyncio.events._event_loop_policy  # the public getter makes one, or warns
    return None if type(policy) is asyncio.DefaultEventLoopPolicy else policy


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
