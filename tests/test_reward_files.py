"""The reward files: each table's order on hand-written conversations."""

import importlib
import json
from pathlib import Path

import pytest

from rewards.financial_tools_reward import reward_func as financial_tools_reward
from rewards.multi_step_reward import reward_func as multi_step_reward
from rewards.tool_call_reward import call_score, likeness
from rewards.tool_call_reward import reward_func as tool_call_reward
from rewards.turn_reward import reward_func as turn_reward
from rewards.validated_reward import reward_func as validated_reward
from tools_funcs import financial_tools_complex, two_step_tools

DATA = Path(__file__).resolve().parent.parent / "data"
GOLD = {"name": "add", "arguments": {"a": 15, "b": 27}}
ANSWER = "Sum: 42"


def call(name: str, **arguments) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(text: str, name: str = "add") -> dict:
    return {"role": "tool", "name": name, "content": text}


def say(text: str) -> dict:
    return {"role": "assistant", "content": text}


NO_CALL = [say("It is 42.")]
UNPARSABLE = [say('<tool_call>\n{"name": "add", "arguments": {"a": 15,\n</tool_call>')]
WRONG_TOOL = [call("multiply", a=15, b=27), result("Product: 405", "multiply"), say("405")]
WRONG_TOOL_ERROR = [call("divide", a=1), result("Error: unknown tool divide", "divide")]
RIGHT_TOOL_ERROR = [call("add", a=15), result("Error: add needs b"), say("Sorry.")]
WRONG_RESULT = [call("add", a=15, b=28), result("Sum: 43"), say("43")]
EXACT = [call("add", a=15, b=27), result(" sum:  42\n"), say("It is 42.")]
SECOND_TRY = [*RIGHT_TOOL_ERROR[:2], *EXACT]
UNANSWERED = [call("add", a=15, b=27)]


def one(reward, conversation, **columns):
    """The reward of a single row."""
    columns = {"answer": [ANSWER], "tool_call": [GOLD], "prompts": [[]]} | columns
    (value,) = reward([conversation], **columns)
    return value


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (NO_CALL, 0.0),
        ([], 0.0),
        (UNPARSABLE, 0.05),
        ([*UNPARSABLE, result("Error: the call is not JSON")], 0.05),
        (WRONG_TOOL, 0.1),
        (WRONG_TOOL_ERROR, 0.1),
        (RIGHT_TOOL_ERROR, 0.2),
        (WRONG_RESULT, 0.4),
        (UNANSWERED, 0.4),
        (EXACT, 1.0),
        (SECOND_TRY, 1.0),
        ([*EXACT[:2], *RIGHT_TOOL_ERROR[:2]], 0.2),
    ],
)
def test_financial_tools_reward_follows_its_table(conversation, expected):
    assert one(financial_tools_reward, conversation) == expected
    ground_truth = {"tool_call": None, "ground_truth": [GOLD]}
    assert one(financial_tools_reward, conversation, **ground_truth) == expected


def test_errors_never_earn_more_than_a_wrong_result():
    assert one(financial_tools_reward, RIGHT_TOOL_ERROR) < one(financial_tools_reward, WRONG_RESULT)
    assert one(financial_tools_reward, WRONG_TOOL_ERROR) <= one(financial_tools_reward, WRONG_TOOL)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (NO_CALL, 0.0),
        (UNPARSABLE, 0.0),
        (WRONG_TOOL, 0.0),
        (RIGHT_TOOL_ERROR, 0.5),
        (WRONG_RESULT, 0.5),
        (UNANSWERED, 0.5),
        ([*EXACT[:2], call("add", a=1, b=1)], 0.5),  # the answer belonged to the earlier call
        ([call("add", a=15, b=27), result("SUM: 42 ")], 1.0),
    ],
)
def test_validated_reward_follows_its_table(conversation, expected):
    assert one(validated_reward, conversation) == expected
    assert one(validated_reward, conversation, tool_call=None, expected_tool=["add"]) == expected


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (NO_CALL, 0.0),
        (UNPARSABLE, 0.0),
        (WRONG_TOOL, 0.0),
        ([call("add")], 0.2),
        ([call("add", a=16)], 0.3),  # .2 + .2 · 1/2
        (RIGHT_TOOL_ERROR, 0.6),  # .2 + .2 · 1/2 + .6 · 1/2
        (WRONG_RESULT, 0.7),  # .2 + .2 + .6 · 1/2
        ([call("add", a=15, b=27, c=1)], 0.2 + 0.2 * 2 / 3 + 0.6),
        (EXACT, 1.0),
        ([call("add", a=15.0, b=27)], 1.0),
        ([call("add", a="15", b=27)], 0.7),
        ([call("add", a=True, b=27)], 0.7),
        ([*WRONG_TOOL[:2], *EXACT], 0.5),  # a needless call costs its share
    ],
)
def test_tool_call_reward_follows_its_table(conversation, expected):
    assert one(tool_call_reward, conversation) == pytest.approx(expected, abs=1e-12)


