"""Runs one tool call in this process; every problem becomes a string that begins with `Error: `."""

from __future__ import annotations

import atexit
import contextlib
import errno
import inspect
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from grpo_jax.text import nearest, replace_lone_surrogates, shorten
from grpo_jax.tools.arguments import check_arguments, show
from grpo_jax.tools.load import Toolbox, named_functions
from grpo_jax.tools.process_state import users_code
from grpo_jax.tools.user_code import error_text, message_of

_MESSAGE_LIMIT = 1000  # characters of an exception's message that a model gets to see
_NAMES_LISTED = 20
OUT_OF_MEMORY = "ran out of memory"


def run_tool(
    call: str | Mapping[str, Any],
    tools: Toolbox | Mapping[str, Callable] | Iterable[Callable],
    lax: bool = False,
) -> str:
    """Check a call, run its tool here, return the tool's string.

    Args:
        call: `{"name": …, "arguments": {…}}` as JSON text or as a dict.
        lax: strings may stand for numbers and booleans.

    Returns:
        The tool's result as a string, or a message that begins with `Error: `. Never raises for anything that
        the call or the tool does. It has no time limit; `ToolRunner` has one.
    """
    if isinstance(call, str | bytes):
        try:
            call = json.loads(call)
        except (ValueError, RecursionError) as error:
            return f"Error: the call is not JSON: {shorten(message_of(error), _MESSAGE_LIMIT)}"
    if not isinstance(call, Mapping) or "name" not in call:
        return 'Error: a call is an object {"name": …, "arguments": {…}}'
    tools, name = tools.functions if isinstance(tools, Toolbox) else tools, call["name"]
    functions: Any = tools if isinstance(tools, Mapping) else named_functions([*tools], "tools")
    with users_code(functions.get(name) if isinstance(name, str) else None):
        return execute(functions, name, call.get("arguments", {}), lax)[0]


def execute(
    functions: Mapping[str, Callable], name: Any, arguments: Any, lax: bool = False, limit: int | None = None
) -> tuple[str, str]:
    """Run one call; returns its text and outcome.

    Args:
        limit: characters that a result may have; None for any number.

    Returns:
        The text for the model, and "ok", "error" or "crash" (`Outcome` values, as plain strings for workers).
    """
    text, outcome = _attempt(functions, name, arguments, lax)
    if outcome == "ok" and limit is not None and len(text) > limit:
        text = f"Error: {name} returned {len(text)} characters, more than the limit of {limit}"
    if outcome == "ok" and text.startswith("Error:"):
        outcome = "error"
    return replace_lone_surrogates(text), outcome


def _attempt(functions: Mapping[str, Callable], name: Any, arguments: Any, lax: bool) -> tuple[str, str]:
    if not isinstance(name, str):
        shown = ", ".join(list(functions)[:_NAMES_LISTED])
        return f"Error: a tool's name must be text, got {show(name)}. Available: {shown}", "error"
    if name not in functions:
        near = functions if len(functions) <= _NAMES_LISTED else nearest(name, functions, 5)
        return f"Error: unknown tool {name[:60]!r}. Available: {', '.join(near)}", "error"
    if not isinstance(arguments, dict):
        return f"Error: the arguments of {name} must be a JSON object", "error"
    try:
        arguments = check_arguments(functions[name], arguments, lax)
    except Exception as error:  # mostly ValueError; also nesting too deep, or a value's own __eq__
        return f"Error: wrong arguments for {name}: {shorten(message_of(error), _MESSAGE_LIMIT)}", "error"
    try:
        return str(call_users(functions[name], **arguments)), "ok"
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        return f"Error: {name} called sys.exit({error.code!r})", "crash"
    except MemoryError:
        return f"Error: {name} {OUT_OF_MEMORY}", "crash"
    except BaseException as error:  # cancelled tasks and pytest's outcomes are not Exceptions
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # from mmap or fork
            return f"Error: {name} {OUT_OF_MEMORY}", "crash"
        return f"Error: {name} raised {shorten(error_text(error), _MESSAGE_LIMIT)}", "error"


# --- event loops -----------------------------------------------------------------------------------------


class _Loops(list):
    """The event loops of a thread: one for all its calls, and one for each nested call."""

    task = None  # the async function that runs

    def idle(self):
        """The thread's current loop, made on first use; another where that one is running or was closed."""
        import asyncio

        self[:] = [loop for loop in self if not loop.is_closed()]
        for loop in self:
            if not loop.is_running():
                return loop
        loop = None
        with contextlib.ExitStack() as quiet:
            quiet.enter_context(contextlib.suppress(RuntimeError))
            if threading.current_thread() is threading.main_thread():  # as the warning
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            loop = asyncio.get_event_loop()  # one that the user's file set or asked for when it was imported
        if loop is None or loop.is_closed() or loop.is_running():
            loop = asyncio.new_event_loop()
        self.append(loop)
        return loop

    def run(self, awaitable: Any) -> Any:
        """Wait for an async function's result in an idle loop."""
        import asyncio

        loop, outer = self.idle(), self.task
        asyncio.set_event_loop(loop)
        self.task = loop.create_task(_finish(awaitable))
        try:
            return loop.run_until_complete(self.task)
        finally:
            self.task = outer

    def cancel(self) -> bool:
        """Cancel the async function that runs, for another thread to call; returns whether one did."""
        task = self.task
        if task is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just been closed
                task.get_loop().call_soon_threadsafe(task.cancel)
        return task is not None

    def close(self) -> None:
        """End the loops, and the tasks that still wait in them."""
        while self:
            loop = self.pop()
            if not loop.is_closed():
                with sys.modules["asyncio"].Runner(loop_factory=lambda loop=loop: loop):
                    pass

    def __del__(self):  # its thread has ended
        for loop in self:
            loop.close()


class _Thread(threading.local):
    def __init__(self):
        self.loops = _Loops()


_thread = _Thread()
atexit.register(_thread.loops.close)  # the main thread's


def call_users(function: Callable, /, **arguments: Any) -> Any:
    """Call a user function, async or not, with the thread's own event loop, which outlives the call.

    So a client, a semaphore or a background task that an async function keeps works in its next call, and a
    plain function that asks for the current loop, or runs one (asyncio.run), finds it idle. It also works
    inside a running loop, as in a notebook's cell; that one is suspended meanwhile.
    """
    with no_running_loop():
        if "asyncio" in sys.modules:  # else no loop is needed; the import takes 50 ms
            sys.modules["asyncio"].set_event_loop(_thread.loops.idle())
        result = function(**arguments)
        return _thread.loops.run(result) if inspect.isawaitable(result) else result


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def thread_loops() -> _Loops:
    """This thread's event loops, for the code that ends the thread or its calls."""
    return _thread.loops


@contextlib.contextmanager
def no_running_loop() -> Iterator[None]:
    """Set the loop that this thread runs aside, so that another may run."""
    asyncio: Any = sys.modules.get("asyncio")
    running = asyncio._get_running_loop() if hasattr(asyncio, "_get_running_loop") else None
    if running is None:
        yield
        return
    task = asyncio.current_task(running)
    if task is not None:
        asyncio._leave_task(running, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(running)
        asyncio.set_event_loop(running)
        if task is not None:
            asyncio._enter_task(running, task)
