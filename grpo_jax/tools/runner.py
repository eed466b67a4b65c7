"""Runs the tool calls of a batch: concurrently, isolated, within limits, equal calls once.

Calls run in lanes, each one call at a time under a time limit: a worker process, or a thread of this process.
A lane never raises for what a tool does; if a tool hangs or crashes, the lane is replaced for the next call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from grpo_jax.text import shorten
from grpo_jax.tools.call import execute, thread_loops
from grpo_jax.tools.isolation import Isolation
from grpo_jax.tools.load import Toolbox, pickled
from grpo_jax.tools.process_state import users_code
from grpo_jax.tools.user_code import error_text
from grpo_jax.types import Outcome, ToolCall, ToolResult

PURITY_SAMPLE = 8  # calls a step that `verify_purity` runs again
USUAL = Isolation()
_CANCEL_GRACE = 0.2  # seconds for an async tool to end when it is cancelled
_START_LIMIT = 120.0  # seconds for importing the user's tools, which may import heavy libraries


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one tool call may take.

    Args:
        seconds: wall time (`tool_timeout`).
        memory_mb: MiB of data that a worker process may hold on top of its start (`tool_memory_limit`).
        characters: length of a result (`tool_result_limit`); a longer one becomes an error that says so.
    """

    seconds: float = 5.0
    memory_mb: int = 2048
    characters: int = 20_000


