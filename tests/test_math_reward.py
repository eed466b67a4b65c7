"""The quickstart's reward, and the data it is used on."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grpo_jax.data.gold import gold_calls
from grpo_jax.data.rows import load_examples
from grpo_jax.scoring.rewards import load_rewards
from rewards.math_answer_reward import math_answer_reward
from rewards.math_reward import reward_func
from tools_funcs import math_tools

ROOT = Path(__file__).resolve().parents[1]
FILES = {"math_train.jsonl": 6000, "math_test.jsonl": 600}
ROWS = {
    name: [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]
    for name in FILES
}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 15, "b": 27}}}],
}


def said(text):
    return {"role": "assistant", "content": text}


def tool(text, name="add"):
    return {"role": "tool", "name": name, "content": text}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("Sum: 42")], 0.0),
        ([said("<tool_call>{broken")], 0.0),
        ([said("<tool_call>{broken"), tool("Error: not JSON", "tool_call_parser"), said("42")], 0.0),
        ([], 0.0),
        ([CALLS], 0.3),
        ([CALLS, tool("Error: unknown tool 'ad'"), said("?")], 0.3),
        ([CALLS, tool("Sum: 43"), said("Sum: 42")], 0.3),
        ([CALLS, tool("Sum: 42"), CALLS, tool("Sum: 1")], 0.3),
        ([CALLS, tool("Sum: 1"), CALLS, tool("Sum: 42")], 1.0),
        ([CALLS, tool(" sum: 42\n"), said("It is 42.")], 1.0),
    ],
)
def test_math_reward_follows_its_table(messages, expected):
    assert reward_func([messages, [said("none")]], ["Sum: 42", "x"], level=[1, 2]) == [expected, 0.0]


def test_math_reward_loads_as_the_command_line_does():
    (loaded,) = load_rewards([str(ROOT / "rewards" / "math_reward.py")], None)
    assert loaded.name == "math_reward"
    assert loaded.function([[CALLS, tool("Sum: 42")]], ["Sum: 42"]) == [1.0]


# The data


@pytest.mark.parametrize("name", FILES)
def test_every_gold_call_gives_the_answer(name):
    functions = {f.__name__: f for f in math_tools.TOOL_FUNCTIONS}
    examples = load_examples(str(ROOT / "data" / name))
    assert len(examples) == FILES[name]
    for example in examples:
        (call,) = gold_calls(example, functions)
        assert functions[call.name](**call.arguments) == example.answer
        assert [message["role"] for message in example.messages] == ["user"]


def test_arguments_stand_in_the_text_in_their_order():
    for row in ALL_ROWS:
        numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in row["prompt"]).split()]
        assert numbers == [row["tool_call"]["arguments"][key] for key in ("a", "b")], row


def test_no_pair_of_numbers_is_in_both_files():
    pairs = [{frozenset(row["tool_call"]["arguments"].values()) for row in rows} for rows in ROWS.values()]
    assert pairs[0].isdisjoint(pairs[1])


def test_no_question_occurs_twice():
    assert len({row["prompt"] for row in ALL_ROWS}) == 6600


def test_questions_are_short():
    assert max(len(row["prompt"].split()) for row in ALL_ROWS) <= 15


def phrasing(row):
    return "".join("#" if c.isdigit() else c for c in row["prompt"]).replace("##", "#").replace("##", "#")


@pytest.mark.parametrize("name", FILES)
def test_both_tools_have_several_phrasings_that_tell_them_apart(name):
    used = {
        tool: {phrasing(row) for row in ROWS[name] if row["tool_call"]["name"] == tool}
        for tool in ("add", "multiply")
    }
    assert min(map(len, used.values())) >= 5
    assert used["add"].isdisjoint(used["multiply"])


@pytest.mark.parametrize("name", FILES)
def test_tools_and_numbers_are_equally_likely(name):
    """Within four standard deviations of a fair draw."""
    rows = ROWS[name]
    tools = Counter(row["tool_call"]["name"] for row in rows)
    assert abs(tools["add"] - len(rows) / 2) < 4 * (len(rows) / 4) ** 0.5
    for key in ("a", "b"):
        numbers = [row["tool_call"]["arguments"][key] for row in rows]
        assert (min(numbers), max(numbers)) == (10, 99)
        deviation = ((90**2 - 1) / 12 / len(rows)) ** 0.5
        assert abs(sum(numbers) / len(rows) - 54.5) < 4 * deviation


def test_the_script_makes_the_same_bytes_again(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "make_math_data.py"), "--output_dir", str(tmp_path)]
    # Another hash seed: the order of a set must not show.
    subprocess.run(script, check=True, env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)})
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


@pytest.mark.parametrize(
    "text, told",
    [
        ("The sum is -5.", True),
        ("It is −5.", True),
        ("The sum is 5.", False),
        ("-5.0", True),
        ("10-5 is what I took, so -5", True),
        ("I took 10-5", False),
    ],
)
def test_a_number_is_told_with_its_sign(text, told):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": -6}}}]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "Sum: -5"},
        {"role": "assistant", "content": text},
    ]
    found = math_answer_reward([completion], answer=["Sum: -5"], statuses=["answered"])
    assert found == [1.0 if told else 0.7]
