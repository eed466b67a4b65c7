"""Checks a call's arguments against the tool's signature, and makes them what the signature says.

All problems of a call come in one message, in the words of the schema, so that a model can fix them at once.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.tools import hints

_PROBLEMS_SHOWN = 8
_VALUES_SHOWN = 20


def check_arguments(function: Callable, arguments: dict[str, Any], lax: bool = False) -> dict[str, Any]:
    """The arguments as the function wants them: integral floats as int, enum members, dataclasses.

    Args:
        arguments: what the model gave, as JSON values.
        lax: strings may stand for numbers and booleans.

    Returns:
        Keyword arguments for the function; those left out stay out.

    Raises:
        ValueError: arguments are unknown, missing, of a wrong type or outside an enum; names all of them.
    """
    known = hints.parameters(function)
    problems: list[str] = []
    converted: dict[str, Any] = {}
    for name, value in _read_keys(arguments, known, "", problems):
        before, choices = len(problems), known[name].choices
        converted[name] = _field(value, known[name], name, lax, problems)
        if value is None or choices is None or len(problems) > before:
            continue
        if not _chosen(value, choices) and not _chosen(converted[name], choices):
            problems.append(f"{_at(name)} must be {_one_of(choices)}, got {show(value)}")
    if problems:
        shown, more = problems[:_PROBLEMS_SHOWN], len(problems) - _PROBLEMS_SHOWN
        raise ValueError("; ".join(shown) + (f"; and {more} more" if more > 0 else ""))
    return converted


def _chosen(value: Any, allowed: list) -> bool:
    """Whether a value, or each item of an array, is among the choices of the documentation."""
    if isinstance(value, list):
        return all(_chosen(item, allowed) for item in value)
    return any(_same(value, one) for one in allowed)


def _field(value: Any, field: hints.Field, where: str, lax: bool, problems: list[str]) -> Any:
    if value is None and field.nullable_default:
        return None
    before = len(problems)
    converted = _convert(value, field.hint, where, lax, problems)
    if value is None and len(problems) > before and not field.required:
        problems[-1] += " (leave it out for its default)"
    if field.limits is not None and len(problems) == before:
        try:
            field.limits.validate_python(converted)  # what it converts itself is not taken
        except Exception as error:  # pydantic's own, or a validator's of the user
            _report(error, where, problems)
    return converted


def _convert(value: Any, hint: Any, where: str, lax: bool, problems: list[str]) -> Any:
    """The value as the hint wants it; on a mismatch, says so in `problems`."""
    hint = hints.meaning(hint)
    kind = hints.container(hint)
    if hints.is_union(hint):
        return _to_member(value, typing.get_args(hint), where, lax, problems)
    if kind is typing.Literal or hints.is_enum(hint):
        for written, meant in hints.allowed_values(hint):
            if _same(_from_text(value, type(written)) if lax else value, written):
                return meant
    elif hints.is_record(hint) and isinstance(value, dict):
        return _to_record(value, hint, where, lax, problems)
    elif kind in hints.ARRAYS and isinstance(value, list):
        return _to_array(value, hint, where, lax, problems)
    elif kind in hints.OBJECTS and isinstance(value, dict):
        return _to_object(value, hint, where, lax, problems)
    elif kind in hints.SCALARS:
        value = _from_text(value, kind) if lax else value
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
        if kind is float and type(value) is int:
            return value
        if type(value) is kind and (kind is not float or math.isfinite(value)):
            return value
    elif not (hints.is_record(hint) or kind in hints.ARRAYS or kind in hints.OBJECTS):
        return value  # Any, or a type that JSON does not know
    problems.append(f"{_at(where)} must be {describe(hint)}, got {show(value)}")
    return value


def _from_text(value: Any, kind: type) -> Any:
    """A string read as the scalar it spells; anything else as it is."""
    if not isinstance(value, str) or kind not in (int, float, bool):
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _to_member(value: Any, members: tuple, where: str, lax: bool, problems: list[str]) -> Any:
    fits, misfits = [], []
    for member in members:
        found: list[str] = []
        converted = _convert(value, member, where, lax, found)
        if found:
            misfits.append(found)
        else:
            fits.append(converted)
    if fits:  # a member that takes the value unchanged goes before one that converts it
        return next((f for f in fits if type(f) is type(value)), fits[0])
    inside = [f for f in misfits if not f[0].startswith(f"{_at(where)} must be ")]
    if inside:  # the right shape with a mistake in it: say which
        problems.extend(min(inside, key=len))
    else:
        kinds = " or ".join(describe(m) for m in members)
        problems.append(f"{_at(where)} must be {kinds}, got {show(value)}")
    return value


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return value == other


def _to_record(value: dict, record: type, where: str, lax: bool, problems: list[str]) -> Any:
    before = len(problems)
    fields, more = hints.record_fields(record), {}
    if hints.is_model(record) and record.model_config.get("extra") == "allow":
        more = {key: v for key, v in value.items() if key not in fields}
        value = {key: v for key, v in value.items() if key in fields}
    keys = {
        key: _field(v, fields[key], f"{where}.{key}", lax, problems)
        for key, v in _read_keys(value, fields, where, problems)
    } | more
    if hints.is_typeddict(record) or len(problems) > before:
        return keys
    try:
        if hints.is_model(record):
            # a strict model would refuse the JSON text of a date; ours are strict checks already
            return record.model_validate(keys, strict=False)
        return record(**keys)
    except Exception as error:  # __post_init__ and a model's validators are the user's
        _report(error, where, problems)
        return value


def _report(error: Any, where: str, problems: list[str]) -> None:
    """Say what refused a value: pydantic, place by place, or code of the user."""
    if not (type(error).__module__.startswith("pydantic") and hasattr(error, "errors")):
        problems.append(f"{_at(where)} is refused: {error}")
        return
    for one in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"])
        problems.append(f"{_at(where + place)} is refused: {one['msg']}")


def _read_keys(
    given: dict, fields: Mapping[str, hints.Field], where: str, problems: list[str]
) -> list[tuple]:
    """The known keys of an object with their values; reports the unknown and the missing."""
    prefix = f"{where}." if where else ""
    for key in given:
        if key not in fields:
            names = ", ".join(fields) or "none"
            problems.append(f"unknown {_at(prefix + str(key)[:60])} (known: {names})")
    for key, field in fields.items():
        if field.required and key not in given:
            problems.append(f"missing {_at(prefix + key)} ({describe(field.hint)})")
    return [(key, value) for key, value in given.items() if key in fields]


def _to_array(value: list, hint: Any, where: str, lax: bool, problems: list[str]) -> Any:
    kind, members = hints.container(hint), typing.get_args(hint)
    if kind is tuple and members and Ellipsis not in members:
        if len(members) != len(value):
            problems.append(f"{_at(where)} must have {len(members)} items, got {len(value)}")
            return value
        types = list(members)
    else:
        types = [members[0] if members else Any] * len(value)
    before = len(problems)
    items = [
        _convert(v, t, f"{where}[{i}]", lax, problems)
        for i, (v, t) in enumerate(zip(value, types, strict=True))
    ]
    if len(problems) > before:
        return value
    try:
        return hints.ARRAYS[kind](items)
    except TypeError:  # a set of arrays or objects
        problems.append(f"{_at(where)} must hold plain values only")
        return value


def _to_object(value: dict, hint: Any, where: str, lax: bool, problems: list[str]) -> dict:
    members = typing.get_args(hint)
    if len(members) != 2:
        return value
    # JSON has no other keys than strings, so a key always may spell its type.
    return {
        _convert(k, members[0], f"{where} key", True, problems): _convert(
            v, members[1], f"{where}.{str(k)[:60]}", lax, problems
        )
        for k, v in value.items()
    }


def describe(hint: Any) -> str:
    """The hint in the words of a JSON schema: `integer`, `one of "a", "b"`, `array or null`."""
    hint = hints.meaning(hint)
    kind = hints.container(hint)
    if hints.is_union(hint):
        return " or ".join(describe(m) for m in typing.get_args(hint))
    if hints.is_enum(hint) or kind is typing.Literal:
        return _one_of([written for written, _ in hints.allowed_values(hint)])
    if hints.is_record(hint) or kind in hints.OBJECTS:
        return "object"
    if kind in hints.ARRAYS:
        return "array"
    return hints.SCALARS.get(kind, "any value")


def show(value: Any) -> str:
    """A value in a message: its JSON type, and itself where that is short."""
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, str):
        return "string " + json.dumps(value[:40], ensure_ascii=False) + ("…" if len(value) > 40 else "")
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge integer"  # Python refuses to print beyond 4,300 digits
    return json.dumps(value, default=repr)


def _one_of(values: list) -> str:
    shown = ", ".join(json.dumps(v, ensure_ascii=False, default=repr) for v in values[:_VALUES_SHOWN])
    return f"one of {shown}" + (", …" if len(values) > _VALUES_SHOWN else "")


def _at(where: str) -> str:
    return f"'{where}'"