class ToolRunner:
    """Runs tool calls; never raises for anything that a tool or a model does.

    Args:
        executor: "process" (isolated worker processes) or "inline" (threads of this process, for tools with
            state; a tool that hangs or uses too much memory is then abandoned but not stopped).
        limits: what a call may take; the limit on memory holds for "process" only.
        workers: calls that run at once; default the CPU count, at least 2, and 1 inline, where tools may
            share state.
        lax: strings may stand for numbers and booleans.
        cache: equal calls of a step run once. Tools with state are never cached.

    Raises:
        ValueError: an unknown executor, tools with state in processes, functions given in Python that
            cannot be copied into them, or an isolation where there are none.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        executor: Literal["process", "inline"] = "process",
        limits: Limits = Limits(),
        workers: int | None = None,
        lax: bool = False,
        cache: bool = True,
        isolation: Isolation = USUAL,
    ):
        if executor not in ("process", "inline"):  # users call this class too
            raise ValueError(f"tool_executor must be one of process, inline, got {executor!r}")
        if executor == "inline" and isolation != USUAL:
            raise ValueError(
                "tool_env and tool_sandbox are for worker processes, and inline tools run in this one; set "
                "tool_executor to process, or leave them out"
            )
        if executor == "process" and toolbox.stateful:
            raise ValueError(
                f"the tools of {toolbox.source} have state, which worker processes do not share; "
                "set tool_executor to inline"
            )
        self._toolbox = toolbox
        self._rows: Mapping[Hashable, Mapping[str, Any]] = {}
        self._row_functions: dict[Hashable, dict[str, Callable]] = {}
        workers = workers or (1 if executor == "inline" else max(2, os.cpu_count() or 2))
        if executor == "inline":
            self._lanes = [
                _InlineLane(self._functions_of, next(iter(toolbox.functions.values()), None), limits, lax)
                for _ in range(workers)
            ]
        else:
            setup = {
                "script": toolbox.script,
                "module": toolbox.module,
                "pickled": None if toolbox.script or toolbox.module else pickled(toolbox.functions),
                "limits": dataclasses.asdict(limits),
                "lax": lax,
            }
            self._lanes = [_ProcessLane(setup, limits.seconds, isolation) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tools")
        self._free: queue.LifoQueue = queue.LifoQueue()  # the lane used last comes first: its worker runs
        for lane in reversed(self._lanes):
            self._free.put(lane)
        self._share = cache and not toolbox.stateful
        self._results: dict[str, Future[ToolResult]] = {}
        self._asked = self._ran = 0
        self._closed = False

    @property
    def cache_hit_rate(self) -> float:
        """Share of the calls since `start_step` that an equal call had answered."""
        return 1 - self._ran / self._asked if self._asked else 0.0

    def start_step(
        self, rows: Sequence[Mapping[str, Any]] | Mapping[Hashable, Mapping[str, Any]] = ()
    ) -> None:
        """Forget the cached results and the rows' objects.

        Args:
            rows: row → the data set's columns for `make_tools(row)`; a sequence where rows are counted from 0.
        """
        self._results = {}
        self._asked = self._ran = 0
        self._row_functions = {}
        self._rows = rows if isinstance(rows, Mapping) else dict(enumerate(rows))

    def run(self, calls: Sequence[ToolCall], rows: Sequence[Hashable] | None = None) -> list[ToolResult]:
        """Run calls: those of different rows at once, those of one row in order.

        Args:
            calls: those of a turn, of all rows.
            rows: the row of each call; by default each call has a separate row.

        Returns:
            One result per call, in the order of `calls`.

        Raises:
            RuntimeError: the runner is closed, or a worker cannot load the tools.
        """
        return [result.result() for result in self.submit(calls, rows)]

    def submit(
        self, calls: Sequence[ToolCall], rows: Sequence[Hashable] | None = None, again: bool = False
    ) -> list[Future[ToolResult]]:
        """Start calls as `run` does and return at once; `result()` of a future waits, and raises as `run`.

        A row's earlier calls must have ended, or those of the two batches may run out of order.

        Args:
            calls, rows: as in `run`.
            again: bypass the cache, which stays unchanged.
        """
        self._check_open()
        rows = range(len(calls)) if rows is None else rows
        share = self._share and not again
        results = self._results if share else {}
        futures = []
        units: dict[Hashable, list[tuple[Future[ToolResult], str, str]]] = {}
        for i, (call, row) in enumerate(zip(calls, rows, strict=True)):
            line = _encode(call)
            key = line if share else f"{i} {line}"  # equal keys are run once
            if key not in results:
                results[key] = Future()
                units.setdefault(row, []).append((results[key], call.name, line))
            futures.append(results[key])
        if share:
            self._asked += len(calls)
            self._ran += sum(map(len, units.values()))
        for row, requests in units.items():
            self._pool.submit(self._serve, row, requests)
        return futures

    def close(self) -> None:
        """End the workers; further calls raise."""
        self._closed = True
        for lane in self._lanes:
            lane.stop()
        self._pool.shutdown()
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> ToolRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _functions_of(self, row: Hashable) -> dict[str, Callable]:
        """The row's own functions where `make_tools` makes them, else those shared by all rows."""
        if self._toolbox.factory is None:
            return self._toolbox.functions
        if row not in self._row_functions:
            self._row_functions[row] = self._toolbox.made_for(self._rows.get(row, {}))
        return self._row_functions[row]

    def _serve(self, row: Hashable, requests: list[tuple[Future[ToolResult], str, str]]) -> None:
        """Run one row's calls on a lane; there are as many lanes as threads."""
        lane = self._free.get()
        try:
            for future, name, line in requests:
                self._check_open()
                text, outcome, seconds = lane.call(name, line, row)
                self._check_open()  # what `close` killed is no crash of the tool
                future.set_result(ToolResult(text, Outcome(outcome), seconds))
        except BaseException as error:  # raised where these calls are waited for
            for future, _, _ in requests:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._free.put(lane)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this ToolRunner is closed; make a new one")


def _encode(call: ToolCall) -> str:
    """The call as a JSON line; arguments that are not JSON are left out, which `execute` reports as an error."""
    try:
        return json.dumps([call.name, call.arguments])
    except (TypeError, ValueError, RecursionError):
        return json.dumps([str(call.name), None])


