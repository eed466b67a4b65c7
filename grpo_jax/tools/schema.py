"""The JSON schema of a tool: what the model sees of a Python function."""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.tools import hints

logger = logging.getLogger(__name__)
_MODEL_LIMITS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "default"),
)


def get_schema(function: Callable) -> dict[str, Any]:
    """The function's schema, byte for byte that of `transformers.utils.get_json_schema` where that works.

    Where it does not (NumPy or `name (int): text` docstrings, undocumented arguments, TypedDict, dataclass,
    limits in `Annotated`), the schema is read here in the same form.

    Returns:
        `{"type": "function", "function": {"name", "description", "parameters", "return"?}}`.

    Raises:
        ValueError: it has no docstring, an argument has no type hint or cannot be given by name.
    """
    _check(function)
    parameters = hints.parameters(function)
    limited = any(p.limits is not None for p in parameters.values())
    schema = None if limited else _transformers_schema(function)
    if schema is None:
        schema = read_schema(function)
        missing = [name for name, p in parameters.items() if p.text is None]
        if missing:
            logger.warning(
                "%s: the docstring does not describe %s; the model sees the name and type only",
                hints.location(function),
                ", ".join(missing),
            )
    return schema


def signature_line(function: Callable) -> str:
    """`add(a: int, b: int) -> str`, for the start-up print."""
    return f"{function.__name__}{hints.signature(function)}"


def read_schema(function: Callable) -> dict[str, Any]:
    """The function's schema, read without transformers.

    Raises:
        ValueError: a type refers to itself, which a schema cannot say, or to a name that does not exist, or
            is none.
    """
    doc = hints.read_docstring(inspect.getdoc(function) or "")
    parameters = hints.parameters(function)
    try:
        properties = {name: _property(p) for name, p in parameters.items()}
    except RecursionError as error:
        raise ValueError(
            f"{hints.location(function)}: a type hint refers to itself; use dict there"
        ) from error
    except Exception as error:  # what is no type, or a name inside a TypedDict that does not exist
        raise ValueError(f"{hints.location(function)}: a type hint cannot be read: {error}") from error
    for name, parameter in parameters.items():
        for hint in _unknown_types(parameter.hint):
            logger.warning(
                "%s: the type %r of argument '%s' has no JSON form; the model sees no type and the tool "
                "gets the JSON value as it is",
                hints.location(function),
                hint,
                name,
            )
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [name for name, p in parameters.items() if p.required]:
        schema["required"] = required
    output = {"name": function.__name__, "description": doc.description, "parameters": schema}
    hint = hints.type_hints(function).get("return")
    returned = {} if hint is None else type_schema(hint)
    if returned or hint is Any:
        output["return"] = returned if doc.returns is None else returned | {"description": doc.returns}
    return {"type": "function", "function": output}


