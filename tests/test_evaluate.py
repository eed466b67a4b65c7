"""The three figures, worked by hand, and the command on a model folder and on a checkpoint."""

import dataclasses

import launch
import pytest
from helpers import prompt

from grpo_jax import evaluate, export
from grpo_jax.scoring.evaluation import call_match, equal_values, schema_match, summarize
from grpo_jax.types import Example, Outcome, Status, ToolCall, ToolResult, Trajectory


def call(name, **arguments):
    return ToolCall(name, arguments)


def trajectory(*calls):
    """A conversation of (call, result text) pairs; a text that begins with Error: is an error's."""
    done = [
        (one, ToolResult(text, Outcome.ERROR if text.startswith("Error:") else Outcome.OK, 0.0))
        for one, text in calls
    ]
    return Trajectory(prompt([1]), [2], [True], [0.0], [], done, Status.ANSWERED)


ADD = call("add", a=1, b=2)


# Equality of values


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (0.333, 0.3333),
        (1_000_000.001, 1_000_000),
        ("x", "x"),
        (None, None),
        (True, True),
        ([1, {"k": 2.0}], [1.0, {"k": 2}]),
        ({"a": 1, "b": None}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
        ({"a": {"b": None}}, {"a": {}}),
    ],
)
def test_equal_values(a, b):
    assert equal_values(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.02),
        (1, True),
        (0, False),
        (0, None),
        ("1", 1),
        ("x", "X"),
        ([1, 2], [2, 1]),
        ([1], [1, None]),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {}),
        ({}, []),
    ],
)
def test_unequal_values(a, b):
    assert not equal_values(a, b)


# Calls


@pytest.mark.parametrize(
    ("made", "gold", "expected"),
    [
        (call("add", a=1, b=2), ADD, 1.0),
        (call("add", a=1, b=3), ADD, 0.65),  # 0.3 + 0.7 · 1/2
        (call("add", a=1), ADD, 0.65),
        (call("add", a=1, b=2, c=3), ADD, 1.0),  # the share is of the gold arguments
        (call("add"), ADD, 0.3),
        (call("multiply", a=1, b=2), ADD, 0.0),
        (call("now"), call("now"), 1.0),
        (call("f", x=None), call("f", x=None, y=2), 0.65),
        (call("f"), call("f", x=None), 1.0),
    ],
)
def test_call_match_is_the_name_and_the_share_of_gold_arguments(made, gold, expected):
    assert call_match(made, gold) == pytest.approx(expected)


def test_each_gold_call_takes_the_best_call_that_is_left():
    two = [call("add", a=1, b=2), call("add", a=3, b=4)]
    assert schema_match(two, two) == 1.0
    assert schema_match(two[::-1], two) == 1.0
    assert schema_match(two[:1], two) == pytest.approx(0.5)
    assert schema_match([call("add", a=1, b=9), *two], two[:1]) == 1.0
    assert schema_match([], two) == 0.0
    # one call cannot stand for two equal gold calls
    assert schema_match([ADD], [ADD, ADD]) == pytest.approx(0.5)


# Figures


def summarized(answers, trajectories, gold):
    """The figures of trajectories whose examples have these answers."""
    examples = [Example([{"role": "user", "content": "?"}], a, source="rows.jsonl:1") for a in answers]
    of = [
        dataclasses.replace(t, prompt=dataclasses.replace(t.prompt, example=e))
        for t, e in zip(trajectories, examples, strict=True)
    ]
    return summarize(of, gold)


def test_the_figures_of_four_rows():
    trajectories = [
        trajectory((ADD, "Sum: 3")),  # right
        trajectory((call("add", a=1, b=5), "Sum: 6")),  # valid, wrong
        trajectory((call("sub", a=1, b=2), "Error: unknown tool")),  # no valid call
        trajectory(),  # no call at all
    ]
    summary = summarized(["Sum: 3"] * 4, trajectories, [[ADD]] * 4)
    assert summary["n"] == 4
    assert summary["response_validity"] == 0.5
    assert summary["exact_answer_match"] == 0.25
    assert summary["tool_call_schema_match"] == pytest.approx((1 + 0.65) / 4)
    # Wilson at z = 1.96 for 1 of 4: (1/4 + z²/8 ∓ z·√(3/64 + z²/64)) / (1 + z²/4)
    assert summary["intervals"]["exact_answer_match"] == pytest.approx((0.04559, 0.69936), abs=1e-5)
    low, high = summary["intervals"]["tool_call_schema_match"]
    assert 0 <= low < summary["tool_call_schema_match"] < high <= 1
    assert summary["error_answers"] == {"n": 0, "exact_answer_match": None}


