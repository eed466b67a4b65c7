"""Strict reading of a model's turn: reasoning, text and tool calls, with typed reasons.

A turn is a sequence of plain text, `<think>…</think>` blocks and
`<tool_call>…</tool_call>` blocks, read once from left to right. Nothing is
repaired: a call counts only as the model wrote it, because a repaired call would
be rewarded for tokens that the policy never sampled.

Two families write the inside of a call differently:

* Hermes (Qwen2.5, Qwen3): `{"name": "add", "arguments": {"a": 1}}`
* Qwen3-Coder: `<function=add>\n<parameter=a>\n1\n</parameter>\n</function>`
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal

from grpo_jax.text import has_lone_surrogate, nearest, shorten
from grpo_jax.types import Message, ParsedTurn, Schema, ToolCall

CallFormat = Literal["hermes", "qwen3_coder"]

# Python's own limit depends on how deep the caller already stands, and deeper
# values would break the template or the tool later. Real arguments nest below 10.
MAX_DEPTH = 64

_NAMES_LISTED = 10  # of the tools, for a call that names none of them

_OPENINGS = re.compile("<think>|<tool_call>")
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_FUNCTION = re.compile(r"<function=([^>\n]*)>")
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>")
_AS_JSON = {"True": "true", "False": "false", "None": "null"}  # Qwen3.5's template writes Python's words


class _CallError(ValueError):
    """Why a call does not parse; the message begins with the typed reason."""


def parse_turn(text: str, schemas: list[Schema], call_format: CallFormat = "hermes") -> ParsedTurn:
    """Read one model turn; never raises, for any text.

    A `<tool_call>` inside a think block is not a call. A think block that is never
    closed takes the rest of the turn: no call, no error. If any call does not parse,
    the turn has no calls at all, `error` holds the first reason and `content` the raw text.

    Args:
        text: the decoded turn without its end-of-turn token.
        schemas: the tools' JSON schemas, as the chat template gets them.

    Returns:
        The parsed turn. `error` begins with one of "unterminated", "not JSON",
        "not an object", "no name", "unknown tool", "arguments not an object",
        "trailing text". Whitespace around `content` and `reasoning_content` is stripped
        when the turn holds a block; a turn without one is returned as it is.
    """
    read_call = _read_qwen3_coder if call_format == "qwen3_coder" else _read_hermes
    tools = {schema["function"]["name"]: schema["function"] for schema in schemas}
    plain, thoughts, calls, spans = [], [], [], []
    at = 0
    while opening := _OPENINGS.search(text, at):
        plain.append(text[at : opening.start()])
        if opening[0] == "<think>":
            end = text.find("</think>", opening.end())
            thoughts.append(text[opening.end() : end if end >= 0 else None].strip())
            at = end + len("</think>") if end >= 0 else len(text)
            continue
        try:
            call, at = read_call(text, opening.end(), tools)
        except _CallError as error:
            close = text.find("</tool_call>", opening.end())
            end = close + len("</tool_call>") if close >= 0 else len(text)
            return ParsedTurn(text, None, (), str(error), spans=((opening.start(), end),))
        calls.append(call)
        spans.append((opening.start(), at))
    content = "".join(plain) + text[at:]
    return ParsedTurn(
        content=content.strip() if thoughts or calls else content,
        reasoning_content="\n".join(thoughts) if thoughts else None,
        calls=tuple(calls),
        error=None,
        spans=tuple(spans),
    )


def assistant_message(turn: ParsedTurn) -> Message:
    """The turn as the chat message that rewards and templates see.

    Keys that do not apply (`reasoning_content`, `tool_calls`) are absent.
    """
    message: Message = {"role": "assistant", "content": turn.content}
    if turn.reasoning_content is not None:
        message["reasoning_content"] = turn.reasoning_content
    if turn.calls:
        message["tool_calls"] = [call_message(call) for call in turn.calls]
    return message


def call_message(call: ToolCall) -> Message:
    """One call in the form of a message's `tool_calls`."""
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _skip_whitespace(text: str, at: int) -> int:
    found = _WHITESPACE.match(text, at)
    return found.end() if found else at


def _expect_close(text: str, at: int, what: str) -> int:
    """Index after `</tool_call>`, which must follow `at` with only whitespace between."""
    at = _skip_whitespace(text, at)
    if text.startswith("</tool_call>", at):
        return at + len("</tool_call>")
    end = text.find("</tool_call>", at)
    if end < 0:
        raise _CallError("unterminated: <tool_call> is never closed by </tool_call>")
    raise _CallError(f"trailing text: {_quote(text[at:end])} stands between {what} and </tool_call>")


def _check_tool(name: str, tools: dict[str, Schema]) -> None:
    if name not in tools:
        names = list(tools)
        if len(names) > _NAMES_LISTED:
            names = nearest(name, tools, _NAMES_LISTED)
        raise _CallError(f"unknown tool: {_quote(name)}; try one of {', '.join(names)}")


def _quote(text: str) -> str:
    """`text` for a message to the model: on one line and short."""
    return repr(shorten(text, 61))


# --- Hermes: one JSON object -------------------------------------------------