class PurityCheck:
    """Tests that tools are pure, on which the sharing of equal calls rests (`--verify_purity`).

    The first good call of each function in a step, at most `PURITY_SAMPLE`, runs a second time, in the
    background. A second run that times out or crashes is not counted.

    Args:
        runner: it ran the calls, and must not be asked for anything else from `start` to `finish`.
        report: gets a line for each function whose results differ, once.

    Raises:
        ValueError: the tools have state, so that equal calls may differ.
    """

    def __init__(self, toolbox: Toolbox, runner: ToolRunner, report: Callable[[str], None]):
        if toolbox.stateful:
            raise ValueError(
                f"verify_purity needs tools without state, and those of {toolbox.source} have state: equal "
                "calls may differ; leave verify_purity off"
            )
        self._runner, self._report = runner, report
        self._reported: set[str] = set()
        self._firsts: list[tuple[ToolCall, ToolResult]] = []
        self._seconds: list[Future[ToolResult]] = []

    def start(self, done: Iterable[tuple[ToolCall, ToolResult]]) -> None:
        """Begin to run a sample of the step's calls, given with their results, again."""
        good: dict[str, tuple[ToolCall, ToolResult]] = {}
        for call, result in done:
            if result.outcome is Outcome.OK:
                good.setdefault(call.name, (call, result))
        self._firsts = list(good.values())[:PURITY_SAMPLE]
        self._seconds = self._runner.submit([call for call, _ in self._firsts], again=True)

    def finish(self) -> int:
        """Wait for the second results; returns how many of the step's functions answered differently."""
        different = 0
        for (call, first), future in zip(self._firsts, self._seconds, strict=True):
            second = future.result()
            if second.text == first.text or second.outcome not in (Outcome.OK, Outcome.ERROR):
                continue
            different += 1
            if call.name not in self._reported:
                self._reported.add(call.name)
                given = shorten(json.dumps(call.arguments, ensure_ascii=False), 200)
                was, now = (shorten(repr(result.text), 200) for result in (first, second))
                self._report(
                    f"Warning: the tool {call.name} is not pure: with {given} it returned {was} and then {now}. "
                    "Equal calls of a step share one result; make it deterministic, or set tool_cache to false"
                )
        return different


# --- lanes -----------------------------------------------------------------------------------------------


