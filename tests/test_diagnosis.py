"""Each hint: when it is given, when it is not, and that it names the row, what was found and the fix."""

import numpy as np
import pytest
from helpers import prompt

from grpo_jax.preflight.diagnosis import (
    BY_CASE,
    BY_FORMAT,
    BY_TEXT,
    Gold,
    corrected,
    difference,
    evaluation_hints,
    form_hints,
    gold_hints,
    limit_hints,
    made_up_arguments,
    made_up_hints,
    preamble_hints,
    reward_hints,
    second_call_hints,
    second_score_hints,
)
from grpo_jax.types import Example, Outcome, Status, ToolCall, ToolResult, Trajectory

NAN = float("nan")


def row(line=1, *, answer="Sum: 42", results=("Sum: 42",), outcome=Outcome.OK, call=10, response=20, last=5):
    """A gold row of file:line whose calls, responses and answer have so many tokens."""
    calls = [(ToolCall("add", {"a": 15}), ToolResult(text, outcome, 0.0)) for text in results]
    mask = ([True] * call + [False] * response) * len(calls) + [True] * last
    zeros = [0] * len(mask)
    trajectory = Trajectory(prompt([1]), zeros, mask, zeros, [], calls, Status.ANSWERED)
    return Gold(Example([{"role": "user", "content": "?"}], answer, {}, f"rows.jsonl:{line}"), trajectory)


def prompts(*systems, tools=None):
    """Rows with these system messages; None for none."""
    user = {"role": "user", "content": "?"}
    heads = [[] if text is None else [{"role": "system", "content": text}] for text in systems]
    extras = tools or [{}] * len(systems)
    return [
        Example([*head, user], "a", extra, f"rows.jsonl:{i}")
        for i, (head, extra) in enumerate(zip(heads, extras, strict=True), start=1)
    ]


# Answers and results


@pytest.mark.parametrize(
    ("result", "answer", "expected"),
    [
        ("Sum: 42", "Sum: 42", None),
        ("Sum: 42", "Sum: 42 ", BY_CASE),
        ("Sum: 42", "sum:  42", BY_CASE),
        ("42", "42.0", BY_FORMAT),
        ("Total: 1000 due", "Total: 1,000 due", BY_FORMAT),
        ("1,234,567.50", "1234567.5", BY_FORMAT),
        ("$1,000.00", "1000", BY_FORMAT),
        ("Rate: 6.5%", "Rate: 6.5 %", BY_FORMAT),
        ("Sum: 42", "Sum: 42.01", BY_TEXT),
        ("Sum: 42", "42", BY_TEXT),
        ("1,2", "12", BY_TEXT),  # a list, no thousands
        ("Sum: 42", "Sum: -42", BY_TEXT),
    ],
)
def test_how_a_result_differs_from_the_answer(result, answer, expected):
    assert difference(result, answer) == expected


def test_answers_in_another_number_format_are_shown_with_what_the_tool_returns():
    rows = [row(1), row(2, answer="Sum: 42.0"), row(3, answer="Sum: 042.0")]
    (hint,) = gold_hints(rows)
    assert hint.text == (
        "rows.jsonl:2: 2 of 3 answers differ from what their gold calls return only by number format or whitespace; "
        'here the answer is "Sum: 42.0", the tool returns "Sum: 42"; write answers as the tools return them'
    )
    assert not hint.fatal


def test_only_the_last_result_is_compared_and_each_kind_of_difference_has_its_hint():
    assert gold_hints([row(results=("Sum: 7", "Sum: 42"))]) == []
    kinds = [row(1, answer="Sum: 42 "), row(2, answer="Sum: 42.0"), row(3, answer="forty-two")]
    starts = [f"rows.jsonl:{line}: 1 of 3 answers differ" for line in (1, 2, 3)]
    assert [hint.text[: len(start)] for hint, start in zip(gold_hints(kinds), starts, strict=True)] == starts


# Gold calls that do not run


