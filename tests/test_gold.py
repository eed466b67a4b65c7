"""Gold calls: how the columns are read, and which rows' calls run."""

import pytest

from grpo_jax.data.gold import gold_calls
from grpo_jax.types import Example, ToolCall


def convert(amount: float, fees: dict, parts: list, limit: int | None) -> str:
    """Four parameters of its own."""
    return ""


def anything(**values: str) -> str:
    """Takes every keyword."""
    return ""


TOOLS = {"convert": convert, "anything": anything}


def with_columns(**extra) -> Example:
    return Example([], "", extra, "rows.jsonl:7")


def test_tool_call_is_taken_as_it_is():
    arguments = {"amount": 5.0, "limit": None, "fees": {"fixed": None}, "strange": None}
    call = {"name": "convert", "arguments": arguments}
    assert gold_calls(with_columns(tool_call=call), TOOLS) == [ToolCall("convert", arguments)]
    assert gold_calls(with_columns(tool_call=[call, call]), None) == [ToolCall("convert", arguments)] * 2


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


def test_ground_truth_without_functions_drops_every_null():
    row = with_columns(ground_truth=[{"name": "x", "arguments": {"a": None, "b": 2.0}}])
    assert gold_calls(row, None) == [ToolCall("x", {"b": 2})]


def test_ground_truth_of_a_function_with_free_keywords_keeps_what_has_a_value():
    row = with_columns(ground_truth={"name": "anything", "arguments": {"a": None, "b": "c"}})
    assert gold_calls(row, TOOLS) == [ToolCall("anything", {"b": "c"})]


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
        ({"name": "convert", "arguments": "{}"}, "a call must be"),
        ([[]], "a call must be"),
        ({"name": "divide", "arguments": {}}, "unknown tool 'divide'; the tools are convert, anything"),
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
        "rows.jsonl:7: column 'tool_call': the row does not see the tool 'anything', only convert; "
        "add it to the column 'tools'"
    )
