"""The parser reads what is there, names what is wrong, and cannot be broken by a model."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_jax.rollout.parsing import MAX_DEPTH, assistant_message, parse_turn
from grpo_jax.types import ParsedTurn, ToolCall


def _schema(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


SCHEMAS = [
    _schema("add", a={"type": "integer"}, b={"type": "integer"}),
    _schema(
        "convert",
        amount={"type": "number"},
        to={"type": "string"},
        note={"type": "string", "nullable": True},
        exact={"type": "boolean"},
        rates={"type": "object"},
        tags={"type": "array"},
        unit={"anyOf": [{"type": "string"}, {"type": "integer"}]},
        level={"enum": [1, 2, None]},
        free={},
    ),
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def _block(inside):
    return f"<tool_call>{inside}</tool_call>"


def test_no_call_is_text_unchanged():
    text = "  The answer is 3.\n"
    assert parse_turn(text, SCHEMAS) == ParsedTurn(text, None, (), None)


def test_several_calls_in_order_with_text_around():
    text = f'Let me see.\n{ADD}\n<tool_call>{{"arguments": {{}}, "name": "convert"}}</tool_call>\nDone.'
    turn = parse_turn(text, SCHEMAS)
    assert turn.calls == (ToolCall("add", {"a": 1, "b": 2}), ToolCall("convert", {}))
    assert turn.content == "Let me see.\n\n\nDone."
    assert turn.error is None


def test_values_keep_their_json_types():
    text = _block(
        '{"name": "add", "arguments": {"a": 1.0, "b": null, "c": [true, "</tool_call>", {"d": -2e3}]}}'
    )
    (call,) = parse_turn(text, SCHEMAS).calls
    assert repr(call.arguments) == "{'a': 1.0, 'b': None, 'c': [True, '</tool_call>', {'d': -2000.0}]}"


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (f"<think>\nI add.\n</think>\n\n{ADD}", "", "I add.", 1),
        ("<think>\n\n</think>\n\nThree.", "Three.", "", 0),
        (f"<think>a</think><think>b {ADD}</think>{ADD}", "", "a\nb " + ADD, 1),
        (f"Hm. <think>I add.\n{ADD}", "Hm.", "I add.\n" + ADD, 0),
        ("</think>Three.", "</think>Three.", None, 0),
    ],
    ids=[
        "before a call",
        "empty",
        "call inside is no call",
        "unterminated takes the rest",
        "stray end is text",
    ],
)
def test_reasoning(text, content, reasoning, calls):
    turn = parse_turn(text, SCHEMAS)
    assert (turn.content, turn.reasoning_content, len(turn.calls)) == (content, reasoning, calls)
    assert turn.error is None


DEEP = "[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1)
REASONS = [
    ('<tool_call>{"name": "add", "arguments": {', "unterminated: "),
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', "unterminated: "),
    ("<tool_call>", "unterminated: "),
    (_block(""), "not JSON: Expecting value at character 0"),
    (_block("add(1, 2)"), "not JSON: Expecting value at character 0"),
    (_block("{'name': 'add'}"), "not JSON: Expecting property name"),
    (_block('{"name": "add", "arguments": {"a": 1,}}'), "not JSON: "),
    (_block('{"name": "add", "arguments": {"a": NaN}}'), "not JSON: NaN is not a JSON number"),
    (_block('{"name": "add", "arguments": {"a": -Infinity}}'), "not JSON: -Infinity is not"),
    (_block('{"name": "add", "arguments": {"a": 1e999}}'), "not JSON: number '1e999' is out of range"),
    (_block('{"name": "add", "arguments": {"a": %s}}' % ("9" * 5000)), "not JSON: number of 5000 digits"),
    (_block('{"name": "add", "arguments": {"a": 1, "a": 2}}'), "not JSON: key 'a' occurs twice"),
    (
        _block('{"name": "add", "arguments": {"a": "\\ud800"}}'),
        "not JSON: a string holds half of a surrogate",
    ),
    (_block('{"name": "add", "arguments": {"\\udc00": 1}}'), "not JSON: a string holds half of a surrogate"),
    (_block('{"name": "add", "arguments": {"a": "\n"}}'), "not JSON: Invalid control character"),
    (_block(DEEP), f"not JSON: nested deeper than {MAX_DEPTH} levels"),
    (_block("[" * 100_000 + "]" * 100_000), f"not JSON: nested deeper than {MAX_DEPTH} levels"),
    (_block('["add", {"a": 1}]'), "not an object: a call is a JSON object, got an array"),
    (_block("null"), "not an object: a call is a JSON object, got null"),
    (_block("{}"), "no name: "),
    (_block('{"name": "", "arguments": {}}'), "no name: "),
    (_block('{"name": ["add"], "arguments": {}}'), "no name: "),
    (_block('{"name": "ad", "arguments": {}}'), "unknown tool: 'ad'; try one of add, convert"),
    (_block('{"name": "zzz", "arguments": {}}'), "unknown tool: 'zzz'; try one of add, convert"),
    (_block('{"name": "add"}'), 'arguments not an object: "arguments" must be a JSON object, got nothing'),
    (_block('{"name": "add", "arguments": "{}"}'), "arguments not an object: "),
    (_block('{"name": "add", "arguments": null}'), "arguments not an object: "),
    (_block('{"name": "add", "arguments": [1]}'), "arguments not an object: "),
    (_block('{"name": "add", "arguments": {}}}'), "trailing text: '}' stands between the JSON value"),
    (_block("1 2"), "trailing text: '2' stands"),
]


@pytest.mark.parametrize(("text", "reason"), REASONS)
def test_reason_why_a_call_does_not_parse(text, reason):
    turn = parse_turn(text, SCHEMAS)
    assert turn.error is not None and turn.error.startswith(reason)
    assert (turn.content, turn.calls) == (text, ())


def test_of_many_tools_the_ten_nearest_are_named():
    schemas = [_schema(f"tool_{i}") for i in range(300)]
    error = parse_turn(_block('{"name": "tool_77b", "arguments": {}}'), schemas).error
    assert error.startswith("unknown tool: 'tool_77b'; try one of tool_77, ") and error.count(",") == 9


def test_one_bad_call_drops_the_good_ones():
    text = f"<think>x</think>{ADD}{_block('[]')}"
    turn = parse_turn(text, SCHEMAS)
    assert turn == ParsedTurn(text, None, (), "not an object: a call is a JSON object, got an array")


def test_deepest_allowed_nesting_parses():
    value = "[" * (MAX_DEPTH - 2) + "1" + "]" * (MAX_DEPTH - 2)
    assert parse_turn(_block(f'{{"name": "add", "arguments": {{"a": {value}}}}}'), SCHEMAS).error is None


def test_message_has_the_contract_form():
    turn = ParsedTurn("Wait.", "I add.", (ToolCall("add", {"a": 1}),), None)
    assert assistant_message(turn) == {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "I add.",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert assistant_message(ParsedTurn("Hi", None, (), None)) == {"role": "assistant", "content": "Hi"}


# --- Qwen3-Coder -------------------------------------------------------------


def _xml(name, **values):
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def test_xml_calls_in_order_with_text_around():
    turn = parse_turn(f"Both:\n{_xml('add', a=1, b=2)}\n{_xml('add')}", SCHEMAS, "qwen3_coder")
    assert turn == ParsedTurn("Both:", None, (ToolCall("add", {"a": 1, "b": 2}), ToolCall("add", {})), None)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("amount", "1.50", 1.5),
        ("amount", "2", 2),
        ("amount", "two", "two"),
        ("amount", "NaN", "NaN"),
        ("to", "5", "5"),
        ("to", "null", "null"),
        ("to", "  two\nlines </tool_call>", "  two\nlines </tool_call>"),
        ("to", "", ""),
        ("note", "None", None),
        ("note", "nothing", "nothing"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("rates", '{"eur": 1}', {"eur": 1}),
        ("tags", '["a", 1]', ["a", 1]),
        ("tags", "None", None),
        ("unit", "7", 7),
        ("unit", "[7]", "[7]"),
        ("unit", "None", "None"),
        ("level", "2", 2),
        ("level", "null", None),
        ("free", '{"x": 1}', {"x": 1}),
        ("free", "plain", "plain"),
        ("undeclared", "3", "3"),
    ],
)
def test_xml_values_are_typed_by_the_schema(key, text, value):
    (call,) = parse_turn(_xml("convert", **{key: text}), SCHEMAS, "qwen3_coder").calls
    assert repr(call.arguments) == repr({key: value})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call><function=add>", "unterminated: <function=add>"),
        ("<tool_call><function=add><parameter=a>1", "unterminated: <parameter=a>"),
        ("<tool_call><function=add></function>", "unterminated: <tool_call>"),
        ("<tool_call>", "unterminated: <tool_call>"),
        (ADD, "no name: "),
        ("<tool_call><function=></function></tool_call>", "no name: "),
        (_xml("sub"), "unknown tool: 'sub'"),
        (
            "<tool_call><function=add>a=1</function></tool_call>",
            "arguments not an object: expected <parameter",
        ),
        (
            "<tool_call><function=add><parameter=a>1</parameter><parameter=a>1</parameter></function></tool_call>",
            "arguments not an object: parameter 'a' occurs twice",
        ),
        ("<tool_call><function=add></function>;</tool_call>", "trailing text: ';'"),
        (_xml("convert", to="\ud800"), "not JSON: a parameter holds half of a surrogate pair"),
    ],
)
def test_xml_reason_why_a_call_does_not_parse(text, reason):
    turn = parse_turn(text, SCHEMAS, "qwen3_coder")
    assert turn.error is not None and turn.error.startswith(reason)
    assert (turn.content, turn.calls) == (text, ())


# --- Fuzzing -----------------------------------------------------------------

REASON = tuple(sorted({reason.split(":")[0] for _, reason in REASONS}))
TAGS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<function=add>",
    "</function>",
    "<parameter=a>",
]
BITS = [
    *TAGS,
    "</parameter>",
    ADD,
    '{"name": "add", "arguments": ',
    "{",
    "}",
    "[" * 2000,
    "]",
    '"',
    "NaN",
    "1e999",
    "\\ud83d",
    "\ud83d",
    "9" * 5000,
    "x" * 100_000,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["name", "arguments"]), inner)
    ),
    max_leaves=15,
)
# Plain text with surrogates, and random bytes decoded.
ANYTHING = st.text(st.characters() | st.sampled_from("\ud800\udfff\ufeff"))
ANYTHING |= st.binary().map(lambda data: data.decode("utf-8", "replace"))


def _deep(value, depth):
    return f"{'[' * depth}{value}{']' * depth}"


def _object(pairs):
    """An object that may name a key twice, which json.dumps cannot write."""
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}"


def _turns(call):
    """Calls of one family, alone and between anything."""
    mixed = st.lists(st.one_of(call, call, ANYTHING, st.sampled_from(BITS)), max_size=6)
    return (mixed | st.lists(call, max_size=4)).map("".join)


# JSON text: with NaN and Infinity, nested up to 1000 levels, with keys that occur twice.
VALUE = JSON.map(json.dumps)
VALUE |= st.builds(_deep, VALUE, st.sampled_from([MAX_DEPTH - 3, MAX_DEPTH, 1000]))
OBJECT = st.lists(st.tuples(st.sampled_from("abcd") | st.text(), VALUE), max_size=3).map(_object)
NAMES = st.sampled_from(["add", "convert", "convert", "x", ""])
KEYS = st.sampled_from(["a", "to", "rates", "level", ""])
CALL = st.builds(
    lambda name, arguments: _block(_object([("name", json.dumps(name)), ("arguments", arguments)])),
    NAMES,
    st.one_of(OBJECT, OBJECT, VALUE),
)
XML = st.builds(lambda name, key, value: _xml(name, **{key: value}), NAMES, KEYS, OBJECT | VALUE | ANYTHING)
TURN = _turns(CALL) | _turns(XML)


def _parsed_within_a_second(text, call_format):
    """Tried again where it took longer: after some 20,000 turns Python's collector takes over a second to
    walk what hypothesis keeps, and it may start at any line."""
    for _ in range(3):
        start = time.process_time()
        turn = parse_turn(text, SCHEMAS, call_format)
        if time.process_time() - start < 1.0:
            return turn
    raise AssertionError(f"{call_format}: over a second, three times: {text!r}")


@given(text=TURN, cut=st.just(0) | st.integers(1, 50))
@settings(
    max_examples=int(os.environ.get("GRPO_JAX_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_turn_breaks_the_parsers(text, cut):
    """Any text, cut anywhere, gives a turn that is typed and can be written down, within a second."""
    text = text[: len(text) - cut]
    for call_format in ("hermes", "qwen3_coder"):
        turn = _parsed_within_a_second(text, call_format)
        if turn.error is not None:
            assert turn.error.startswith(REASON) and turn.calls == () and turn.content == text
            turn.error.encode("utf-8")  # it may be sent to the model
        for call in turn.calls:
            assert call.name in ("add", "convert")
            assert json.loads(json.dumps(call.arguments, allow_nan=False)) == call.arguments
            json.dumps(call.arguments, ensure_ascii=False).encode("utf-8")


@given(name=st.sampled_from(["add", "convert"]), arguments=st.dictionaries(st.text(), JSON))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_written_call_is_read_back(name, arguments):
    """JSON that the json module writes for finite, well-formed values parses to the same values."""
    arguments = json.loads(json.dumps(arguments).replace("NaN", "0").replace("Infinity", "1"))
    turn = parse_turn(_block(json.dumps({"name": name, "arguments": arguments})), SCHEMAS)
    assert turn.calls == (ToolCall(name, arguments),)


@pytest.mark.parametrize(
    "bit", ["<tool_call>", "<think>", "[", '{"a":', "<tool_call>{}", ADD, '"\\', "<think></think>"]
)
@pytest.mark.parametrize("call_format", ["hermes", "qwen3_coder"])
def test_a_megabyte_of_anything_takes_under_a_second(bit, call_format):
    text = "<tool_call>" + bit * (1_000_000 // len(bit))
    start = time.process_time()
    parse_turn(text, SCHEMAS, call_format)
    parse_turn(text.removeprefix("<tool_call>"), SCHEMAS, call_format)
    assert time.process_time() - start < 2.0
