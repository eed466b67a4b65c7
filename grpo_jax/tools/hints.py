"""What the type hints of a tool mean: one reading, shared by schemas and argument checks."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

from grpo_jax.tools.docstrings import read_docstring, split_choices

# A hint's container → what a tool is given for a JSON array.
ARRAYS: dict[Any, type] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
}
OBJECTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument of a tool.

    Args:
        hint: its type hint, `Annotated` stripped.
        required: it has no default.
        nullable_default: its default is None, so an explicit null means the same.
        text: its documentation on one line, None when there is none.
        choices: the values of a closing `(choices: [...])` in its documentation.
    """

    hint: Any
    required: bool
    nullable_default: bool
    text: str | None
    choices: list | None


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a TypedDict or dataclass."""

    hint: Any
    required: bool


def location(function: Callable) -> str:
    """`file:line, name`, for messages to the user."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__name__", repr(function))
    return f"{code.co_filename}:{code.co_firstlineno}, {name}" if code else name


def parameters(function: Callable) -> dict[str, Parameter]:
    """Argument name → what is known of it, in the order of the signature.

    Raises:
        ValueError: a hint names something that does not exist.
    """
    if inspect.ismethod(function):
        return _parameters(function.__func__, True)
    return _parameters(function, False)


@functools.lru_cache(maxsize=4096)  # bounded: tools made per trajectory must not pile up
def _parameters(function: Callable, skip_first: bool) -> dict[str, Parameter]:
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        raise ValueError(f"{location(function)}: a type hint cannot be read: {error}") from error
    texts = read_docstring(inspect.getdoc(function) or "").arguments
    signature = list(inspect.signature(function).parameters.values())[int(skip_first) :]
    return {p.name: _parameter(p, hints.get(p.name, Any), texts.get(p.name)) for p in signature}


def _parameter(parameter: inspect.Parameter, hint: Any, text: str | None) -> Parameter:
    text, choices = split_choices(text) if text else (None, None)
    required = parameter.default is inspect.Parameter.empty
    return Parameter(hint, required, parameter.default is None, text, choices)


def is_union(hint: Any) -> bool:
    """`Union[...]`, `Optional[...]` or `X | Y`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def is_enum(hint: Any) -> bool:
    """An Enum class."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def is_record(hint: Any) -> bool:
    """A TypedDict or a dataclass: a JSON object with known keys."""
    return typing.is_typeddict(hint) or (isinstance(hint, type) and dataclasses.is_dataclass(hint))


def container(hint: Any) -> Any:
    """`list[int]` → list, `list` → list, `int` → int."""
    return typing.get_origin(hint) or hint


@functools.lru_cache(maxsize=4096)
def record_fields(record: type) -> dict[str, Field]:
    """Key → hint and whether it must be given, for a TypedDict or a dataclass."""
    hints = typing.get_type_hints(record)
    if typing.is_typeddict(record):
        # Under `from __future__ import annotations` the class itself does not see NotRequired.
        extras = typing.get_type_hints(record, include_extras=True)
        optional = {k for k, h in extras.items() if typing.get_origin(h) is typing.NotRequired}
        required = set(record.__required_keys__) - optional
        return {key: Field(hint, key in required) for key, hint in hints.items()}
    return {f.name: Field(hints[f.name], _has_no_default(f)) for f in dataclasses.fields(record) if f.init}


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