def _read_hermes(text: str, at: int, tools: dict[str, Schema]) -> tuple[ToolCall, int]:
    """The call whose `<tool_call>` ends at `at`, and the index after its `</tool_call>`."""
    try:
        value, end = _read_json(text, _skip_whitespace(text, at))
    except ValueError as error:
        if text.find("</tool_call>", at) < 0:
            raise _CallError("unterminated: <tool_call> is never closed by </tool_call>") from None
        raise _CallError(f"not JSON: {error}") from None
    end = _expect_close(text, end, "the JSON value")
    if not isinstance(value, dict):
        raise _CallError(f"not an object: a call is a JSON object, got {_kind(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise _CallError('no name: a call needs "name", a non-empty string')
    _check_tool(name, tools)
    arguments = value.get("arguments")
    if not isinstance(arguments, dict):
        got = _kind(arguments) if "arguments" in value else "nothing"
        raise _CallError(f'arguments not an object: "arguments" must be a JSON object, got {got}')
    return ToolCall(name, arguments), end


def _kind(value: Any) -> str:
    """JSON's own word for the type of `value`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return kinds[type(value)]


# --- Strict JSON -------------------------------------------------------------


def _read_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and the index after it.

    Raises:
        ValueError: it is not JSON by RFC 8259 (NaN and Infinity are not), an object
            repeats a key, a number is out of range, a string holds half of a surrogate
            pair, or it nests deeper than `MAX_DEPTH`.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos - at}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_values(value)
    return value, end


def _check_values(value: Any) -> None:
    """Refuse what the json module reads but a tool, a file or a template could not carry."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str) and has_lone_surrogate(item):
                raise ValueError("a string holds half of a surrogate pair")
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {_quote(key)} occurs twice in one object")
        result[key] = value
    return result


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"number {_quote(number)} is out of range")
    return value


def _integer(number: str) -> int:
    try:
        return int(number)
    except ValueError:  # Python refuses integers beyond sys.get_int_max_str_digits()
        raise ValueError(f"number of {len(number)} digits is out of range") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_float=_finite, parse_int=_integer, parse_constant=_no_constant
)


# --- Qwen3-Coder: one XML element per parameter ------------------------------


def _read_qwen3_coder(text: str, at: int, tools: dict[str, Schema]) -> tuple[ToolCall, int]:
    """The call whose `<tool_call>` ends at `at`, and the index after its `</tool_call>`."""
    function = _FUNCTION.match(text, _skip_whitespace(text, at))
    if not function or not function[1]:
        if text.find("</tool_call>", at) < 0:
            raise _CallError("unterminated: <tool_call> is never closed by </tool_call>")
        raise _CallError("no name: a call begins with <function=NAME>")
    _check_tool(function[1], tools)
    properties = tools[function[1]].get("parameters", {}).get("properties", {})
    arguments: dict[str, Any] = {}
    at = _skip_whitespace(text, function.end())
    while parameter := _PARAMETER.match(text, at):
        end = text.find("</parameter>", parameter.end())
        if end < 0:
            raise _CallError(f"unterminated: <parameter={parameter[1]}> is never closed by </parameter>")
        if parameter[1] in arguments:
            raise _CallError(f"arguments not an object: parameter {_quote(parameter[1])} occurs twice")
        value = text[parameter.end() : end].removeprefix("\n").removesuffix("\n")
        if has_lone_surrogate(value):
            raise _CallError("not JSON: a parameter holds half of a surrogate pair")
        arguments[parameter[1]] = _typed_value(value, properties.get(parameter[1], {"type": "string"}))
        at = _skip_whitespace(text, end + len("</parameter>"))
    if not text.startswith("</function>", at):
        if text.find("</function>", at) < 0:
            raise _CallError(f"unterminated: <function={function[1]}> is never closed by </function>")
        raise _CallError(
            f"arguments not an object: expected <parameter=NAME>, got {_quote(text[at : at + 30])}"
        )
    return ToolCall(function[1], arguments), _expect_close(text, at + len("</function>"), "</function>")


def _typed_value(text: str, schema: Schema) -> Any:
    """A parameter's text as the value that its schema asks for.

    The format has no quotes, so only the schema distinguishes 5 from "5". Text that does not
    read as any allowed type stays text: the argument check then names the parameter.
    """
    types = _json_types(schema)
    if "null" in types and text in ("null", "None"):
        return None
    if types - {"null"} == {"string"}:
        return text
    written = _AS_JSON.get(text, text)
    try:
        value, end = _read_json(written, _skip_whitespace(written, 0))
    except ValueError:
        return text
    if _skip_whitespace(written, end) < len(written):  # something follows the value
        return text
    kind = _json_type(value)
    admitted = kind in types or (kind == "integer" and "number" in types)
    return value if admitted or "string" not in types else text


def _json_types(schema: Schema) -> set[str]:
    """Names of the JSON types that a schema admits; empty when it names none."""
    declared = schema.get("type", [])
    types = {declared} if isinstance(declared, str) else set(declared)
    for option in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        types |= _json_types(option)
    if not types and "enum" in schema:
        types = {_json_type(value) for value in schema["enum"]}
    return types | {"null"} if schema.get("nullable") else types


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
