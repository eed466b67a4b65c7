"""Functions as users write them: odd types, odd docstrings, odd callables.

Each test names what a broken version did: refused the tool, showed a model a schema that no value
satisfies, or refused a value that the schema allows.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import json
from collections.abc import AsyncIterator, Iterator
from collections.abc import Set as AbstractSet
from enum import Enum, IntEnum, StrEnum, auto
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Required, TypedDict

import pydantic
import pytest
import typing_extensions
from transformers.utils import get_json_schema

from grpo_jax.tools import check_arguments, get_schema, run_tool, signature_line
from grpo_jax.tools.load import named_functions

if TYPE_CHECKING:
    import nowhere


class Person(TypedDict, total=False):
    name: Required[str]
    age: int


class Extended(typing_extensions.TypedDict):
    key: str
    size: typing_extensions.NotRequired[int]


@dataclasses.dataclass
class Address:
    street: str
    number: int = None
    tags: list[str] = dataclasses.field(default_factory=list)


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Ratio(Enum):
    HALF = 0.5
    WHOLE = 1.0


class Mood(StrEnum):
    GOOD = auto()
    BAD = auto()


class Corner(Enum):
    LEFT = (0, 0)
    RIGHT = (1, 0)


UserId = NewType("UserId", int)
Counts = typing_extensions.TypeAliasType("Counts", dict[str, int])  # Python 3.12's `type Counts = …`


def takes(hint, default=...):
    """A documented tool with one argument of a type."""

    def tool(value):
        """Take a value.

        Args:
            value: It.
        """
        return repr(value)

    tool.__annotations__["value"] = hint
    if default is not ...:
        tool.__defaults__ = (default,)
    return tool


def shown(tool) -> dict:
    """What the model sees of the one argument."""
    schema = get_schema(tool)["function"]["parameters"]["properties"]["value"]
    json.dumps(schema)  # as the chat template will
    return {key: value for key, value in schema.items() if key != "description"}


def given(tool, value):
    """What the function gets for a JSON value."""
    return check_arguments(tool, {"value": value})["value"]


# Types


def test_required_and_not_required_keys_are_read_under_future_annotations():
    """The class itself sees only total=False, since its annotations are text."""
    assert shown(takes(Person)) == {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
    }
    with pytest.raises(ValueError, match=r"missing 'value\.name' \(string\)"):
        check_arguments(takes(Person), {"value": {"age": 3}})


def test_a_typed_dict_of_typing_extensions_is_one():
    tool = takes(Extended)
    assert shown(tool) == {
        "type": "object",
        "properties": {"key": {"type": "string"}, "size": {"type": "integer"}},
        "required": ["key"],
    }
    assert given(tool, {"key": "a", "size": 1.0}) == {"key": "a", "size": 1}


@pytest.mark.parametrize(
    ("hint", "written", "meant"),
    [
        (Size, 2.0, Size.LARGE),
        (Ratio, 1, Ratio.WHOLE),  # JSON knows one kind of number
        (Mood, "bad", Mood.BAD),
        (Corner, "RIGHT", Corner.RIGHT),  # JSON has no tuples: by name
        (Literal[1, "x"], 1.0, 1),
        (Literal[0.5, 2.0], 2, 2.0),
        (Literal[Mood.GOOD, Size.SMALL], "good", Mood.GOOD),
        (Literal[Mood.GOOD, Size.SMALL], 1, Size.SMALL),
        (Literal[1, True], True, True),
        (dict[Mood, int], {"good": 1.0}, {Mood.GOOD: 1}),
    ],
)
def test_a_value_of_an_enum_or_literal_becomes_what_it_stands_for(hint, written, meant):
    got = given(takes(hint), written)
    assert repr(got) == repr(meant)


@pytest.mark.parametrize(
    ("hint", "written"),
    [(Size, True), (Size, 3), (Ratio, "0.5"), (Corner, [1, 0]), (Literal[1], True), (Literal[True], 1)],
)
def test_other_values_are_refused(hint, written):
    with pytest.raises(ValueError, match=r"'value' must be one of"):
        given(takes(hint), written)


def test_enums_that_json_cannot_write_are_shown_by_name_and_literals_of_members_by_value():
    assert shown(takes(Corner)) == {"type": "string", "enum": ["LEFT", "RIGHT"]}
    assert shown(takes(Literal[Mood.GOOD, Size.LARGE])) == {
        "type": ["string", "integer"],
        "enum": ["good", 2],
    }


@pytest.mark.parametrize(
    ("hint", "schema", "written", "meant"),
    [
        (UserId, {"type": "integer"}, 3.0, 3),
        (list[UserId], {"type": "array", "items": {"type": "integer"}}, [3.0], [3]),
        (Counts, {"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1.0}, {"a": 1}),
        (AbstractSet[int], {"type": "array", "items": {"type": "integer"}}, [1, 1], {1}),
        (
            collections.deque[int],
            {"type": "array", "items": {"type": "integer"}},
            [1],
            collections.deque([1]),
        ),
        (
            collections.OrderedDict[str, int],
            {"type": "object", "additionalProperties": {"type": "integer"}},
            {"a": 1},
            {"a": 1},
        ),
    ],
)
def test_aliases_and_rarer_containers(hint, schema, written, meant):
    tool = takes(hint)
    assert shown(tool) == schema
    assert given(tool, written) == meant


def test_null_passes_where_a_nested_default_is_none():
    """As it does for an argument: a model that writes out every key means the default."""
    tool = takes(list[Address])
    assert given(tool, [{"street": "x", "number": None}]) == [Address("x")]
    with pytest.raises(ValueError, match=r"'value\[0\]\.tags' must be array, got null \(leave it out"):
        given(tool, [{"street": "x", "tags": None}])


def documented_choices(mood: Mood, tags: list[str] = (), share: float = 1.0) -> str:
    """Choose.

    Args:
        mood: How (choices: ["good", "bad"])
        tags: Which (choices: ["a", "b"])
        share: How much (choices: [0.5, 1.0])
    """
    return f"{mood!r} {tags} {share}"


def test_documented_choices_hold_for_enums_numbers_and_the_items_of_arrays():
    good = {"mood": "good", "tags": ["b", "a"], "share": 1}
    assert run_tool({"name": "documented_choices", "arguments": good}, [documented_choices]) == (
        "<Mood.GOOD: 'good'> ['b', 'a'] 1"
    )
    for bad in ({"mood": "so so"}, {"tags": ["a", "c"]}, {"share": 0.75}, {"share": True}):
        (name,) = bad
        with pytest.raises(ValueError, match=rf"^'{name}' must be"):
            check_arguments(documented_choices, good | bad)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ([int], "unhashable type: 'list'"),
        (list[[int]], "a type hint cannot be read"),
        (Literal[b"x", "y"], "b'x' has no JSON form; use text"),
    ],
)
def test_what_is_no_type_is_an_error_with_file_and_line(hint, message):
    with pytest.raises(
        ValueError, match=r"test_odd_tools\.py:\d+, tool: a type hint cannot be read: "
    ) as error:
        get_schema(takes(hint))
    assert message in str(error.value)


def frame(n: int) -> nowhere.DataFrame:
    """Make a frame.

    Args:
        n: Rows.
    """
    return "ok"


def test_the_hint_of_the_return_value_need_not_be_readable():
    """A module that imports it for type checkers only runs well: no model needs it."""
    assert get_schema(frame)["function"]["parameters"] == {
        "type": "object",
        "properties": {"n": {"type": "integer", "description": "Rows."}},
        "required": ["n"],
    }
    assert run_tool({"name": "frame", "arguments": {"n": 1.0}}, [frame]) == "ok"
    assert signature_line(frame).startswith("frame(n: ")


# Docstrings


def sphinx(a: int, b: str = "x", *, c: float = 1.0) -> str:
    """Sphinx style.

    With a second paragraph: here.

    :param  a : The first
        continued: here.
    :param str b: The second.
    :keyword c: The third.
    :type a: int
    :returns: What
        comes out.
    :raises ValueError: never
    """
    return f"{a} {b} {c}"


def test_sphinx_docstrings_are_read():
    schema = get_schema(sphinx)["function"]
    assert schema["description"] == "Sphinx style.\n\nWith a second paragraph: here."
    assert {k: p["description"] for k, p in schema["parameters"]["properties"].items()} == {
        "a": "The first continued: here.",
        "b": "The second.",
        "c": "The third.",
    }
    assert schema["return"] == {"type": "string", "description": "What comes out."}


def numpy_returns(a: int) -> str:
    """Take a number.

    Parameters
    ----------
    a : int
        It.

    Returns
    -------
    str
        What
        comes out.
    """
    return str(a)


def test_numpy_returns_are_read_without_their_type():
    assert get_schema(numpy_returns)["function"]["return"]["description"] == "What comes out."


def titled(*, a: int, b: int = 1) -> str:
    """
    Titled
    ------
    The first line is underlined.

    Keyword Args:
        a: The first.
        b (int): The second.
    """
    return f"{a} {b}"


def test_an_underlined_title_is_description_and_keyword_arguments_are_arguments():
    schema = get_schema(titled)["function"]
    assert schema["description"] == "Titled\n------\nThe first line is underlined."
    texts = {name: p["description"] for name, p in schema["parameters"]["properties"].items()}
    assert texts == {"a": "The first.", "b": "The second."}


# Callables


def numbers(n: int) -> Iterator[int]:
    """Count."""
    yield from range(n)


async def later_numbers(n: int) -> AsyncIterator[int]:
    """Count."""
    yield n


def listed(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return list(function(*args, **kwargs))

    return wrapper


@listed
def listed_numbers(n: int) -> Iterator[int]:
    """Count.

    Args:
        n: How far.
    """
    yield from range(n)


@pytest.mark.parametrize("tool", [numbers, later_numbers])
def test_a_generator_is_an_error(tool):
    """The model would see `<generator object numbers at 0x7f…>`."""
    with pytest.raises(ValueError, match="a tool returns its result, and this one yields; return a list"):
        get_schema(tool)


def test_a_wrapped_generator_is_the_function_that_wraps_it():
    assert get_schema(listed_numbers) == get_json_schema(listed_numbers)
    assert run_tool({"name": "listed_numbers", "arguments": {"n": 3}}, [listed_numbers]) == "[0, 1, 2]"


class Callable_:
    """Call it."""

    __name__ = "callable_"

    def __call__(self, a: int) -> str:
        return str(a)


@pytest.mark.parametrize(
    "thing", [Callable_(), functools.partial(Callable_(), 1), Callable_, "sphinx", lambda a: a, None]
)
def test_what_is_no_function_is_an_error(thing):
    with pytest.raises(ValueError, match=r"TOOLS\[0\] must be a function defined with `def`, got "):
        named_functions([thing], "TOOLS")


@functools.lru_cache
def remembered(a: int, b: Any = None) -> str:
    """Remember.

    Args:
        a: A number.
        b: Anything.
    """
    return f"{a} {b}"


def test_a_cached_function_is_a_function():
    tools = named_functions([remembered], "TOOLS")
    assert get_schema(remembered) == get_json_schema(remembered)
    assert run_tool({"name": "remembered", "arguments": {"a": 1.0}}, tools) == "1 None"


def convert(amount: float, rate: float, unit: str = "USD") -> str:
    """Convert an amount.

    Args:
        amount: How much.
        rate: The rate.
        unit: The currency.
    """
    return f"{amount * rate} {unit}"


def test_bound_arguments_of_a_partial_are_not_the_models():
    tools = named_functions([functools.partial(convert, rate=2.0, unit="EUR")], "TOOLS")
    schema = get_schema(tools["convert"])["function"]
    assert schema["description"] == "Convert an amount."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {"amount": {"type": "number", "description": "How much."}},
        "required": ["amount"],
    }
    assert signature_line(tools["convert"]) == "convert(amount: float) -> str"
    assert run_tool({"name": "convert", "arguments": {"amount": 3}}, tools) == "6.0 EUR"
    bad = run_tool({"name": "convert", "arguments": {"amount": 3, "rate": 9.0}}, tools)
    assert bad == "Error: wrong arguments for convert: unknown 'rate' (known: amount)"


class Account:
    def transfer(self, amount: int, to: str) -> str:
        """Move money."""
        return f"{amount} to {to}"


def test_a_partial_of_what_was_read_before_lacks_what_it_binds():
    """functools.wraps copies what was remembered of the function."""
    account = Account()
    save = functools.partial(account.transfer, to="savings")
    save.__name__, save.__doc__ = "save", "Save money."
    tools = named_functions([account.transfer, save], "TOOLS")
    for function in (account.transfer, *tools.values()):
        get_schema(function)
    assert run_tool({"name": "save", "arguments": {"amount": 1}}, tools) == "1 to savings"
    assert run_tool({"name": "transfer", "arguments": {"amount": 1, "to": "x"}}, tools) == "1 to x"


def test_a_partial_of_a_function_that_yields_is_refused():
    def count(n: int):
        """Count."""
        yield n

    (refused,) = named_functions([functools.partial(count)], "TOOLS").values()
    with pytest.raises(ValueError, match="a tool returns its result, and this one yields"):
        get_schema(refused)


def test_an_argument_may_have_any_name():
    def integrate(function: str, self_: str, name: str, arguments: str, call: str, tool: str) -> str:
        """Integrate."""
        return function + tool

    given = dict.fromkeys(("function", "self_", "name", "arguments", "call", "tool"), "x")
    assert run_tool({"name": "integrate", "arguments": given}, [integrate]) == "xx"


def test_a_partial_may_bind_by_place_and_have_its_own_name():
    first = functools.partial(functools.partial(convert, 3.0), unit="EUR")
    first.__name__, first.__doc__ = "three.times", "Multiply by three."
    tools = named_functions([first, functools.partial("a-b".join)], "TOOLS")
    assert list(tools) == ["three.times", "join"]
    assert get_schema(tools["three.times"])["function"]["name"] == "three.times"
    assert list(get_schema(tools["three.times"])["function"]["parameters"]["properties"]) == ["rate"]
    assert run_tool({"name": "three.times", "arguments": {"rate": 2}}, tools) == "6.0 EUR"


def named(name):
    def tool(n: int) -> str:
        """Take a number."""
        return str(n)

    tool.__name__ = name
    return tool


def test_a_name_may_hold_dots_and_dashes():
    tools = named_functions([named("math.add"), named("get-2")], "TOOLS")
    assert get_schema(tools["math.add"])["function"]["name"] == "math.add"
    assert run_tool({"name": "math.add", "arguments": {"n": 1}}, tools) == "1"


@pytest.mark.parametrize("name", ["two words", "", "größe", "a/b"])
def test_other_names_are_errors(name):
    with pytest.raises(
        ValueError, match=r"TOOLS\[0\] must have a name of A-Z, a-z, 0-9, '_', '\.' and '-', got "
    ):
        named_functions([named(name)], "TOOLS")


def test_a_lambda_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"got a lambda, which has no name .* \(.*test_odd_tools\.py:\d+"):
        named_functions([lambda n: n], "TOOLS")


class Doc:
    def __init__(self, documentation):
        self.documentation = documentation


def annotated(
    a: Annotated[int, "the first\n number"],
    b: Annotated[str, Doc("the second"), "not this"] = "x",
    c: Annotated[float | None, pydantic.Field(description="the third")] = None,
    d: Annotated[list[Annotated[int, "an item"]], "the fourth (choices: [1, 2])"] = (),
) -> str:
    """Take numbers."""
    return f"{a} {b} {c} {d}"


def test_annotated_texts_are_the_arguments_descriptions(caplog):
    properties = get_schema(annotated)["function"]["parameters"]["properties"]
    assert {name: p["description"] for name, p in properties.items()} == {
        "a": "the first number",
        "b": "the second",
        "c": "the third",
        "d": "the fourth",
    }
    assert properties["c"] == {"type": "number", "nullable": True, "description": "the third"}
    assert properties["d"]["enum"] == [1, 2]
    assert not caplog.records
    assert run_tool({"name": "annotated", "arguments": {"a": 1.0}}, [annotated]) == "1 x None ()"


# pydantic


class Item(pydantic.BaseModel):
    """An item."""

    name: str = pydantic.Field(description="what to buy", min_length=1)
    quantity: Annotated[int, pydantic.Field(ge=1)] = 1
    mood: Mood = Mood.GOOD
    note: str | None = None


class Order(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    items: list[Item]
    by_day: dict[str, Item] = {}
    when: datetime.date = pydantic.Field(alias="date", description="day of delivery")
    gift: Item | None = None

    @pydantic.model_validator(mode="after")
    def _not_empty(self):
        if not self.items:
            raise ValueError("an order needs items")
        return self


class Loose(pydantic.BaseModel, extra="allow"):
    n: int


class Tree(pydantic.BaseModel):
    children: list[Tree] = []


ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "what to buy", "minLength": 1},
        "quantity": {"type": "integer", "minimum": 1, "default": 1},
        "mood": {"type": "string", "enum": ["good", "bad"], "default": "good"},
        "note": {"type": "string", "nullable": True},
    },
    "required": ["name"],
}


def test_pydantic_models_are_shown_with_their_fields_limits_and_texts():
    assert shown(takes(Item)) == ITEM
    assert shown(takes(list[Item])) == {"type": "array", "items": ITEM}
    assert shown(takes(Item | None)) == ITEM | {"nullable": True}
    assert shown(takes(dict[str, Item])) == {"type": "object", "additionalProperties": ITEM}
    order = shown(takes(Order))
    assert order["properties"]["items"] == {"type": "array", "items": ITEM}
    assert order["properties"]["date"] == {
        "type": "string",
        "format": "date",
        "description": "day of delivery",
    }
    assert order["properties"]["gift"] == ITEM | {"nullable": True}
    assert order["required"] == ["items", "date"]


def test_pydantic_arguments_arrive_as_instances():
    tea = Item(name="tea", quantity=2)
    written = {"name": "tea", "quantity": 2.0, "note": None}
    assert given(takes(Item), written) == tea
    assert given(takes(list[Item]), [written]) == [tea]
    assert given(takes(dict[str, Item]), {"a": written}) == {"a": tea}
    assert given(takes(Item | None), None) is None and given(takes(Item | None), written) == tea
    order = given(
        takes(Order), {"items": [written], "date": "2024-02-29", "gift": {"name": "x", "mood": "bad"}}
    )
    assert order == Order(items=[tea], when=datetime.date(2024, 2, 29), gift=Item(name="x", mood=Mood.BAD))
    assert given(takes(Loose), {"n": 1, "more": "x"}).more == "x"
    with pytest.raises(ValueError, match=r"'value\.n' must be integer"):
        given(takes(Loose), {"n": "1"})
    assert check_arguments(takes(Loose), {"value": {"n": "1"}}, lax=True)["value"].n == 1


@pytest.mark.parametrize(
    ("hint", "value", "problem"),
    [
        (Item, {"quantity": 1}, "missing 'value.name' (string)"),
        (Item, {"name": "a", "colour": 1}, "unknown 'value.colour' (known: name, quantity, mood, note)"),
        (Item, {"name": "a", "quantity": "2"}, "'value.quantity' must be integer, got string \"2\""),
        (list[Item], [{"name": ""}], "'value[0].name' is refused: String should have at least 1 character"),
        (
            Item,
            {"name": "a", "quantity": 0},
            "'value.quantity' is refused: Input should be greater than or equal to 1",
        ),
        (Order, {"items": [], "date": "2024-01-01"}, "'value' is refused: Value error, an order needs items"),
        (Item, "tea", "'value' must be object, got string \"tea\""),
    ],
)
def test_what_a_model_refuses_is_named_by_its_place(hint, value, problem):
    def tool(value):
        """Take it."""

    tool.__annotations__["value"] = hint
    text = run_tool({"name": "tool", "arguments": {"value": value}}, [tool])
    assert text == f"Error: wrong arguments for tool: {problem}"


def test_a_model_that_holds_itself_is_an_error_with_file_and_line():
    with pytest.raises(ValueError, match=r"test_odd_tools\.py:\d+, tool: a type hint refers to itself"):
        get_schema(takes(Tree))