def test_only_the_last_result_is_the_answer_and_blanks_and_case_do_not_matter():
    trajectories = [
        trajectory((ADD, "Sum: 9"), (ADD, " sum:  3 ")),
        trajectory((ADD, "Sum: 3"), (ADD, "Sum: 9")),
        trajectory((ADD, "Error: no"), (ADD, "Sum: 3")),  # a later valid call makes a row valid
    ]
    summary = summarized(["Sum: 3"] * 3, trajectories, [[]] * 3)
    assert summary["exact_answer_match"] == pytest.approx(2 / 3)
    assert summary["response_validity"] == 1.0


def test_rows_whose_gold_answer_is_an_error_are_counted_separately():
    wrong = (call("add", a=1), "Error: b is missing")
    answers = ["Sum: 3", "Error: b is missing", "Error: b is missing"]
    trajectories = [trajectory((ADD, "Sum: 3")), trajectory(wrong), trajectory((ADD, "Sum: 3"))]
    summary = summarized(answers, trajectories, [[ADD]] * 3)
    assert summary["n"] == 1
    assert summary["response_validity"] == summary["exact_answer_match"] == 1.0
    assert summary["tool_call_schema_match"] == 1.0
    assert summary["error_answers"] == {"n": 2, "exact_answer_match": 0.5}


def test_rows_without_gold_calls_have_no_schema_figure():
    summary = summarized(["Sum: 3"], [trajectory((ADD, "Sum: 3"))], [[]])
    assert summary["tool_call_schema_match"] is summary["intervals"]["tool_call_schema_match"] is None
    assert summary["exact_answer_match"] == 1.0


# The command


def run_evaluate(model, out) -> launch.Ran:
    changes = {"model_name_or_path": model, "eval_dataset_id_or_path": launch.evaluation_rows()}
    return launch.call(evaluate.main, launch.options(out, **changes), out)


def samples(ran: launch.Ran) -> list[str]:
    """The sample conversations that a run printed; a random model writes others for other weights."""
    return [line for line in ran.out.splitlines() if line.startswith("  completion:")]


def test_a_model_folder_and_its_checkpoint_have_the_same_figures(tmp_path):
    run = launch.whole().folder
    folder = run_evaluate(run / "model", tmp_path / "a")
    step = run_evaluate(run / "checkpoints" / "4", tmp_path / "b")
    assert folder.status == step.status == 0
    assert len(samples(folder)) == 3
    assert samples(folder) == samples(step)
    of_folder, of_step = (ran.json("evaluation.json") for ran in (folder, step))
    assert (of_folder["model"], of_step["model"]) == (str(run / "model"), str(run / "checkpoints/4"))
    for figures in (of_folder, of_step):
        del figures["model"], figures["timings"]
    assert of_folder == of_step
    assert of_folder["n"] == 6  # of which the second batch of four held two


def test_another_step_is_another_model(tmp_path):
    run = launch.whole().folder
    exported = tmp_path / "step_1"
    launch.call(export.main, ["--checkpoint", 1, "--output_dir", run, "--to", exported], run)
    step = run_evaluate(run / "checkpoints" / "1", tmp_path / "a")
    assert samples(step) == samples(run_evaluate(exported, tmp_path / "b"))
    assert samples(step) != samples(run_evaluate(run / "model", tmp_path / "c"))


def test_a_model_must_be_named(tmp_path):
    ran = run_evaluate(None, tmp_path)
    assert ran.status == 2
    assert "model_name_or_path must be set" in ran.err
