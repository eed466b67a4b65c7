"""What states a tool result: the examples of docs/evaluation.md, several results, the reward and its files."""

import json
import re
import time
from pathlib import Path

import pytest

from grpo_jax.run.options import GRPOConfig
from grpo_jax.scoring.grounding import is_grounded
from grpo_jax.scoring.rewards import grounded, load_rewards
from grpo_jax.tools import final_tools, load_tools
from grpo_jax.types import PARSER_NAME, Status

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text()
EXAMPLES = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|$", PAGE, re.M)
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


def said(text):
    return {"role": "assistant", "content": text}


def tool(text, name="add"):
    return {"role": "tool", "name": name, "content": text}


@pytest.mark.parametrize(("result", "final", "grounded"), EXAMPLES)
def test_the_examples_of_the_page(result, final, grounded):
    assert is_grounded([CALLS, tool(result), said(final)]) is (grounded == "yes")


def test_the_page_has_examples_and_every_status():
    assert len(EXAMPLES) == 8
    table = PAGE[PAGE.index("## How a conversation ends") :]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == {status.value for status in Status}


@pytest.mark.parametrize(
    ("result", "final", "expected"),
    [
        ("2020-05-01", "On 2020-05-01.", True),
        ("from 10-20", "10 to 20", True),  # no sign
        ("rate 1e-07", "0.0000001", True),
        ("['a', 'b']", "b and a", True),
        ("['a', 'b']", "about a", False),
        ('say \\"7\\" twice', "7", True),
        ("don't", "I don't", True),
        ("", "anything", True),  # says nothing
        ("9" * 30_000, "9" * 30_000, True),
        ("1e999999999", "1", False),  # no number of that size is made
        ("rate 0.5", "It is .5.", True),
        ("-.5 and $.25", "−0.5, 0.25", True),
        ("5 apples", "I have .5 apples", False),
        ("5 apples", "apples.5", True),  # a sentence without a space after it
    ],
)
def test_numbers_and_quotes(result, final, expected):
    assert is_grounded([CALLS, tool(result), said(final)]) is expected


def test_the_last_result_counts_or_those_of_the_named_tools():
    messages = [CALLS, tool("Error: 9", "a"), CALLS, tool("1", "a"), CALLS, tool("2", "a"), tool("3", "b")]
    assert is_grounded([*messages, said("3")])
    assert not is_grounded([*messages, said("3")], ["a"])
    assert is_grounded([*messages, said("1 and 2")], ["a"])
    assert is_grounded([*messages, said("1, 2, 3")], '["a", "b"]')  # as a CSV has it
    assert not is_grounded([*messages, said("1, 2, 3")], ["a", "c"])  # c has not answered


def test_rows_without_a_tool_result_have_no_answer():
    feedback = tool("Error: the tool call does not parse: not JSON", PARSER_NAME)
    assert is_grounded([said("42")]) is is_grounded([feedback, said("42")]) is is_grounded([]) is None
    assert is_grounded([CALLS, tool("Sum: 42")]) is False  # the calling turn is the last that was said


def test_the_reward_needs_a_closed_turn():
    right, wrong = [CALLS, tool("Sum: 42"), said("It is 42.")], [CALLS, tool("Sum: 42"), said("Hm.")]
    statuses = ["answered", "overlong", "tool_limit", "answered", "answered"]
    assert grounded([right, right, right, wrong, [said("42")]], statuses) == [1.0, 0.0, 0.0, 0.0, None]
    assert grounded([right], ["answered"], must_state=[["multiply"]]) == [0.0]


@pytest.mark.parametrize(
    ("messages", "status", "maths", "financial"),
    [
        ([said("42")], "answered", 0.0, 0.0),
        ([CALLS, tool("Sum: 41"), said("Sum: 41")], "answered", 0.3, 0.8 * 0.4 + 0.2),
        ([CALLS, tool("Sum: 42"), said("Sum: 43")], "answered", 0.7, 0.8),
        ([CALLS, tool("Sum: 42"), said("It is 42.")], "answered", 1.0, 1.0),
        ([CALLS, tool("Sum: 42"), said("It is 42. So")], "overlong", 0.7, 0.8),
        ([CALLS, tool("Sum: 42")], "overlong_tool_response", 0.7, 0.8),
    ],
)
def test_the_files_for_maths_and_the_financial_job(messages, status, maths, financial):
    files = [str(ROOT / f"rewards/{name}_answer_reward.py") for name in ("math", "financial")]
    columns = {"answer": ["Sum: 42"], "statuses": [status], "tool_call": [{"name": "add"}]}
    of_maths, of_financial = (one.function([messages], **columns) for one in load_rewards(files, None))
    assert of_maths == [maths]
    assert of_financial == pytest.approx([financial])