def test_gold_calls_of_which_none_runs_are_fatal_and_the_first_error_is_shown():
    rows = [row(i, results=(f"Error: no {i}",), outcome=Outcome.ERROR) for i in (4, 5)]
    (hint,) = gold_hints(rows)
    assert hint.text == (
        'rows.jsonl:4: no gold call runs; the first: add(a=15) returns "Error: no 4"; correct the call or the tool'
    )
    assert hint.fatal


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.TIMEOUT, Outcome.CRASH])
def test_some_gold_calls_that_do_not_run_are_a_hint(outcome):
    (hint,) = gold_hints([row(1), row(2, results=("Error: x",), outcome=outcome), row(3)])
    assert hint.text.startswith(
        "rows.jsonl:2: the gold calls of 1 of 3 rows do not run; the first: add(a=15) returns"
    )
    assert not hint.fatal


def test_an_error_that_is_the_answer_is_no_failure():
    assert gold_hints([row(answer="Error: x", results=("Error: x",), outcome=Outcome.ERROR)]) == []


# The preamble


def test_a_varying_system_message_is_named_by_both_rows_and_where_they_part():
    text = "You are a careful assistant of "
    examples = prompts(text + "Anna.", text + "Anna.", text + "Bernd.")
    (hint,) = preamble_hints(examples, [100, 100, 106], 50)
    assert hint.text == (
        "the preamble that prompts share, and that is computed once, is under half of a prompt (50 of 102.0 "
        'tokens): the system message varies, first between rows.jsonl:1 (… "areful assistant of Anna.") and '
        'rows.jsonl:3 (… "areful assistant of Bernd."); move what varies into the user\'s message'
    )
    assert not hint.fatal


def test_a_preamble_of_half_a_prompt_is_enough():
    assert preamble_hints(prompts("a", "b"), [100, 100], 50) == []


def test_a_row_without_a_system_message_varies_from_one_with_it():
    (hint,) = preamble_hints(prompts("Be brief.", None), [100, 100], 3)
    assert 'rows.jsonl:1 ("Be brief.") and rows.jsonl:2 ("")' in hint.text


def test_a_varying_column_of_tools_is_named():
    examples = prompts("a", "a", tools=[{}, {"tools": ["add"]}])
    (hint,) = preamble_hints(examples, [100, 100], 3)
    assert (
        "the column 'tools' varies, first between rows.jsonl:1 (null) and rows.jsonl:2 ([\"add\"])"
        in hint.text
    )
    assert "system message varies" not in hint.text


def test_long_questions_are_nothing_to_fix():
    (hint,) = preamble_hints(prompts("a", "a"), [100, 100], 3)
    assert hint.text.endswith("longer than it and the tool schemas; nothing to fix")


# Limits


def test_gold_conversations_over_the_budget_are_counted_and_the_first_is_named():
    """Their lengths are 35, 45 and 55 tokens."""
    rows = [row(1), row(2, response=30), row(3, response=40)]
    (hint,) = limit_hints(rows, 40, None)
    assert hint.text == (
        "rows.jsonl:2: 2 of 3 gold conversations exceed 40 tokens, this one has 45; "
        "raise max_grpo_completion_length to 55"
    )
    assert not hint.fatal
    assert limit_hints(rows, 55, None) == []


@pytest.mark.parametrize(("budget", "fatal"), [(9, True), (10, False), (34, False)])
def test_a_budget_that_holds_no_rows_calls_is_fatal(budget, fatal):
    """10 tokens are the call; its result is seen by the reward even where it ends the row."""
    (hint,) = limit_hints([row(1), row(2, call=12)], budget, None)
    assert hint.fatal == fatal


def test_the_last_of_several_calls_has_to_fit():
    (hint,) = limit_hints([row(results=("7", "Sum: 42"))], 39, None)  # 10 + 20 + 10 tokens
    assert hint.fatal


def test_more_gold_calls_than_tool_turns():
    rows = [row(1), row(2, results=("7", "Sum: 42"))]
    (hint,) = limit_hints(rows, 512, 1)
    assert hint.text == (
        "rows.jsonl:2: 1 of 2 gold conversations exceed 1 tool turns, this one has 2; "
        "raise max_tool_calling_iterations to 2"
    )
    assert not hint.fatal
    assert limit_hints(rows[1:], 512, 1)[0].fatal
    assert limit_hints(rows, 512, 2) == []


