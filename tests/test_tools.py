"""Loading, schemas, argument checks and `run_tool`."""

# ruff: noqa: UP007, UP045  (users write Optional and Union, so the tests do)

import dataclasses
import datetime
import functools
import json
import math
import random
import subprocess
import sys
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict, Union

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from transformers.utils import get_json_schema

from grpo_jax.tools import ToolRunner, check_arguments, get_schema, load_tools, run_tool, signature_line
from grpo_jax.tools.schema import read_schema
from grpo_jax.types import ToolCall


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Debt(TypedDict):
    name: str
    rate: float
    months: NotRequired[int]


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0

    def __post_init__(self):
        if self.x < 0:
            raise ValueError("x must not be negative")


def add(a: int, b: int) -> str:
    """Add two integers."""
    return f"Sum: {a + b}"


def mixed(
    age: int,
    rate: float,
    colour: Colour,
    goal: Literal["growth", "income"],
    debts: list[dict[str, float]],
    note: Optional[str],
    size: int | str = 3,
    tags: Optional[list[str]] = None,
    extra: Any = None,
    pair: tuple[int, str] = (1, "a"),
    flag: Annotated[bool, "a switch"] = True,
) -> str:
    """Describe a mixed bag.

    A second paragraph, with a colon: here.

    Args:
        age: Age in years,
            continued on a second line.
        rate: A ratio (choices: [0.5, 1.5])
        colour: The colour.
        goal: What for: growth or income.
        debts: Debts.
        note: A note
        size: Size.
        tags: Tags.
        extra: Anything.
        pair: A pair.
        flag: A switch.

    Returns:
        One line.

    Raises:
        KeyError: never.
    """
    return json.dumps([age, rate, colour.value, goal, debts, note, size, tags, extra, pair, flag])


def nothing() -> int:
    """Return seven."""
    return 7


def google_typed(path: str, depth: int = 1) -> dict[str, list]:
    """List a folder.

    Args:
        path (str): The folder
            to list.
        depth (Dict[str, Union[int, str]], optional): How deep: levels.

    Returns:
        listing (dict): What is there.
    """
    return {}


def numpy_style(path: str, width: int, height: int = 1) -> str:
    """List a folder.

    Parameters
    ----------
    path : str
        The folder
        to list.
    width, height : int
        In pixels.

    Returns
    -------
    str
        What is there.
    """
    return path


def records(debts: list[Debt], start: Point, colours: set[Colour]) -> str:
    """Take records.

    Args:
        debts: The debts.
        start: Where.
        colours: Which.
    """
    return f"{debts} {start} {sorted(c.value for c in colours)}"


def fails() -> str:
    """Fail."""
    raise KeyError("k")


def exits() -> str:
    """Exit."""
    sys.exit(3)


def refuses() -> str:
    """Refuse."""
    return "Error: not today"


async def later(a: int) -> str:
    """Answer later."""
    return f"later {a}"


def described(a: str, b: int = 1) -> str:
    """Do it
    over lines.

    Example:
        x = described("x: 1")

    Note: text.

    Args:
        a: One - a dash: here (choices: ["x", "y"])

        b: Two,
          and more.
    Returns:
        dict: with
            - x: 1
        and more
    Raises:
        ValueError: never
    """
    return a


def parameters(function):
    return get_schema(function)["function"]["parameters"]


# --- schemas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mixed, nothing, described])
@pytest.mark.parametrize("read", [get_schema, read_schema])
def test_a_schema_is_that_of_transformers_byte_for_byte(function, read):
    """Our own reader too: a tool must not look different because one argument needed it."""
    assert json.dumps(read(function)) == json.dumps(get_json_schema(function))


