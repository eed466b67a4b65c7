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
from typing import Any

from grpo_jax.tools.call import execute
from grpo_jax.tools.user_code import error_text

_START_LIMIT = 120.0  # seconds for importing the user's tools, which may pull in heavy libraries


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
            outcome, text = self._ask(line, self._timeout)
        except TimeoutError:
            outcome, text = "timeout", _overtime(name, self._timeout)
        except (EOFError, OSError, ValueError) as error:
            outcome, text = "crash", f"Error: {name} {self._cause_of_death(error)}"
        if outcome in ("timeout", "crash"):
            self.close()
        return text, outcome

    def stop(self) -> None:
        """Kill the worker and what it started; a call under way ends as a crash."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the worker; the next call starts another."""
        self.stop()
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> None:
        self.close()
        # The parent's own sys.path: the worker imports what the parent would.
        program = f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.tools import worker; worker.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # a set prints alike in every worker and every run
            start_new_session=True,  # Ctrl-C is for the parent, and a tool's own children die with it
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            state, why = self._ask(self._setup, _START_LIMIT)
        except TimeoutError:
            state, why = "error", f"importing the tools took over {_START_LIMIT:g} s"
        except (EOFError, OSError, ValueError) as error:
            state, why = "error", f"importing the tools {self._cause_of_death(error)}"
        if state != "ready":
            self.close()
            raise RuntimeError(f"a tool worker did not start: {why}")

    def _ask(self, line: str, timeout: float) -> tuple[str, str]:
        answer = json.loads(self._exchange(line, timeout))
        match answer:
            case ["ready" | "ok" | "error" | "crash" as outcome, str(text)]:
                return outcome, text
        raise ValueError("it wrote into the worker's pipe")

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


def _overtime(name: str, timeout: float) -> str:
    return f"Error: {name} did not finish within {timeout:g} s"


class InlineLane:
    """One thread of this process. A tool that hangs keeps its thread; the next call gets a new one.

    Args:
        functions_of: row → its functions by name.
        timeout: seconds per call.
        lax: strings may stand for numbers and booleans.
        result_limit: characters.
    """

    def __init__(
        self,
        functions_of: Callable[[Hashable], dict[str, Callable]],
        timeout: float,
        lax: bool,
        result_limit: int,
    ):
        self._functions_of = functions_of
        self._timeout = timeout
        self._options = (lax, result_limit)
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
            return _overtime(name, self._timeout), "timeout"

    def stop(self) -> None:
        """A thread cannot be killed: a call under way goes on until its time limit."""

    def close(self) -> None:
        """Let the thread end after what it is doing; the next call starts another."""
        if self._inbox is not None:
            self._inbox.put(None)
        self._inbox = None

    def _serve(self, inbox: queue.SimpleQueue, outbox: queue.SimpleQueue) -> None:
        while (request := inbox.get()) is not None:
            line, row = request
            try:
                # Read again from text, so that a tool which changes its arguments does not change the call.
                outbox.put(execute(self._functions_of(row), *json.loads(line), *self._options))
            except BaseException as error:  # make_tools() failed, or the tool raised KeyboardInterrupt
                outbox.put((f"Error: {error_text(error)}", "crash"))