def test_calls_that_do_not_run_say_nothing_of_the_budget():
    assert limit_hints([row(results=("Error: long",), outcome=Outcome.ERROR, response=900)], 40, None) == []


# Rewards, of no call, a wrong call and the gold calls


@pytest.mark.parametrize(
    ("rewards", "fatal", "text"),
    [
        ([[0, 0.3, 1], [0, 0.3, 1]], None, ""),
        ([[0, 0.3, 1], [0, 0.3, 0.8]], None, ""),  # one row with the top reward is enough
        ([[0, 0.3, 1], [0, 0.3, 0.3]], False, "rows.jsonl:2: 1 of 2 gold conversations earn no more than"),
        ([[0, 0.3, 0.3], [0, 0.3, 0.3]], True, "rows.jsonl:1: no gold conversation earns the top reward"),
        ([[0, 0, 0], [0, 0, 0]], True, "the most that anything earns is 0; here it earns 0, a wrong call 0"),
        ([[0, 0.5, 0.4], [0, 0, 0.4]], True, "the most that anything earns is 0.5; here it earns 0.4"),
        ([[-1, -1, -0.5], [-1, -1, -1]], False, "rows.jsonl:2: 1 of 2 gold conversations"),
        ([[NAN, NAN, 1], [NAN, NAN, NAN]], False, "rows.jsonl:2: 1 of 2 gold conversations"),
        ([[NAN, NAN, NAN], [NAN, NAN, NAN]], True, "rows.jsonl:1: no reward applies to any conversation"),
    ],
)
def test_gold_conversations_must_earn_more_than_others(rewards, fatal, text):
    hints = reward_hints([row(1), row(2)], np.array(rewards, float))
    assert [hint.fatal for hint in hints] == ([] if fatal is None else [fatal])
    assert all(text in hint.text for hint in hints)


def test_the_fix_is_the_answer_or_the_reward():
    zero = np.zeros((1, 3))
    (hint,) = reward_hints([row(answer="Sum: 42.0")], zero)
    assert hint.text.endswith('the answer is "Sum: 42.0", the tool returns "Sum: 42": make them equal')
    (hint,) = reward_hints([row()], zero)
    assert "the tool returns the answer, so correct the reward function" in hint.text


def test_a_made_up_call_proves_nothing():
    assert made_up_hints([row()], np.array([[0, 0.1, 1.0]])) == []
    (hint,) = made_up_hints([row()], np.zeros((1, 3)))
    assert hint.text.startswith(
        "rows.jsonl:1: a call whose result is the answer earns 0, one that fails 0, no call 0; unless"
    )
    assert not hint.fatal


def test_conversations_that_earn_something_else_the_second_time_are_said():
    first = np.array([[0, 0.1, 1], [0, 0.1, NAN]])
    assert second_score_hints([row(1), row(2)], first, first.copy()) == []
    (hint,) = second_score_hints([row(1), row(2)], first, np.array([[0, 0.1, 1], [0, 0.2, NAN]]))
    assert hint.text.startswith("rows.jsonl:2: the conversations of 1 of 2 rows earn something else")
    assert "0, 0.1, none, then 0, 0.2, none" in hint.text
    assert not hint.fatal


# Answers without gold calls


def answers(*texts):
    return [Example([], text, {}, f"rows.jsonl:{i}") for i, text in enumerate(texts, start=1)]


