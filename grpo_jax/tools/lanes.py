"""Lanes: each runs one tool call at a time under a time limit, in a worker process or in a thread.

A lane's `call` never raises for what a tool does; a lane whose tool hangs or crashes is as good as new for
the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from grpo_jax.tools.calls import execute, function_table

_START_LIMIT = 120.0  # seconds for importing the user's tools, which may pull in heavy libraries
_ROOT = Path(__file__).resolve().parents[2]


class ProcessLane:
    """One worker process, started at the first call and after each hang or crash.

    Args:
        setup: the worker's first line (see `worker.py`).
        timeout: seconds per call.
    """

    def __init__(self, setup: dict[str, Any], timeout: float):
        self._setup = json.dumps(setup)
        self._timeout = timeout
        self._process: subprocess.Popen | None = None

    def call(self, name: str, line: str, row: Hashable) -> tuple[str, str]:
        """Run one call, given as a JSON line; returns the text for the model and the outcome.

        Raises:
            RuntimeError: the worker cannot load the tools that this process could load.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            outcome, text = json.loads(self._exchange(line, self._timeout))
        except TimeoutError:
            outcome, text = "timeout", f"Error: {name} did not finish within {self._timeout:g} s"
        except (EOFError, OSError, ValueError) as error:
            outcome, text = "crash", f"Error: {name} {self._cause_of_death(error)}"
        if outcome in ("timeout", "crash"):
            self.close()
        return text, outcome

    def forget(self) -> None:
        """Nothing to forget: a worker keeps no objects of rows."""

    def close(self) -> None:
        """End the worker and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def _start(self) -> None:
        self.close()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grpo_jax.tools.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent; and children of a tool die with it
            env={**os.environ, "PYTHONPATH": path},
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            state, why = json.loads(self._exchange(self._setup, _START_LIMIT))
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            state, why = "error", self._cause_of_death(error)
        if state != "ready":
            self.close()
            raise RuntimeError(f"a tool worker did not start: {why}")

    def _exchange(self, line: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        self._write(line.encode() + b"\n", deadline)
        chunks: list[bytes] = []
        while not chunks or not chunks[-1].endswith(b"\n"):
            _wait(self._process.stdout.fileno(), select.POLLIN, deadline)
            chunks.append(os.read(self._process.stdout.fileno(), 1 << 16))
            if not chunks[-1]:
                raise EOFError("it closed its pipe")
        return b"".join(chunks)

    def _write(self, data: bytes, deadline: float) -> None:
        while data:
            _wait(self._process.stdin.fileno(), select.POLLOUT, deadline)
            data = data[os.write(self._process.stdin.fileno(), data) :]

    def _cause_of_death(self, error: Exception) -> str:
        try:
            code = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return f"broke its worker process: {error or type(error).__name__}"
        if code >= 0:
            return f"ended its worker process with exit code {code}"
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        return f"crashed its worker process ({signal.Signals(-code).name}{hint})"


def _wait(fd: int, event: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(fd, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


class InlineLane:
    """One thread of this process. A tool that hangs keeps its thread; later calls get a new one.

    Args:
        functions: name → function, used for rows without objects of their own.
        factory: makes the functions of a row at its first call; None to share `functions`.
        timeout: seconds per call.
        lax: strings may stand for numbers and booleans.
        result_limit: characters.
    """

    def __init__(
        self,
        functions: dict[str, Callable],
        factory: Callable[[], list[Callable]] | None,
        timeout: float,
        lax: bool,
        result_limit: int,
    ):
        self._functions = functions
        self._factory = factory
        self._timeout = timeout
        self._options = (lax, result_limit)
        self._tables: dict[Hashable, dict[str, Callable]] = {}
        self._inbox: queue.SimpleQueue | None = None

    def call(self, name: str, line: str, row: Hashable) -> tuple[str, str]:
        """Run one call, given as a JSON line; returns the text for the model and the outcome."""
        if self._inbox is None:
            self._inbox, self._outbox = queue.SimpleQueue(), queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(self._inbox, self._outbox), daemon=True).start()
        self._inbox.put((line, row))
        try:
            return self._outbox.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            return f"Error: {name} did not finish within {self._timeout:g} s", "timeout"

    def forget(self) -> None:
        """Drop the rows' objects."""
        self._tables.clear()

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        if self._inbox is not None:
            self._inbox.put(None)
        self._inbox = None

    def _serve(self, inbox: queue.SimpleQueue, outbox: queue.SimpleQueue) -> None:
        while (request := inbox.get()) is not None:
            line, row = request
            try:
                # Read again from text, so that a tool which changes its arguments does not change the call.
                outbox.put(execute(self._table(row), *json.loads(line), *self._options))
            except BaseException as error:  # make_tools() failed, or the tool raised KeyboardInterrupt
                outbox.put((f"Error: {type(error).__name__}: {error}", "crash"))

    def _table(self, row: Hashable) -> dict[str, Callable]:
        if self._factory is None:
            return self._functions
        if row not in self._tables:
            self._tables[row] = function_table(self._factory())
        return self._tables[row]
