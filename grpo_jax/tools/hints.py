"""What the type hints of a tool mean: one reading, shared by schemas and argument checks."""

from __future__ import annotations

import collections
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
    collections.deque: collections.deque,
    collections.abc.Set: set,
    collections.abc.MutableSet: set,
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
}
OBJECTS = (dict, collections.OrderedDict, collections.abc.Mapping, collections.abc.MutableMapping)
SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a TypedDict or dataclass, or one argument of a tool.

    Args:
        hint: its type hint, `Annotated` stripped.
        required: it has no default and must be given.
        nullable_default: its default is None, so an explicit null means the same.
    """

    hint: Any
    required: bool
    nullable_default: bool = False


@dataclasses.dataclass(frozen=True)
class Parameter(Field):
    """One argument of a tool.

    Args:
        text: its documentation on one line, None when there is none.
        choices: the values of a closing `(choices: [...])` in its documentation.
    """

    text: str | None = None
    choices: list | None = None


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
    hints = type_hints(function)
    texts = read_docstring(inspect.getdoc(function) or "").arguments
    signature = list(inspect.signature(function).parameters.values())[int(skip_first) :]
    return {p.name: _parameter(p, hints.get(p.name, Any), texts.get(p.name)) for p in signature}


def _parameter(parameter: inspect.Parameter, hint: Any, text: str | None) -> Parameter:
    text, choices = split_choices(text) if text else (None, None)
    required = parameter.default is inspect.Parameter.empty
    return Parameter(hint, required, parameter.default is None, text, choices)


def type_hints(function: Callable) -> dict[str, Any]:
    """Argument name → hint, and "return" → hint where that one can be read: no model needs it.

    Raises:
        ValueError: an argument's hint names something that does not exist, or is no type.
    """
    try:
        return typing.get_type_hints(function)
    except Exception as error:
        try:
            return typing.get_type_hints(_without_return(function))
        except Exception:
            raise ValueError(f"{location(function)}: a type hint cannot be read: {error}") from error


def _without_return(function: Callable) -> Callable:
    """A function with the same hints but for the return value's."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    bare = types.FunctionType(function.__code__, function.__globals__)
    bare.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return bare


def meaning(hint: Any) -> Any:
    """The type behind a NewType or a `type` alias; any other hint as it is."""
    if isinstance(hint, typing.NewType):
        return meaning(hint.__supertype__)
    if type(hint).__name__ == "TypeAliasType":  # in typing from Python 3.12 on
        return meaning(hint.__value__)
    return hint


def is_union(hint: Any) -> bool:
    """`Union[...]`, `Optional[...]` or `X | Y`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def is_enum(hint: Any) -> bool:
    """An Enum class."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def allowed_values(hint: Any) -> list[tuple[Any, Any]]:
    """(what a model writes, what the tool is given) for each value of a Literal or an Enum.

    An Enum whose values are not all text, numbers, booleans or null is written by its members' names.

    Raises:
        ValueError: a Literal holds bytes, which JSON does not know.
    """
    members = list(hint) if is_enum(hint) else typing.get_args(hint)
    pairs = [(_written(member), member) for member in members]
    for written, _ in pairs:
        if type(written) not in SCALARS:
            raise ValueError(f"{written!r} has no JSON form; use text")
    return pairs


def _written(member: Any) -> Any:
    if not isinstance(member, Enum):
        return member
    by_value = all(type(one.value) in SCALARS for one in type(member))
    return member.value if by_value else member.name


def is_record(hint: Any) -> bool:
    """A TypedDict or a dataclass: a JSON object with known keys."""
    return is_typeddict(hint) or (isinstance(hint, type) and dataclasses.is_dataclass(hint))


def is_typeddict(hint: Any) -> bool:
    """A TypedDict of `typing` or of `typing_extensions`, which typing.is_typeddict does not know."""
    return isinstance(hint, type) and issubclass(hint, dict) and hasattr(hint, "__required_keys__")


def container(hint: Any) -> Any:
    """`list[int]` → list, `list` → list, `int` → int."""
    return typing.get_origin(hint) or hint


@functools.lru_cache(maxsize=4096)
def record_fields(record: type) -> dict[str, Field]:
    """Key → hint and whether it must be given, for a TypedDict or a dataclass."""
    hints = typing.get_type_hints(record)
    if is_typeddict(record):
        # Under `from __future__ import annotations` the class itself sees neither Required nor NotRequired.
        extras = typing.get_type_hints(record, include_extras=True)
        marks = {key: typing.get_origin(hint) for key, hint in extras.items()}
        required = {key for key in record.__required_keys__ if marks[key] is not typing.NotRequired}
        required |= {key for key, mark in marks.items() if mark is typing.Required}
        return {key: Field(hint, key in required) for key, hint in hints.items()}
    return {f.name: _field(f, hints[f.name]) for f in dataclasses.fields(record) if f.init}


def _field(field: dataclasses.Field, hint: Any) -> Field:
    missing = dataclasses.MISSING
    required = field.default is missing and field.default_factory is missing
    return Field(hint, required, field.default is None)