_SCALARS = st.sampled_from(
    [int, float, str, bool, Any, list, dict, Colour, Literal["a", 2], Literal[1.5, None]]
)
_HINTS = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        inner.map(lambda h: list[h]),
        inner.map(lambda h: Optional[h]),
        inner.map(lambda h: dict[str, h]),
        st.tuples(inner, inner).map(lambda hs: Union[hs]),
        st.tuples(inner, inner).map(lambda hs: tuple[hs]),
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(_HINTS, st.booleans())
def test_any_hint_reads_as_in_transformers(hint, required):
    def tool(value=None):
        """Take a value.

        Args:
            value: It.
        """

    tool.__annotations__["value"] = hint
    if required:
        tool.__defaults__ = None
    assert json.dumps(read_schema(tool)) == json.dumps(get_json_schema(tool))


def test_undocumented_arguments_have_no_description_and_warn(caplog):
    assert parameters(add)["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}
    assert get_schema(add)["function"]["description"] == "Add two integers."
    assert "does not describe a, b" in caplog.text and "test_tools.py" in caplog.text


def test_google_docstrings_with_types_are_read():
    assert parameters(google_typed)["properties"] == {
        "path": {"type": "string", "description": "The folder to list."},
        "depth": {"type": "integer", "description": "How deep: levels."},
    }
    assert get_schema(google_typed)["function"]["description"] == "List a folder."


def test_numpy_docstrings_are_read():
    schema = get_schema(numpy_style)["function"]
    assert schema["description"] == "List a folder."
    assert schema["parameters"]["properties"] == {
        "path": {"type": "string", "description": "The folder to list."},
        "width": {"type": "integer", "description": "In pixels."},
        "height": {"type": "integer", "description": "In pixels."},
    }
    assert schema["parameters"]["required"] == ["path", "width"]


def test_typed_dicts_and_dataclasses_become_objects_with_their_keys():
    properties = parameters(records)["properties"]
    assert properties["debts"]["items"] == {
        "type": "object",
        "properties": {"name": {"type": "string"}, "rate": {"type": "number"}, "months": {"type": "integer"}},
        "required": ["name", "rate"],
    }
    assert properties["start"] == {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        "required": ["x"],
        "description": "Where.",
    }
    assert properties["colours"]["items"] == {"type": "string", "enum": ["red", "blue"]}


@dataclasses.dataclass
class Stay:
    """A stay.

    Args:
        start: the first day.
        nights: how many.
    """

    start: datetime.date
    nights: int


def test_a_type_without_json_form_warns_inside_of_others_too(caplog):
    def book(
        stay: Stay,
        days: list[datetime.date],
        until: datetime.date | None = None,
        more: Any = None,
        of: dict | None = None,
    ):
        """Book."""

    parameters(book)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split("argument ")[1].split(" ")[0] for text in said if "JSON form" in text] == [
        "'stay'", "'days'", "'until'",
    ]  # fmt: skip
    assert all("<class 'datetime.date'>" in text for text in said if "JSON form" in text)


def test_pydantics_field_as_a_default_is_refused():
    def add(a: int, b: int = pydantic.Field(default=3, ge=0)) -> str:
        """Add."""

    with pytest.raises(
        ValueError, match=r"argument 'b' has pydantic's Field as its default; write it inside"
    ):
        parameters(add)


def test_limits_of_a_key_that_may_be_absent_are_kept():
    class Item(TypedDict):
        n: Annotated[int, pydantic.Field(ge=1, description="how many")]
        m: NotRequired[Annotated[int, pydantic.Field(ge=1, description="how many")]]

    def take(item: Item) -> str:
        """Take."""

    properties = parameters(take)["properties"]["item"]["properties"]
    assert properties["m"] == properties["n"] == {"type": "integer", "minimum": 1, "description": "how many"}
    with pytest.raises(ValueError, match=r"'item\.m' is refused: Input should be greater than or equal to 1"):
        check_arguments(take, {"item": {"n": 1, "m": 0}})


def test_a_strict_model_takes_the_text_that_its_schema_asks_for():
    class Visit(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True)
        day: datetime.date

    def visit(x: Visit) -> str:
        """Visit."""

    assert parameters(visit)["properties"]["x"]["properties"]["day"]["format"] == "date"
    assert check_arguments(visit, {"x": {"day": "2024-01-01"}})["x"].day == datetime.date(2024, 1, 1)


