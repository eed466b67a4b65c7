"""Runs the tool calls of a batch: concurrently, isolated, within limits, equal calls once."""

from __future__ import annotations

import json
import os
import queue
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from grpo_jax.tools.call import function_table
from grpo_jax.tools.lanes import InlineLane, ProcessLane
from grpo_jax.tools.load import Toolbox
from grpo_jax.types import Outcome, ToolCall, ToolResult

EXECUTORS = ("process", "inline")


class ToolRunner:
    """Runs tool calls and never raises for what a tool or a model does.

    Args:
        toolbox: the tools.
        executor: "process" (isolated worker processes) or "inline" (threads of this process, for tools with
            state; a tool that hangs or eats memory is then not stopped, only left behind).
        timeout: seconds per call.
        workers: calls that run at once; default the CPU count, at least 2, and 1 inline, where tools may
            share state.
        memory_limit_mb: MiB that a worker may map on top of its start; "process" only.
        result_limit: characters of a result; a longer one becomes an error that says so.
        lax: strings may stand for numbers and booleans.
        cache: equal calls of a step run once. Tools with state are never cached.

    Raises:
        ValueError: an unknown executor, a limit that is not positive, tools with state in processes.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        executor: str = "process",
        timeout: float = 5.0,
        workers: int | None = None,
        memory_limit_mb: int = 2048,
        result_limit: int = 20_000,
        lax: bool = False,
        cache: bool = True,
    ):
        limits = {"memory_limit_mb": memory_limit_mb, "result_limit": result_limit}
        _check(toolbox, executor, timeout=timeout, workers=workers, **limits)
        self._toolbox = toolbox
        self._row_functions: dict[Hashable, dict[str, Callable]] = {}
        workers = workers or (1 if executor == "inline" else max(2, os.cpu_count() or 2))
        if executor == "inline":
            self._lanes = [InlineLane(self._functions_of, timeout, lax, result_limit) for _ in range(workers)]
        else:
            setup = {
                "script": toolbox.script,
                "module": toolbox.module,
                "timeout": timeout,
                "memory_limit_mb": memory_limit_mb,
                "result_limit": result_limit,
                "lax": lax,
            }
            self._lanes = [ProcessLane(setup, timeout) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tools")
        self._free: queue.LifoQueue = queue.LifoQueue()  # the lane used last comes first: its worker is up
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

    def start_step(self) -> None:
        """Forget the cached results and the rows' objects."""
        self._results = {}
        self._asked = self._ran = 0
        self._row_functions = {}

    def run(self, calls: Sequence[ToolCall], rows: Sequence[Hashable] | None = None) -> list[ToolResult]:
        """Run calls: those of different rows at once, those of one row in order.

        Args:
            calls: the calls of a turn, of all rows.
            rows: the row of each call; default, each call is a row of its own.

        Returns:
            One result per call, in the order of `calls`.

        Raises:
            RuntimeError: the runner is closed, or a worker cannot load the tools.
        """
        return [result.result() for result in self.submit(calls, rows)]

    def submit(
        self, calls: Sequence[ToolCall], rows: Sequence[Hashable] | None = None
    ) -> list[Future[ToolResult]]:
        """Start calls as `run` does and return at once; `result()` of a future waits, and raises as `run`.

        A row's earlier calls must have ended, or those of the two batches may run out of order.
        """
        return self._submit(calls, range(len(calls)) if rows is None else rows, self._share)

    def run_again(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run calls past the cache, each as a row of its own; what the cache holds stays as it is."""
        futures = self._submit(calls, range(len(calls)), share=False)
        return [future.result() for future in futures]

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
        """The row's own functions where `make_tools` makes them, else everybody's."""
        if self._toolbox.factory is None:
            return self._toolbox.functions
        if row not in self._row_functions:
            self._row_functions[row] = function_table(self._toolbox.factory())
        return self._row_functions[row]

    def _submit(
        self, calls: Sequence[ToolCall], rows: Sequence[Hashable], share: bool
    ) -> list[Future[ToolResult]]:
        self._check_open()
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

    def _serve(self, row: Hashable, requests: list[tuple[Future[ToolResult], str, str]]) -> None:
        """Run one row's calls on a lane; there are as many lanes as threads."""
        lane = self._free.get()
        try:
            for future, name, line in requests:
                self._check_open()
                start = time.perf_counter()
                text, outcome = lane.call(name, line, row)
                self._check_open()  # what `close` killed is no crash of the tool
                future.set_result(ToolResult(text, Outcome(outcome), time.perf_counter() - start))
        except BaseException as error:  # whoever waits for these calls raises it
            for future, _, _ in requests:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._free.put(lane)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this ToolRunner is closed; make a new one")


def _encode(call: ToolCall) -> str:
    """The call as a JSON line; without arguments, which `execute` then refuses, where they are no JSON."""
    try:
        return json.dumps([call.name, call.arguments])
    except (TypeError, ValueError, RecursionError):
        return json.dumps([str(call.name), None])


def _check(toolbox: Toolbox, executor: str, **limits: float | None) -> None:
    if executor not in EXECUTORS:
        raise ValueError(f"tool_executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
    for name, limit in limits.items():
        if limit is not None and limit <= 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    if executor == "process" and toolbox.stateful:
        raise ValueError(
            f"the tools of {toolbox.source} have state, which worker processes do not share; "
            "set tool_executor to inline"
        )
    if executor == "process" and toolbox.script is None and toolbox.module is None:
        raise ValueError(
            "worker processes load tools by file or module, and this toolbox names none; "
            "make it with load_tools, or set tool_executor to inline"
        )
