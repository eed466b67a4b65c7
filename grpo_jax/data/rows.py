"""Turns rows into examples; every row is checked before anything is compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_jax.data.sources import Source, read_source
from grpo_jax.text import has_lone_surrogate, nearest, shorten
from grpo_jax.types import Example, Message

# Arguments that every reward gets from the trainer; a column of the same name would hide one.
RESERVED_COLUMNS = frozenset(
    ("completions", "prompts", "completion_ids", "statuses", "trainer_state", "log_metric", "log_extra")
)
ROLES = ("system", "user", "assistant", "tool")


def load_examples(
    source: Source, *, system_prompt: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Read and check every row of a data set, in the source's order; at least one.

    Args:
        source: a file's path (`rows.jsonl`, .json, .csv, .tsv, .parquet; text also compressed), a slice of one
            (`rows.jsonl[:95%]`), `tfds:name[/config][:split]`, a hub id `owner/name[:split]`, a list of dicts,
            or a datasets.Dataset.
        system_prompt: system message for the rows that do not start with one; None adds nothing.
        columns: our column → the data set's, e.g. {"prompt": "question"}; None renames nothing.

    Raises:
        FileNotFoundError: the file does not exist; names those that do.
        ValueError: a row is not usable (says place, reason and fix), there are no rows, or the source cannot
            be loaded.
    """
    examples = []
    for place, row in read_source(source):
        try:
            examples.append(_example(row, place, system_prompt, columns or {}))
        except RecursionError:
            raise ValueError(f"{place}: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not examples:
        name = source if isinstance(source, str | os.PathLike) else f"the given {type(source).__name__}"
        raise ValueError(f'{name} contains no rows; a row is an object like {{"prompt": "…", "answer": "…"}}')
    return examples


def _example(row: Any, place: str, system_prompt: str | None, columns: Mapping[str, str]) -> Example:
    if not isinstance(row, dict):
        raise ValueError(
            f'a row must be a JSON object like {{"prompt": "…", "answer": "…"}}, got {show_json(row)}'
        )
    if has_lone_surrogate(json.dumps(row, ensure_ascii=False, default=repr, skipkeys=True)):
        raise ValueError(
            "a string contains half of a surrogate pair, which no file can represent; write the whole character"
        )
    if absent := [theirs for theirs in columns.values() if theirs not in row]:
        raise ValueError(
            f"has no column {absent[0]!r}, which dataset_columns names; it has {', '.join(map(repr, row))}"
        )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    row = kept | {ours: row[theirs] for ours, theirs in columns.items()}
    for name in ("prompt", "answer"):
        if name not in row:
            raise ValueError(
                f"has no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}; rename one, or map it "
                f'with dataset_columns, e.g. {{"{name}": "…"}}'
            )
    if odd := [name for name in row if not isinstance(name, str)]:
        raise ValueError(f"the name of a column must be text, as rewards get columns by name, got {odd[0]!r}")
    if reserved := sorted(RESERVED_COLUMNS & set(row)):
        raise ValueError(
            f"column {reserved[0]!r} has the name of an argument that rewards get from the trainer; rename it"
        )
    answer, messages = _answer(row.pop("answer")), read_prompt(row.pop("prompt"))
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return Example(messages, answer, row, place)


def _answer(value: Any) -> str:
    """The answer as the tool would return it; a value that is not text becomes its JSON text."""
    if isinstance(value, str):
        return value
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = None
    if text is None or _holds_null(value):
        raise ValueError(
            "'answer' must be text, as the tool returns it, or a JSON value without null, "
            f"got {show_json(value)}; write it as text"
        )
    return text


def _holds_null(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_null, inner))


def row_tools(example: Example, names: Iterable[str], column: str = "tools") -> list[str]:
    """The tools that a row shows, in the order of `names`: those that its column `tools` names, or all.

    Args:
        example: null in its column means all, as does its absence.
        column: `must_state` for the tools whose results the final text must state.

    Raises:
        ValueError: the column is not a list of at least one tool's name.
    """
    names, wanted = list(names), parsed_text(example.extra.get(column))
    if wanted is None:
        return names
    if not isinstance(wanted, list) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise ValueError(
            f"{example.source}: column {column!r} must be a list of tool names, as {show_json(names[:1])}, or null "
            f"for {'all' if column == 'tools' else 'the last result'}, got {show_json(wanted)}"
        )
    for name in wanted:
        if name not in names:
            near = nearest(name, names)[0]
            raise ValueError(f"{example.source}: column {column!r}: unknown tool {name!r}; nearest: {near}")
    return [name for name in names if name in wanted]


# Messages


def read_prompt(prompt: Any, name: str = "prompt") -> list[Message]:
    """A prompt as the chat messages that templates read.

    A tool call may be recorded with its arguments as JSON text; Qwen2.5's template would quote that
    text once more, so the text is parsed.

    Args:
        prompt: text, which becomes one message of the user, or a list of messages.
        name: what errors call it.

    Raises:
        ValueError: it is neither, a message or one of its tool calls is not usable, or no turn of the
            assistant can follow.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError(f"{name!r} must be text or a list of chat messages, got {show_json(prompt)}")
    if not prompt:
        raise ValueError(f"{name!r} is empty; it needs at least one message from the user")
    messages = [_message(message, f"{name!r} message {i}") for i, message in enumerate(prompt, start=1)]
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise ValueError(
            f"the last message of {name!r} must have the role user or tool, got {last['role']!r}"
        )
    if last["role"] == "user" and not last["content"].strip():
        raise ValueError(f"{name!r} is empty: the user's last message has no text")
    return messages


def _message(message: Any, which: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{which} must be {{"role": …, "content": …}}, got {show_json(message)}')
    if message.get("role") not in ROLES:
        raise ValueError(
            f"{which}: role must be one of {', '.join(ROLES)}, got {show_json(message.get('role'))}"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    is_call = message["role"] == "assistant" and calls
    if not isinstance(content, str) and not (is_call and content is None):
        raise ValueError(f"{which}: content must be text, got {show_json(content)}")
    if not is_call:
        return message
    if not isinstance(calls, list):
        raise ValueError(f"{which}: tool_calls must be a list, got {show_json(calls)}")
    read = []
    for call in calls:
        if (function := recorded_call(call)) is None:
            raise ValueError(
                f'{which}: a tool call must be {{"function": {{"name": text, "arguments": object}}}}, '
                f"got {show_json(call)}"
            )
        read.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": read}


def recorded_call(call: Any) -> dict[str, Any] | None:
    """A recorded call's {"name", "arguments"}, with the arguments as an object; None if it is not a call.

    Args:
        call: {"name", "arguments"}, also inside {"function": …}; the arguments may be JSON text.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = parsed_text(function.get("arguments"))
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else None


# JSON


def parsed_text(value: Any) -> Any:
    """The value of JSON text, the only form of lists and objects in a CSV cell; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def show_json(value: Any) -> str:
    """A value in a message to the user: as JSON, and short."""
    return shorten(json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True), 80)
