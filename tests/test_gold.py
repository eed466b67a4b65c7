"""Gold calls: how the columns are read, and which rows' calls run."""

import dataclasses
import json
from typing import Any, NotRequired, TypedDict

import pytest
from pydantic import BaseModel

from grpo_jax.data.gold import failed_call, gold_calls, gold_texts, run_gold_calls, show_call, unpadded
from grpo_jax.types import Example, Outcome, ToolCall, ToolResult


def convert(amount: float, fees: dict, parts: list, limit: int | None) -> str:
    """Four parameters of its own."""
    return ""


def anything(**values: str) -> str:
    """Takes every keyword."""
    return ""


TOOLS = {"convert": convert, "anything": anything}


def with_columns(**extra) -> Example:
    return Example([], "", extra, "rows.jsonl:7")


def test_rewards_get_the_column_as_it_was_written_without_what_arrow_adds():
    call = {"name": "anything", "arguments": {"amount": "1", "limit": None}}
    clean = {"name": "anything", "arguments": {"amount": "1"}}
    wrapped = {"type": "function", "id": "1", "function": call}
    text = {"name": "anything", "arguments": json.dumps(call["arguments"])}
    for value, want in [
        (call, clean),
        ([call, clean], [clean, clean]),
        (wrapped, clean | wrapped | {"function": clean}),
        ({"function": text}, clean | {"function": text}),
        (text, clean),
        (json.dumps(call), json.dumps(call)),  # text stays text
        ({"name": "unknown", "arguments": {"x": None}}, {"name": "unknown", "arguments": {"x": None}}),
        ([], []),
        (None, None),
    ]:
        assert unpadded(with_columns(tool_call=value), TOOLS) == want


class Offer(TypedDict, total=False):
    """Only keys that may be left out, one with an object of its own."""

    fees: "Fees"
    day: str


class Fees(TypedDict):
    """An object with a key that may be left out, and one that must be there and may be null."""

    cap: float | None
    rate: NotRequired[float]


@dataclasses.dataclass
class Part:
    """An item with an optional field."""

    size: float
    colour: str = "red"


def quote(fees: Fees, parts: list[Part], digits: int = 2, unit: str | None = "kg", note: str = None) -> str:  # noqa: RUF013
    """Records, and defaults."""
    return ""


def refuse(fees: dict[str, Fees] | None, offer: Offer, **more: Any) -> str:
    """Records inside objects."""
    return ""


TOOLS |= {"quote": quote, "refuse": refuse}


def test_what_a_tool_call_writes_stays():
    """Also an argument that the function does not have: the tool refuses it, and that is reported."""
    arguments = {"amount": 5.0, "limit": None, "fees": {"fixed": 2.0}, "parts": [None], "strange": 1}
    call = {"name": "convert", "arguments": arguments}
    assert gold_calls(with_columns(tool_call=call), TOOLS) == [ToolCall("convert", arguments)]
    assert gold_calls(with_columns(tool_call=[call, call]), TOOLS) == [ToolCall("convert", arguments)] * 2
    (read,) = gold_calls(with_columns(tool_call=call), TOOLS)
    assert isinstance(read.arguments["amount"], float)


@pytest.mark.parametrize("column", ["tool_call", "ground_truth"])
@pytest.mark.parametrize(
    ("name", "padded", "expected"),
    [
        ("convert", {"amount": 1, "limit": None, "city": None}, {"amount": 1, "limit": None}),
        ("convert", {"fees": {"a": None, "b": {"c": None, "d": 0.5}}}, {"fees": {"b": {"d": 0.5}}}),
        ("convert", {"parts": [{"x": None, "y": 2}, None]}, {"parts": [{"y": 2}, None]}),
        ("anything", {"a": None, "b": "c"}, {"b": "c"}),
        # of its own parameters: one with a default that does not take null was left out
        ("quote", {"digits": None, "unit": None, "note": None}, {"unit": None, "note": None}),
        # required keys of a TypedDict or dataclass stay, whether null is right or is to be reported
        ("quote", {"fees": {"cap": None, "rate": None, "x": None}}, {"fees": {"cap": None}}),
        ("quote", {"parts": [{"size": None, "colour": None}]}, {"parts": [{"size": None}]}),
        ("refuse", {"fees": {"a": {"cap": None, "rate": None}, "b": None}}, {"fees": {"a": {"cap": None}}}),
        ("refuse", {"fees": None, "more": None}, {"fees": None}),
        ("refuse", {"offer": {"fees": {"cap": None}, "day": None}}, {"offer": {"fees": {"cap": None}}}),
    ],
)
def test_nulls_that_only_fill_up_are_dropped_from_both_columns(column, name, padded, expected):
    call = {"name": name, "arguments": padded}
    assert gold_calls(with_columns(**{column: call}), TOOLS) == [ToolCall(name, expected)]


class Wide(BaseModel):
    """A pydantic model's field that may be null and must be given."""

    x: int | None


def records(
    union: Offer | Fees | str, pair: tuple[int, Fees], many: tuple[Fees, ...], wide: Wide | None
) -> str:
    """Records as members of others."""
    return ""


TOOLS |= {"records": records}


@pytest.mark.parametrize(
    ("padded", "expected"),
    [
        ({"union": {"cap": None, "rate": None}}, {"union": {"cap": None}}),
        ({"union": {"fees": {"cap": None}, "day": None}}, {"union": {"fees": {"cap": None}}}),
        ({"pair": [1, {"cap": None, "x": None}]}, {"pair": [1, {"cap": None}]}),
        ({"many": [{"cap": None}, {"cap": 2.5, "rate": None}]}, {"many": [{"cap": None}, {"cap": 2.5}]}),
        ({"wide": {"x": None, "y": None}}, {"wide": {"x": None}}),
    ],
)
def test_nulls_that_a_record_requires_are_kept_wherever_it_stands(padded, expected):
    call = {"name": "records", "arguments": padded}
    assert gold_calls(with_columns(tool_call=call), TOOLS) == [ToolCall("records", expected)]