def test_run_tool_takes_the_list_that_a_tools_file_exports():
    def search(q: str, limit: int) -> str:
        """Search."""
        return f"{q} {limit}"

    call = {"name": "search", "arguments": {"q": "x"}}
    assert run_tool(call, [functools.partial(search, limit=3)]) == "x 3"


def test_a_type_without_json_form_is_open_and_warns(caplog):
    def tool(when: complex) -> str:
        """Take it."""

    assert parameters(tool)["properties"] == {"when": {}}
    assert "argument 'when' has no JSON form" in caplog.text


def test_a_missing_hint_names_file_function_argument_and_fix():
    def tool(a: int, b) -> str:
        """Take it."""

    with pytest.raises(
        ValueError, match=r"test_tools\.py:\d+, tool: argument 'b' has no type hint; write b: int"
    ):
        get_schema(tool)


def test_a_missing_docstring_is_an_error():
    def tool(a: int) -> str:
        return ""

    with pytest.raises(ValueError, match=r"test_tools\.py:\d+, tool: a tool needs a docstring"):
        get_schema(tool)


def test_star_arguments_are_an_error():
    def tool(*values: int) -> str:
        """Take it."""

    with pytest.raises(ValueError, match="cannot be given by name"):
        get_schema(tool)


def test_a_hint_that_does_not_exist_is_an_error():
    def tool(a: "Nowhere") -> str:  # noqa: F821
        """Take it."""

    with pytest.raises(ValueError, match="tool: a type hint cannot be read: name 'Nowhere' is not defined"):
        get_schema(tool)


def test_reading_a_schema_does_not_import_torch_or_jax():
    """torch's CUDA libraries may clash with jax's; and the worker program must start fast."""
    code = (
        "import sys; from grpo_jax.tools import load_tools\n"
        "import grpo_jax.tools.worker\n"
        "assert not {'jax', 'transformers'} & set(sys.modules)\n"
        "load_tools(module='tools_funcs.math_tools')\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_signature_line():
    assert signature_line(add) == "add(a: int, b: int) -> str"


# --- arguments -------------------------------------------------------------------------------------------

GOOD = {"age": 40, "rate": 0.5, "colour": "red", "goal": "growth", "debts": [{"r": 1}], "note": None}


def test_good_arguments_pass_and_become_what_the_hints_say():
    """An int for a float stays an int; an integral float becomes int; a JSON array becomes a tuple."""
    given_ = GOOD | {"age": 40.0, "size": "big", "tags": None, "pair": [2.0, "b"], "flag": False}
    converted = check_arguments(mixed, given_)
    assert converted == given_ | {"colour": Colour.RED, "pair": (2, "b")}
    assert [type(converted["age"]), type(converted["debts"][0]["r"])] == [int, int]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"age": "40"}, "'age' must be integer, got string \"40\""),
        ({"age": 40.5}, "'age' must be integer, got 40.5"),
        ({"age": True}, "'age' must be integer, got true"),
        ({"age": None}, "'age' must be integer, got null"),
        ({"age": [1]}, "'age' must be integer, got array"),
        ({"note": 10**5000}, "'note' must be string or null, got a huge integer"),
        ({"rate": float("nan")}, "'rate' must be number, got NaN"),
        ({"rate": False}, "'rate' must be number, got false"),
        ({"rate": 0.75}, "'rate' must be one of 0.5, 1.5, got 0.75"),
        ({"colour": "green"}, '\'colour\' must be one of "red", "blue", got string "green"'),
        ({"goal": 1}, '\'goal\' must be one of "growth", "income", got 1'),
        ({"debts": [{"r": 1}, {"r": "x"}]}, "'debts[1].r' must be number, got string \"x\""),
        ({"debts": {}}, "'debts' must be array, got object"),
        ({"note": 3}, "'note' must be string or null, got 3"),
        ({"size": 2.5}, "'size' must be integer or string, got 2.5"),
        ({"tags": ["a", 1]}, "'tags[1]' must be string, got 1"),
        ({"pair": [1]}, "'pair' must have 2 items, got 1"),
        ({"flag": None}, "'flag' must be boolean, got null (leave it out for its default)"),
        ({"flag": "true"}, "'flag' must be boolean, got string \"true\""),
    ],
)
def test_a_bad_argument_is_named_with_what_it_must_be(change, problem):
    with pytest.raises(ValueError) as error:
        check_arguments(mixed, GOOD | change)
    assert str(error.value) == problem


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError) as error:
        check_arguments(add, {"a": "1", "c": 2, "d": 3})
    assert str(error.value) == (
        "unknown 'c' (known: a, b); unknown 'd' (known: a, b); missing 'b' (integer); "
        "'a' must be integer, got string \"1\""
    )