@pytest.mark.parametrize(
    ("texts", "results", "found"),
    [
        (["Sum: 7", "Product: 9"], {"add": ["Sum: 2"], "multiply": ["Product: 4"]}, None),
        (["Optimal Return: 7%"] * 2, {"add": ["Sum: 2"], "multiply": ["Product: 4"]}, "2 of 2 answers"),
        (["42", "7"], {"add": ["Sum: 2"]}, "2 of 2 answers"),
        (["42", "7"], {"add": ["9"]}, None),
        (["Sum: 7"], {"add": ["9", "8"]}, "1 of 1 answers"),
        (["Sum: 7", "x: 1", "y: 1"], {"add": ["Sum: 2"]}, "2 of 3 answers"),
        (["Sum: 7", "x: 1"], {"add": ["Sum: 2"]}, None),  # half of them may be another branch's
        (["Total due: 7, Rate: 2"], {"loan": ["Total due: 1, Rate: 9, Paid: 3"]}, None),
        (
            ["Rainy in Rome"],
            {"weather": ["example unknown", "Cloudy skies"]},
            None,
        ),  # nothing in common to compare
        (["Error: no"], {"add": ["Sum: 2"]}, None),
        (["Other"], {"add": []}, None),
    ],
)
def test_answers_in_no_form_of_the_tools_are_said(texts, results, found):
    hints = form_hints(answers(*texts), results, none=False)
    assert [found in hint.text for hint in hints] == ([] if found is None else [True])
    assert not any(hint.fatal for hint in hints)


def test_the_answer_and_a_result_are_shown():
    hints = form_hints(answers("Optimal: 7"), {"add": ["Sum: 2"], "other": []}, none=True)
    assert "no row has a gold call" in hints[0].text
    assert (
        "rows.jsonl:1: 1 of 1 answers of rows without gold calls look like nothing that the tools return (1 of 2 tools "
        'could be called): here the answer is "Optimal: 7", add returns "Sum: 2"; load the tools that the data was made'
    ) in hints[1].text


def test_made_up_arguments_fit_the_schema():
    properties = {
        "age": {"type": "integer"},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "rate": {"type": ["null", "number"]},
        "on": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string"}},
        "deep": {"type": "object", "properties": {"x": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}},
    }
    parameters = {"type": "object", "properties": properties, "required": ["age", "kind"]}
    made = [*made_up_arguments(parameters)]
    assert made[0] == {"age": 1, "kind": "a"}
    assert made[4] == {"age": 1, "kind": "a", "rate": 3, "on": True, "names": ["example"], "deep": {"x": 6}}
    assert all(isinstance(one["age"], int) and one["age"] > 0 for one in made)
    assert next(made_up_arguments({})) == {}


@pytest.mark.parametrize(
    ("error", "new"),
    [
        ("Error: age must be a whole number from 18 to 80, got 1", {"age": 49}),
        ("Error: rate must be between 0 and 0.2", {"rate": 0.1}),
        ("Error: state must be one of AL, AK or AZ, got 'example'", {"state": "AL"}),
        ("Error: debts[0].rate must be a number from 0 to 1", {"rate": 0.5}),
        ("Error: division by zero", None),
        ("Error: age must be from 01.01.2020 to 31.12.2025", None),
        ("Error: rate must be from .5 to 1", {"rate": 0.75}),
    ],
)
def test_arguments_are_corrected_as_the_error_asks(error, new):
    arguments = {"age": 1, "rate": 3.0, "state": "example"}
    assert corrected(arguments, error) == (None if new is None else arguments | new)


def test_a_correction_that_was_made_is_not_made_again():
    assert corrected({"state": "AL"}, "Error: state must be one of AL, AK") is None


# The second call


@pytest.mark.parametrize(
    ("first", "second", "fatal"),
    [
        (("Sum: 3", Outcome.OK), ("Sum: 3", Outcome.OK), None),
        (("Sum: 3", Outcome.OK), ("Error: Event loop is closed", Outcome.ERROR), True),
        (("Sum: 3", Outcome.OK), ("Sum: 4", Outcome.OK), False),
    ],
)
def test_a_tool_must_answer_a_second_time(first, second, fatal):
    hints = second_call_hints({"add": [ToolResult(*one, 0.0) for one in (first, first, second)]})
    assert [hint.fatal for hint in hints] == ([] if fatal is None else [fatal])


def test_evaluation_rows_without_figures_are_said():
    assert evaluation_hints(answers("Error: a", "Sum: 2")) == []
    (hint,) = evaluation_hints(answers("Error: a", "Error: b"))
    assert hint.text.startswith("rows.jsonl:1: the answers of all 2 evaluation rows begin with 'Error:'")
