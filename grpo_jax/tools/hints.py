"""Reads the type hints and the docstring of a tool, for both schemas and argument checks."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

from docstring_parser import numpydoc, rest
from docstring_parser.common import ParseError
from docstring_parser.google import GoogleParser, Section, SectionType

_PARAMETER_SECTIONS = (
    "Args",
    "Arguments",
    "Parameters",
    "Keyword Args",
    "Keyword Arguments",
    "Other Parameters",
)
# As in transformers, an "Example:" or "Note:" is part of the description.
_GOOGLE = GoogleParser(
    [
        *(Section(title, "param", SectionType.MULTIPLE) for title in _PARAMETER_SECTIONS),
        Section("Returns", "returns", SectionType.SINGULAR_OR_MULTIPLE),
        Section("Raises", "raises", SectionType.MULTIPLE),
    ]
)
_REMEMBERED = "__grpo_jax_fields__"
_GOOGLE_RETURNS = re.compile(r"^[ \t]*Returns:[ \t]*\n(.*?)(?=^[ \t]*Raises:|\Z)", re.MULTILINE | re.DOTALL)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)

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
class Docstring:
    """What a docstring says.

    Args:
        description: the text before the first section.
        arguments: argument name → its text on one line.
        returns: the text of the Returns section, None when there is none.
    """

    description: str
    arguments: dict[str, str]
    returns: str | None


@dataclasses.dataclass(frozen=True)
class Field:
    """One argument of a tool, or one key of a TypedDict, dataclass or pydantic model.

    Args:
        hint: its type hint, `Annotated` stripped.
        nullable_default: its default is None, so an explicit null means the same.
        text: its documentation on one line, None when there is none.
        choices: the values of a closing `(choices: [...])` in its documentation.
        limits: pydantic's adapter where `Annotated` limits the values, as with its `Field(ge=1)`.
    """

    hint: Any
    required: bool
    nullable_default: bool = False
    text: str | None = None
    choices: list | None = None
    limits: Any = None


def read_docstring(doc: str) -> Docstring:
    """Read a docstring in Google's style (with or without types), NumPy's or Sphinx's, whichever fits best."""
    readings = []
    for parse in (_GOOGLE.parse, numpydoc.parse, rest.parse):
        try:
            readings.append(parse(doc))
        except ParseError:
            continue
    if not readings:
        return Docstring(doc.strip(), {}, None)
    best = max(readings, key=lambda reading: len(reading.meta))
    arguments = {}
    for parameter in best.params:
        for name in parameter.arg_name.lstrip("*").split(","):  # NumPy's `width, height : int`
            arguments[name.strip()] = _one_line(parameter.description)
    returns = best.returns and _one_line(best.returns.description)
    if google := _GOOGLE_RETURNS.search(doc):  # as transformers gives it, with its type and its lines
        returns = google[1].strip()
    return Docstring((best.description or "").strip(), {k: v for k, v in arguments.items() if v}, returns)


def _one_line(text: str | None) -> str:
    return " ".join(line.strip() for line in (text or "").splitlines()).strip()


def _split_choices(text: str) -> tuple[str, list | None]:
    """Take a closing `(choices: ["a", "b"])` off an argument's text; None when there is none."""
    match = _CHOICES.search(text)
    if not match:
        return text, None
    try:
        choices = json.loads(match.group(1))
    except ValueError:
        return text, None
    if not isinstance(choices, list):
        return text, None
    return text[: match.start()].strip(), [c.strip() if isinstance(c, str) else c for c in choices]


def signature(function: Callable) -> inspect.Signature:
    """The signature, with types in place of their text where that can be evaluated."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # evaluating the text of a hint may raise anything
        return inspect.signature(function)


def location(function: Callable) -> str:
    """`file:line, name`, for messages to the user."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__name__", repr(function))
    return f"{code.co_filename}:{code.co_firstlineno}, {name}" if code else name


def parameters(function: Callable) -> dict[str, Field]:
    """Argument name → what is known of it, in the order of the signature.

    Raises:
        ValueError: a hint names something that does not exist.
    """
    method = inspect.ismethod(function)
    function = function.__func__ if method else function
    found = _remembered(function, _parameters)
    return dict(list(found.items())[1:]) if method else found


def _remembered(owner: Any, read: Callable) -> Any:
    """What is read from a function or class, cached on the object itself: a table here would keep objects of
    finished trajectories alive."""
    of, found = getattr(owner, "__dict__", {}).get(_REMEMBERED, (None, None))
    if of is owner:  # functools.wraps copies what is stored on a function
        return found
    found = read(owner)
    with contextlib.suppress(AttributeError, TypeError):  # a function that is written in C
        setattr(owner, _REMEMBERED, (owner, found))
    return found


def _parameters(function: Callable) -> dict[str, Field]:
    hints, extras = type_hints(function), type_hints(function, include_extras=True)
    texts = read_docstring(inspect.getdoc(function) or "").arguments
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        text = texts.get(name) or annotated_text(extras.get(name))
        text, choices = _split_choices(text) if text else (None, None)
        required = parameter.default is inspect.Parameter.empty
        limits = _limits(extras.get(name))
        found[name] = Field(hints.get(name, Any), required, parameter.default is None, text, choices, limits)
    return found