def test_a_long_list_of_problems_is_counted():
    with pytest.raises(ValueError, match=r"; and 92 more$"):
        check_arguments(mixed, GOOD | {"debts": [1] * 100})


def test_a_required_optional_argument_must_be_given_and_may_be_null():
    with pytest.raises(ValueError, match=r"^missing 'note' \(string or null\)$"):
        check_arguments(mixed, {k: v for k, v in GOOD.items() if k != "note"})


def test_null_passes_where_the_default_is_none():
    def tool(a: int = None) -> str:  # noqa: RUF013
        """Take it."""

    assert check_arguments(tool, {"a": None}) == {"a": None}


def test_strings_become_numbers_only_when_lax():
    text = {"age": "40.0", "rate": "0.5", "flag": "True", "size": "7", "debts": [{"r": "2"}]}
    converted = check_arguments(mixed, GOOD | text, lax=True)
    assert converted | {"colour": "red"} == GOOD | {
        "age": 40,
        "rate": 0.5,
        "flag": True,
        "size": "7",
        "debts": [{"r": 2}],
    }
    with pytest.raises(ValueError, match="'age' must be integer"):
        check_arguments(mixed, GOOD | {"age": "nan"}, lax=True)


def test_records_are_checked_and_built():
    good = {"debts": [{"name": "car", "rate": 5}], "start": {"x": 1.0}, "colours": ["red", "red"]}
    converted = check_arguments(records, good)
    assert converted == {"debts": good["debts"], "start": Point(1, 0), "colours": {Colour.RED}}
    bad = {"debts": [{"name": "car", "months": "2"}], "start": {"x": -1, "y": 2}, "colours": []}
    with pytest.raises(ValueError) as error:
        check_arguments(records, bad)
    assert str(error.value) == (
        "missing 'debts[0].rate' (number); 'debts[0].months' must be integer, got string \"2\"; "
        "'start' is refused: x must not be negative"
    )


_TYPES = {
    "integer": lambda v: type(v) is int or (type(v) is float and v.is_integer()),
    "number": lambda v: type(v) in (int, float),
    "string": lambda v: type(v) is str,
    "boolean": lambda v: type(v) is bool,
    "null": lambda v: v is None,
    "array": lambda v: type(v) is list,
    "object": lambda v: type(v) is dict,
}


