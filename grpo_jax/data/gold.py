"""Gold calls, the calls that answer a row; used by fine-tuning, `--check` and the figure tool_call_schema_match."""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from grpo_jax.data.rows import parsed_text, recorded_call, row_tools, show_json
from grpo_jax.text import shorten
from grpo_jax.tools import ToolRunner
from grpo_jax.tools.hints import container, is_record, is_union, meaning, record_fields
from grpo_jax.types import Example, Outcome, ToolCall, ToolResult

CallAndResult = tuple[ToolCall, ToolResult]


def gold_calls(example: Example, functions: Mapping[str, Callable]) -> list[ToolCall]:
    """The calls that answer a row, in order, from its column `tool_call`, else from `ground_truth`.

    Arrow and Parquet pad every call with the parameters of all tools, set to null. From both columns a null is
    dropped:
    1. if the function has no such parameter;
    2. if the parameter has a default and does not accept null; for all other parameters null is kept;
    3. inside objects, except for the required keys of a TypedDict, dataclass or pydantic model.
    From `ground_truth` every other key that the function does not have is dropped too, and integral floats
    become int, as the original TRL recipe's data needs. In `tool_call` both are kept.

    Args:
        functions: tool name → function, whose signature says which parameters are its own.

    Returns:
        The calls; none for a row that has neither column, or null in it.

    Raises:
        ValueError: a call is not {"name": text, "arguments": object}, or names an unknown tool or one
            that the row does not see.
    """
    column = "ground_truth" if example.extra.get("tool_call") is None else "tool_call"
    value = parsed_text(example.extra.get(column))
    try:
        gold = [
            _gold_call(call, functions, column == "ground_truth")
            for call in ([] if value is None else value if isinstance(value, list) else [value])
        ]
    except ValueError as error:
        raise ValueError(f"{example.source}: column {column!r}: {error}") from None
    seen = row_tools(example, functions) if gold else []
    for call in gold:
        if call.name not in seen:
            raise ValueError(
                f"{example.source}: column {column!r}: the row does not show the tool {call.name!r}, only "
                f"{', '.join(seen)}; add it to the column 'tools'"
            )
    return gold


def _gold_call(call: Any, functions: Mapping[str, Callable], original: bool) -> ToolCall:
    read = recorded_call(parsed_text(call))
    if read is None:
        raise ValueError(f'a call must be {{"name": text, "arguments": object}}, got {show_json(call)}')
    name, arguments = read["name"], read["arguments"]
    if name not in functions:
        raise ValueError(f"unknown tool {name!r}; the tools are {', '.join(functions)}")
    written = signature(functions[name]).parameters
    parameters = {key: p for key, p in written.items() if p.kind is not Parameter.VAR_KEYWORD}
    free, hints, kept = len(parameters) < len(written), {}, {}
    with contextlib.suppress(Exception):  # loading the tools has already reported it
        hints = typing.get_type_hints(functions[name])
    for key, value in arguments.items():
        parameter, hint = parameters.get(key), hints.get(key, Any)
        if value is None:
            if parameter is None:
                continue
            default = parameter.default
            if default is not Parameter.empty and default is not None and not _takes_null(hint):
                continue
        elif parameter is None and original and not free:
            continue
        kept[key] = _without_nulls(value, hint)
    return ToolCall(name, _integers(kept) if original else kept)


def unpadded(example: Example, functions: Mapping[str, Callable]) -> Any:
    """The column `tool_call` as rewards get it: as it was written, but without the nulls that `gold_calls` drops.

    Arguments that are JSON text are an object here. A call in OpenAI's form has `name` and `arguments` next to its
    `function`, so that a reward may read either.
    """
    value = example.extra.get("tool_call")
    try:
        gold = gold_calls(example, functions) if isinstance(value, dict | list) else []
    except ValueError:  # whoever needs the calls says so
        return value
    calls: list[Any] = value if isinstance(value, list) else [value]
    if not gold or not all(isinstance(call, dict) for call in calls):
        return value
    found = []
    for call, one in zip(calls, gold, strict=True):
        function, read = call.get("function"), {"name": one.name, "arguments": one.arguments}
        if isinstance(function, dict):
            # OpenAI's own way is text, for rewards that are written for it
            as_text = isinstance(function.get("arguments"), str)
            found.append(read | call | {"function": function if as_text else function | read})
        else:
            found.append(call | read)
    return found if isinstance(value, list) else found[0]