def type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of one type hint; `{}`, which allows anything, for a type that JSON does not know."""
    hint = hints.meaning(hint)
    kind = hints.container(hint)
    if hints.is_enum(hint) or kind is typing.Literal:
        values = [written for written, _ in hints.allowed_values(hint)]
        types = list(dict.fromkeys(hints.SCALARS[type(v)] for v in values))
        return {"type": types[0] if len(types) == 1 else types, "enum": values}
    members = typing.get_args(hint)
    if hints.is_union(hint):
        return _union_schema(members)
    if hints.is_record(hint):
        fields = hints.record_fields(hint)
        properties = {key: _property(field) for key, field in fields.items()}
        if hints.is_model(hint):  # it may say limits, formats and defaults that type hints do not
            own = _pydantics(hint.model_json_schema).get("properties", {})
            for key in fields.keys() & own.keys():
                _limit(properties[key], own[key])
        required = [key for key, field in fields.items() if field.required]
        schema = {"type": "object", "properties": properties}
        return schema | {"required": required} if required else schema
    if kind in hints.SCALARS:
        return {"type": hints.SCALARS[kind]}
    if kind in hints.ARRAYS:
        if kind is tuple and members and Ellipsis not in members:
            return {"type": "array", "prefixItems": [type_schema(m) for m in members]}
        return {"type": "array", "items": type_schema(members[0])} if members else {"type": "array"}
    if kind in hints.OBJECTS:
        schema = {"type": "object"}
        return schema | {"additionalProperties": type_schema(members[1])} if len(members) == 2 else schema
    return {}


def _check(function: Callable) -> None:
    where = hints.location(function)
    if not inspect.getdoc(function):
        raise ValueError(f"{where}: a tool needs a docstring, which is what the model reads; add one")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{where}: a tool returns its result, and this one yields; return a list or text")
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            raise ValueError(f"{where}: argument '{p}' cannot be given by name; write it as a named argument")
        if p.annotation is p.empty and p.name in ("self", "cls"):
            raise ValueError(f"{where}: it is a method without its object; export object.{function.__name__}")
        if p.annotation is p.empty:
            raise ValueError(
                f"{where}: argument '{p.name}' has no type hint; write {p.name}: int (or its type)"
            )
        if type(p.default).__name__ == "FieldInfo":  # Python would pass it to the tool
            raise ValueError(
                f"{where}: argument '{p.name}' has pydantic's Field as its default; write it inside the type, as in "
                f'{p.name}: Annotated[int, Field(ge=0, description="…")] = 3, without "= 3" where it is required'
            )


def _transformers_schema(function: Callable) -> dict[str, Any] | None:
    """transformers' own schema; None where it refuses the function."""
    from transformers.utils import chat_template_utils

    torch_check = getattr(chat_template_utils, "is_torch_available", None)
    # It would import torch, whose CUDA libraries may clash with jax's, only to ask if a hint is a tensor.
    chat_template_utils.is_torch_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]
    try:
        return chat_template_utils.get_json_schema(function)
    except Exception:  # its errors share no base class; read_schema says what is wrong
        return None
    finally:
        chat_template_utils.is_torch_available = torch_check  # pyright: ignore[reportPrivateImportUsage]


def _property(parameter: hints.Field) -> dict[str, Any]:
    schema = type_schema(parameter.hint)
    if parameter.limits is not None:
        _limit(schema, _pydantics(parameter.limits.json_schema))
    if parameter.choices is not None:
        schema["enum"] = parameter.choices
    if parameter.text is not None:
        schema["description"] = parameter.text
    return schema


def _unknown_types(hint: Any, records: tuple = ()) -> Iterator[Any]:
    """The types without a JSON form in a hint, its members, items and fields; pydantic reads those of its models.

    Args:
        records: the records that contain the hint.
    """
    hint = hints.meaning(hint)
    if hints.is_record(hint):
        if not hints.is_model(hint) and hint not in records:
            for field in hints.record_fields(hint).values():
                yield from _unknown_types(field.hint, (*records, hint))
    elif hints.is_union(hint) or hints.container(hint) in (*hints.ARRAYS, *hints.OBJECTS):
        for inner in typing.get_args(hint):
            yield from _unknown_types(inner, records)
    elif hint not in (Any, object, None, type(None), ...) and not type_schema(hint):
        yield hint


def _union_schema(members: tuple) -> dict[str, Any]:
    subtypes = [type_schema(m) for m in members if m is not type(None)]
    if len(subtypes) == 1:
        schema = subtypes[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in subtypes):
        names = sorted({s["type"] for s in subtypes})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": subtypes}
    return schema | {"nullable": True} if type(None) in members else schema


def _pydantics(schema: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """pydantic's own schema; empty where a type in it has no JSON form for pydantic."""
    try:
        return schema()
    except Exception:
        return {}


def _limit(schema: dict[str, Any], own: dict[str, Any]) -> None:
    """Adds what pydantic's own schema of a value says and ours does not."""
    if "nullable" in schema:
        own = next((one for one in own.get("anyOf", ()) if one.get("type") != "null"), own)
    if isinstance(schema.get("items"), dict) and isinstance(own.get("items"), dict):
        _limit(schema["items"], own["items"])
    named = schema.keys() & {"type", "enum", "anyOf"}
    limits = own if not named and "$ref" not in own else {k: own.get(k) for k in _MODEL_LIMITS}
    schema |= {k: v for k, v in limits.items() if v is not None and k not in ("title", "description")}
