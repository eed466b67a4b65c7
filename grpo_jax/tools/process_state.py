"""Puts back what the user's code changes of this process and the run relies on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# What jax and the libraries under it read from the environment, some of it only when a device is first used.
_RUNS_VARIABLES = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NCCL_")
# Not SIGALRM, SIGVTALRM and SIGPROF: the user's time limits, which the run does not set.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD", "SIGPIPE", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]

# Set by a tool worker, in which the user's code alone runs: nothing is restored there.
has_own_process = False
_lock = threading.Lock()
_open_blocks = 0  # blocks of `users_code` that have not ended, of all threads
_found: tuple = ()  # what the first of them found


@contextlib.contextmanager
def users_code(function: Callable | None = None) -> Iterator[None]:
    """Run the user's code in the block, in this process; restore the process state that the run relies on.

    Restored: the working directory, `sys.path`, and the environment variables that jax and XLA read; in the
    main thread also `sys.stdout`, `sys.stderr`, signal handlers (except those of the timers, which stay the
    user's), a timer left on, warning filters, numpy's handling of floating-point errors, and the event loop
    policy. Not restored, since the run never reads them: the global random generators of `random` and numpy,
    which are the user's to seed. Where blocks of several threads overlap, the last one restores what the first
    found.

    Args:
        function: runs in the block; it finds the working directory and the variables that its file set
            while it was imported.
    """
    global _open_blocks, _found
    if has_own_process:
        yield
        return
    with _lock:
        if not _open_blocks:
            _found = (_working_directory(), list(sys.path), _environment())
        _open_blocks += 1
        directory, path, environment = _found
    is_main = threading.current_thread() is threading.main_thread()
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    users_folder = getattr(getattr(module, "__loader__", None), "folder", None)  # of user_code.py
    left = getattr(users_folder, "left", None)
    try:
        with _main_threads_state_restored() if is_main else contextlib.nullcontext():
            if left is not None:
                _set_directory(left[0])
                _set_variables(left[1])
            yield
    finally:
        with _lock:
            _open_blocks -= 1
            if not _open_blocks:
                _set_directory(directory)
                if sys.path != path:
                    sys.path[:] = path
                if _environment() != environment:
                    _set_variables(_runs_variables(environment))


# --- of all threads --------------------------------------------------------------------------------------


def directory_and_variables() -> tuple[str | None, dict[str, str]]:
    """The working directory, None where it was removed, and the environment variables that jax and XLA read."""
    return _working_directory(), _runs_variables(_environment())


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


# --- of the main thread ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _main_threads_state_restored() -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    streams = sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    timer = signal.getitimer(signal.ITIMER_REAL)[0]
    filters = list(warnings.filters)
    floats = numpy.geterr() if hasattr(numpy, "geterr") else None
    policy = _loop_policy()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
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