def _without_nulls(value: Any, hint: Any) -> Any:
    """A value without the nulls inside its objects, except those that its type hint requires."""
    hint = _some(hint, value)
    if isinstance(value, list):
        items = typing.get_args(hint) or (Any,)
        if container(hint) is tuple and Ellipsis not in items and len(items) == len(value):
            return [_without_nulls(inner, item) for inner, item in zip(value, items, strict=True)]
        return [_without_nulls(inner, items[0]) for inner in value]
    if not isinstance(value, dict):
        return value
    fields = record_fields(hint) if is_record(hint) else {}
    values = (*typing.get_args(hint), Any, Any)[1]  # of dict[str, hint]
    return {
        key: _without_nulls(inner, fields[key].hint if key in fields else values)
        for key, inner in value.items()
        if inner is not None or (key in fields and fields[key].required)
    }


def _integers(value: Any) -> Any:
    """A value with its integral floats converted to int: Arrow has one type for all numbers of a column."""
    if isinstance(value, dict):
        return {key: _integers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_integers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _takes_null(hint: Any) -> bool:
    if is_union(hint):
        return any(map(_takes_null, typing.get_args(hint)))
    return hint in (Any, object, None, type(None)) or None in typing.get_args(hint)  # or Literal[…, None]


def _some(hint: Any, value: Any) -> Any:
    """A hint without its `| None`; of several other members the record that has most keys of an object, or Any."""
    hint = meaning(hint)
    if not is_union(hint):
        return hint
    members = [meaning(member) for member in typing.get_args(hint) if member is not type(None)]
    if len(members) > 1 and isinstance(value, dict):
        given = {key for key, inner in value.items() if inner is not None}
        members = [m for m in members if is_record(m) and given <= record_fields(m).keys()]
        members = sorted(members, key=lambda m: -len(value.keys() & record_fields(m).keys()))[:1]
    return _some(members[0], value) if len(members) == 1 else Any


def gold_texts(example: Example, functions: Mapping[str, Callable]) -> list[str]:
    """A row's gold calls as the JSON that the model is to write."""
    return [
        json.dumps({"name": call.name, "arguments": call.arguments})
        for call in gold_calls(example, functions)
    ]


# Running them


def run_gold_calls(
    examples: Sequence[Example], functions: Mapping[str, Callable], runner: ToolRunner
) -> list[list[CallAndResult]]:
    """The gold calls of every row, each with its result."""
    gold = [gold_calls(example, functions) for example in examples]
    flat = [(i, call) for i, calls in enumerate(gold) for call in calls]
    runner.start_step([example.columns for example in examples])
    results = iter(runner.run([call for _, call in flat], [i for i, _ in flat]))
    return [[(call, next(results)) for call in calls] for calls in gold]


def failed_call(calls: Sequence[CallAndResult], answers: bool) -> CallAndResult | None:
    """The first gold call of a row that did not run; None where all did, or where its error is the answer.

    Args:
        answers: whether the last result is the row's answer.
    """
    return None if answers else next((pair for pair in calls if pair[1].outcome is not Outcome.OK), None)


def show_call(call: ToolCall, result: ToolResult) -> str:
    """A call and its result in a message to the user: `add(a=1) returns "Error: …"`."""
    arguments = shorten(", ".join(f"{name}={value!r}" for name, value in call.arguments.items()), 200)
    return f"{call.name}({arguments}) returns {shorten(json.dumps(result.text, ensure_ascii=False), 200)}"
