"""Tests the promise that tools are pure, on which the sharing of equal calls rests (`--verify_purity`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from grpo_jax.tools.load import Toolbox
from grpo_jax.tools.runner import ToolRunner
from grpo_jax.types import Outcome, ToolCall, ToolResult

SAMPLE = 8  # calls a step
_SHOWN = 200  # characters of the arguments and of each result


class PurityCheck:
    """Runs a sample of a step's calls a second time and reports functions whose results differ.

    The sample is the first good call of each function, at most `SAMPLE`. It runs beside the rest of the
    step: in the worker processes, or, with the inline executor, in the threads of this one. A second run
    that ends by time limit or crash proves nothing and is not counted.

    Args:
        toolbox: the tools.
        runner: that ran the calls; from `start` to `finish` it must not be asked for anything else.
        report: gets a line for each function that is found, once.

    Raises:
        ValueError: the tools have state, so that equal calls may differ.
    """

    def __init__(self, toolbox: Toolbox, runner: ToolRunner, report: Callable[[str], None]):
        if toolbox.stateful:
            raise ValueError(
                f"verify_purity needs tools without state, and those of {toolbox.source} have state: equal "
                "calls may differ; leave verify_purity off"
            )
        self._runner = runner
        self._report = report
        self._reported: set[str] = set()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="purity")
        self._firsts: list[tuple[ToolCall, ToolResult]] = []
        self._seconds: Future[list[ToolResult]] | None = None

    def start(self, done: Iterable[tuple[ToolCall, ToolResult]]) -> None:
        """Begin to run a sample of the step's calls again.

        Args:
            done: every call of the step with its result.
        """
        good: dict[str, tuple[ToolCall, ToolResult]] = {}
        for call, result in done:
            if result.outcome is Outcome.OK:
                good.setdefault(call.name, (call, result))
        self._firsts = list(good.values())[:SAMPLE]
        self._seconds = self._background.submit(self._runner.run_again, [call for call, _ in self._firsts])

    def finish(self) -> int:
        """Wait for the second results; returns how many of the step's functions answered differently."""
        seconds = self._seconds.result()
        different = 0
        for (call, first), second in zip(self._firsts, seconds, strict=True):
            if second.text != first.text and second.outcome in (Outcome.OK, Outcome.ERROR):
                different += 1
                self._say(call, first.text, second.text)
        return different

    def _say(self, call: ToolCall, first: str, second: str) -> None:
        if call.name not in self._reported:
            self._reported.add(call.name)
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            self._report(
                f"Warning: the tool {call.name} is not pure: with {_short(arguments)} it returned "
                f"{_short(repr(first))} and then {_short(repr(second))}. Equal calls of a step share one result; "
                "make it deterministic, or set tool_cache to false"
            )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