def _allows(schema, value):
    """JSON Schema's own rules, as a reader of the tool's schema knows them."""
    if value is None and schema.get("nullable"):
        return True
    types = schema.get("type", list(_TYPES))
    if not any(_TYPES[name](value) for name in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in schema and not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in schema["enum"]
    ):
        return False
    if "anyOf" in schema and not any(_allows(one, value) for one in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        return all(_allows(schema.get("additionalProperties", {}), one) for one in value.values())
    if isinstance(value, list) and "prefixItems" in schema:
        places = schema["prefixItems"]
        return len(value) == len(places) and all(map(_allows, places, value))
    return not isinstance(value, list) or all(_allows(schema.get("items", {}), one) for one in value)


def _near(schema):
    """Values that a schema allows, and some that it may not."""
    own = [st.sampled_from(schema["enum"])] if "enum" in schema else []
    own += [_near(one) for one in schema.get("anyOf", [])]
    own += [st.tuples(*map(_near, schema["prefixItems"])).map(list)] if "prefixItems" in schema else []
    own += [st.lists(_near(schema["items"]), max_size=2)] if "items" in schema else []
    if "additionalProperties" in schema:
        own.append(st.dictionaries(st.sampled_from("ab"), _near(schema["additionalProperties"]), max_size=2))
    odd = st.sampled_from(
        [None, True, 0, 1, 2, 1.0, 0.5, 1e300, 2**70, "red", "1", "", [], {}, [1], {"a": 1}]
    )
    return st.one_of(*own, *own, odd)


@settings(max_examples=400, deadline=None)
@given(_HINTS, st.data())
def test_arguments_are_accepted_exactly_where_the_schema_allows_them(hint, data):
    def tool(value):
        """Take a value."""

    tool.__annotations__["value"] = hint
    (schema,) = read_schema(tool)["function"]["parameters"]["properties"].values()
    value = data.draw(_near(schema))
    try:
        check_arguments(tool, {"value": value})
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == _allows(schema, value)


# --- run_tool --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[add, later], {"add": add, "later": later}])
def test_run_tool_takes_text_or_dict(tools):
    assert run_tool('{"name": "add", "arguments": {"a": 15, "b": 27}}', tools) == "Sum: 42"
    assert run_tool({"name": "add", "arguments": {"a": 15, "b": 27.0}}, tools) == "Sum: 42"
    assert run_tool({"name": "later", "arguments": {"a": 1}}, tools) == "later 1"


@pytest.mark.parametrize(
    "call, text",
    [
        ("{", "Error: the call is not JSON: "),
        ("[1]", "Error: a call is an object"),
        ("null", "Error: a call is an object"),
        ('{"arguments": {}}', "Error: a call is an object"),
        (
            '{"name": "sub", "arguments": {}}',
            "Error: unknown tool 'sub'. Available: add, fails, exits, nothing",
        ),
        ('{"name": [1], "arguments": {}}', "Error: a tool's name must be text, got array. Available: add, "),
        ('{"name": "add", "arguments": [1]}', "Error: the arguments of add must be a JSON object"),
        ('{"name": "add", "arguments": null}', "Error: the arguments of add must be a JSON object"),
        ('{"name": "add"}', "Error: wrong arguments for add: missing 'a' (integer); missing 'b' (integer)"),
        ('{"name": "fails"}', "Error: fails raised KeyError: 'k'"),
        ('{"name": "exits"}', "Error: exits called sys.exit(3)"),
        ("[" * 100_000, "Error: the call is not JSON: "),
    ],
)
def test_problems_are_strings(call, text):
    assert run_tool(call, [add, fails, exits, nothing]).startswith(text)


def test_a_result_that_is_no_string_is_written_as_one():
    assert run_tool({"name": "nothing"}, [nothing]) == "7"


def test_lone_surrogates_never_reach_a_tokenizer():
    def echo(text: str) -> str:
        """Say it back."""
        return text

    call = '{"name": "echo", "arguments": {"text": "a\\ud800b\\ud83d\\ude00"}}'
    assert run_tool(call, [echo]) == "a\ufffdb😀"


_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(), max_size=8),
        st.sampled_from(["red", "growth", 1e300, -0.0, 2**70, 10**4000, "\ud800", "1e5", "nan"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_KEYS = ["age", "rate", "colour", "goal", "debts", "note", "size", "tags", "pair", "start", "colours", "zz"]
_NAMES = st.sampled_from(_KEYS)


_STARTS = [
    (mixed, GOOD),
    (records, {"debts": [{"name": "car", "rate": 5}], "start": {"x": 1}, "colours": []}),
    (add, {"a": 1, "b": 2}),
]


def _never_raises(arguments, near, lax):
    """Random arguments, and random changes of good ones, which get further."""
    for tool, good in _STARTS:
        changed = good | {k: v for k, v in arguments.items() if k in near}
        for given_ in (arguments, changed):
            text = run_tool({"name": tool.__name__, "arguments": given_}, [tool], lax=lax)
            text.encode()  # no surrogates
            assert text.startswith((f"Error: wrong arguments for {tool.__name__}: ", "[", "Sum: ")), arguments


@settings(max_examples=300, deadline=1000)
@given(st.dictionaries(_NAMES, _JSON), st.sets(_NAMES, max_size=2), st.booleans())
def test_no_arguments_make_run_tool_raise(arguments, near, lax):
    _never_raises(arguments, near, lax)


@pytest.mark.slow
def test_no_arguments_of_20_000_make_run_tool_raise():
    """As above; drawn by `random`, which takes a tenth of hypothesis' time and has no need to shrink them."""
    rng = random.Random(0)
    leaves = [None, True, False, 0, -1, 0.5, math.nan, math.inf, 1e300, -0.0, 2**70, 10**4000]
    leaves += ["", "red", "growth", "1e5", "nan", "\ud800", "\x00", "é😀"]

    def value(depth):
        if depth == 0 or rng.random() < 0.5:
            return rng.choice(
                [*leaves, rng.randint(-(10**20), 10**20), rng.gauss(0, 1e3), chr(rng.randrange(0x110000))]
            )
        inner = [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return (
            inner
            if rng.random() < 0.5
            else {rng.choice([*_KEYS, "", "a", "x", chr(rng.randrange(0x110000))]): v for v in inner}
        )

    for _ in range(20_000):
        arguments = {rng.choice(_KEYS): value(3) for _ in range(rng.randint(0, 6))}
        _never_raises(arguments, rng.sample(_KEYS, rng.randint(0, 2)), rng.random() < 0.5)


def test_deep_nesting_is_an_error_string_or_a_result():
    deep = []
    for _ in range(50_000):
        deep = [deep]
    text = run_tool({"name": "mixed", "arguments": GOOD | {"extra": deep}}, [mixed])
    assert text.startswith("Error: mixed raised RecursionError")


# --- loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    def write(text, name="my_tools.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


ADD = 'def add(a: int, b: int) -> str:\n    """Add."""\n    return str(a + b)\n'


def test_math_tools_load_by_module():
    tools = load_tools(module="tools_funcs.math_tools")
    assert list(tools.functions) == ["add", "multiply"]
    assert [s["function"]["name"] for s in tools.schemas] == ["add", "multiply"]
    assert run_tool({"name": "add", "arguments": {"a": 15, "b": 27}}, tools) == "Sum: 42"
    assert run_tool({"name": "multiply", "arguments": {"a": 8, "b": 9}}, tools) == "Product: 72"


def test_a_script_wins_over_the_module_and_its_folder_is_importable(script):
    script("WORD = 'side'\n", "sidekick_of_tools.py")
    path = script("import sidekick_of_tools\n" + ADD + "TOOL_FUNCTIONS = [add]\n")
    tools = load_tools(script=path, module="tools_funcs.math_tools")
    assert (list(tools.functions), tools.script, tools.module) == (["add"], path, None)


def test_scripts_named_like_modules_do_not_replace_them(script):
    """Neither in this process nor in the workers, which import json themselves."""
    tools = load_tools(script=script(ADD + "TOOL_FUNCTIONS = [add]\n", "json.py"))
    assert sys.modules["json"] is json
    with ToolRunner(tools, workers=1) as runner:
        assert runner.run([ToolCall("add", {"a": 15, "b": 27})])[0].text == "42"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", r"^No TOOL_FUNCTIONS found in /.*my_tools\.py"),
        ("TOOL_FUNCTIONS = []\n", "must be a list with at least one function"),
        ("TOOL_FUNCTIONS = 3\n", "must be a list with at least one function, got 3"),
        ("TOOL_FUNCTIONS = [3]\n", r"TOOL_FUNCTIONS in .*\[0\] must be a function defined with `def`, got 3"),
        ("TOOL_FUNCTIONS = [int]\n", "must be a function"),
        ("TOOL_FUNCTIONS = [lambda: 1]\n", "must be a function"),
        (
            ADD + "TOOL_FUNCTIONS = [add, add]\n",
            r"contains the name 'add' twice .*my_tools\.py:1, add.*rename one",
        ),
        (
            ADD + "TOOL_FUNCTIONS = [add]\ndef make_tools():\n    return [add]\n",
            "exports TOOL_FUNCTIONS and make",
        ),
        ("y = 1\nx = nope + 1\n", r"importing .* failed: NameError.*\n  .*my_tools\.py:2: x = nope \+ 1$"),
        ("def f(:\n", r"SyntaxError.*\n  .*my_tools\.py:1: def f\(:$"),
        (
            "class Mute(Exception):\n    def __str__(self):\n        return 1 / 0\nraise Mute\n",
            r"failed: Mute\n  .*my_tools\.py:4",
        ),
        ("import sys\nsys.exit(1)\n", r"failed: SystemExit: 1\n  .*my_tools\.py:2"),
        (
            "def make_tools():\n    return 1 / 0\n",
            r"make_tools\(\) in /.* failed: ZeroDivisionError.*\n  .*my_tools\.py:2: return 1 / 0$",
        ),
    ],
)
def test_what_is_wrong_with_a_script_is_said(script, text, message):
    with pytest.raises(ValueError, match=message):
        load_tools(script=script(text))


def test_missing_sources_are_errors():
    with pytest.raises(
        ValueError, match=r"tools_script must be a Python file, and /no/such\.py does not exist"
    ):
        load_tools(script="/no/such.py")
    with pytest.raises(ValueError, match=r"'no\.such' is not importable"):
        load_tools(module="no.such")
    with pytest.raises(ValueError, match="no tools given"):
        load_tools()


def test_make_tools_makes_methods_of_an_object(script):
    text = (
        "class Counter:\n"
        "    def __init__(self):\n        self.n = 0\n"
        '    def bump(self, by: int) -> str:\n        """Count."""\n        self.n += by\n        return str(self.n)\n'
        "def make_tools():\n    return [Counter().bump]\n"
    )
    tools = load_tools(script=script(text))
    assert tools.stateful and tools.factory is not None
    assert list(tools.schemas[0]["function"]["parameters"]["properties"]) == ["by"]
    assert [run_tool({"name": "bump", "arguments": {"by": 2}}, tools) for _ in range(2)] == ["2", "4"]


def buy(
    quantity: Annotated[int, Field(ge=1, le=5, description="How many.")],
    names: Annotated[list[Annotated[str, Field(min_length=2)]], "Of what."],
    limit: Annotated[float | None, Field(gt=0)] = None,
) -> str:
    """Buy."""
    return f"{quantity} {names} {limit}"


def test_limits_in_annotated_are_part_of_the_schema_and_checked():
    properties = get_schema(buy)["function"]["parameters"]["properties"]
    assert properties["quantity"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 5,
        "description": "How many.",
    }
    assert properties["names"]["items"] == {"type": "string", "minLength": 2}
    assert properties["limit"] == {"type": "number", "nullable": True, "exclusiveMinimum": 0}
    assert check_arguments(buy, {"quantity": 5.0, "names": ["ab"]}) == {"quantity": 5, "names": ["ab"]}
    assert check_arguments(buy, {"quantity": 1, "names": [], "limit": None})["limit"] is None
    with pytest.raises(ValueError) as raised:
        check_arguments(buy, {"quantity": -7, "names": ["ab", "x"], "limit": 0})
    assert str(raised.value) == (
        "'quantity' is refused: Input should be greater than or equal to 1; "
        "'names[1]' is refused: String should have at least 2 characters; "
        "'limit' is refused: Input should be greater than 0"
    )


def test_a_description_alone_limits_nothing_and_the_schema_is_transformers():
    def add(a: Annotated[int, Field(description="First.")], b: int) -> int:
        """Add.

        Args:
            a: First.
            b: Second.
        """
        return a + b

    assert get_schema(add) == get_json_schema(add)


class Order(TypedDict):
    amount: Annotated[int, Field(ge=1)]


def test_limits_of_a_records_keys_are_checked():
    def place(order: Order) -> str:
        """Place an order."""
        return "ok"

    with pytest.raises(ValueError, match=r"'order.amount' is refused: .* greater than or equal to 1"):
        check_arguments(place, {"order": {"amount": 0}})