CALL = {"name": "anything", "arguments": {"a": "b"}}


@pytest.mark.parametrize(
    "written",
    [
        CALL,
        [CALL],
        {"id": "x", "type": "function", "function": CALL},
        {"name": "anything", "arguments": '{"a": "b"}'},
        json.dumps(CALL),  # a CSV cell
        json.dumps([CALL]),
        [json.dumps(CALL)],
    ],
)
def test_a_call_may_be_written_in_openais_form_or_as_json_text(written):
    assert gold_calls(with_columns(tool_call=written), TOOLS) == [ToolCall("anything", {"a": "b"})]


def test_ground_truth_loses_its_padding():
    padded = {
        "amount": 5.0,
        "limit": None,
        "fees": {"fixed": None, "rate": 0.25, "deep": {"x": None, "y": 2.0}},
        "parts": [{"size": 3.0, "colour": None}, None, True],
        "age": None,
        "state": "CA",
    }
    expected = {
        "amount": 5,
        "limit": None,
        "fees": {"rate": 0.25, "deep": {"y": 2}},
        "parts": [{"size": 3}, None, True],
    }
    (call,) = gold_calls(with_columns(ground_truth={"name": "convert", "arguments": padded}), TOOLS)
    assert call == ToolCall("convert", expected)
    assert isinstance(call.arguments["amount"], int)
    assert call.arguments["parts"][2] is True


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tool_call": None},
        {"tool_call": []},
        {"ground_truth": None},
        {"tool_call": [], "ground_truth": None},
    ],
)
def test_a_row_may_have_no_gold_call(extra):
    assert gold_calls(with_columns(**extra), TOOLS) == []


def test_tool_call_comes_before_ground_truth():
    call = {"name": "anything", "arguments": {}}
    assert gold_calls(with_columns(tool_call=[], ground_truth=call), TOOLS) == []
    assert gold_calls(with_columns(tool_call=None, ground_truth=call), TOOLS) == [ToolCall("anything", {})]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add(1, 2)", 'a call must be {"name": text, "arguments": object}, got "add(1, 2)"'),
        ({"name": "convert"}, "a call must be"),
        ({"name": 3, "arguments": {}}, "a call must be"),
        ({"name": "convert", "arguments": "[]"}, "a call must be"),
        ({"name": "convert", "arguments": "{"}, "a call must be"),
        ({"function": None}, "a call must be"),
        ([[]], "a call must be"),
        (
            {"name": "divide", "arguments": {}},
            "unknown tool 'divide'; the tools are convert, anything, quote, refuse",
        ),
    ],
)
def test_a_bad_gold_call_is_named_by_row_and_column(call, message):
    with pytest.raises(ValueError) as raised:
        gold_calls(with_columns(tool_call=call), TOOLS)
    assert str(raised.value).startswith(f"rows.jsonl:7: column 'tool_call': {message}")


def test_a_gold_call_that_the_row_does_not_see_is_named_by_row():
    gold = {"name": "anything", "arguments": {}}
    assert gold_calls(with_columns(tool_call=gold, tools=["anything"]), TOOLS) == [ToolCall("anything", {})]
    with pytest.raises(ValueError) as raised:
        gold_calls(with_columns(tool_call=gold, tools=["convert"]), TOOLS)
    assert str(raised.value) == (
        "rows.jsonl:7: column 'tool_call': the row does not show the tool 'anything', only convert; "
        "add it to the column 'tools'"
    )


def test_the_texts_of_gold_calls_are_json():
    assert gold_texts(with_columns(tool_call=[CALL]), TOOLS) == [
        '{"name": "anything", "arguments": {"a": "b"}}'
    ]
    assert gold_texts(with_columns(), TOOLS) == []


# Running them


class Echo:
    """A runner whose result is the row and the call's name."""

    def start_step(self, rows):
        self.rows = rows

    def run(self, calls, rows):
        return [
            ToolResult(f"{row}: {call.name}", Outcome.OK, 0.0) for call, row in zip(calls, rows, strict=True)
        ]


def test_each_call_comes_back_with_its_row_and_result():
    other = {"name": "convert", "arguments": {}}
    rows = [with_columns(tool_call=[CALL, other]), with_columns(), with_columns(tool_call=other)]
    runner = Echo()
    ran = run_gold_calls(rows, TOOLS, runner)
    assert runner.rows == [row.columns for row in rows]
    assert [[(call.name, result.text) for call, result in row] for row in ran] == [
        [("anything", "0: anything"), ("convert", "0: convert")],
        [],
        [("convert", "2: convert")],
    ]


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.TIMEOUT, Outcome.CRASH])
def test_the_first_call_that_does_not_run_is_found_unless_the_row_ends_in_its_answer(outcome):
    good = (ToolCall("add", {"a": 1}), ToolResult("Sum: 1", Outcome.OK, 0.0))
    bad = (ToolCall("add", {"a": "x"}), ToolResult('Error: "a" must be integer', outcome, 0.0))
    assert failed_call([good, good], answers=False) is None
    assert failed_call([good, bad, bad], answers=False) is bad
    assert failed_call([bad], answers=True) is None
    assert show_call(*bad) == 'add(a=\'x\') returns "Error: \\"a\\" must be integer"'