def test_tool_call_reward_pairs_the_best_calls():
    # The second call is exact, so the first (.7 against it) is left with the other gold call: .2 + .2.
    other = {"name": "add", "arguments": {"a": 1, "b": 2}}
    conversation = [call("add", a=15, b=28), call("add", a=15, b=27)]
    assert one(tool_call_reward, conversation, tool_call=[[GOLD, other]]) == pytest.approx((1.0 + 0.4) / 2)
    assert one(tool_call_reward, conversation[1:], tool_call=[[GOLD, other]]) == pytest.approx(0.5)


ALL_REWARDS = (financial_tools_reward, tool_call_reward, validated_reward, multi_step_reward)


@pytest.mark.parametrize("reward", ALL_REWARDS)
@pytest.mark.parametrize("gold", [None, []])
def test_where_no_call_is_due_trying_none_is_the_best(reward, gold):
    assert one(reward, NO_CALL, tool_call=[gold]) == 1.0
    for conversation in (UNPARSABLE, WRONG_TOOL, RIGHT_TOOL_ERROR, EXACT):
        assert one(reward, conversation, tool_call=[gold]) == 0.0


@pytest.mark.parametrize("reward", (financial_tools_reward, tool_call_reward))
def test_a_row_without_tool_call_has_its_ground_truth(reward):
    columns = {"answer": [ANSWER] * 3, "tool_call": [GOLD, None, None], "ground_truth": [None, GOLD, None]}
    assert reward([EXACT] * 3, **columns) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("reward", ALL_REWARDS)
def test_what_the_parser_says_is_no_tool_result(reward):
    feedback = [
        *UNPARSABLE,
        result("Error: the tool call does not parse", "tool_call_parser"),
        say("It is 42."),
    ]
    assert one(reward, [call("add", a=15, b=27), result("Sum: 42"), *feedback]) == 1.0


def test_tool_call_reward_reads_padded_ground_truth():
    padded = {"name": "add", "arguments": {"a": 15, "b": 27, "state": None, "debts": None}}
    columns = {"tool_call": None, "ground_truth": [padded]}
    assert one(tool_call_reward, EXACT, **columns) == 1.0
    assert one(tool_call_reward, [call("add", a=15, b=27, c=None)], **columns) == 1.0
    # In the column tool_call a null is a value: one that must be written.
    assert one(tool_call_reward, EXACT, tool_call=[padded]) == pytest.approx(0.2 + 0.1 + 0.3)


def test_likeness_of_nested_values():
    debts = [{"balance": 5000, "rate": 0.18}, {"balance": 900, "rate": 0.2}]
    assert likeness(debts, debts) == 1.0
    assert likeness(debts[:1], debts) == 0.5
    assert likeness([debts[0], {"balance": 900, "rate": 0.3}], debts) == 0.75
    assert likeness({"life": 1, "ltc": None}, {"life": 1}) == 1.0
    assert likeness({}, {}) == likeness([], []) == likeness(None, None) == likeness("CA", " ca ") == 1.0
    assert likeness(0.1 + 0.2, 0.3) == 1.0
    assert likeness(1, True) == likeness(0, None) == likeness("1", 1) == likeness([], {}) == 0.0


@pytest.mark.parametrize("junk", [None, [], {}, "x", True, -1, float("nan"), 10**400, [{"a": [1]}]])
def test_no_argument_makes_a_reward_raise(junk):
    for arguments in ({"a": junk, "b": 27}, {"a": [junk], "b": {"c": junk}}):
        conversation = [call("add", **arguments), result(ANSWER)]
        for reward in (financial_tools_reward, tool_call_reward, validated_reward, multi_step_reward):
            assert 0.0 <= one(reward, conversation) <= 1.0
    assert 0.0 <= call_score({"name": "add", "arguments": junk}, GOLD) <= 1.0


