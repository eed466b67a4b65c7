"""Runs one tool call in this process; every problem becomes a string that begins with `Error: `."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from grpo_jax.tools.arguments import check_arguments, show
from grpo_jax.tools.user_code import error_text, message_of

if TYPE_CHECKING:
    from grpo_jax.tools.load import Toolbox

_MESSAGE_LIMIT = 1000  # characters of an exception's message that a model gets to see
_NAMES_LISTED = 20
# Lone surrogates, which no tokenizer takes, become U+FFFD.
_SURROGATE = re.compile("[\ud800-\udfff]")


def run_tool(
    call: str | Mapping[str, Any],
    tools: Toolbox | Mapping[str, Callable] | Iterable[Callable],
    lax: bool = False,
) -> str:
    """Check a call, run its tool here, return the tool's string.

    Args:
        call: `{"name": …, "arguments": {…}}` as JSON text or as a dict.
        tools: a toolbox, functions, or name → function.
        lax: strings may stand for numbers and booleans.

    Returns:
        What the tool returned, as a string; or what is wrong, beginning with `Error: `. Never raises for
        what the call or the tool does. It has no time limit: `ToolRunner` does.
    """
    if isinstance(call, str | bytes):
        try:
            call = json.loads(call)
        except (ValueError, RecursionError) as error:
            return f"Error: the call is not JSON: {_cut(message_of(error))}"
    if not isinstance(call, Mapping) or "name" not in call:
        return 'Error: a call is an object {"name": …, "arguments": {…}}'
    return execute(function_table(tools), call["name"], call.get("arguments", {}), lax)[0]


def function_table(tools: Toolbox | Mapping[str, Callable] | Iterable[Callable]) -> dict[str, Callable]:
    """Name → function of a toolbox, a mapping or some functions."""
    tools = getattr(tools, "functions", tools)
    return dict(tools) if isinstance(tools, Mapping) else {f.__name__: f for f in tools}


def execute(
    functions: Mapping[str, Callable], name: Any, arguments: Any, lax: bool = False, limit: int | None = None
) -> tuple[str, str]:
    """Run one call and say what became of it.

    Args:
        functions: name → function.
        name: the tool's name, as the model gave it.
        arguments: its arguments, as JSON values.
        lax: strings may stand for numbers and booleans.
        limit: characters that a result may have; None for any number.

    Returns:
        The text for the model, and "ok", "error" or "crash" (`Outcome` values, as plain strings for workers).
    """
    text, outcome = _attempt(functions, name, arguments, lax)
    if outcome == "ok" and limit is not None and len(text) > limit:
        text = f"Error: {name} returned {len(text)} characters, more than the limit of {limit}"
    if outcome == "ok" and text.startswith("Error:"):
        outcome = "error"
    return _SURROGATE.sub("\ufffd", text), outcome


def _attempt(functions: Mapping[str, Callable], name: Any, arguments: Any, lax: bool) -> tuple[str, str]:
    if not isinstance(name, str) or name not in functions:
        return _unknown_tool(name, list(functions)), "error"
    if not isinstance(arguments, dict):
        return f"Error: the arguments of {name} must be a JSON object", "error"
    try:
        arguments = check_arguments(functions[name], arguments, lax)
    except Exception as error:  # mostly ValueError; also nesting too deep, or a value's own __eq__
        return f"Error: wrong arguments for {name}: {_cut(message_of(error))}", "error"
    try:
        result = functions[name](**arguments)
        if inspect.isawaitable(result):
            result = _wait_for(result)
        return str(result), "ok"
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        return f"Error: {name} called sys.exit({error.code!r})", "crash"
    except MemoryError:
        return f"Error: {name} ran out of memory", "crash"
    except BaseException as error:  # cancelled tasks and pytest's outcomes are not Exceptions
        return f"Error: {name} raised {_cut(error_text(error))}", "error"


def _wait_for(awaitable: Any) -> Any:
    """The result of an async tool, also where this thread already runs an event loop (a notebook)."""
    import asyncio

    async def finish():
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    box: list[Any] = []

    def in_thread():
        try:
            box.append((asyncio.run(finish()), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    result, error = box[0]
    if error is not None:
        raise error
    return result


def _unknown_tool(name: Any, names: list[str]) -> str:
    if not isinstance(name, str):
        return f"Error: a tool's name must be text, got {show(name)}. Available: {', '.join(names[:_NAMES_LISTED])}"
    shown = name[:60]
    if len(names) > _NAMES_LISTED:
        names = difflib.get_close_matches(shown, names, 5, 0.0)
    return f"Error: unknown tool {shown!r}. Available: {', '.join(names)}"


def _cut(text: str) -> str:
    return text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + "…"