class _ProcessLane:
    """One worker process, started at the first call and after each hang or crash.

    Args:
        setup: the worker's first line (see `worker.py`).
        timeout: seconds per call.
    """

    def __init__(self, setup: dict[str, Any], timeout: float, isolation: Isolation):
        self._setup = json.dumps(setup)
        self._timeout = timeout
        self._isolation = isolation
        self._process: Any = None  # a subprocess.Popen once it is started

    def call(self, name: str, line: str, row: Hashable) -> tuple[str, str, float]:
        """Run one call, given as a JSON line; returns the text for the model, the outcome and the tool's seconds.

        Raises:
            RuntimeError: the worker cannot load the tools that this process could load.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        began = time.perf_counter()
        try:
            outcome, text, seconds = self._ask(line, self._timeout)
        except TimeoutError:
            outcome, text, seconds = "timeout", _overtime(name, self._timeout), self._timeout
        except (EOFError, OSError, ValueError) as error:
            text, seconds = f"Error: {name} {self._cause_of_death(error)}", time.perf_counter() - began
            outcome = "crash"
        if outcome in ("timeout", "crash"):
            self.close()
        return text, outcome, seconds

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
            [*self._isolation.prefix, sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # a set prints alike in every worker and every run
            env=self._isolation.environment(os.environ) | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the parent, and a tool's own children die with it
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            state, why, _ = self._ask(self._setup, _START_LIMIT)
        except TimeoutError:
            state, why = "error", f"importing the tools took over {_START_LIMIT:g} s"
        except (EOFError, OSError, ValueError) as error:
            state, why = "error", f"importing the tools {self._cause_of_death(error)}"
        if state != "ready":
            self.close()
            raise RuntimeError(f"a tool worker did not start: {why}")

    def _ask(self, line: str, timeout: float) -> tuple[str, str, float]:
        """Write one line to the worker and read its answer."""
        deadline = time.monotonic() + timeout

        def wait(fd: int, event: int) -> None:
            poller = select.poll()
            poller.register(fd, event)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError

        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        data = line.encode() + b"\n"
        while data:
            wait(stdin, select.POLLOUT)
            data = data[os.write(stdin, data) :]
        chunks: list[bytes] = []
        while not chunks or not chunks[-1].endswith(b"\n"):
            wait(stdout, select.POLLIN)
            chunks.append(os.read(stdout, 1 << 16))
            if not chunks[-1]:
                raise EOFError("it closed its pipe")
        match json.loads(b"".join(chunks)):
            case ["ready" | "ok" | "error" | "crash" as outcome, str(text), float(seconds)]:
                return outcome, text, seconds
        raise ValueError("it wrote into the worker's pipe")

    def _cause_of_death(self, error: Exception) -> str:
        try:
            code = self._isolation.exit_code(self._process.wait(timeout=0.5))
        except subprocess.TimeoutExpired:
            return f"broke its worker process: {error or type(error).__name__}"
        if code >= 0:
            return f"ended its worker process with exit code {code}"
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        return f"crashed its worker process ({signal.Signals(-code).name}{hint})"


def _overtime(name: str, timeout: float) -> str:
    return f"Error: {name} did not finish within {timeout:g} s"


class _InlineLane:
    """One thread of this process. A tool that hangs keeps its thread, unless it is async; the next call gets a new one.

    Args:
        sample: one of the functions, which says from which file they come.
    """

    def __init__(
        self,
        functions_of: Callable[[Hashable], dict[str, Callable]],
        sample: Callable | None,
        limits: Limits,
        lax: bool,
    ):
        self._functions_of, self._sample = functions_of, sample
        self._timeout = limits.seconds
        self._options = (lax, limits.characters)
        self._inbox: queue.SimpleQueue | None = None

    def call(self, name: str, line: str, row: Hashable) -> tuple[str, str, float]:
        """Run one call, given as a JSON line; returns the text for the model, the outcome and the tool's seconds."""
        if self._inbox is None:
            self._inbox, self._outbox, self._loops = queue.SimpleQueue(), queue.SimpleQueue(), None
            threading.Thread(target=self._serve, args=(self._inbox, self._outbox), daemon=True).start()
        with users_code(self._sample):  # in this thread: a tool that hangs in its own must not keep it open
            self._inbox.put((line, row))
            try:
                return self._outbox.get(timeout=self._timeout)
            except queue.Empty:
                try:  # an async tool ends here, and its event loop stays usable for the next call
                    cancelled = self._loops is not None and self._loops.cancel()
                    self._outbox.get(timeout=_CANCEL_GRACE if cancelled else 0)
                except queue.Empty:
                    self.close()
                return _overtime(name, self._timeout), "timeout", self._timeout

    def stop(self) -> None:
        """A thread cannot be killed: a call under way continues until its time limit."""

    def close(self) -> None:
        """Let the thread end after what it is doing; the next call starts another."""
        if self._inbox is not None:
            self._inbox.put(None)
        self._inbox = None

    def _serve(self, inbox: queue.SimpleQueue, outbox: queue.SimpleQueue) -> None:
        self._loops = loops = thread_loops()
        while (request := inbox.get()) is not None:
            (line, row), began = request, time.perf_counter()
            try:
                # Read again from text, so that a tool which changes its arguments does not change the call.
                name, arguments = json.loads(line)
                lax, limit = self._options
                text, outcome = execute(self._functions_of(row), name, arguments, lax, limit)
            except BaseException as error:  # make_tools() failed, or the tool raised KeyboardInterrupt
                text, outcome = f"Error: {error_text(error)}", "crash"
            outbox.put((text, outcome, time.perf_counter() - began))
            del line, row, request
        loops.close()