FIRST = {"name": "grow_savings", "arguments": {"amount": 1000, "annual_rate": 0.05, "years": 2}}
SECOND = {"name": "take_share", "arguments": {"amount": 1102.5, "share": 0.2}}
GROWN, SHARE = result("Future Value: 1102.50", "grow_savings"), result("Share: 220.50", "take_share")
grow = call("grow_savings", **FIRST["arguments"])
wrong_grow = call("grow_savings", amount=1000, annual_rate=0.06, years=2)
share = call("take_share", **SECOND["arguments"])
wrong_share = call("take_share", amount=1000, share=0.2)
OTHER_SHARE = result("Share: 200.00", "take_share")


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (NO_CALL, 0.0),
        ([wrong_grow, result("Future Value: 1123.60", "grow_savings")], 0.1),
        ([wrong_share, OTHER_SHARE], 0.1),
        ([grow, GROWN, say("1102.50")], 0.35),  # .1 + .5 · 1/2
        ([grow, GROWN, wrong_share, OTHER_SHARE], 0.45),
        ([grow, GROWN, share, SHARE, wrong_share, OTHER_SHARE], 0.7),
        ([share, SHARE], 0.8),
        ([share, SHARE, grow, GROWN, share, SHARE], 1.0),
        ([grow, GROWN, share, SHARE, say("You may spend 220.50.")], 1.0),
    ],
)
def test_multi_step_reward_follows_its_table(conversation, expected):
    columns = {"answer": ["Share: 220.50"], "tool_call": [[FIRST, SECOND]]}
    assert one(multi_step_reward, conversation, **columns) == pytest.approx(expected, abs=1e-12)


def test_a_step_may_drop_cents():
    gold = [FIRST, {"name": "take_share", "arguments": {"amount": 110_250.49, "share": 0.2}}]
    conversation = [grow, GROWN, call("take_share", amount=110_250, share=0.2), result("Share: 22050.00")]
    columns = {"answer": ["Share: 22050.10"], "tool_call": [gold]}
    assert one(multi_step_reward, conversation, **columns) == pytest.approx(0.7)  # both steps, another result


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (NO_CALL, [0.0]),
        ([grow, GROWN, say("1102.50")], [1.0, 0.0]),
        ([wrong_grow, result("Future Value: 1123.60", "grow_savings"), share, SHARE], [0.0, 1.0]),
        ([grow, GROWN, wrong_share, OTHER_SHARE, say("200.")], [1.0, 0.0, None]),
        ([share, SHARE, grow, GROWN, share, SHARE], [0.0, 0.0, None]),
    ],
)
def test_turn_reward_scores_each_turn_by_the_gold_call_of_its_place(conversation, expected):
    columns = {"answer": ["Share: 220.50"], "tool_call": [[FIRST, SECOND]]}
    assert turn_reward([conversation], **columns) == [expected]
    with pytest.raises(ValueError, match="tool_call"):
        turn_reward([conversation], answer=["Share: 220.50"])


@pytest.mark.parametrize(
    "reward", [financial_tools_reward, tool_call_reward, validated_reward, multi_step_reward]
)
def test_a_missing_column_is_an_error_that_names_it(reward):
    with pytest.raises(ValueError, match="tool_call"):
        reward([EXACT], answer=[ANSWER])


@pytest.mark.parametrize(
    ("file", "tools", "rewards"),
    [
        (
            "financial_test.jsonl",
            financial_tools_complex.TOOL_FUNCTIONS,
            [financial_tools_reward, tool_call_reward, validated_reward],
        ),
        ("two_step_test.jsonl", two_step_tools.TOOL_FUNCTIONS, [multi_step_reward, tool_call_reward]),
    ],
)
def test_gold_conversations_earn_the_top_reward(file, tools, rewards):
    run = {tool.__name__: tool for tool in tools}
    rows = [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    conversations = []
    for row in rows:
        gold = row["tool_call"] if isinstance(row["tool_call"], list) else [row["tool_call"]]
        steps = [(call(c["name"], **c["arguments"]), result(run[c["name"]](**c["arguments"]))) for c in gold]
        conversations.append([message for step in steps for message in step])
    columns = {key: [row[key] for row in rows] for key in ("answer", "tool_call")}
    for reward in rewards:
        assert set(reward(conversations, **columns)) == {1.0}
        assert max(reward([NO_CALL] * len(rows), **columns)) == 0.0


@pytest.mark.parametrize(
    "path", sorted((DATA.parent / "rewards").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_each_file_is_a_module_of_the_package_too(path):
    """For a script that imports the function and gives it to GRPOTrainer."""
    assert callable(importlib.import_module(f"rewards.{path.stem}").reward_func)