def test_the_financial_file_wants_no_call_where_there_is_none():
    (reward,) = load_rewards([str(ROOT / "rewards/financial_answer_reward.py")], None)
    columns = {"answer": ["none"], "statuses": ["answered"], "tool_call": [[]]}
    assert reward.function([[said("Hello.")]], **columns) == [1.0]


def test_final_tools_are_marked_or_named(tmp_path):
    tools = """
from typing import final

@final
def say(text: str) -> str:
    \"\"\"Say it.\"\"\"
    return text

def add(a: int, b: int) -> str:
    \"\"\"Add.\"\"\"
    return str(a + b)

def close(answer: dict[str, int]) -> str:
    \"\"\"Close.\"\"\"
    return "done"

def end(answer: str = "I do not know") -> str:
    \"\"\"End.\"\"\"
    return answer

TOOL_FUNCTIONS = [say, add, close, end]
"""
    (tmp_path / "t.py").write_text(tools)
    toolbox = load_tools(tmp_path / "t.py")
    assert final_tools(toolbox) == {"say": "text"}
    assert final_tools(toolbox, "close") == {"say": "text", "close": "answer"}
    with pytest.raises(ValueError, match="final tool add must have one parameter, the answer, got 2: a, b"):
        final_tools(toolbox, "add")
    with pytest.raises(
        ValueError, match="answer of the final tool end is the answer and must have no default"
    ):
        final_tools(toolbox, "end")
    with pytest.raises(ValueError, match=r"final_tool must name a tool of .*, got 'clos'; nearest: close"):
        final_tools(toolbox, "clos")


def test_options_that_contradict_a_text_that_is_not_asked_for():
    with pytest.raises(ValueError, match="stop_after_tools asks for no final text"):
        GRPOConfig(stop_after_tools=True, reward_function_name=["accuracy", "grounded"])
    with pytest.raises(ValueError, match="final_tool say has no effect with stop_after_tools"):
        GRPOConfig(stop_after_tools=True, final_tool="say")


def test_built_in_rewards_may_stand_among_files():
    file = str(ROOT / "rewards/math_reward.py")
    assert [one.name for one in load_rewards([file, "grounded"], None)] == ["math_reward", "grounded"]


def test_quotes_of_a_long_result_take_time_in_proportion_to_its_length():
    """JSON within JSON, cut: each of the escaped quotes began a search to the end of the text."""
    rows = [{"name": f"row {i}", "value": i} for i in range(400)]
    cut = json.dumps({"status": 200, "body": json.dumps(rows)})[:16_000]
    began = time.perf_counter()
    assert is_grounded([CALLS, tool(cut), said("row 3")]) is False
    assert is_grounded([CALLS, tool('"' + '\\"' * 8_000), said("row 3")]) is False
    assert time.perf_counter() - began < 1  # 6 and 13 s each


def test_keys_need_not_be_stated_and_quoted_values_must():
    result = tool('{"city": "Graz", \'note\': \'wet\', "of \\"old\\"": "a \\"b\\""}')
    assert is_grounded([CALLS, result, said('Graz, wet, a "b"')]) is True
    assert is_grounded([CALLS, result, said("Graz, wet")]) is False


@pytest.mark.parametrize(
    ("result", "text", "states"),
    [
        (json.dumps({"city": "Zürich", "temp": 21}), "In Zürich it is 21 degrees.", True),  # "Z\\u00fcrich"
        (json.dumps({"city": "Zürich", "temp": 21}), "In Zurich it is 21 degrees.", False),
        (json.dumps({"a": "two\nlines"}), "They are two lines.", True),
        ('{"path": "C:\\x"}', "It is in C:\\x", True),  # no JSON: as it is written
        ("没有库存", "抱歉没有库存了", True),
        (json.dumps({"城市": "北京"}), "北京的天气是晴。", True),
        ("Paris", "Parisian weather", False),
        ("气温-5度", "气温5度", False),
        ("气温-5度", "现在气温-5度", True),
        ("Change: -₹500", "It rose by 500", False),
        ("Change: -₹500", "It fell by -500", True),
    ],
)
def test_values_are_read_as_people_read_them(result, text, states):
    assert is_grounded([CALLS, tool(result), said(text)]) is states