def annotated_text(hint: Any) -> str | None:
    """The text of `Annotated[int, "text"]`, also as `Doc("text")` or pydantic's `Field(description="text")`."""
    for note in getattr(hint, "__metadata__", ()):
        for text in (note, getattr(note, "documentation", None), getattr(note, "description", None)):
            if isinstance(text, str):
                return _one_line(text)
    return None


def _has_limits(hint: Any) -> bool:
    """Whether a hint limits its values, or those inside it, by what pydantic reads of `Annotated`."""
    for note in getattr(hint, "__metadata__", ()):
        of_pydantic = type(note).__module__.partition(".")[0] in ("pydantic", "annotated_types")
        if of_pydantic and getattr(note, "metadata", True):  # of a Field that only describes it is empty
            return True
    return any(map(_has_limits, typing.get_args(hint)))


def _limits(hint: Any) -> Any:
    """pydantic's adapter of a hint that limits its values; None where it does not, or holds a type unknown to pydantic."""
    if not _has_limits(hint):
        return None
    import pydantic

    try:
        return pydantic.TypeAdapter(hint)
    except pydantic.PydanticUserError:
        return None


def type_hints(function: Callable, include_extras: bool = False) -> dict[str, Any]:
    """Argument name → hint, and "return" → hint where it can be read: no model needs it.

    Raises:
        ValueError: an argument's hint names something that does not exist, or is no type.
    """
    try:
        return typing.get_type_hints(function, include_extras=include_extras)
    except Exception as error:
        try:  # a function with the same hints except the return value's
            inner = inspect.unwrap(getattr(function, "__func__", function))
            bare = types.FunctionType(inner.__code__, inner.__globals__)
            bare.__annotations__ = {k: hint for k, hint in inner.__annotations__.items() if k != "return"}
            return typing.get_type_hints(bare, include_extras=include_extras)
        except Exception:
            raise ValueError(f"{location(function)}: a type hint cannot be read: {error}") from error


def meaning(hint: Any) -> Any:
    """The type behind a NewType, a `type` alias or `Annotated`; any other hint unchanged."""
    if hasattr(hint, "__metadata__"):
        return meaning(hint.__origin__)
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
    pairs = []
    for member in list(hint) if is_enum(hint) else typing.get_args(hint):
        written = member
        if isinstance(member, Enum):
            by_value = all(type(one.value) in SCALARS for one in type(member))
            written = member.value if by_value else member.name
        if type(written) not in SCALARS:
            raise ValueError(f"{written!r} has no JSON form; use text")
        pairs.append((written, member))
    return pairs


def is_record(hint: Any) -> bool:
    """A TypedDict, a dataclass or a pydantic model: a JSON object with known keys."""
    return is_typeddict(hint) or is_model(hint) or (isinstance(hint, type) and dataclasses.is_dataclass(hint))


def is_model(hint: Any) -> bool:
    """A pydantic model; pydantic itself is imported by the user's file, if at all."""
    pydantic: Any = sys.modules.get("pydantic")
    if not isinstance(hint, type) or not hasattr(pydantic, "BaseModel"):
        return False
    return issubclass(hint, pydantic.BaseModel) and not issubclass(hint, pydantic.RootModel)


def is_typeddict(hint: Any) -> bool:
    """A TypedDict of `typing` or of `typing_extensions`, which typing.is_typeddict does not know."""
    return isinstance(hint, type) and issubclass(hint, dict) and hasattr(hint, "__required_keys__")


def container(hint: Any) -> Any:
    """`list[int]` → list, `list` → list, `int` → int."""
    return typing.get_origin(hint) or hint


def record_fields(record: type) -> dict[str, Field]:
    """Key → hint and whether it must be given, for a TypedDict, a dataclass or a pydantic model."""
    return _remembered(record, _record_fields)


def _record_fields(record: type) -> dict[str, Field]:
    if is_model(record):
        found = {}
        for name, field in record.model_fields.items():
            alias = field.validation_alias or field.alias
            key = alias if isinstance(alias, str) else name
            found[key] = Field(
                field.annotation, field.is_required(), field.default is None, field.description
            )
        return found
    hints = typing.get_type_hints(record)
    extras = typing.get_type_hints(record, include_extras=True)
    # Under `from __future__ import annotations` the class itself sees neither Required nor NotRequired.
    marks = {key: typing.get_origin(hint) for key, hint in extras.items()}
    marked = (typing.Required, typing.NotRequired)
    inner = {key: typing.get_args(hint)[0] if marks[key] in marked else hint for key, hint in extras.items()}
    texts = {key: annotated_text(hint) for key, hint in inner.items()}
    limits = {key: _limits(hint) for key, hint in inner.items()}
    if is_typeddict(record):
        required = {key for key in record.__required_keys__ if marks[key] is not typing.NotRequired}
        required |= {key for key, mark in marks.items() if mark is typing.Required}
        return {
            key: Field(hint, key in required, text=texts[key], limits=limits[key])
            for key, hint in hints.items()
        }
    missing = dataclasses.MISSING
    return {
        f.name: Field(
            hints[f.name],
            f.default is missing and f.default_factory is missing,
            f.default is None,
            texts[f.name],
            limits=limits[f.name],
        )
        for f in dataclasses.fields(record)
        if f.init
    }
